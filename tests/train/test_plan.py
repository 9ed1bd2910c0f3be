"""Memory of a step: exact where it can be, and adding up."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from jfp4.models.config import MODELS
from jfp4.models.llama import REMAT, Llama, as_stored
from train import plan
from train.config import TrainConfig
from train.plan import (
    GIB,
    Plan,
    compiler_options,
    device_memory,
    estimated_activations,
    kept_bytes,
    make_plan,
    peak_bytes,
)
from train.step import Trainer

ROOT = Path(__file__).parents[2]


def number_of_parameters(llama):
    heads = llama.num_heads + 2 * llama.num_kv_heads
    layer = llama.embed_dim * heads * llama.head_dim + llama.embed_dim**2
    layer += 3 * llama.embed_dim * llama.mlp_dim + 2 * llama.embed_dim
    embeddings = llama.vocab_size * llama.embed_dim * (1 if llama.tied_head else 2)
    return llama.num_layers * layer + llama.embed_dim + embeddings


@pytest.fixture
def small_device(monkeypatch):
    monkeypatch.setattr(plan, "device_memory", lambda: (10**5, "this machine"))


@pytest.mark.parametrize("model", MODELS)
def test_exact_parts_of_every_size(small_device, model):
    # Nothing is compiled, since no size fits.
    config = TrainConfig(model=model, llama=dataclasses.replace(MODELS[model], remat="full"))
    planned, compiled = make_plan(Trainer(config))
    assert compiled is None and not planned.compiled and not planned.fits
    parameters = number_of_parameters(config.llama)
    assert planned.parameters == parameters
    # Four layers, each with a lower and an upper threshold for each of the stacked ones.
    assert planned.weights == 4 * parameters + 4 * 4 * 2 * config.llama.num_layers
    # Two moments, and the counters: two steps and two of what was skipped, and whether it was.
    assert planned.optimizer == 8 * parameters + 4 * 4 + 1
    assert planned.gradients == 4 * parameters
    # A byte a weight of the layers, and two scales of four bytes an output channel.
    c = config.llama
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    d, m = c.embed_dim, c.mlp_dim
    shapes = ((d, qkv), (d, d), (d, 2 * m), (m, d))
    assert planned.prepared == c.num_layers * sum(k * n + 8 * n for k, n in shapes)
    assert planned.activations > 0
    # Where nothing reads them twice, none are made ahead.
    once, _ = make_plan(Trainer(dataclasses.replace(config, llama=MODELS[model])))
    assert once.prepared == (planned.prepared if MODELS[model].remat != "none" else 0)


def test_paper_sizes_have_about_the_parameters_in_their_names():
    for name in ("llama60m", "llama130m", "llama400m", "llama1b", "llama7b", "llama13b"):
        size = float(re.sub(r"\D", "", name)) * (1e9 if name.endswith("b") else 1e6)
        assert number_of_parameters(MODELS[name]) == pytest.approx(size, rel=0.35)


def test_recipe_without_statistics(small_device, tiny_config):
    from jfp4.recipe import RECIPES

    planned, _ = make_plan(Trainer(tiny_config(recipe="bf16", quantization=RECIPES["bf16"])))
    assert planned.weights == 4 * planned.parameters


def test_nothing_is_allocated_for_what_does_not_fit(small_device):
    before = len(jax.live_arrays())
    make_plan(Trainer(TrainConfig(model="llama13b", llama=MODELS["llama13b"])))
    assert len(jax.live_arrays()) == before
    assert peak_bytes() < 20e9  # its weights alone take 52


def kept(remat="full", rows=8, accumulation=1, **changes):
    llama = dataclasses.replace(MODELS["llama60m"], remat=remat, **changes)
    optimizer = dataclasses.replace(TrainConfig().optimizer, accumulation=accumulation)
    return TrainConfig(model="llama60m", llama=llama, batch_size=rows, optimizer=optimizer)


def test_estimate_follows_batch_accumulation_and_remat(small_device):
    eight, sixteen, more = (kept_bytes(kept(rows=rows)) for rows in (8, 16, 24))
    assert eight < sixteen and more - sixteen == sixteen - eight
    assert kept_bytes(kept(rows=16, accumulation=2)) == eight
    estimates = [estimated_activations(kept(remat)) for remat in (*reversed(REMAT), "none")]
    assert estimates == sorted(set(estimates))
    planned = make_plan(Trainer(kept("qkv", rows=16, accumulation=2)))[0]
    assert planned.activations == estimated_activations(kept("qkv"))
    assert planned.gradients == 2 * 4 * planned.parameters
    # Of two microbatches, and of as many as bfloat16 can sum.
    two, most = (
        dataclasses.replace(c, optimizer=dataclasses.replace(c.optimizer, master="bfloat16"))
        for c in (kept("qkv", rows=8 * n, accumulation=n) for n in (2, 256))
    )
    assert estimated_activations(two) == estimated_activations(most)
    # A chunk's logits and their gradient: no more of them with more tokens.
    small, large = (estimated_activations(kept(loss_chunk=chunk)) for chunk in (16, 1024))
    assert large - small == 8 * (1024 - 16) * 32000


@pytest.mark.parametrize("load", [as_stored, lambda params: jax.tree.map(lambda v: v * 2, params)])
@pytest.mark.parametrize("remat", REMAT)
def test_bytes_kept_a_token_a_layer(remat, load, monkeypatch):
    """As ``REMAT`` says, in bfloat16; and nothing that the number of tokens has no part in."""

    def loading(self):
        model = Llama(self.config.llama, self.config.quantization, rngs=nnx.Rngs(0))
        model.load = load
        return model

    monkeypatch.setattr(Trainer, "_model", loading)
    sizes = dict(embed_dim=64, num_heads=4, num_kv_heads=4, mlp_dim=112)

    two, three = (kept_bytes(kept(remat, 3, num_layers=n, **sizes)) for n in (2, 3))
    d, m = 64, 112
    expected = {
        "codes": 13 * d + 5 * m + 16,
        "products": 10 * d + 4 * m,
        "qkv": 8 * d,
        "full": 2 * d,
    }
    assert three - two == expected[remat] * 3 * 256


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_only_xlas_attention_keeps_scores(remat):
    """What cuDNN's keeps, and all else, grows by as much for every token."""

    def estimated(seq_len, attention):
        return estimated_activations(
            dataclasses.replace(kept(remat, 2, loss_chunk=64), seq_len=seq_len), attention
        )

    lengths = 256, 512, 768
    of_cudnn = [estimated(n, "cudnn") for n in lengths]
    assert np.ptp(np.diff(of_cudnn)) == 0
    c = MODELS["llama60m"]
    layers = c.num_layers if remat == "none" else 1
    # XLA's keeps a number in float32, or more, of every query with every key.
    scores = 4 * layers * 2 * c.num_heads * lengths[-1] ** 2
    assert estimated(lengths[-1], "xla") - of_cudnn[-1] >= scores


