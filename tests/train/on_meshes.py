"""Twenty steps on each of several meshes, as a program of its own: it needs eight devices.

Prints a JSON object of losses by case, and what the devices of a mesh hold.
"""

import dataclasses
import functools
import json
import sys
import unittest.mock

import jax
import numpy as np
from flax import nnx

from jfp4.nn import Prepared
from jfp4.ops.linear import quantize_activation
from jfp4.sharding import make_mesh, parse_mesh
from train.batches import batches
from train.config import parse
from train.placement import Placement
from train.step import Trainer

MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")
STEPS, ROWS, SEQ = 20, 8, 16

FLAGS = (
    "--model.num_layers=2",
    "--model.scan_layers",
    "--model.dtype=float32",
    "--model.embed_dim=64",
    "--model.mlp_dim=128",
    "--model.num_heads=8",
    "--model.num_kv_heads=8",
    "--recipe.occ_sample=None",
    "--optimizer.first_moment=e4m3",
    "--optimizer.second_moment=float16",
    "--optimizer.rounding=nearest",  # stochastically, runs part sooner, whatever is reduced how
    f"--batch_size={ROWS}",
    f"--seq_len={SEQ}",
    f"--steps={STEPS}",
)


def tokens():
    """Text with a pattern, so that there is something to learn."""
    text = "".join(f"x{i} = {i * i} + {i % 7}\n" for i in range(4000))
    return np.frombuffer(text.encode(), np.uint8)


def first_codes(placement):
    """Of the first step every weight's codes and scales, and of every layer's input the codes."""
    trainer = Trainer(parse(FLAGS), placement)
    batch = next(batches(tokens(), seq_len=SEQ, batch_size=ROWS, seed=0))

    def of_input(x, w, recipe, calibration):
        q, _ = quantize_activation(x.reshape(-1, x.shape[-1]), recipe, calibration)
        return {"codes": q.codes}

    def codes(state, batch):
        model = trainer._merge(state.params, state.stats)
        model.prepare()
        given = trainer.health(state.params, state.stats, batch)
        return nnx.state(model, Prepared), given

    with placement.in_force(), unittest.mock.patch("jfp4.nn.health", of_input):
        state = trainer.placed_init()
        found = jax.jit(codes)(state, placement.put(batch[placement.rows(ROWS)], ROWS))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


@functools.cache
def compiled(placement, *flags):
    """The functions that begin a run and go on with it, compiled once for all its runs."""
    trainer = Trainer(parse([*FLAGS, *flags]), placement)
    places = trainer.shardings, placement.replicated
    return trainer.placed_init, jax.jit(trainer.step, out_shardings=places)


def run(placement, change=lambda batch: batch, *flags, begin=lambda state: state):
    """The losses of a run, and the state after it."""
    init, step = compiled(placement, *flags)
    with placement.in_force():
        state = begin(init())
        data = batches(tokens(), seq_len=SEQ, batch_size=ROWS, seed=0)
        losses = []
        for _ in range(STEPS):
            batch = change(next(data))
            own = batch[placement.rows(ROWS)]
            state, metrics = step(state, placement.put(own, ROWS))
            losses.append(metrics["loss"])
    return [float(loss) for loss in losses], state


def main():
    """Runs every case."""
    results = {}
    one = Placement()
    results["one device"], _ = run(one)
    codes_of_one = first_codes(one)
    rng = np.random.default_rng(0)
    for i in range(3):
        order = rng.permutation(ROWS)
        results[f"order {i}"], _ = run(one, lambda batch, order=order: batch[order])
    # Of weights that are off by up to eight units in the last place: the root of 64, the model's
    # width, is about what sums of so many terms differ by in two orders.
    for i in range(3):

        def begin(state):
            def rounded(w):
                return w * (1 + 2.0**-23 * rng.integers(-8, 9, w.shape)).astype(np.float32)

            return dataclasses.replace(state, params=jax.tree.map(rounded, state.params))

        results[f"rounding {i}"], _ = run(one, begin=begin)
    # What comes of a gradient, or of a loss, that was reduced over half of the devices alone.
    half = np.r_[: ROWS // 2, : ROWS // 2]
    results["half"], _ = run(one, lambda batch: batch[half])
    for text in MESHES:
        placement = Placement(make_mesh(parse_mesh(text)))
        results[text], state = run(placement)
        pairs = zip(first_codes(placement), codes_of_one, strict=True)
        results[f"{text}, codes"] = [float(np.mean(a != b)) for a, b in pairs]
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        results[f"{text} holds"] = held / sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if text == "data=2,fsdp=2,tensor=2":
            for comm in ("bfloat16", "fp8"):
                flags = (f"--mesh={text}", f"--grad_comm={comm}")
                results[comm], _ = run(placement, lambda batch: batch, *flags)
            flag = "--model.no_scan_layers"
            results["written out"], _ = run(placement, lambda batch: batch, flag)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
