"""Documents, their split, prepared shards, and the order of batches."""

import errno
import gzip
import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from train import batches, data, documents, prepare
from train import tokenizer as tokenizer_lib
from train.errors import UserError
from train.tokenizer import FileTokenizer

TEXTS = [f"Document {i}: naïve café № {i * i}.\r\n" + "déjà vu\n" * (i % 7) for i in range(60)]


def write_texts(directory: Path, texts: list[str], *, prefix: str = "doc") -> Path:
    directory.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (directory / f"{prefix}{i:03d}.txt").write_bytes(text.encode())
    return directory


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def documents_of(tokens: batches.Tokens, corpus: data.Corpus) -> list[str]:
    ids = tokens[:]
    ends = np.flatnonzero(ids == corpus.tokenizer.eod)
    assert ends[-1] == len(ids) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [
        corpus.tokenizer.decode(ids[begin:end]) for begin, end in zip(starts, ends, strict=True)
    ]


def split_of(path: Path) -> tuple[list[str], list[str]]:
    corpus = data.load(str(path), seq_len=4, batch_size=1)
    return documents_of(corpus.train, corpus), documents_of(corpus.valid, corpus)


def _encoded(path: Path, tokenizer: str) -> list[list[int]]:
    files = documents.Documents(str(path))
    return [ids.tolist() for _, ids in data.encode(files, tokenizer_lib.load(tokenizer))]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    source = write_texts(tmp_path / "text", TEXTS)
    prepare.prepare(
        prepare.Config(data=str(source), out=str(tmp_path / "out"), vocab_size=300, shard_tokens=99)
    )
    return tmp_path / "out"


class TestTokens:
    @settings(max_examples=200, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 12), max_size=6),
        begin=st.integers(-5, 60),
        end=st.integers(-5, 60),
        seq_len=st.integers(1, 20),
    )
    def test_parts_read_as_one_array(
        self, lengths: list[int], begin: int, end: int, seq_len: int
    ) -> None:
        whole = np.arange(sum(lengths), dtype=np.uint16)
        tokens = batches.Tokens(np.split(whole, np.cumsum(lengths)[:-1]) if lengths else [])
        assert len(tokens) == len(whole)
        np.testing.assert_array_equal(tokens[begin:end], whole[begin:end])
        windows = batches.TokenWindows(tokens, seq_len)
        assert len(windows) == max(0, len(whole) - 1) // seq_len
        for i in range(len(windows)):
            assert windows[i].dtype == np.int32
            np.testing.assert_array_equal(
                windows[i], np.arange(i * seq_len, i * seq_len + seq_len + 1)
            )
        with pytest.raises(IndexError, match="window"):
            windows[len(windows)]

    def test_refuses_other_steps(self) -> None:
        with pytest.raises(ValueError, match="step 1"):
            batches.Tokens([np.arange(4, dtype=np.uint16)])[::2]