def plan_of(**changes):
    sizes = dict(weights=4 * 2**30, optimizer=7 * 2**30, prepared=2**30, gradients=2**31)
    sizes["activations"] = 2**30
    rest = dict(
        parameters=10**9, saved=11 * 2**30, device_bytes=15 * 2**30, device="A1", compiled=True
    )
    return Plan(**sizes | rest | changes)


def test_together_and_whether_it_fits(capsys):
    fitting = plan_of()
    assert fitting.total == 15 * GIB and fitting.fits
    large = plan_of(activations=2**31, compiled=False)
    assert large.total == 16 * GIB and not large.fits
    fitting.show()
    large.show()
    first, second = capsys.readouterr().out.split("fits")
    assert "Memory of a train step, from the compiled step" in first
    assert "1,000,000,000 parameters" in first
    assert re.search(r"together +│ +15\.00 +│ +16,106,127,360", first)
    assert re.search(r"A1 has +│ +15\.00", second)
    assert "estimated from shapes" in second
    assert "1.00 GiB too large" in " ".join(second.split())


def test_memory_of_this_machine():
    total, name = device_memory()
    assert total > 2**28 and name
    array = np.ones(2**20)
    assert peak_bytes() >= array.nbytes


def test_memory_is_that_of_a_device_of_this_process(monkeypatch):
    def refused():
        raise RuntimeError("MemoryStats is only supported for addressable PjRt devices")

    given = {"bytes_limit": 7, "peak_bytes_in_use": 5}
    theirs = SimpleNamespace(platform="gpu", device_kind="A1", memory_stats=refused)
    own = SimpleNamespace(platform="gpu", device_kind="A1", memory_stats=lambda: given)
    monkeypatch.setattr(jax, "devices", lambda: [theirs, own])
    monkeypatch.setattr(jax, "local_devices", lambda: [own])
    assert device_memory() == (7, "A1") and peak_bytes() == 5


@pytest.mark.parametrize(
    ("platform", "size", "overlapped"),
    [("gpu", 1, False), ("gpu", 2, True), ("cpu", 2, False), ("tpu", 2, False)],
)
def test_what_is_sent_goes_on_beside_what_is_computed_on_meshes_of_gpus(platform, size, overlapped):
    devices = np.array([SimpleNamespace(platform=platform)] * size, object)
    mesh = SimpleNamespace(size=size, devices=devices)
    placement = SimpleNamespace(mesh=mesh)
    overlap = {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_experimental_parallel_collective_overlap_limit": "2",
    }
    expected = overlap if overlapped else {}
    assert compiler_options(TrainConfig(), placement) == expected
    exact = {"xla_gpu_exclude_nondeterministic_ops": True}
    assert compiler_options(TrainConfig(deterministic=True), placement) == exact | expected


@pytest.mark.skipif(sys.platform != "linux", reason="there getrusage tells a process of its own")
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    held = np.ones(2**29, np.uint8)  # and getrusage of a child says so
    program = "from train.plan import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 2**20 < int(done.stdout) < held.nbytes
