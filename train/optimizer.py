"""The optimizer: AdamW under warm-up and cosine, clipped, skipping what is not finite."""

from typing import Any

import jax
import optax

from jfp4 import optim
from train.config import TrainConfig

DECAYED = ("kernel", "embedding")
"""Names of the parameters with weight decay: the matrices."""


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up to ``lr``, then cosine to its final share."""
    warmup = max(1, round(config.steps * config.optimizer.warmup))
    return optax.warmup_cosine_decay_schedule(
        init_value=config.lr / warmup,
        peak_value=config.lr,
        warmup_steps=warmup,
        decay_steps=max(config.steps, warmup + 1),
        end_value=config.lr * config.optimizer.final_lr,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """The whole transformation; its state counts steps without a finite gradient."""
    o = config.optimizer
    adamw = optax.chain(
        optim.scale_by_adam(
            o.beta1,
            o.beta2,
            o.eps,
            first=o.first_moment,
            second=o.second_moment,
            seed=config.seed if o.rounding == "stochastic" else None,
        ),
        optax.add_decayed_weights(o.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule(config)),
    )
    clip = optax.identity() if o.clip_norm is None else optim.clip_by_norm(o.clip_norm)
    return optim.skip_not_finite(optax.chain(clip, adamw))


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay."""

    def is_matrix(path: Any, _: Any) -> bool:
        return any(str(getattr(key, "key", key)) in DECAYED for key in path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