class TestBatches:
    # 24 windows of 4 tokens, 8 batches of 3 in an epoch; a window is known by its first token.
    TOKENS = np.arange(24 * 4 + 3, dtype=np.uint16)

    def firsts(self, seed: int, start_step: int, count: int) -> list[list[int]]:
        found = batches.batches(
            self.TOKENS, seq_len=4, batch_size=3, seed=seed, start_step=start_step
        )
        return [batch[:, 0].tolist() for batch in islice(found, count)]

    def test_shape_dtype_and_content(self) -> None:
        batch = next(batches.batches(self.TOKENS, seq_len=4, batch_size=3, seed=0))
        assert batch.shape == (3, 5)
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(5))

    def test_pure_in_seed_and_step(self) -> None:
        assert self.firsts(1, 0, 20) == self.firsts(1, 0, 20)
        assert self.firsts(1, 0, 8) != self.firsts(2, 0, 8)

    @pytest.mark.parametrize("start", [1, 7, 8, 19])
    def test_start_step_skips(self, start: int) -> None:
        assert self.firsts(5, start, 10) == self.firsts(5, 0, start + 10)[start:]

    def test_starts_late_as_fast_as_early(self) -> None:
        assert len(self.firsts(5, 10**12, 2)) == 2

    def test_an_epoch_holds_every_window_once_in_its_own_order(self) -> None:
        served = self.firsts(0, 0, 24)
        epochs = [[*chain.from_iterable(served[begin : begin + 8])] for begin in (0, 8, 16)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(0, 96, 4))
            assert epoch != sorted(epoch)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]

    def test_left_over_windows_shorten_the_epoch_not_a_batch(self) -> None:
        found = batches.batches(self.TOKENS, seq_len=4, batch_size=5, seed=0)
        firsts = [batch[:, 0].tolist() for batch in islice(found, 8)]  # Two epochs of 4.
        assert all(len(batch) == 5 for batch in firsts)
        for epoch in (firsts[:4], firsts[4:]):
            assert len(set(chain.from_iterable(epoch))) == 20

    def test_epochs_of_neighbouring_seeds_differ(self) -> None:
        assert self.firsts(0, 8, 8) != self.firsts(1, 0, 8)

    def test_refuses_less_than_a_batch(self) -> None:
        with pytest.raises(ValueError, match="24 windows"):
            batches.batches(self.TOKENS, seq_len=4, batch_size=25, seed=0)

    def test_evaluation_is_in_order_and_full(self) -> None:
        def firsts(batch_size: int, max_batches: int) -> list[list[int]]:
            found = batches.eval_batches(
                self.TOKENS, seq_len=4, batch_size=batch_size, max_batches=max_batches
            )
            return [batch[:, 0].tolist() for batch in found]

        assert firsts(3, 2) == [[0, 4, 8], [12, 16, 20]]
        assert len(firsts(5, 100)) == 4  # 24 windows: the last 4 fill no batch.
        assert firsts(50, 100) == [list(range(0, 96, 4))]


def as_text(path: Path, texts: list[str]) -> None:
    write_texts(path, texts)


def as_jsonl(path: Path, texts: list[str]) -> None:
    path.mkdir()
    (path / "a.jsonl").write_bytes(jsonl(texts[:20]) + b"\n")
    (path / "b.JSONL").write_bytes(jsonl(texts[20:]))


def as_jsonl_gz(path: Path, texts: list[str]) -> None:
    path.mkdir()
    (path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))


def as_parquet(path: Path, texts: list[str]) -> None:
    path.mkdir()
    parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), path / "a.parquet")


def as_python(path: Path, texts: list[str]) -> None:
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03d}.py").write_bytes(text.encode())


