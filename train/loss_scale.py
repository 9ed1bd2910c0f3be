"""The loss scale: what a loss is multiplied by so that float16 gradients are neither 0 nor inf."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

START, GROWTH_STEPS = 2.0**16, 2000
"""As flax's ``DynamicScale`` has them, and its halving and doubling."""

LARGEST = 2.0**100
"""Beyond it the reciprocal would go subnormal; nothing comes near."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """A power of two that halves after a gradient that overflowed and doubles after 2000 that fit.

    Not ``flax.training.dynamic_scale.DynamicScale``: it takes the gradient itself, and hands it out
    whole, divided and in float32, four bytes a parameter.

    Attributes:
        value: the scale.
        fitting_steps: finite gradients since it last changed.
    """

    value: Float32[Array, ""]
    fitting_steps: Int32[Array, ""]

    @classmethod
    def init(cls) -> "LossScale":
        """The scale of the first step."""
        return cls(jnp.float32(START), jnp.int32(0))

    def after(self, finite: Bool[Array, ""]) -> "LossScale":
        """The scale of the next step; ``finite`` says whether this one's gradient was."""
        grows = finite & (self.fitting_steps + 1 >= GROWTH_STEPS)
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        value = jnp.clip(self.value * factor, 1 / LARGEST, LARGEST)
        return LossScale(value, jnp.where(finite & ~grows, self.fitting_steps + 1, 0))
