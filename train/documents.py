"""Documents: text from files of several kinds, each given to training or validation.

A document goes to one or the other by its content alone, so that the split is the same on any
machine and whatever the files are called.
"""

import gzip
import hashlib
import io
import json
import os
import re
import stat
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from train.errors import UserError
from train.progress import progress

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")

_VALID_SHARE = 0.05
# Not trainer, validate.py or device. A folder called training or dev may be of a program's source.
_NAMED_SPLIT = {
    "file": re.compile(r"(train(?:ing)?|val(?:id(?:ation)?)?|dev)(?![^\W\d_])", re.IGNORECASE),
    "directory": re.compile(r"(train|val(?:id(?:ation)?)?)(?![^\W\d_])", re.IGNORECASE),
}
_STDLIB_MIN_CHARS = 200
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Documents:
    """The documents at a path, in a fixed order, each with its split; can be read many times.

    Where a directory has files named train or training and valid, validation, val or dev, such as
    train-00000.jsonl and valid.txt, or has all files in directories named train and valid,
    validation or val, the names decide the split; capitals, and what follows that is no letter,
    make no difference. Elsewhere the
    SHA-256 of a document's text decides: the lowest twentieth is validation, and each split gets at
    least one document. A document that is all there is gives its last twentieth to validation.
    Empty documents are passed over.

    Attributes:
        counts: Documents in each split.
        text_bytes: UTF-8 bytes of text in each split.
        rule: What the split is by: "file names", for example.

    ``str`` of it says in a line what went to training and what to validation, and by what rule.
    """

    counts: dict[Split, int]
    text_bytes: dict[Split, int]
    rule: str

    def __init__(self, data: str, *, divide: bool = True) -> None:
        """Reads everything once, to count it and to find the split.

        Args:
            data: "pystdlib" for the running Python's own standard library, without its tests and
                files under 200 characters; or a file; or a directory, read in the order of its
                file names, without what is hidden. Files are .jsonl (a string "text" on each
                line), .parquet (a string column "text"), .py (in the encoding it declares), and
                anything else but .json as UTF-8 text, a document a file; all may end in .gz too.
            divide: Whether there is training. Without, all documents are validation, whole.

        Raises:
            UserError: A file cannot be read as what its name says, or a directory not at all or
                through a link only, or names tell the split of some files only, or a split would
                be empty.
        """
        self._min_chars = 1
        self._named: dict[Path, Split] = {}
        self.rule = "a hash of their text"
        if data == "pystdlib":
            self._files = _stdlib_files()
            self._min_chars = _STDLIB_MIN_CHARS
        else:
            self._files = _files(Path(data))
            if divide:
                self._read_names(Path(data))
        if not divide:
            self.rule = "nothing: all is validation"
        self._divided = False
        self._cut = int((_VALID_SHARE if divide else 1) * (1 << 256))
        lowest, highest = self._survey()
        count = sum(self.counts.values())
        if count == 0:
            raise UserError(f"{data} holds no text; give files with documents in them")
        if 0 not in self.counts.values() or not divide:
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
        if self._divided:
            self.rule = "cutting the only one in two"
        self._cut = highest - 1 if self.counts["train"] == 0 else lowest
        self._survey()

    def _read_names(self, root: Path) -> None:
        if (found := _named_splits(self._files, root)) is not None:
            self.rule, self._named = found
        elif (file := _named_for_validation(self._files, root)) is not None:
            self.rule += f", though {file} is named as validation is"

    def __iter__(self) -> Iterator[tuple[Split, str]]:
        """Yields the split and the text of each document."""
        for split, _, text in self._read():
            yield split, text

    def __str__(self) -> str:
        """What the split is: documents, validation's share of the text, and the rule."""
        share = self.text_bytes["valid"] / sum(self.text_bytes.values())
        return (
            f"{self.counts['train']:,} documents for training and {self.counts['valid']:,} for "
            f"validation ({share:.1%} of the text), split by {self.rule}"
        )

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
                    # Between lines, if there are any about there.
                    end = 1 + text.rfind("\n", int(len(text) * (1 - 2 * _VALID_SHARE)), end) or end
                    yield "train", digest, text[:end]
                    yield "valid", digest, text[end:]
                else:
                    yield "valid" if digest <= self._cut else "train", digest, text


