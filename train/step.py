"""Pure functions of training: initial state, train step, evaluation, quantisation health."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jfp4 import master
from jfp4.models.llama import Llama, as_stored, by_layers, split_params
from jfp4.nn import Linear, Prepared, path_name
from jfp4.ops.exchange import grad_comm
from jfp4.optim import norm_and_finite
from jfp4.recipe import Recipe
from jfp4.sharding import constrain, constrain_weights
from train.config import TrainConfig
from train.loss_scale import LossScale
from train.optimizer import decay_mask, make_optimizer, schedule
from train.placement import Placement


def _check_skip(model: Llama, recipe: Recipe) -> None:
    """Raises ValueError if a pattern that was asked for is of no layer, and so changes nothing."""
    layers = [
        path_name(path)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear)
    ]
    for pattern in set(recipe.skip) - set(Recipe().skip) if recipe.quantizes else ():
        if not fnmatch.filter(layers, pattern):
            raise ValueError(
                f"recipe.skip={pattern!r} is no layer's path; expected a pattern of some of "
                f"{', '.join(sorted(layers))} (layers of a kind are one stack)"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step, and all that a checkpoint holds.

    The batch of a step is a function of (seed, step), and nothing else is drawn at random after
    the start; so ``step`` is the data position and the state of every random number.
    """

    step: Int32[Array, ""]
    params: Any
    stats: Any
    opt_state: Any
    loss_scale: LossScale | None = None


