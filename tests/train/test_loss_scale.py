"""The loss scale by itself."""

import jax
import jax.numpy as jnp

from train.loss_scale import GROWTH_STEPS, LARGEST, START, LossScale

after = jax.jit(LossScale.after)


def test_halves_at_once_and_doubles_after_many():
    scale = LossScale.init()
    assert float(scale.value) == START == 2.0**16
    scale = after(after(scale, True), False)
    assert (float(scale.value), int(scale.fitting_steps)) == (START / 2, 0)
    for _ in range(GROWTH_STEPS - 1):
        scale = after(scale, True)
    assert (float(scale.value), int(scale.fitting_steps)) == (START / 2, GROWTH_STEPS - 1)
    scale = after(scale, True)
    assert (float(scale.value), int(scale.fitting_steps)) == (START, 0)


def test_it_and_its_reciprocal_stay_normal_numbers():
    ready = jnp.int32(GROWTH_STEPS - 1)
    for start, finite in ((LARGEST, True), (1 / LARGEST, False)):
        scale = after(LossScale(jnp.float32(start), ready), finite)
        assert float(scale.value) == start and float(1 / scale.value) == 1 / start
