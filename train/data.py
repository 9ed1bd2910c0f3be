"""Text to batches: reads documents, splits them, and serves windows of tokens.

A document goes to training or validation by its content alone, and a batch is a pure function of
the seed and the step, so that a run can be repeated or resumed on any machine.
"""

import contextlib
import gzip
import hashlib
import io
import json
import re
import sysconfig
import time
import tokenize
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from train import tokenizer as tokenizer_lib
from train.errors import UserError
from train.tokenizer import Tokenizer

FORMAT_VERSION = 1
"""Version of the directory that train.prepare writes; raised when its meaning changes."""

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")

_VALID_SHARE = 0.05
_NAMED_SPLIT = re.compile(r"(train|valid(?:ation)?)(?![a-z])")  # Not trainer.py or validate.py.
_STDLIB_MIN_CHARS = 200
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_BATCH_CHARS = 1 << 21  # Encoded at a time: enough to fill the cores, about 200 MB of memory.
_READ_BYTES = 1 << 22


class Tokens:
    """Token ids in one or more arrays, read as if they were one."""

    def __init__(self, parts: Sequence[npt.NDArray[np.unsignedinteger]]) -> None:
        """Joins `parts`: 1-D arrays of one dtype, which may be memory-mapped; none is copied."""
        self._parts = list(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, wanted: slice) -> npt.NDArray[np.unsignedinteger]:
        """Returns the ids of a slice with step 1.

        Raises:
            ValueError: The slice has another step.
        """
        begin, end, step = wanted.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of Tokens has step 1, not {step}")
        pieces = [np.empty(0, np.uint16)] if begin >= end else []
        part = bisect_right(self._ends, begin)
        while begin < end:
            start = self._ends[part] - len(self._parts[part])
            stop = min(end, self._ends[part])
            pieces.append(self._parts[part][begin - start : stop - start])
            begin, part = stop, part + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class Corpus:
    """Text ready to train on.

    Attributes:
        train: Ids of the training documents, each followed by the tokenizer's eod.
        valid: Ids of the validation documents, likewise.
        tokenizer: What made the ids.
        fingerprint: SHA-256 in hexadecimal of the tokenizer and all the ids; a run is resumed
            only on data with the fingerprint it began with.
    """

    train: Tokens
    valid: Tokens
    tokenizer: Tokenizer
    fingerprint: str


def load(data: str, tokenizer: str | None = None, *, seq_len: int, batch_size: int) -> Corpus:
    """Reads, splits and encodes text, or opens what train.prepare wrote.

    Args:
        data: What `Documents` takes, or a directory that train.prepare wrote.
        tokenizer: What `train.tokenizer.load` takes. None is the prepared data's own, or bytes
            for text. Prepared data takes no other tokenizer than its own.
        seq_len: Tokens that one sequence predicts.
        batch_size: Sequences in a training batch.

    Raises:
        UserError: The text cannot be read, a shard is damaged, the tokenizer is not the
            prepared data's, or there is less text than one training batch and one validation
            sequence.
    """
    if (Path(data) / "meta.json").is_file():
        corpus = _load_prepared(Path(data), tokenizer)
    else:
        corpus = _load_text(data, tokenizer_lib.load(tokenizer or "bytes"))
    for split, tokens, sequences in (
        ("training", corpus.train, batch_size),
        ("validation", corpus.valid, 1),
    ):
        needed = sequences * seq_len + 1
        if len(tokens) < needed:
            raise UserError(
                f"{data} has {len(tokens):,} {split} tokens and {needed:,} are needed "
                f"({sequences} x {seq_len} + 1); give more text, or a smaller batch or sequence"
            )
    return corpus