def _files(path: Path) -> list[Path]:
    try:
        files = sorted(_within(path), key=Path.as_posix) if path.is_dir() else [path]
        modes = [file.stat().st_mode for file in files]
    except FileNotFoundError as error:
        if error.filename != str(path):  # a broken link
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}); mend or remove it"
            ) from error
        raise UserError(
            f'data {path} does not exist; give "pystdlib", a file of text, or a directory of them'
        ) from None
    except OSError as error:
        raise UserError(
            f"data {path} cannot be read ({error.filename}: {error.strerror}); allow it, or give "
            "other data"
        ) from error
    for file, mode in zip(files, modes, strict=True):
        if not stat.S_ISREG(mode):  # a pipe would be waited for, and is read but once
            raise UserError(f"{file} is no regular file; give files or move it elsewhere")
        if file.name.lower().removesuffix(".gz").endswith(".json"):
            raise UserError(
                f"{file} is not read, since .json tells neither text nor documents: if it is JSON "
                'Lines, with a string "text" on each line, name it .jsonl (or .jsonl.gz); else '
                "move it elsewhere"
            )
    return files


def _within(directory: Path) -> Iterator[Path]:
    """Yields what is under a directory and neither hidden nor a directory itself.

    Raises:
        OSError: a directory cannot be read; nothing is left out without a word.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(directory, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for folder in folders:
            if Path(place, folder).is_symlink():
                raise UserError(
                    f"{Path(place, folder)} is a link to a directory, which is not followed; put "
                    "the directory in its place, or move it elsewhere"
                )
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    relative = [file.relative_to(root) for file in root.rglob("*.py")]
    kept = [file for file in relative if _STDLIB_LEFT_OUT.isdisjoint(file.parts)]
    return [root / file for file in sorted(kept, key=Path.as_posix)]


def _named_splits(files: list[Path], root: Path) -> tuple[str, dict[Path, Split]] | None:
    """Returns the split of each file where names tell them all, and whose names; or None.

    Those of the files themselves come before those of the directories under ``root`` that they are
    in, of which the innermost that tells decides.
    """
    strays: list[Path] = []
    for kind, part in (("file", slice(-1, None)), ("directory", slice(-2, None, -1))):
        named: dict[Path, Split] = {}
        for file in files:
            for name in file.relative_to(root).parts[part]:
                if (split := _named(name, kind)) is not None:
                    named[file] = split
                    break
        if set(named.values()) == set(SPLITS):
            if len(named) == len(files):
                return f"{kind} names", named
            strays = strays or [file for file in files if file not in named]
    if strays:
        raise UserError(
            f"{strays[0]} is named neither train nor valid like others in {root}, nor is a "
            f"directory of its; rename it or move it elsewhere ({len(strays)} such)"
        )
    return None


def _named_for_validation(files: list[Path], root: Path) -> Path | None:
    """The first file whose name, or whose folder's, is validation's."""
    names = ((file, name) for file in files for name in file.relative_to(root).parts)
    return next((file for file, name in names if _named(name, "file") == "valid"), None)


def _named(name: str, kind: str) -> Split | None:
    """The split that the name of a file or of a directory tells, if any."""
    if (match := _NAMED_SPLIT[kind].match(name)) is None:
        return None
    return "train" if match[1].lower().startswith("train") else "valid"


def _read(file: Path) -> Iterator[str]:
    """Yields the documents of a file, each sure to be a string that UTF-8 can hold."""
    name = file.name.lower()
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".py": _read_python}
    read = readers.get(Path(name.removesuffix(".gz")).suffix, _read_text)
    try:
        if name.endswith(".gz") and not file.stat().st_size:  # which gzip reads as no text
            raise _Unreadable(" is empty, as no gzip file is; write it again or remove it")
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
    content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unreadable(
            f" is not UTF-8 text (byte {content.index(error.object) + error.start}); convert it or "
            "move it elsewhere"
        ) from error
    if (at := content.find(0)) >= 0:  # an archive, a shard without its meta.json, UTF-16
        raise _Unreadable(f" is not text (byte {at} is zero); convert it or move it elsewhere")
    yield "", text


def _read_python(stream: io.BufferedIOBase) -> Iterator[tuple[str, object]]:
    source = stream.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        yield "", source.decode(encoding)
    except (SyntaxError, LookupError, UnicodeError) as error:
        raise _Unreadable(
            " is not text in the encoding it declares; convert it or move it elsewhere"
        ) from error


def _read_jsonl(stream: io.BufferedIOBase) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
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
