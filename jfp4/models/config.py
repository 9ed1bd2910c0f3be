"""LlamaConfig and the named sizes."""

import dataclasses
import math
from typing import Literal

from jfp4.recipe import check_choices, is_count


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and compute settings of a Llama decoder.

    Raises:
        ValueError: sizes that do not divide or are not positive, naming the fields.
    """

    vocab_size: int = 32000
    """Number of token ids."""

    embed_dim: int = 512
    """Width of the residual stream."""

    num_layers: int = 8
    """Number of decoder layers."""

    num_heads: int = 8
    """Query heads; embed_dim / num_heads is the head dimension."""

    num_kv_heads: int = 8
    """Key and value heads, each shared by num_heads / num_kv_heads query heads."""

    mlp_dim: int = 1376
    """Width of the SwiGLU layer."""

    tied_head: bool = False
    """Whether the output head is the embedding transposed."""

    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""

    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute dtype. float16 wants its loss scaled to be trained, as train.main does."""

    scan_layers: bool = True
    """Whether layers share one compiled body; written out, they compile longer and run faster."""

    remat: Literal["none", "codes", "products", "qkv", "full"] = "none"
    """What is kept of a layer for the backward: all; codes and products; products; qkv; nothing."""

    loss_chunk: int | None = None
    """Most tokens whose logits stand at a time in training; None: as many as take 1 GiB."""

    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention implementation; auto is cudnn on a GPU, but for float32 and heads of more than 256
    dimensions or a number that 8 does not divide, and xla elsewhere."""

    def __post_init__(self) -> None:
        check_choices(self)
        for field in (
            "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim"
        ):  # fmt: skip
            if not is_count(getattr(self, field)):
                raise ValueError(f"{field}={getattr(self, field)}; expected a positive integer")
        if self.loss_chunk is not None and not is_count(self.loss_chunk):
            raise ValueError(f"loss_chunk={self.loss_chunk}; expected a positive integer or None")
        for field in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)}; expected a positive number")
        if self.embed_dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"embed_dim={self.embed_dim} and num_heads={self.num_heads}; expected an even "
                "number of dimensions a head"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}; expected the "
                "second to divide the first"
            )

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.embed_dim // self.num_heads


def _size(embed_dim: int, num_layers: int, num_heads: int, mlp_dim: int) -> LlamaConfig:
    return LlamaConfig(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        mlp_dim=mlp_dim,
    )


MODELS: dict[str, LlamaConfig] = {
    # For CPUs, where scanned layers run at half the speed, and for byte vocabularies.
    "llama5m": LlamaConfig(512, 256, 6, 4, 2, 688, tied_head=True, scan_layers=False),
    "llama60m": _size(512, 8, 8, 1376),
    "llama130m": _size(768, 12, 12, 2048),
    "llama400m": _size(1024, 24, 16, 3072),
    # The three of arXiv 2501.17116.
    "llama1b": _size(2048, 24, 16, 5504),
    "llama7b": _size(4096, 32, 32, 11008),
    "llama13b": _size(5120, 40, 40, 13824),
}
"""Named sizes; all but the first with a vocabulary of 32,000."""
