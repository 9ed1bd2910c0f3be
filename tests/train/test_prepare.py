"""The program that turns text into shards."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from train import prepare, tokenizer
from train.documents import Documents
from train.errors import UserError

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "while",
    "café",
    "owners",
    "sip",
    "naïve",
    "tea",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 80 documents."""
    rng = np.random.default_rng(0)
    path = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": " ".join(rng.choice(WORDS, 50))}) for _ in range(80))
    path.write_text("\n".join(lines))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert prepare.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_same_input_gives_same_bytes(text: Path, tmp_path: Path) -> None:
    # Two processes, since hash seeds differ between them and not within one.
    for name, seed in (("a", "1"), ("b", "2")):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "train.prepare",
                f"--data={text}",
                f"--out={tmp_path / name}",
                "--vocab_size=400",
                "--shard_tokens=500",
            ],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
        )
    first = contents(tmp_path / "a")
    assert {"meta.json", "tokenizer.json", "train-00000.bin", "valid-00000.bin"} <= first.keys()
    assert first == contents(tmp_path / "b")


def test_writes_what_meta_says(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    prepare.main([f"--data={text}", f"--out={out}", "--vocab_size=300", "--shard_tokens=500"])
    files = contents(out)
    meta = json.loads(files.pop("meta.json"))
    definition = files.pop("tokenizer.json")
    assert meta["tokenizer_fingerprint"] == hashlib.sha256(definition).hexdigest()
    assert meta["vocab_size"] == 300
    listed = meta["splits"]["train"] + meta["splits"]["valid"]
    assert [shard["file"] for shard in listed] == sorted(files)
    for shard in listed:
        content = files[shard["file"]]
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
        assert len(content) == 2 * shard["tokens"]
    assert {shard["tokens"] for shard in meta["splits"]["train"][:-1]} == {500}
    ids = np.concatenate([np.frombuffer(content, "<u2") for content in files.values()])
    assert np.count_nonzero(ids == meta["eod"]) == sum(meta["documents"].values()) == 80
    num_bytes = sum(meta["text_bytes"].values())
    share = meta["text_bytes"]["valid"] / num_bytes
    assert capsys.readouterr().out == (
        f"{out}: 80 documents, {len(ids):,} tokens of 300, "
        f"{num_bytes / len(ids):.2f} bytes per token\n"
        f"{meta['documents']['train']} documents for training and {meta['documents']['valid']} for "
        f"validation ({share:.1%} of the text), split by a hash of their text\n"
    )


@pytest.mark.parametrize(
    ("names", "counts", "share", "rule"),
    [
        (["a.txt"], (1, 1), 5.1, "cutting the only one in two"),  # between lines: 5 of 99
        (["a.txt", "train.txt"], (1, 1), 62.5, "a hash of their text"),
        (["trainer.txt", "device.txt"], (1, 1), 52.2, "a hash of their text"),
        (["train-0.txt", "train-1.txt", "val.txt"], (2, 1), 25.0, "file names"),
        (["Training.txt", "DEV-0.txt", "valid_1.txt"], (1, 2), 62.9, "file names"),
        (["training/a.txt", "training/b.txt"], (1, 1), 50.0, "a hash of their text"),
        (["train/a.txt", "validation/b.txt", "validation/c.txt"], (1, 2), 73.9, "directory names"),
    ],
)
def test_says_what_split_the_documents(
    names: list[str], counts: tuple[int, int], share: float, rule: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(f"{name}\n" * 99)
    config = prepare.Config(str(tmp_path / "text"), str(tmp_path / "out"), tokenizer="bytes")
    assert prepare.prepare(config).splitlines()[1] == (
        f"{counts[0]} documents for training and {counts[1]} for validation ({share}% of the text),"
        f" split by {rule}"
    )


@pytest.mark.parametrize(
    ("other", "name"),
    [("a.txt", "valid.txt"), ("train.txt", "dev/b.txt"), ("training/a.txt", "dev/b.txt")],
)
def test_a_name_that_does_not_decide_is_pointed_out(other: str, name: str, tmp_path: Path) -> None:
    for file in (other, name):
        (tmp_path / "text" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / file).write_text(f"{file}\n" * 99)
    said = f"a hash of their text, though {tmp_path}/text/{name} is named as validation is"
    assert said in str(Documents(str(tmp_path / "text")))


def test_learns_from_training_documents_only(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("abab " * 50)
    (tmp_path / "text" / "valid.txt").write_text("xyxy " * 500)
    prepare.main([f"--data={tmp_path / 'text'}", f"--out={tmp_path / 'out'}", "--vocab_size=300"])
    learnt = tokenizer.load(str(tmp_path / "out" / "tokenizer.json"))
    assert len(learnt.encode("abab")) == 1
    assert len(learnt.encode("xyxy")) == 4


def test_takes_a_tokenizer(text: Path, tmp_path: Path) -> None:
    prepare.main([f"--data={text}", f"--out={tmp_path / 'a'}", "--vocab_size=300"])
    given = tmp_path / "a" / "tokenizer.json"
    prepare.main([f"--data={text}", f"--out={tmp_path / 'b'}", f"--tokenizer={given}"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    prepare.main([f"--data={text}", f"--out={tmp_path / 'c'}", "--tokenizer=bytes"])
    assert "tokenizer.json" not in contents(tmp_path / "c")


@pytest.mark.parametrize("name", ["bytes", "learnt"])
def test_tokenizer_keeps_text_and_never_yields_eod(name: str, text: Path, tmp_path: Path) -> None:
    if name == "learnt":
        prepare.main([f"--data={text}", f"--out={tmp_path / 'out'}", "--vocab_size=300"])
        name = str(tmp_path / "out" / "tokenizer.json")
    loaded = tokenizer.load(name)
    for sample in ("", "  two\r\n\tcafé 日本 🙂", f"quoted {tokenizer.EOD} here"):
        ids = loaded.encode(sample)
        assert loaded.eod not in ids
        assert loaded.decode(ids) == sample
        np.testing.assert_array_equal(ids, loaded.encode_batch(["x", sample])[1])
    assert loaded.decode([loaded.eod]) == tokenizer.EOD
    assert loaded.dtype == np.uint16


def test_a_document_that_would_end_in_its_middle(tmp_path: Path) -> None:
    words = {"<unk>": 0, tokenizer.EOD: 1, "a": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([tokenizer.EOD])
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    loaded = tokenizer.load(str(path))
    np.testing.assert_array_equal(loaded.encode("a a"), [2, 2])
    with pytest.raises(UserError, match="within a document as the id 1 that ends documents"):
        loaded.encode(f"a {tokenizer.EOD} a")


def test_truncation_in_a_definition_loses_nothing(text: Path, tmp_path: Path) -> None:
    prepare.main([f"--data={text}", f"--out={tmp_path / 'out'}", "--vocab_size=300"])
    path = tmp_path / "out" / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    path.write_text(json.dumps(definition))
    loaded = tokenizer.load(str(path))
    assert loaded.decode(loaded.encode("the quick brown fox")) == "the quick brown fox"


class TestMistakes:
    @pytest.mark.parametrize(
        ("flags", "match"),
        [
            (["--vocab_size=256"], "--vocab_size=256 has no room"),
            (["--shard_tokens=0"], "--shard_tokens=0 is too few"),
            (["--vocab_size=300", "--tokenizer=bytes"], "drop either"),
            (["--tokenizer=none.json"], "none.json cannot be read"),
            (["--data=missing"], "missing does not exist"),
        ],
    )
    def test_flags(
        self,
        flags: list[str],
        match: str,
        text: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        message = refused(capsys, f"--data={text}", f"--out={tmp_path / 'out'}", *flags)
        assert match in message
        assert list(tmp_path.iterdir()) == [text]

    def test_bad_document(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with text.open("a") as file:
            file.write("\n{")
        message = refused(capsys, f"--data={text}", f"--out={tmp_path / 'out'}")
        assert f"{text}:81: is not JSON" in message
        assert list(tmp_path.iterdir()) == [text]

    def test_directory_in_use(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        prepare.main([f"--data={text}", f"--out={out}", "--tokenizer=bytes"])
        before = contents(out)
        capsys.readouterr()
        assert "is not empty" in refused(capsys, f"--data={text}", f"--out={out}")
        assert "is not empty" in refused(capsys, f"--data={text}", f"--out={text}")
        assert contents(out) == before
        assert sorted(tmp_path.iterdir()) == [out, text]

    def test_disk_full(
        self, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
        try:
            message = refused(
                capsys, f"--data={text}", f"--out={tmp_path / 'out'}", "--tokenizer=bytes"
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "cannot be written (File too large)" in message
        assert list(tmp_path.iterdir()) == [text]

    def test_unwritable_place(self, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
        message = refused(capsys, f"--data={text}", f"--out={text}/out", "--tokenizer=bytes")
        assert "cannot be written (Not a directory)" in message