class TestDocuments:
    @pytest.mark.parametrize("write", [as_text, as_jsonl, as_jsonl_gz, as_parquet, as_python])
    def test_every_format_gives_the_text_back(
        self, write: Callable[[Path, list[str]], None], tmp_path: Path
    ) -> None:
        write(tmp_path / "text", TEXTS)
        train, valid = split_of(tmp_path / "text")
        assert sorted(train + valid) == sorted(TEXTS)

    def test_python_in_the_encoding_it_declares(self, tmp_path: Path) -> None:
        source = "# -*- coding: latin-1 -*-\nname = 'é'\n" * 9
        (tmp_path / "a.py").write_bytes(source.encode("latin-1"))
        assert "".join(text for _, text in documents.Documents(str(tmp_path))) == source

    def test_the_mark_of_utf_8_is_no_text(self, tmp_path: Path) -> None:
        for i, text in enumerate(("a first", "a second")):
            (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8-sig")
        assert sorted(chain(*split_of(tmp_path))) == ["a first", "a second"]

    def test_a_long_document_is_encoded_by_the_piece(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text, out = tmp_path / "text", tmp_path / "out"
        text.mkdir()
        for name in ("train.txt", "valid.txt"):
            (text / name).write_text("\n".join(TEXTS))
        prepare.prepare(prepare.Config(data=str(text), out=str(out), vocab_size=300))
        whole = data.load(str(out), seq_len=4, batch_size=1)
        most: list[int] = []
        encode_batch = FileTokenizer.encode_batch

        def noted(self: FileTokenizer, texts: list[str]) -> Any:
            most.append(sum(map(len, texts)))
            return encode_batch(self, texts)

        monkeypatch.setattr("train.tokenizer.PIECE", 100)
        monkeypatch.setattr(data, "_BATCH_CHARS", 200)
        monkeypatch.setattr(FileTokenizer, "encode_batch", noted)
        pieces = _encoded(text, str(out / "tokenizer.json"))
        assert len(most) > 10 and max(most) < 1000
        assert pieces == [whole.train[:].tolist(), whole.valid[:].tolist()]

    def test_split_is_by_content(self, tmp_path: Path) -> None:
        # Repeats fall on both ends of the order, under other names.
        texts = TEXTS + TEXTS[::-1]
        train, valid = split_of(write_texts(tmp_path / "a", texts))
        assert sorted(train + valid) == sorted(texts)
        assert not set(train) & set(valid)
        assert train and valid
        renamed = split_of(write_texts(tmp_path / "b", texts[30:] + texts[:30], prefix="x"))
        assert (set(renamed[0]), set(renamed[1])) == (set(train), set(valid))

    def test_split_is_about_a_twentieth(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl([f"document {i}" for i in range(4000)]))
        counts = documents.Documents(str(tmp_path)).counts
        assert sum(counts.values()) == 4000
        assert 140 <= counts["valid"] <= 260

    @pytest.mark.parametrize("seed", range(5))
    def test_each_split_gets_a_document(self, seed: int, tmp_path: Path) -> None:
        texts = write_texts(tmp_path, [f"one {seed}", f"two {seed}"])
        found = documents.Documents(str(texts))
        assert found.counts == {"train": 1, "valid": 1}
        assert sorted(split for split, _ in found) == ["train", "valid"]

    def test_names_decide_where_they_tell(self, tmp_path: Path) -> None:
        (tmp_path / "train-00000-of-00001.jsonl").write_bytes(jsonl(TEXTS[:30]))
        (tmp_path / "validation.jsonl").write_bytes(jsonl(TEXTS[30:]))
        assert split_of(tmp_path) == (TEXTS[:30], TEXTS[30:])
        (tmp_path / "LICENSE").write_text("free")
        with pytest.raises(UserError, match=r"LICENSE is named neither train nor valid"):
            documents.Documents(str(tmp_path))

    @pytest.mark.parametrize("valid", ["valid", "validation", "val", "val-2024/part"])
    def test_names_of_directories_decide_where_they_tell(self, valid: str, tmp_path: Path) -> None:
        # The names of files, which tell of some only, do not.
        for name, texts in (("train", TEXTS[:30]), (valid, TEXTS[30:])):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "train.jsonl").write_bytes(jsonl(texts))
            (tmp_path / name / "z.jsonl").write_bytes(jsonl([texts[0]]))
        assert split_of(tmp_path) == (
            [*TEXTS[:30], TEXTS[0]],
            [*TEXTS[30:], TEXTS[30]],
        )
        (tmp_path / "LICENSE").write_text("free")
        with pytest.raises(UserError, match=r"LICENSE is named neither .* nor is a directory of"):
            documents.Documents(str(tmp_path))

    def test_names_of_files_come_before_those_of_directories(self, tmp_path: Path) -> None:
        for name, texts in (("train", TEXTS[:30]), ("valid", TEXTS[30:])):
            (tmp_path / "train-data").mkdir(exist_ok=True)
            (tmp_path / "train-data" / f"{name}.jsonl").write_bytes(jsonl(texts))
        assert split_of(tmp_path) == (TEXTS[:30], TEXTS[30:])

    def test_the_name_of_all_that_is_given_does_not_decide(self, tmp_path: Path) -> None:
        write_texts(tmp_path / "train", TEXTS)
        (tmp_path / "train" / "valid").mkdir()
        (tmp_path / "train" / "valid" / "z.txt").write_text("z")
        assert documents.Documents(str(tmp_path / "train")).counts["valid"] > 1

    def test_other_names_do_not_decide(self, tmp_path: Path) -> None:
        write_texts(tmp_path, TEXTS)
        (tmp_path / "trainer.py").write_text("a = 1")
        (tmp_path / "validate.py").write_text("b = 1")
        assert sum(documents.Documents(str(tmp_path)).counts.values()) == 62

    def test_lone_document_is_divided_between_lines(self, tmp_path: Path) -> None:
        text = "".join(f"line {i}\n" for i in range(1000))
        (tmp_path / "book.txt").write_text(text)
        train, valid = split_of(tmp_path / "book.txt")
        assert train[0] + valid[0] == text
        assert train[0].endswith("\n")
        assert 0.04 < len(valid[0]) / len(text) < 0.06

    def test_lone_document_without_lines_about_there_is_divided_anywhere(
        self, tmp_path: Path
    ) -> None:
        text = "Title\n" + "x" * 10000
        (tmp_path / "book.txt").write_text(text)
        train, valid = split_of(tmp_path / "book.txt")
        assert train[0] + valid[0] == text
        assert 0.04 < len(valid[0]) / len(text) < 0.06

    @pytest.mark.parametrize("names", [["train.txt"], ["train.txt", "valid.txt"]])
    def test_undivided_documents_are_whole(self, names: list[str], tmp_path: Path) -> None:
        for name in names:
            (tmp_path / name).write_text("line\n" * 99)
        found = documents.Documents(str(tmp_path), divide=False)
        assert list(found) == [("valid", "line\n" * 99)] * len(names)
        assert found.counts == {"train": 0, "valid": len(names)}

    def test_hidden_files_and_empty_documents_are_passed_over(self, tmp_path: Path) -> None:
        write_texts(tmp_path, [*TEXTS, ""])
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "junk").write_bytes(b"\xff")
        assert sum(documents.Documents(str(tmp_path)).counts.values()) == 60

    def test_standard_library(self) -> None:
        corpus = data.load("pystdlib", seq_len=256, batch_size=8)
        assert len(corpus.train) > 5e6
        # A twentieth of the documents by hash; of the text within five standard deviations, which
        # its few large documents make as wide as they do.
        sizes = np.array([len(text.encode()) for _, text in documents.Documents("pystdlib")])
        deviation = np.sqrt(0.05 * 0.95 * np.sum((sizes / sizes.sum()) ** 2))
        share = len(corpus.valid) / (len(corpus.valid) + len(corpus.train))
        assert abs(share - 0.05) < 5 * deviation
        content = b"".join(
            tokens[:].astype(np.uint8).tobytes() for tokens in (corpus.train, corpus.valid)
        )
        assert content.count(Path(tokenize.__file__).read_bytes()) == 1

    def test_standard_library_leaves_out_tests_and_packages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("a.py", "deep/b.py", "test/c.py", "deep/tests/d.py", "site-packages/e.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"# {name}\n".ljust(200, "#"))
        (tmp_path / "short.py").write_text("#".ljust(199, "#"))
        (tmp_path / "readme.txt").write_text("text".ljust(200, "#"))
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        first_lines = {text.splitlines()[0] for _, text in documents.Documents("pystdlib")}
        assert first_lines == {"# a.py", "# deep/b.py"}

    def test_fingerprint_is_of_content(self, tmp_path: Path) -> None:
        def fingerprint(texts: list[str], name: str) -> str:
            path = write_texts(tmp_path / name, texts)
            return data.load(str(path), seq_len=4, batch_size=1).fingerprint

        assert fingerprint(TEXTS, "a") == fingerprint(TEXTS, "b")
        assert fingerprint([*TEXTS[:-1], TEXTS[-1] + "!"], "c") != fingerprint(TEXTS, "a")


class TestMistakes:
    def refused(self, path: Path, match: str) -> None:
        with pytest.raises(UserError, match=match) as refusal:
            data.load(str(path), seq_len=4, batch_size=1)
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("a.jsonl", jsonl(TEXTS) + b'{"text": "cut', r"a\.jsonl:61: is not JSON"),
            ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', r"a\.jsonl:3: .* field \"text\""),
            ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: .* field \"text\""),
            ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: \"text\" is not a string"),
            ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: .*surrogate"),
            ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: is not JSON in UTF-8"),
            ("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-20], r"a\.jsonl\.gz cannot be read"),
            ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz cannot be read"),
            ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 text \(byte 3\)"),
            ("a.txt", "abc".encode("utf-16-le"), r"a\.txt is not text \(byte 1 is zero\)"),
            ("a.txt.gz", b"", r"a\.txt\.gz is empty, as no gzip file is"),
            ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: is not JSON in UTF-8"),
            ("a.py", b"# coding: latin-0\n", r"a\.py is not text in the encoding it declares"),
            ("a.py", b"# coding: rot13\n", r"a\.py is not text in the encoding it declares"),
            ("a.py", b"# coding: undefined\n", r"a\.py is not text in the encoding it declares"),
            ("a.parquet", b"PAR1", r"a\.parquet is not a sound parquet file"),
            ("a.txt", b"", "holds no text"),
            (
                "c4-train.00000.json.gz",
                gzip.compress(jsonl(TEXTS)),
                r"name it \.jsonl \(or \.jsonl",
            ),
            ("a.JSON", jsonl(TEXTS), r"a\.JSON is not read, .* name it \.jsonl"),
        ],
    )
    def test_bad_file(self, name: str, content: bytes, match: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        self.refused(tmp_path, match)

    def test_bad_parquet_column(self, tmp_path: Path) -> None:
        parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
        self.refused(tmp_path, r'a\.parquet has no column "text"')
        parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
        self.refused(tmp_path, r'a\.parquet: row 2: "text" is not a string')

    def test_missing_path_and_broken_link(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none", "none does not exist")
        (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
        self.refused(tmp_path, r"a\.txt cannot be read")

    def test_what_cannot_be_listed_is_not_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_texts(tmp_path, TEXTS)
        closed = tmp_path / "closed"
        write_texts(closed, ["more"])
        scandir = os.scandir

        def refuse(path: Any) -> Any:
            if Path(path) == closed:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        match = rf"data {tmp_path} cannot be read \({closed}: Permission denied\)"
        self.refused(tmp_path, match)

    def test_what_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, **options: Any) -> Any:
            if path.name in ("meta.json", "doc000.txt"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return stat(path, **options)

        write_texts(tmp_path, TEXTS)
        stat, is_file = Path.stat, Path.is_file
        monkeypatch.setattr(Path, "stat", refuse)
        self.refused(tmp_path / "doc000.txt", "data .*doc000.txt cannot be read .*Permission")
        monkeypatch.setattr(Path, "is_file", lambda path: bool(path.stat()))
        self.refused(tmp_path, "data .* cannot be read .*Permission denied.*; allow it")
        monkeypatch.setattr(Path, "is_file", is_file)

    def test_a_linked_directory_is_not_left_out(self, tmp_path: Path) -> None:
        write_texts(tmp_path / "text", TEXTS)
        write_texts(tmp_path / "more", ["more"])
        (tmp_path / "text" / ".hidden").symlink_to(tmp_path / "more")
        assert sum(documents.Documents(str(tmp_path / "text")).counts.values()) == 60
        (tmp_path / "text" / "z").symlink_to(tmp_path / "more")
        self.refused(tmp_path / "text", "text/z is a link to a directory, which is not followed")

    @pytest.mark.timeout(20)
    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        write_texts(tmp_path, TEXTS)
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe"):
            self.refused(path, "pipe is no regular file; give files or move it elsewhere")

    def test_one_document_repeated(self, tmp_path: Path) -> None:
        self.refused(write_texts(tmp_path, ["same"] * 3), "one document 3 times")

    def test_named_split_without_text(self, tmp_path: Path) -> None:
        write_texts(tmp_path, TEXTS, prefix="train")
        (tmp_path / "valid.txt").touch()
        self.refused(tmp_path, "the valid files of .* hold no text")

    def test_too_little_text(self, tmp_path: Path) -> None:
        # 9 bytes and an eod of training text, 4 and an eod of validation text.
        (tmp_path / "train.txt").write_text("123456789")
        (tmp_path / "valid.txt").write_text("1234")
        data.load(str(tmp_path), seq_len=3, batch_size=3)
        with pytest.raises(UserError, match=r"has 10 training tokens and 13 are needed"):
            data.load(str(tmp_path), seq_len=3, batch_size=4)
        with pytest.raises(UserError, match=r"has 5 validation tokens and 6 are needed"):
            data.load(str(tmp_path), seq_len=5, batch_size=1)

    def test_tokenizer(self, tmp_path: Path) -> None:
        def refused(name: str, match: str) -> None:
            with pytest.raises(UserError, match=match):
                data.load(str(tmp_path), name, seq_len=4, batch_size=1)

        path = tmp_path / "t.json"
        refused(str(path), r"t\.json cannot be read \(No such file")
        path.write_text("{}")
        refused(str(path), r"t\.json is not a tokenizer\.json")
        tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
        refused(str(path), r"t\.json has no special token <\|endoftext\|>")


class TestPrepared:
    def test_holds_what_the_text_holds(self, prepared: Path) -> None:
        tokenizer = str(prepared / "tokenizer.json")
        text = data.load(str(prepared.parent / "text"), tokenizer, seq_len=4, batch_size=1)
        for named in (None, tokenizer):
            shards = data.load(str(prepared), named, seq_len=4, batch_size=1)
            np.testing.assert_array_equal(shards.train[:], text.train[:])
            np.testing.assert_array_equal(shards.valid[:], text.valid[:])
        assert sorted(documents_of(shards.train, shards) + documents_of(shards.valid, shards)) == (
            sorted(TEXTS)
        )
        assert len(list(prepared.glob("train-*.bin"))) > 3

    def test_one_shard_has_the_fingerprint_of_the_text(self, tmp_path: Path) -> None:
        source = str(write_texts(tmp_path / "text", TEXTS))
        prepare.prepare(prepare.Config(data=source, out=str(tmp_path / "out"), tokenizer="bytes"))
        shards = data.load(str(tmp_path / "out"), seq_len=4, batch_size=1)
        assert shards.fingerprint == data.load(source, seq_len=4, batch_size=1).fingerprint

    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_flipped_byte(self, split: str, prepared: Path) -> None:
        shard = prepared / f"{split}-00000.bin"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        self.refused(prepared, rf"{split}-00000\.bin has SHA-256 \w{{64}} and \w{{64}} is expected")

    def test_processes_share_the_check(
        self, prepared: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []
        check = data._check

        def noted(file: Path, *rest: Any) -> None:
            read.append(file.name)
            check(file, *rest)

        monkeypatch.setattr(data, "_check", noted)
        for number in range(3):
            data.load(str(prepared), seq_len=4, batch_size=1, share=(number, 3))
        assert sorted(read) == sorted(file.name for file in prepared.glob("*.bin"))
        # Of one that another reads, the size is known at least.
        shard = prepared / "train-00001.bin"
        content = bytearray(shard.read_bytes())
        content[0] ^= 1
        shard.write_bytes(content)
        data.load(str(prepared), seq_len=4, batch_size=1, share=(0, 3))
        with pytest.raises(UserError, match=r"train-00001\.bin has SHA-256"):
            data.load(str(prepared), seq_len=4, batch_size=1, share=(1, 3))
        shard.write_bytes(content[:-2])
        with pytest.raises(UserError, match=r"train-00001\.bin has 196 bytes and 198 are"):
            data.load(str(prepared), seq_len=4, batch_size=1, share=(0, 3))

    def test_an_id_that_the_tokenizer_does_not_have(self, prepared: Path) -> None:
        shard, meta = prepared / "train-00001.bin", prepared / "meta.json"
        old = shard.read_bytes()
        new = old[:-2] + (300).to_bytes(2, "little")
        shard.write_bytes(new)
        digests = (hashlib.sha256(content).hexdigest() for content in (old, new))
        meta.write_text(meta.read_text().replace(*digests))
        self.refused(prepared, r"train-00001\.bin has the id 300 of a tokenizer with 300;")

    @pytest.mark.parametrize("change", [-1, 1])
    def test_wrong_size(self, change: int, prepared: Path) -> None:
        shard = prepared / "train-00001.bin"
        shard.write_bytes((shard.read_bytes() + b"\0")[: 198 + change])
        self.refused(prepared, rf"train-00001\.bin has {198 + change} bytes and 198 are expected")

    def test_missing_shard(self, prepared: Path) -> None:
        (prepared / "train-00001.bin").unlink()
        self.refused(prepared, r"train-00001\.bin cannot be read \(No such file")

    def test_other_tokenizer(self, prepared: Path) -> None:
        with pytest.raises(UserError, match="prepared with another tokenizer than bytes"):
            data.load(str(prepared), "bytes", seq_len=4, batch_size=1)

    def test_changed_tokenizer(self, prepared: Path) -> None:
        with (prepared / "tokenizer.json").open("a") as file:
            file.write(" ")
        self.refused(prepared, "the tokenizer of .* has SHA-256")

    @pytest.mark.parametrize(
        ("old", "new", "match"),
        [
            ('"format_version": 1', '"format_version": 2', "has format version 2 .* reads 1"),
            ('"format_version"', '"version"', "is not one that train.prepare wrote"),
            ("{", "", "is not one that train.prepare wrote"),
            ('"valid":', '"value":', r"meta\.json is damaged \(KeyError"),
            ('"uint16"', '"foo"', r"meta\.json is damaged \(TypeError"),
            ('"uint16"', '"float16"', r"meta\.json is damaged \(dtype is float16 and .* uint16"),
        ],
    )
    def test_bad_meta(self, old: str, new: str, match: str, prepared: Path) -> None:
        meta = prepared / "meta.json"
        meta.write_text(meta.read_text().replace(old, new))
        self.refused(prepared, match)

    def refused(self, path: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            data.load(str(path), seq_len=4, batch_size=1)


def test_validation_needs_as_many_sequences_as_are_asked_for(tmp_path):
    (tmp_path / "train.txt").write_text("123456789")
    (tmp_path / "valid.txt").write_text("1234")
    data.load(str(tmp_path), seq_len=2, batch_size=1, valid_sequences=2)
    with pytest.raises(UserError, match=r"has 5 validation tokens and 7 are needed \(3 x 2 \+ 1\)"):
        data.load(str(tmp_path), seq_len=2, batch_size=1, valid_sequences=3)


@pytest.mark.parametrize("reverse", [False, True])
def test_documents_come_in_the_order_of_their_names_whatever_the_file_system_s(
    tmp_path, monkeypatch, reverse
):
    for name in ("b", "a", "c/d", "c-0"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    walk = os.walk

    def in_order(*args, **kwargs):
        listed = ((place, folders, sorted(files, reverse=reverse))
                  for place, folders, files in walk(*args, **kwargs))  # fmt: skip
        return sorted(listed, key=lambda entry: entry[0], reverse=reverse)

    monkeypatch.setattr(os, "walk", in_order)
    texts = [text for _, text in documents.Documents(str(tmp_path))]
    assert texts == ["a", "b", "c-0", "c/d"]
