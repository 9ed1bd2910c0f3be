"""Text to tokens: reads and encodes documents, or opens the shards that train.prepare wrote."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train import tokenizer as tokenizer_lib
from train.batches import Tokens
from train.documents import SPLITS, Documents, Split
from train.errors import UserError
from train.progress import progress
from train.tokenizer import Tokenizer

FORMAT_VERSION = 1
"""Version of the directory that train.prepare writes; raised when its meaning changes."""

_BATCH_CHARS = 1 << 21  # Encoded at a time: enough to fill the cores, about 200 MB of memory.
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """Text ready to train on.

    Attributes:
        train: Ids of the training documents, each followed by the tokenizer's eod.
        valid: Ids of the validation documents, likewise.
        tokenizer: What made the ids.
        fingerprint: SHA-256 in hexadecimal of the tokenizer and all the ids, shard by shard; a run
            is resumed only on data with the fingerprint it began with.
        valid_bytes: UTF-8 bytes of the validation documents.
        split: What went to training and what to validation, in words; nothing for shards, of which
            train.prepare said it.
    """

    train: Tokens
    valid: Tokens
    tokenizer: Tokenizer
    fingerprint: str
    valid_bytes: int
    split: str = ""


def load(
    data: str,
    tokenizer: str | None = None,
    *,
    seq_len: int,
    batch_size: int,
    valid_sequences: int = 1,
    share: tuple[int, int] = (0, 1),
) -> Corpus:
    """Reads, splits and encodes text, or opens what train.prepare wrote.

    Args:
        data: What `Documents` takes, or a directory that train.prepare wrote.
        tokenizer: What `train.tokenizer.load` takes. None is the prepared data's own, or bytes
            for text. Prepared data takes no other tokenizer than its own.
        seq_len: Tokens that one sequence predicts.
        batch_size: Sequences in a training batch.
        valid_sequences: Fewest sequences in a validation batch.
        share: Which process this is, and of how many that open the same shards. It holds every so
            manieth shard against its digest, from its own number on, and of the others the sizes.

    Raises:
        UserError: The text cannot be read, a shard is damaged, the tokenizer is not the
            prepared data's, or there is less text than one training batch and one validation
            batch.
    """
    if is_prepared(data):
        corpus = _load_prepared(Path(data), tokenizer, share)
    else:
        corpus = _load_text(data, tokenizer_lib.load(tokenizer or "bytes"))
    for split, tokens, sequences in (
        ("training", corpus.train, batch_size),
        ("validation", corpus.valid, valid_sequences),
    ):
        needed = sequences * seq_len + 1
        if len(tokens) < needed:
            raise UserError(
                f"{data} has {len(tokens):,} {split} tokens and {needed:,} are needed "
                f"({sequences} x {seq_len} + 1); give more text, or a smaller batch or sequence"
            )
    return corpus


def is_prepared(data: str) -> bool:
    """Whether data is a directory that train.prepare wrote.

    Raises:
        UserError: It cannot be told.
    """
    try:
        return (Path(data) / "meta.json").is_file()
    except (OSError, ValueError) as error:
        raise UserError(
            f"data {data} cannot be read ({getattr(error, 'strerror', error)}); allow it, or give "
            "other data"
        ) from error


def encode(
    documents: Documents, tokenizer: Tokenizer
) -> Iterator[tuple[Split, npt.NDArray[np.unsignedinteger]]]:
    """Yields each document's split and ids, ended by eod, in the order of the documents.

    A document is held at a time. Of its text the tokenizer makes some hundred times as many bytes,
    but of a few megabytes at a time, or of one of its pieces (``Tokenizer.pieces``).
    """
    eod = np.array([tokenizer.eod], tokenizer.dtype)
    parts: list[npt.NDArray[np.unsignedinteger]] = []
    with progress("encoding", sum(documents.text_bytes.values())) as advance:
        for batch in _batched(documents, tokenizer):
            texts = [text for _, text, _ in batch]
            for (split, _, last), ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                parts.append(ids)
                if last:
                    yield split, np.concatenate([*parts, eod])
                    parts = []
            advance(sum(len(text.encode()) for text in texts))


def _batched(documents: Documents, tokenizer: Tokenizer) -> Iterator[list[tuple[Split, str, bool]]]:
    """Yields pieces of documents, and whether each is its document's last, by the batch."""
    batch: list[tuple[Split, str, bool]] = []
    chars = 0
    for split, document in documents:
        pieces = tokenizer.pieces(document)
        for number, text in enumerate(pieces, 1):
            batch.append((split, text, number == len(pieces)))
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
    documents = Documents(data)
    for split, ids in encode(documents, tokenizer):
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
        valid_bytes=documents.text_bytes["valid"],
        split=str(documents),
    )


def _load_prepared(directory: Path, wanted: str | None, share: tuple[int, int]) -> Corpus:
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
        valid_bytes = int(meta["text_bytes"]["valid"])
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
    if dtype != tokenizer.dtype.newbyteorder("<"):
        raise UserError(
            f"{path} is damaged (dtype is {meta['dtype']} and the tokenizer's ids are "
            f"{tokenizer.dtype}); prepare the data again"
        )
    if wanted is not None and tokenizer_lib.load(wanted).fingerprint != fingerprint:
        raise UserError(
            f"{directory} was prepared with another tokenizer than {wanted}; leave the tokenizer "
            "out to use the data's own, or prepare the data again"
        )
    checked = [
        (file, count * dtype.itemsize, sha256)
        for shards in listed.values()
        for file, count, sha256 in shards
    ]
    for file, size, _ in checked:
        _check_size(file, size)
    own = checked[share[0] :: share[1]]
    with progress("checking shards", sum(size for _, size, _ in own)) as advance:
        for file, _, sha256 in own:
            _check(file, sha256, dtype, tokenizer.vocab_size, advance)
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
        valid_bytes=valid_bytes,
    )


def _check_size(file: Path, size: int) -> None:
    """Holds a shard against its listed size in bytes."""
    with _readable(file):
        found = file.stat().st_size
    if found != size:
        raise UserError(
            f"shard {file} has {found:,} bytes and {size:,} are expected; prepare the data again"
        )


def _check(
    file: Path,
    sha256: str,
    dtype: np.dtype[np.unsignedinteger],
    vocab_size: int,
    advance: Callable[[int], None],
) -> None:
    """Holds a shard against its listed digest and its ids' bound, reading a piece at a time."""
    digest, largest = hashlib.sha256(), 0
    with _readable(file), file.open("rb") as shard:
        while piece := shard.read(_READ_BYTES):
            digest.update(piece)
            largest = max(largest, int(np.frombuffer(piece, dtype).max()))
            advance(len(piece))
    if digest.hexdigest() != sha256:
        raise UserError(
            f"shard {file} has SHA-256 {digest.hexdigest()} and {sha256} is expected; "
            "prepare the data again"
        )
    if largest >= vocab_size:
        raise UserError(
            f"shard {file} has the id {largest} of a tokenizer with {vocab_size:,}; prepare the "
            "data again"
        )


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"shard {file} cannot be read ({error.strerror}); prepare the data again"
        ) from error


def _fingerprint(tokenizer: Tokenizer, shards: dict[Split, list[tuple[int, str]]]) -> str:
    content = json.dumps([tokenizer.fingerprint, [shards[split] for split in SPLITS]])
    return hashlib.sha256(content.encode()).hexdigest()
