"""Bytes of the compiled step: what stands, what does not, and that they are as predicted.

In float32, since CPUs widen what is narrower and would have two copies of it.
"""

import functools
import re

import jax
import pytest

from jfp4.models.config import LlamaConfig
from train.config import OptimizerConfig, TrainConfig
from train.plan import estimated_activations, kept_bytes, make_plan
from train.step import Trainer

LAYERS, WIDTH, MLP, VOCAB, SEQ, TOKENS, CHUNK = 6, 64, 160, 1500, 32, 512, 64


def configured(remat="full", accumulation=1, chunk=CHUNK):
    llama = LlamaConfig(
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=4,
        mlp_dim=MLP,
        remat=remat,
        dtype="float32",
        loss_chunk=chunk,
    )
    return TrainConfig(
        llama=llama,
        batch_size=TOKENS // SEQ * accumulation,
        seq_len=SEQ,
        optimizer=OptimizerConfig(accumulation=accumulation),
    )


@functools.cache
def step(**changes):
    """The plan of a step, its memory and its program."""
    plan, compiled = make_plan(Trainer(configured(**changes)))
    return plan, compiled.memory_analysis(), compiled.as_text()


def test_all_of_the_state_is_donated():
    batch = 4 * TOKENS // SEQ * (SEQ + 1)
    plan, memory, _ = step()
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes - batch
    # With the step's number, and all but perhaps a flag, which no step reads.
    assert 0 <= plan.weights + plan.optimizer + 4 - memory.alias_size_in_bytes <= 1


@pytest.mark.parametrize("remat", ["full", "qkv", "codes", "none"])
def test_a_step_takes_what_is_kept_and_a_working_set(remat):
    plan, memory, _ = step(remat=remat)
    predicted = (
        plan.fixed - plan.weights - plan.optimizer + estimated_activations(configured(remat))
    )
    # A layer's weights stand decoded, unpacked, and as a gradient meanwhile, which is little where
    # there are more tokens to a weight than here.
    layer = 4 * WIDTH * (4 * WIDTH + 3 * MLP)
    # Codes that are kept count twice: of activations, and of weights that are not prepared.
    codes = TOKENS * (3 * WIDTH + MLP) * (remat in ("codes", "none")) + layer // 4 * (
        remat == "none"
    )
    most = 1.2 * predicted + 3 * layer + LAYERS * codes
    assert 0.95 * predicted < memory.temp_size_in_bytes < most
    if remat != "full":
        # The working set cancels, but for what a layer no longer computes again.
        more = kept_bytes(configured(remat)) - kept_bytes(configured("full"))
        found = memory.temp_size_in_bytes - step()[1].temp_size_in_bytes
        assert found == pytest.approx(more, rel=0.1)


def test_no_logits_of_all_tokens_stand():
    """A dimension of the vocabulary, and others that make up all tokens."""
    at_once = re.compile(rf"\[({TOKENS},{VOCAB}|{VOCAB},{TOKENS}|{TOKENS // SEQ},{SEQ},{VOCAB})\]")
    text = step()[2]
    _, whole, whole_text = step(chunk=TOKENS)
    assert at_once.search(whole_text) and not at_once.search(text)
    assert re.search(rf"\[{CHUNK},{VOCAB}\]", text)
    # No token's layer is as wide here as its logits: they are what the peak is made of.
    assert whole.temp_size_in_bytes > 2 * 4 * TOKENS * VOCAB


def test_no_codes_of_all_layers_stand_in_bytes():
    text = step()[2]
    for k, n in ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 320), (160, WIDTH)):
        # Packed along either axis, and not in bytes.
        assert f"u8[{LAYERS},{n},{k // 2}]" in text and f"u8[{LAYERS},{k},{n // 2}]" in text
        assert not re.search(rf"(f8e4m3fn|f16|bf16|s8)\[{LAYERS},({k},{n}|{n},{k})\]", text)


def test_a_second_microbatch_takes_a_second_gradient():
    plan, memory, _ = step()
    twice, more, _ = step(accumulation=2)
    assert twice.gradients == 2 * plan.gradients
    found = more.temp_size_in_bytes - memory.temp_size_in_bytes
    assert found == pytest.approx(plan.gradients, rel=0.1)
    assert kept_bytes(configured(accumulation=2)) == kept_bytes(configured())


@pytest.mark.parametrize("measured", ["evaluate", "health"])
def test_what_is_measured_takes_a_microbatch_at_a_time(measured):
    """A batch that fits by its microbatches would not fit all at once."""

    def temporary(accumulation):
        trainer = Trainer(configured("none", accumulation))
        state, batch = trainer.abstract_state(), trainer.batch_shape()
        compiled = jax.jit(getattr(trainer, measured)).lower(state.params, state.stats, batch)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary(4) < 1.5 * temporary(1)


def test_the_plan_adds_up_to_the_compilers_peak():
    plan, memory, _ = step()
    # A step gives its metrics beside the state.
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert 0 <= plan.total - peak < 2**10
    assert plan.compiled
    assert plan.prepared == kept_packed()


def kept_packed():
    """Half a byte a weight in two layouts, and two scales of four bytes an output channel."""
    shapes = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 320), (160, WIDTH))
    return LAYERS * sum(k * n + 8 * n for k, n in shapes)
