"""The Llama decoder in flax.nnx, its layers stacked under scan."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jfp4.models.config import LlamaConfig
from jfp4.nn import CalibrationStat, convert
from jfp4.ops.linear import save_codes
from jfp4.recipe import Recipe, get_recipe

INIT_STD = 0.02


class Llama(nnx.Module):
    """Llama: pre-norm decoder with RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

    Every parameter declares its logical axes (``out_sharding`` metadata): vocab, embed, heads,
    mlp, and layers for the stacked ones.

    Attributes:
        embed: token embedding [vocab, embed].
        layers: one ``Block`` whose parameters have a leading layer axis.
        norm: the last RMSNorm.
        lm_head: output projection, or None where the embedding serves.
    """

    def __init__(
        self, config: LlamaConfig, recipe: str | Recipe = "fp4", *, rngs: nnx.Rngs
    ) -> None:
        recipe = get_recipe(recipe)
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.embed_dim,
            dtype=_dtype(config),
            embedding_init=nnx.initializers.normal(INIT_STD),
            embedding_metadata=_axes("vocab", "embed"),
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = _norm(config, rngs)
        self.lm_head = (
            None
            if config.tied_head
            else _projection(config, config.embed_dim, config.vocab_size, "embed", "vocab", rngs)
        )
        if recipe.quantizes:
            convert(self, recipe)

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s v"]:
        """Logits of the next token at every position, in float32.

        Raises:
            ValueError: ``tokens`` is not a matrix of integers.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens is {tokens.dtype}{list(tokens.shape)}; expected [b, s] integers"
            )
        x = self.norm(self._decode(self.embed(tokens)))
        logits = self.embed.attend(x) if self.lm_head is None else self.lm_head(x)
        return logits.astype(jnp.float32)

    def _decode(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        sin_cos = rotary_angles(x.shape[1], self.config.head_dim, self.config.rope_theta)
        graph, params, rest = split_params(self.layers)

        def layer(x: Array, states: tuple[Any, Any]) -> tuple[Array, Any]:
            block = nnx.merge(graph, *states)
            x = block(x, sin_cos)
            return x, nnx.state(block, (CalibrationStat, nnx.Intermediate))

        if self.config.remat != "none":
            policy = save_codes if self.config.remat == "codes" else None
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        x, written = jax.lax.scan(layer, x, (params, rest), unroll=not self.config.scan_layers)
        nnx.update(self.layers, written)
        return x


class Block(nnx.Module):
    """One decoder layer: attention and MLP, each after a norm and added to the stream."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b s d"], sin_cos: tuple[Array, Array]
    ) -> Float[Array, "b s d"]:
        """Returns the residual stream after the layer."""
        x = x + self.attention(self.attention_norm(x), sin_cos)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nnx.Module):
    """Causal grouped-query attention.

    One product makes queries, keys and values, so that their common input is quantised once. Its
    columns are ordered by key head (that head's queries, its key, its value), so that a tensor
    axis may split them between heads.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = _projection(
            config, config.embed_dim, heads * config.head_dim, "embed", "heads", rngs
        )
        self.o_proj = _projection(
            config, config.embed_dim, config.embed_dim, "heads", "embed", rngs, residual=True
        )

    def __call__(
        self, x: Float[Array, "b s d"], sin_cos: tuple[Array, Array]
    ) -> Float[Array, "b s d"]:
        """Attends over the sequence; every position to itself and those before."""
        c = self.config
        b, s, _ = x.shape
        qkv = self.qkv_proj(x).reshape(b, s, c.num_kv_heads, -1, c.head_dim)
        q = rotate(qkv[..., :-2, :].reshape(b, s, c.num_heads, c.head_dim), sin_cos)
        k = rotate(qkv[..., -2, :], sin_cos)
        y = jax.nn.dot_product_attention(
            q, k, qkv[..., -1, :], is_causal=True, implementation=attention_implementation(c)
        )
        return self.o_proj(y.reshape(b, s, -1))


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``.

    One product makes gate and up, as neighbouring columns, so that their common input is quantised
    once and a tensor axis may split them.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.gate_up_proj = _projection(
            config, config.embed_dim, 2 * config.mlp_dim, "embed", "mlp", rngs
        )
        self.down_proj = _projection(
            config, config.mlp_dim, config.embed_dim, "mlp", "embed", rngs, residual=True
        )

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Applies the layer to every position."""
        y = self.gate_up_proj(x)
        y = y.reshape(*y.shape[:-1], -1, 2)
        return self.down_proj(jax.nn.silu(y[..., 0]) * y[..., 1])


def split_params(module: nnx.Module) -> tuple[Any, Any, Any]:
    """Splits a module into its graph, its parameters, and all other state."""
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states
    return graph, params, rest


def attention_implementation(config: LlamaConfig) -> Literal["xla", "cudnn"]:
    """What ``config.attention`` means on the default device."""
    if config.attention != "auto":
        return config.attention
    cudnn = jax.default_backend() == "gpu" and config.dtype == "bfloat16"
    return "cudnn" if cudnn else "xla"


def rotary_angles(
    length: int, head_dim: int, theta: float
) -> tuple[Float[Array, "s 1 e"], Float[Array, "s 1 e"]]:
    """Sine and cosine of the rotary angles, float32; ``e`` is half the head dimension.

    Pair i turns by ``position * theta ** (-2 i / head_dim)`` (arXiv 2104.09864, section 3.4.2).
    """
    wavelength = theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] / wavelength
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: Float[Array, "b s h e2"], sin_cos: tuple[Array, Array]) -> Float[Array, "b s h e2"]:
    """Applies the rotary embedding, pairing the first half of a head with the second."""
    sin, cos = sin_cos
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _dtype(config: LlamaConfig) -> Any:
    return jnp.dtype(config.dtype)


def _axes(*names: str) -> dict[str, Any]:
    # Names only: they become shardings when a mesh is chosen, not while a weight is made.
    return {"out_sharding": names, "eager_sharding": False}


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.embed_dim,
        epsilon=config.norm_eps,
        dtype=_dtype(config),
        scale_metadata=_axes("embed"),
        rngs=rngs,
    )


def _projection(
    config: LlamaConfig,
    inputs: int,
    outputs: int,
    input_axis: str,
    output_axis: str,
    rngs: nnx.Rngs,
    residual: bool = False,
) -> nnx.Linear:
    # The two layers that write to the residual stream start smaller, so that its variance does not
    # grow with depth.
    std = INIT_STD / (2 * config.num_layers) ** 0.5 if residual else INIT_STD
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=_dtype(config),
        kernel_init=nnx.initializers.normal(std),
        kernel_metadata=_axes(input_axis, output_axis),
        rngs=rngs,
    )
