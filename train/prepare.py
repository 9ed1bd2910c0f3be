"""Turns text into shards of token ids that training maps into memory.

python -m train.prepare --data=text/ --out=tokens/ learns a byte-level BPE tokenizer from the
training documents, or takes a given one, and writes

    meta.json           format version, tokenizer, and each shard's length and SHA-256
    tokenizer.json      what made the ids; absent where they are bytes
    train-00000.bin     raw little-endian ids: documents joined, each ended by the eod id
    valid-00000.bin

The same text and flags give the same bytes. OUT appears whole or not at all.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train import tokenizer as tokenizer_lib
from train.config import run_program
from train.data import FORMAT_VERSION, encode, little_endian
from train.documents import SPLITS, Documents, Split
from train.errors import UserError
from train.progress import progress
from train.whole import check_new, written_whole

_DEFAULT_VOCAB_SIZE = 32_000
_MIN_VOCAB_SIZE = 257  # Every byte and the end of a document.


@dataclass(frozen=True)
class Config:
    """Turns text into token shards for training."""

    data: str
    """Text to read: "pystdlib", a file, or a directory of .jsonl, .parquet or text files."""

    out: str
    """Directory to write; it must not exist or be empty."""

    tokenizer: str | None = None
    """ "bytes" or the path of a tokenizer.json; left out, one is learnt from the text."""

    vocab_size: int | None = None
    """Tokens in the tokenizer to learn, at most; 32000 if left out."""

    shard_tokens: int = 100_000_000
    """Tokens in a shard, at most."""

    def __post_init__(self) -> None:
        """Checks the flags.

        Raises:
            UserError: One is out of range, or two disagree.
        """
        if self.tokenizer is not None and self.vocab_size is not None:
            raise UserError(
                "--vocab_size is for a tokenizer to learn and --tokenizer gives one; drop either"
            )
        if self.vocab_size is not None and self.vocab_size < _MIN_VOCAB_SIZE:
            raise UserError(
                f"--vocab_size={self.vocab_size} has no room for every byte and {tokenizer_lib.EOD}"
                f"; give {_MIN_VOCAB_SIZE} or more"
            )
        if self.shard_tokens < 1:
            raise UserError(f"--shard_tokens={self.shard_tokens} is too few; give 1 or more")


def prepare(config: Config) -> str:
    """Writes the shards; returns lines that sum up what was written.

    Raises:
        UserError: The text or the tokenizer cannot be used, or `config.out` cannot be written.
            Nothing is left behind.
    """
    out = Path(config.out).resolve()
    check_new(out)
    if config.tokenizer is not None:
        tokenizer_lib.load(config.tokenizer)  # A mistake shows before the text is read.
    documents = Documents(config.data)
    with written_whole(out) as directory:
        tokenizer = _tokenizer(config, documents, directory)
        writers = {split: _ShardWriter(directory, split, config.shard_tokens) for split in SPLITS}
        with contextlib.closing(writers["train"]), contextlib.closing(writers["valid"]):
            for split, ids in encode(documents, tokenizer):
                writers[split].write(ids)
        meta = {
            "format_version": FORMAT_VERSION,
            "source": config.data,
            "tokenizer": "bytes" if config.tokenizer == "bytes" else "tokenizer.json",
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "dtype": tokenizer.dtype.name,
            "documents": documents.counts,
            "text_bytes": documents.text_bytes,
            "splits": {split: writer.shards for split, writer in writers.items()},
        }
        (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    num_tokens = sum(shard["tokens"] for writer in writers.values() for shard in writer.shards)
    return (
        f"{out}: {sum(documents.counts.values()):,} documents, {num_tokens:,} tokens of "
        f"{tokenizer.vocab_size:,}, {sum(documents.text_bytes.values()) / num_tokens:.2f} bytes "
        f"per token\n{documents}"
    )


def _tokenizer(config: Config, documents: Documents, directory: Path) -> tokenizer_lib.Tokenizer:
    """Returns the tokenizer to use, with its definition in `directory` if it has one."""
    if config.tokenizer == "bytes":
        return tokenizer_lib.load("bytes")
    path = directory / "tokenizer.json"
    if config.tokenizer is None:
        vocab_size = config.vocab_size or _DEFAULT_VOCAB_SIZE
        path.write_text(_learn(documents, vocab_size), encoding="utf-8")
    else:
        shutil.copyfile(config.tokenizer, path)
    return tokenizer_lib.load(str(path))


def _learn(documents: Documents, vocab_size: int) -> str:
    """Returns the definition of a byte-level BPE tokenizer learnt from the training documents.

    Follows GPT-2 (Radford et al., 2019): text is cut into words by its pattern, and the most
    frequent pair of neighbours within a word becomes a token, again and again.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[tokenizer_lib.EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with progress(f"learning {vocab_size:,} tokens", documents.counts["train"]) as advance:

        def texts() -> Iterator[str]:
            for split, text in documents:
                if split == "train":
                    yield text
                    advance(1)

        tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer.to_str(pretty=True)


class _ShardWriter:
    """Writes the ids of a split into full shards and a last one, and lists them with digests."""

    def __init__(self, directory: Path, split: Split, shard_tokens: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self._directory = directory
        self._split = split
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None

    def write(self, ids: npt.NDArray[np.unsignedinteger]) -> None:
        while len(ids):
            if self._file is None:
                name = f"{self._split}-{len(self.shards):05d}.bin"
                self._file = (self._directory / name).open("xb")
                self._digest = hashlib.sha256()
                self._num_tokens = 0
            fitting = ids[: self._shard_tokens - self._num_tokens]
            content = little_endian(fitting).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._num_tokens += len(fitting)
            ids = ids[len(fitting) :]
            if self._num_tokens == self._shard_tokens:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.shards.append(
                {
                    "file": Path(self._file.name).name,
                    "tokens": self._num_tokens,
                    "sha256": self._digest.hexdigest(),
                }
            )
            self._file = None


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status: 0, or 2 after a mistake of the user's."""
    return run_program(prepare, Config, args, "python -m train.prepare")


if __name__ == "__main__":
    sys.exit(main())