class TokenWindows:
    """Sequences of `seq_len` + 1 tokens, each beginning with the last token of the one before.

    A tail shorter than a sequence is left out. Random access, as grain wants of a source.
    """

    def __init__(self, tokens: Tokens | npt.NDArray[np.integer], seq_len: int) -> None:
        """Cuts 1-D ids into windows that predict `seq_len` tokens each."""
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        """Returns the number of windows."""
        return max(0, len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        """Returns window `index`, int32 [seq_len + 1].

        Raises:
            IndexError: There is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        begin = index * self._seq_len
        return self._tokens[begin : begin + self._seq_len + 1].astype(np.int32)


def batches(
    tokens: Tokens | npt.NDArray[np.integer],
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
) -> Iterator[npt.NDArray[np.int32]]:
    """Yields training batches for ever, from `start_step` on, without reading those before.

    Each epoch holds every window once, in an order of its own; the windows left over after the
    epoch's last full batch are passed over.

    Args:
        tokens: 1-D ids, at least `batch_size` windows of them.
        seq_len: Tokens that a window predicts.
        batch_size: Windows in a batch.
        seed: Decides the order, together with the epoch. 0 to 2**32 - 1.
        start_step: Number of the first batch.

    Yields:
        int32 [batch_size, seq_len + 1], a pure function of the arguments and the step.

    Raises:
        ValueError: There is less than one batch.
    """
    dataset = _shuffled(tokens, seq_len, batch_size, seed)
    # The trainer waits for one batch a step, and two threads keep that ahead of any model.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(dataset[start_step:].to_iter_dataset(ahead))


def batch_at(
    tokens: Tokens | npt.NDArray[np.integer],
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    step: int,
) -> npt.NDArray[np.int32]:
    """Returns the batch that `batches` yields at `step`, int32 [batch_size, seq_len + 1].

    Raises:
        ValueError: There is less than one batch.
    """
    batch: npt.NDArray[np.int32] = _shuffled(tokens, seq_len, batch_size, seed)[step]
    return batch


def eval_batches(
    tokens: Tokens | npt.NDArray[np.integer],
    *,
    seq_len: int,
    batch_size: int,
    max_batches: int,
) -> Iterator[npt.NDArray[np.int32]]:
    """Yields the first windows in order: the same batches at each evaluation.

    Yields:
        int32 [batch_size, seq_len + 1], at most `max_batches` of them, all full, so that one
        compiled step serves all. Where there are fewer windows than `batch_size`, one batch
        of as many as there are.
    """
    windows = TokenWindows(tokens, seq_len)
    rows = min(batch_size, len(windows))
    for batch in range(min(max_batches, len(windows) // max(rows, 1))):
        yield np.stack([windows[batch * rows + row] for row in range(rows)])


def _shuffled(
    tokens: Tokens | npt.NDArray[np.integer], seq_len: int, batch_size: int, seed: int
) -> Any:
    windows = TokenWindows(tokens, seq_len)
    if len(windows) < batch_size:
        raise ValueError(f"{len(windows)} windows do not fill a batch of {batch_size}")
    # seed() hashes what it is given. shuffle(seed) would not, and adds the epoch to it: epoch 1
    # of seed 0 would be epoch 0 of seed 1. Batching before repeating keeps epochs apart.
    return (
        grain.MapDataset.source(windows)
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .repeat()
    )


class Documents:
    """The documents at a path, in a fixed order, each with its split; can be read many times.

    Where a directory has files named train* and valid*, such as train-00000.jsonl and valid.txt,
    the names decide the split. Elsewhere the SHA-256 of a document's text decides: the lowest
    twentieth is validation, and each split gets at least one document. A document that is all
    there is gives its last twentieth to validation. Empty documents are passed over.

    Attributes:
        counts: Documents in each split.
        text_bytes: UTF-8 bytes of text in each split.
    """

    counts: dict[Split, int]
    text_bytes: dict[Split, int]

    def __init__(self, data: str) -> None:
        """Reads everything once, to count it and to find the split.

        Args:
            data: "pystdlib" for the running Python's own standard library, without its tests and
                files under 200 characters; or a file; or a directory, read in the order of its
                file names, without hidden files and linked directories. Files are .jsonl (a
                string "text" on each line), .parquet (a string column "text"), .py (in the
                encoding it declares), and anything else as UTF-8 text; all may end in .gz too.

        Raises:
            UserError: A file cannot be read as what its name says, or a split would be empty.
        """
        self._min_chars = 1
        if data == "pystdlib":
            self._files = _stdlib_files()
            self._min_chars = _STDLIB_MIN_CHARS
        else:
            self._files = _files(Path(data))
        self._named = _named_splits(self._files)
        self._divided = False
        self._cut = int(_VALID_SHARE * (1 << 256))
        lowest, highest = self._survey()
        count = sum(self.counts.values())
        if count == 0:
            raise UserError(f"{data} holds no text; give files with documents in them")
        if 0 not in self.counts.values():
            return
        # Few documents: all fell into one split.
        if self._named:
            empty = next(split for split in SPLITS if not self.counts[split])
            raise UserError(f"the {empty} files of {data} hold no text; put documents in them")
        if count > 1 and lowest == highest:
            raise UserError(
                f"{data} holds one document {count} times; training and validation need one each"
            )
        self._divided = count == 1
        self._cut = highest - 1 if self.counts["train"] == 0 else lowest
        self._survey()

    def __iter__(self) -> Iterator[tuple[Split, str]]:
        """Yields the split and the text of each document."""
        for split, _, text in self._read():
            yield split, text

    def _survey(self) -> tuple[int, int]:
        """Counts what there is; returns the lowest and the highest digest of a document."""
        self.counts = dict.fromkeys(SPLITS, 0)
        self.text_bytes = dict.fromkeys(SPLITS, 0)
        lowest, highest = 1 << 256, -1
        with progress("reading documents") as advance:
            for split, digest, text in self._read():
                self.counts[split] += 1
                self.text_bytes[split] += len(text.encode())
                lowest, highest = min(lowest, digest), max(highest, digest)
                advance(1)
        return lowest, highest

    def _read(self) -> Iterator[tuple[Split, int, str]]:
        for file in self._files:
            for text in _read(file):
                if len(text) < self._min_chars:
                    continue
                digest = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
                if self._named:
                    yield self._named[file], digest, text
                elif self._divided:
                    end = int(len(text) * (1 - _VALID_SHARE))
                    end = 1 + text.rfind("\n", 0, end) or end  # Between lines, if there are any.
                    yield "train", digest, text[:end]
                    yield "valid", digest, text[end:]
                else:
                    yield "valid" if digest <= self._cut else "train", digest, text


def encode(
    documents: Documents, tokenizer: Tokenizer
) -> Iterator[tuple[Split, npt.NDArray[np.unsignedinteger]]]:
    """Yields each document's split and ids, ended by eod, in the order of the documents.

    A few megabytes of text are held at a time, or one document where that is larger.
    """
    eod = np.array([tokenizer.eod], tokenizer.dtype)
    with progress("encoding", sum(documents.text_bytes.values())) as advance:
        for batch in _batched(documents):
            texts = [text for _, text in batch]
            for (split, _), ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                yield split, np.concatenate([ids, eod])
            advance(sum(len(text.encode()) for text in texts))


@contextlib.contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes the amount done since its last call; no total is no bound.

    A bar appears on stderr for work that lasts over a second.
    """
    bar = Progress(console=Console(stderr=True))
    task = bar.add_task(title, total=total)
    begun = time.monotonic()

    def advance(amount: int) -> None:
        bar.advance(task, amount)
        if time.monotonic() - begun > 1:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _batched(documents: Documents) -> Iterator[list[tuple[Split, str]]]:
    batch: list[tuple[Split, str]] = []
    chars = 0
    for split, text in documents:
        batch.append((split, text))
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def little_endian(ids: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    """Returns `ids` in the byte order of a shard, whatever the machine's."""
    return ids.astype(ids.dtype.newbyteorder("<"), copy=False)


def _load_text(data: str, tokenizer: Tokenizer) -> Corpus:
    parts: dict[Split, list[npt.NDArray[np.unsignedinteger]]] = {split: [] for split in SPLITS}
    for split, ids in encode(Documents(data), tokenizer):
        parts[split].append(ids)
    joined = {split: np.concatenate(parts.pop(split)) for split in SPLITS}
    shards = {
        split: [(len(ids), hashlib.sha256(little_endian(ids).data).hexdigest())]
        for split, ids in joined.items()
    }
    return Corpus(
        train=Tokens([joined["train"]]),
        valid=Tokens([joined["valid"]]),
        tokenizer=tokenizer,
        fingerprint=_fingerprint(tokenizer, shards),
    )


def _load_prepared(directory: Path, wanted: str | None) -> Corpus:
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        version = meta["format_version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not one that train.prepare wrote; prepare the data again, or move the "
            "file elsewhere if the directory holds text"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version} and this program reads {FORMAT_VERSION}; "
            "prepare the data again"
        )
    try:
        own, fingerprint = meta["tokenizer"], meta["tokenizer_fingerprint"]
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        listed: dict[Split, list[tuple[Path, int, str]]] = {
            split: [
                (directory / shard["file"], int(shard["tokens"]), shard["sha256"])
                for shard in meta["splits"][split]
            ]
            for split in SPLITS
        }
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); prepare the data again") from error

    tokenizer = tokenizer_lib.load(own if own == "bytes" else str(directory / own))
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"the tokenizer of {directory} has SHA-256 {tokenizer.fingerprint} and {fingerprint} "
            "is expected; prepare the data again"
        )
    if wanted is not None and tokenizer_lib.load(wanted).fingerprint != fingerprint:
        raise UserError(
            f"{directory} was prepared with another tokenizer than {wanted}; leave the tokenizer "
            "out to use the data's own, or prepare the data again"
        )
    num_tokens = sum(count for shards in listed.values() for _, count, _ in shards)
    with progress("checking shards", num_tokens * dtype.itemsize) as advance:
        for shards in listed.values():
            for file, count, sha256 in shards:
                _check(file, count * dtype.itemsize, sha256, advance)
    tokens = {
        split: Tokens([np.memmap(file, dtype, mode="r") for file, _, _ in shards])
        for split, shards in listed.items()
    }
    return Corpus(
        train=tokens["train"],
        valid=tokens["valid"],
        tokenizer=tokenizer,
        fingerprint=_fingerprint(
            tokenizer,
            {split: [shard[1:] for shard in shards] for split, shards in listed.items()},
        ),
    )


