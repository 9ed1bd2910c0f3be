"""``python -m train.evaluate``: the loss of a trained model on any text.

Every token but the first is predicted once, whatever the windows and the batches.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jfp4.models.llama import Llama
from train import data as data_lib
from train import rundir
from train.batches import Tokens, TokenWindows
from train.config import run_program
from train.documents import Documents
from train.errors import UserError
from train.progress import progress
from train.trained import config_of, load_model, tokenizer_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluates the model of a run on text that it may never have seen."""

    run_dir: str
    """Run directory of train.main."""

    data: str | None = None
    """Text, all of it, or shards, their validation split; None: the validation split of the run."""

    step: int | None = None
    """Step of the checkpoint; None takes the newest."""

    quantize: bool = True
    """Compute as the run's recipe says; without, with the master weights and no quantisation."""

    seq_len: int | None = None
    """Tokens a sequence, each begun without what is before it; None is the run's."""

    batch_size: int = 8
    """Sequences at a time."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a model loses on a text.

    Attributes:
        nats: the sum of every token's cross-entropy but the first one's, nats.
        tokens: how many these are. A document ends with one that stands for no text.
        text_bytes: UTF-8 bytes of the text.
    """

    nats: float
    tokens: int
    text_bytes: int

    def __str__(self) -> str:
        mean = self.nats / self.tokens
        perplexity = math.inf if mean > 700 else math.exp(mean)  # which has no larger one
        return (
            f"{mean:.4f} nats a token, perplexity {perplexity:.2f}, "
            f"{self.nats / math.log(2) / self.text_bytes:.4f} bits a byte; "
            f"{self.tokens:,} tokens, {self.text_bytes:,} bytes"
        )


def evaluate(config: Config) -> Loss:
    """The loss of a run's model.

    Raises:
        UserError: there is no such run, checkpoint or text, the text is of less than two tokens,
            shards are of another tokenizer than the run, or the run's own data are other ones than
            it began with.
    """
    for name in ("seq_len", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}; expected at least 1")
    about = config_of(config.run_dir)
    tokens, text_bytes = _read(config, about)
    if len(tokens) < 2:
        raise UserError(f"{config.data} has {len(tokens)} tokens; expected at least 2")
    model = load_model(config.run_dir, config.step, quantize=config.quantize)
    nats = total_loss(model, tokens, config.seq_len or about["seq_len"], config.batch_size)
    return Loss(nats, len(tokens) - 1, text_bytes)


def total_loss(model: Llama, tokens: Tokens, seq_len: int, batch_size: int) -> float:
    """The cross-entropy of every token but the first, added up, in nats.

    Tokens are predicted from those of their window of ``seq_len`` alone; the last window, and the
    last batch, may be shorter.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def loss(state: nnx.State, rows: Int32[Array, "b s1"]) -> Float32[Array, ""]:
        return nnx.merge(graph, state).loss(rows[:, :-1], rows[:, 1:])

    windows = TokenWindows(tokens, seq_len)
    total = 0.0
    with progress("evaluating", len(tokens) - 1) as advance:
        starts = range(0, len(windows), batch_size)
        batches = (
            np.stack([windows[i] for i in range(start, min(start + batch_size, len(windows)))])
            for start in starts
        )
        rest = tokens[len(windows) * seq_len : len(tokens)].astype(np.int32)
        for rows in itertools.chain(batches, [rest[None]]):
            if count := rows[:, 1:].size:
                total += count * float(loss(state, rows))
                advance(count)
    return total


def _read(config: Config, about: dict[str, Any]) -> tuple[Tokens, int]:
    """Tokens to evaluate on, and the bytes of their text."""
    tokenizer, data = tokenizer_of(about), about["data"] if config.data is None else config.data
    if config.data is None or data_lib.is_prepared(data):
        corpus = data_lib.load(data, tokenizer.name, seq_len=1, batch_size=1)
        if config.data is None:
            rundir.check_data(Path(config.run_dir), corpus.fingerprint)
        return corpus.valid, corpus.valid_bytes
    documents = Documents(data, divide=False)
    parts = [ids for _, ids in data_lib.encode(documents, tokenizer)]
    return Tokens(parts), documents.text_bytes["valid"]


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status: 0, or 2 after a mistake of the user's."""
    return run_program(evaluate, Config, args, "python -m train.evaluate")


if __name__ == "__main__":
    sys.exit(main())
