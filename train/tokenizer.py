"""Tokenizers: text to token ids and back, as plain bytes or as a tokenizer.json says."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from train.errors import UserError

EOD = "<|endoftext|>"
"""The special token that ends each document. Its text inside a document is encoded as text."""

PIECE = 1 << 18
"""Characters that a longer text is encoded by, about: an encoding takes some hundred bytes each."""

_CUT = re.compile(r"[ \n][!-~]")  # cut before the space


class Tokenizer(Protocol):
    """What the trainer asks of a tokenizer.

    Attributes:
        name: What `load` was given.
        vocab_size: One more than the largest id.
        eod: Id of the end-of-document token, which encoding never yields.
        dtype: Type of the ids: uint16 where every id fits, else uint32.
        fingerprint: SHA-256 of the definition, in hexadecimal.
    """

    name: str
    vocab_size: int
    eod: int
    dtype: np.dtype[np.unsignedinteger]
    fingerprint: str

    def encode(self, text: str) -> npt.NDArray[np.unsignedinteger]:
        """Returns the ids of `text`, 1-D, without an end-of-document id."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        """Returns `encode` of each text, using every core where the library can."""
        ...

    def pieces(self, text: str) -> list[str]:
        """Returns the text in pieces whose ids, one after another, are those of the text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    name = "bytes"
    vocab_size = 257
    eod = 256
    dtype: np.dtype[np.unsignedinteger] = np.dtype(np.uint16)
    fingerprint = hashlib.sha256(b"UTF-8 bytes, end of document 256").hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.unsignedinteger]:
        """Returns the bytes of `text`."""
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        """Returns `encode` of each text."""
        return [self.encode(text) for text in texts]

    def pieces(self, text: str) -> list[str]:
        """Returns the text, of which no more is made than its bytes."""
        return [text]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; an id above 256 raises ValueError."""
        pieces = (EOD.encode() if id == self.eod else bytes([id]) for id in map(int, ids))
        return b"".join(pieces).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of the Hugging Face tokenizers library.

    Only its normaliser, splitting and model are used: a truncation length, padding or tokens
    added around a text would put into the data what the documents do not hold.
    """

    def __init__(self, name: str) -> None:
        """Reads the file `name`.

        Raises:
            UserError: It is missing, is not a tokenizer, or has no EOD special token.
        """
        path = Path(name)
        try:
            definition = path.read_bytes()
            inner = tokenizers.Tokenizer.from_str(definition.decode())
        except OSError as error:
            raise UserError(
                f'tokenizer {name} cannot be read ({error.strerror}); give "bytes" or the path '
                "of a tokenizer.json"
            ) from error
        except Exception as error:  # The library raises nothing narrower.
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"tokenizer {name} is not a tokenizer.json ({reason}); give one that the "
                "tokenizers library wrote"
            ) from error
        added = inner.get_added_tokens_decoder().items()
        eod = next((id for id, token in added if token.special and token.content == EOD), None)
        if eod is None:
            raise UserError(
                f"tokenizer {name} has no special token {EOD} to end documents with; add it"
            )
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # A document that quotes EOD does not end there.
        self._inner = inner
        self.name = name
        # Ids may have gaps, so a count of the tokens would not bound them.
        self.vocab_size = 1 + max(inner.get_vocab().values())
        self.eod = eod
        self.dtype: np.dtype[np.unsignedinteger] = np.dtype(
            np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        )
        self.fingerprint = hashlib.sha256(definition).hexdigest()
        self._cuts_at_spaces = _cuts_at_spaces(json.loads(definition))

    def encode(self, text: str) -> npt.NDArray[np.unsignedinteger]:
        """Returns the ids of `text`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        """Returns `encode` of each text, on every core.

        Raises:
            UserError: The model of the tokenizer makes its EOD of a document's text.
        """
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        encoded = [np.array(encoding.ids, self.dtype) for encoding in encodings]
        if any(self.eod in ids for ids in encoded):
            raise UserError(
                f"tokenizer {self.name} encodes {EOD} within a document as the id {self.eod} that "
                "ends documents; give one whose model does not have it as a word"
            )
        return encoded

    def pieces(self, text: str) -> list[str]:
        """Returns the text, in pieces of some `PIECE` characters where spaces divide its words."""
        pieces, begin = [], 0
        while self._cuts_at_spaces and (cut := _CUT.search(text, begin + PIECE)):
            pieces.append(text[begin : cut.start()])
            begin = cut.start()
        return [*pieces, text[begin:]]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`."""
        return self._inner.decode([int(id) for id in ids], skip_special_tokens=False)


def _cuts_at_spaces(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer makes the same ids of a text and of its pieces, cut where `_CUT` says.

    GPT-2's splitting into words, which byte-level tokenizers have by default, has a word of all
    spaces but the last before what is none, and that one begins the next word or is one: so there
    is a word's end before it, in the text as at a piece's end. A normaliser, a token added to the
    model's or a space put before a text may have it otherwise.
    """
    words = definition.get("pre_tokenizer") or {}
    return (
        (words.get("type"), words.get("use_regex", True)) == ("ByteLevel", True)
        and not words.get("add_prefix_space", True)
        and definition.get("normalizer") is None
        and all(token["special"] for token in definition.get("added_tokens", []))
    )


def load(name: str) -> Tokenizer:
    """Returns the tokenizer `name`: "bytes", or the path of a tokenizer.json.

    Raises:
        UserError: The path is missing, is not a tokenizer, or has no EOD special token.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)
