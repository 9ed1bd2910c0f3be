"""The optimizer: AdamW under warm-up and cosine, clipped, skipping what is not finite."""

from typing import Any

import jax
import optax

from jfp4.adamw import AdamW
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


def make_optimizer(config: TrainConfig) -> AdamW:
    """The optimizer; its state counts steps without a finite gradient."""
    o = config.optimizer
    return AdamW(
        schedule(config),
        b1=o.beta1,
        b2=o.beta2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        mask=decay_mask,
        clip_norm=o.clip_norm,
        first=o.first_moment,
        second=o.second_moment,
        seed=config.seed if o.rounding == "stochastic" else None,
    )


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay."""

    def is_matrix(path: Any, _: Any) -> bool:
        return any(str(getattr(key, "key", key)) in DECAYED for key in path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