class Trainer:
    """The functions of a configuration, ready to be compiled for a mesh; holds no arrays.

    They are to be traced with ``placement.in_force()``.
    """

    def __init__(self, config: TrainConfig, placement: Placement | None = None) -> None:
        self.config = config
        self.placement = Placement() if placement is None else placement
        self.optimizer = make_optimizer(config)
        self.schedule = schedule(config)
        model = nnx.eval_shape(self._model)
        rows = config.batch_size // config.optimizer.accumulation
        model.check_loss_chunk(rows * config.seq_len)
        _check_skip(model, config.quantization)
        self.graph = split_params(model)[0]
        # What a gradient passes through in float16, small ones would not survive.
        self.scales_loss = "float16" in (config.llama.dtype, config.optimizer.master)

    def _model(self) -> Llama:
        c = self.config
        return Llama(c.llama, c.quantization, rngs=nnx.Rngs(c.seed))

    def init(self) -> TrainState:
        """The state before the first step."""
        _, params, stats = split_params(self._model())
        master_format = self.config.optimizer.master
        return TrainState(
            step=jnp.int32(0),
            params=master.encode(params, master_format, decay_mask),
            stats=stats,
            opt_state=self.optimizer.init(params),
            loss_scale=LossScale.init() if self.scales_loss else None,
        )

    @functools.cached_property
    def shardings(self) -> TrainState:
        """Where each leaf of the state lies.

        Raises:
            UserError: the mesh does not divide a weight.
        """
        return self.placement.state(jax.eval_shape(self.init))

    @functools.cached_property
    def placed_init(self) -> Callable[[], TrainState]:
        """``init``, compiled so that every device makes its part of the state alone."""
        return jax.jit(self.init, out_shardings=self.shardings)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without making it."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(self.init),
            self.shardings,
        )

    def batch_shape(self) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of a batch: the inputs and, one later, their targets."""
        shape = (self.config.batch_size, self.config.seq_len + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.placement.batch)

    def step(
        self, state: TrainState, batch: Int32[Array, "b s1"]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step.

        A gradient without a finite norm changes nothing but ``step`` and the counts of what
        was skipped.

        Returns:
            The next state, and the scalars ``loss`` (mean nats a token), ``grad_norm`` (before
            clipping), ``lr``, ``skipped`` (in all) and ``skipped_in_a_row``; where the loss is
            scaled ``loss_scale``, and with float16 weights ``overflowed``, whether one is infinite.
        """
        scale = state.loss_scale
        with grad_comm(self.config.gradients_sent_in):
            loss, stats, grads = self._gradient(state, batch)
        with jax.named_scope("optimizer"):
            params, opt_state, grad_norm = self.optimizer.step(
                state.params,
                state.opt_state,
                grads,
                scale=1.0 if scale is None else 1 / scale.value,
                seed=self.config.seed,
                step=state.step,
                shardings=self.shardings.params,
            )
        finite = opt_state.last_finite
        stats = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stats, state.stats)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            # The schedule counts the steps that were taken.
            "lr": self.schedule(state.step - state.opt_state.total_notfinite),
            "skipped": opt_state.total_notfinite,
            "skipped_in_a_row": opt_state.notfinite_count,
        }
        if scale is not None:
            metrics["loss_scale"] = scale.value
            scale = scale.after(finite)
        if self.config.optimizer.master == "float16":
            metrics["overflowed"] = ~norm_and_finite(params)[1]
        return TrainState(state.step + 1, params, stats, opt_state, scale), metrics

    def prepare(self, params: Any, stats: Any) -> Any:
        """Every quantised weight's codes, for all that a step computes with them.

        None of them where a step has one microbatch and recomputes nothing: each weight is then
        quantised once as it is, and need not be packed.
        """
        model = self._merge(params, stats)
        if self.config.optimizer.accumulation > 1 or self.config.llama.remat != "none":
            model.prepare()
        return nnx.state(model, Prepared)

    def loss(
        self, params: Any, prepared: Any, stats: Any, batch: Int32[Array, "b s1"]
    ) -> tuple[Float32[Array, ""], Any]:
        """Mean loss of a microbatch, nats a token, and the statistics after it."""
        model = self._merge(params, stats)
        nnx.update(model, prepared)
        loss = mean_loss(model, batch)
        _, *states = nnx.split(model, nnx.Param, Prepared, ...)
        return loss, states[-1]

    def _gradient(self, state: TrainState, batch: Array) -> tuple[Array, Any, Any]:
        """Loss, new statistics and gradient, averaged over the microbatches.

        The gradient has the dtypes of the stored parameters and is that of the scaled loss.
        """
        scale = 1.0 if state.loss_scale is None else state.loss_scale.value
        prepared = self.prepare(state.params, state.stats)

        def loss_of(params: Any, stats: Any, tokens: Array) -> tuple[Array, Any]:
            loss, stats = self.loss(params, prepared, stats, tokens)
            return loss * scale, (loss, stats)

        def gradient(params: Any, stats: Any, tokens: Array) -> tuple[Any, Any]:
            # Here, since slices cut ahead of the loop over microbatches would stand beside it.
            grads, aux = jax.grad(loss_of, has_aux=True)(sliced(params), stats, tokens)
            return aux, constrain_weights(grads)

        sliced = as_stored if self.config.llama.scan_layers else by_layers
        n = self.config.optimizer.accumulation
        if n == 1:
            (loss, stats), grads = gradient(state.params, state.stats, batch)
            return loss, stats, grads

        def accumulate(carry: Any, tokens: Array) -> tuple[Any, None]:
            loss, stats, grads = carry
            (new_loss, stats), new = gradient(state.params, stats, tokens)
            grads = jax.tree.map(lambda total, g: total + g / n, grads, new)
            return (loss + new_loss / n, stats, grads), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(sliced, state.params))
        microbatches = constrain(batch.reshape(n, -1, batch.shape[1]), None, "batch")
        carry, _ = jax.lax.scan(accumulate, (jnp.float32(0), state.stats, zeros), microbatches)
        return carry

    def _microbatches(self, batch: Int32[Array, "b s1"]) -> Int32[Array, "n rows s1"]:
        """As many as a step has, or as many as rows allow: what fits a step fits their forward."""
        n = math.gcd(self.config.optimizer.accumulation, batch.shape[0] // self.placement.shards)
        return constrain(batch.reshape(n, -1, batch.shape[1]), None, "batch")

    def _merge(self, params: Any, stats: Any) -> Llama:
        """The model of stored parameters, which it decodes a layer at a time."""
        model = nnx.merge(self.graph, params, stats, copy=True)
        model.load = decode
        return model

    def evaluate(self, params: Any, stats: Any, batch: Int32[Array, "b s1"]) -> Float32[Array, ""]:
        """Mean loss of a batch, nats a token, by the recipe's forward and running calibration."""

        def loss(rows: Array) -> Array:
            model = self._merge(params, stats)
            model.eval()
            return mean_loss(model, rows)

        return jnp.mean(jax.lax.map(loss, self._microbatches(batch)))

    def health(
        self, params: Any, stats: Any, batch: Int32[Array, "b s1"]
    ) -> dict[str, dict[str, Array]]:
        """Quantisation health of every quantised layer on a batch's first microbatch.

        Returns:
            By layer path, then by measure (``jfp4.ops.health``), an array over stacked layers.
        """
        model = self._merge(params, stats)
        model.set_attributes(Linear, monitor=True)
        mean_loss(model, self._microbatches(batch)[0])
        seen = nnx.state(model, nnx.Intermediate)
        return {
            ".".join(str(key) for key in path[:-1]): variable.get_value()[0]
            for path, variable in nnx.to_flat_state(seen)
        }


def decode(params: Any) -> Any:
    """A tree of parameters as they are computed with: bfloat16 needs no decoding."""
    return jax.tree.map(lambda p: p if p.dtype == jnp.bfloat16 else master.decode(p), params)


def mean_loss(model: Llama, batch: Int32[Array, "b s1"]) -> Float32[Array, ""]:
    """Mean cross-entropy of each next token, in nats."""
    return model.loss(batch[:, :-1], batch[:, 1:])