def _check(file: Path, size: int, sha256: str, advance: Callable[[int], None]) -> None:
    """Holds a shard against its listed size in bytes and digest, reading a piece at a time."""
    digest = hashlib.sha256()
    found = 0
    try:
        with file.open("rb") as shard:
            while piece := shard.read(_READ_BYTES):
                digest.update(piece)
                found += len(piece)
                advance(len(piece))
    except OSError as error:
        raise UserError(
            f"shard {file} cannot be read ({error.strerror}); prepare the data again"
        ) from error
    if found != size:
        raise UserError(
            f"shard {file} has {found:,} bytes and {size:,} are expected; prepare the data again"
        )
    if digest.hexdigest() != sha256:
        raise UserError(
            f"shard {file} has SHA-256 {digest.hexdigest()} and {sha256} is expected; "
            "prepare the data again"
        )


def _fingerprint(tokenizer: Tokenizer, shards: dict[Split, list[tuple[int, str]]]) -> str:
    content = json.dumps([tokenizer.fingerprint, [shards[split] for split in SPLITS]])
    return hashlib.sha256(content.encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(
            f'data {path} does not exist; give "pystdlib", a file of text, or a directory of them'
        )
    # What is neither file nor directory, such as a broken link, stays in and fails by name.
    relative = [file.relative_to(path) for file in path.rglob("*") if not file.is_dir()]
    kept = [file for file in relative if not any(part.startswith(".") for part in file.parts)]
    return [path / file for file in sorted(kept, key=Path.as_posix)]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    relative = [file.relative_to(root) for file in root.rglob("*.py")]
    kept = [file for file in relative if _STDLIB_LEFT_OUT.isdisjoint(file.parts)]
    return [root / file for file in sorted(kept, key=Path.as_posix)]


def _named_splits(files: list[Path]) -> dict[Path, Split]:
    """Returns the split of each file where names tell them all, and nothing where none do."""
    named: dict[Path, Split] = {
        file: "train" if match[1] == "train" else "valid"
        for file in files
        if (match := _NAMED_SPLIT.match(file.name))
    }
    if set(named.values()) != set(SPLITS):
        return {}
    strays = [file for file in files if file not in named]
    if strays:
        raise UserError(
            f"{strays[0]} is named neither train* nor valid* like the files beside it; rename it "
            f"or move it elsewhere ({len(strays)} such)"
        )
    return named


def _read(file: Path) -> Iterator[str]:
    """Yields the documents of a file, each sure to be a string that UTF-8 can hold."""
    name = file.name.lower()
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".py": _read_python}
    read = readers.get(Path(name.removesuffix(".gz")).suffix, _read_text)
    try:
        with gzip.open(file) if name.endswith(".gz") else file.open("rb") as stream:
            for place, text in read(stream):
                if not isinstance(text, str):
                    raise UserError(f'{file}{place}: "text" is not a string; mend or remove it')
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"{file}{place}: text has half a surrogate pair; mend or remove it"
                    ) from error
                yield text
    except _Unreadable as error:
        raise UserError(f"{file}{error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}); mend or remove it") from error


