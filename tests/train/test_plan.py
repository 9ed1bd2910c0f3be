"""Memory of a step: exact where it can be, and adding up."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from jfp4.models.config import MODELS
from train import plan
from train.config import TrainConfig
from train.plan import GIB, Plan, device_memory, make_plan, peak_bytes
from train.step import Trainer


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
    config = TrainConfig(model=model, llama=MODELS[model])
    planned, compiled = make_plan(Trainer(config))
    assert compiled is None and not planned.compiled and not planned.fits
    parameters = number_of_parameters(config.llama)
    assert planned.parameters == parameters
    # Four layers, each with a lower and an upper threshold for each of the stacked ones.
    assert planned.weights == 4 * parameters + 4 * 4 * 2 * config.llama.num_layers
    # Two moments, and the counters: two steps and two of what was skipped, and whether it was.
    assert planned.optimizer == 8 * parameters + 4 * 4 + 1
    assert planned.gradients == 4 * parameters
    assert planned.activations > 0


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


def test_estimate_follows_batch_accumulation_and_remat(small_device):
    def activations(remat="none", **changes):
        llama = dataclasses.replace(MODELS["llama60m"], remat=remat)
        config = TrainConfig(model="llama60m", llama=llama, **changes)
        return make_plan(Trainer(config))[0].activations

    once = activations()
    assert activations(batch_size=16) == 2 * once
    halves = dataclasses.replace(TrainConfig().optimizer, accumulation=2)
    assert activations(batch_size=16, optimizer=halves) == once
    assert activations("full") < activations("codes") < once


def plan_of(**changes):
    sizes = dict(weights=4 * 2**30, optimizer=8 * 2**30, gradients=2**31, activations=2**30)
    rest = dict(parameters=10**9, device_bytes=15 * 2**30, device="A1", compiled=True)
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