class _Unreadable(Exception):
    """What is wrong with a file, and where: the end of a sentence that begins with its name."""


def _read_text(stream: io.BufferedIOBase) -> Iterator[tuple[str, object]]:
    try:
        yield "", stream.read().decode()
    except UnicodeDecodeError as error:
        raise _Unreadable(
            f" is not UTF-8 text (byte {error.start}); convert it or move it elsewhere"
        ) from error


def _read_python(stream: io.BufferedIOBase) -> Iterator[tuple[str, object]]:
    source = stream.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        yield "", source.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise _Unreadable(
            " is not text in the encoding it declares; convert it or move it elsewhere"
        ) from error


def _read_jsonl(stream: io.BufferedIOBase) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _Unreadable(f":{number}: is not JSON in UTF-8; mend or remove it") from error
        if not isinstance(record, dict) or "text" not in record:
            raise _Unreadable(f':{number}: is not an object with a field "text"; add it')
        yield f":{number}", record["text"]


def _read_parquet(stream: io.BufferedIOBase) -> Iterator[tuple[str, object]]:
    # Imported here since it takes as long to load as the rest together.
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(stream)
        if "text" not in table.schema_arrow.names:
            raise _Unreadable(' has no column "text"; rename the column that holds the documents')
        texts = (
            text
            for batch in table.iter_batches(columns=["text"], batch_size=1024)
            for text in batch.column(0).to_pylist()
        )
        for row, text in enumerate(texts, 1):
            yield f": row {row}", text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise _Unreadable(f" is not a sound parquet file ({reason}); write it again") from error
