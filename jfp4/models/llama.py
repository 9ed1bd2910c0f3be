"""The Llama decoder in flax.nnx, its layers stacked under scan."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from jfp4.models.config import LlamaConfig
from jfp4.models.embedding import look_up
from jfp4.models.head import loss_of_parts
from jfp4.nn import CalibrationStat, Linear, Prepared, convert
from jfp4.ops.cross_entropy import cross_entropy, cross_entropy_of_logits
from jfp4.ops.linear import CODES_NAME
from jfp4.ops.rms_norm import rms_norm, rms_norm_of_stream
from jfp4.ops.slices import Slices, scan_written_out
from jfp4.recipe import Recipe, get_recipe
from jfp4.sharding import batch_shards, constrain

M = TypeVar("M", bound=nnx.Module)

INIT_STD = 0.02

_WRITTEN = (CalibrationStat, nnx.Intermediate)
"""What a call leaves in the model."""

_QKV, _PRODUCTS = "llama_qkv", "llama_product"

_save = jax.checkpoint_policies.save_only_these_names
REMAT: dict[str, Callable[..., Any]] = {
    "codes": _save(CODES_NAME, _QKV, _PRODUCTS),
    "products": _save(_QKV, _PRODUCTS),
    "qkv": _save(_QKV),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What ``LlamaConfig.remat`` keeps of a layer for the backward, as policies of jax.checkpoint.

Bytes a token a layer in bfloat16, with d the embed_dim, m the mlp_dim and as many key heads as
query heads; of 13b (d = 5120, m = 13824); and what of fprop is computed again:

    codes     13 d + 5 m + 16   135,696   norms, attention, the activation
    products  10 d + 4 m        106,496   these and the quantisers of activations
    qkv        8 d               40,960   these and two of four products, 53% of the multiplications
    full       2 d               10,240   these and a third product, 78%

The stream itself is 2 d of each. Every product takes as many bytes for what it saves, so which of
them are kept is a matter of how many fit. The codes are a byte an activation. Packed, those
without outliers would be 0.5, which is a ninth of what codes keeps, for two passes over them in
every backward; those with outliers (2% in the paper's recipe), with a list of these at five bytes
each, 0.6, and a list has a length that is not known. Where that is wanted, products keeps neither.

Keeping what attention gave would save nothing: its own backward needs more of its forward.
"""


class Llama(nnx.Module):
    """Llama: pre-norm decoder with RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

    Every parameter declares its logical axes (``out_sharding`` metadata): vocab, embed, heads,
    mlp, and layers for the stacked ones.

    Attributes:
        embed: token embedding [vocab, embed].
        layers: one ``Block`` whose parameters have a leading layer axis.
        norm: the last RMSNorm.
        lm_head: output projection, or None where the embedding serves.
        load: makes of a State of parameters as they are stored those that are computed with, in
            float32 or a narrower dtype; it is applied to a layer's slice inside the scan over
            layers, and to the embedding, the last norm and the head by themselves, so that a
            decoded copy of them all never stands (unless ``config.remat`` is none: the backward
            then keeps what it gave). Gradients are those of the stored form.
    """

    def __init__(
        self, config: LlamaConfig, recipe: str | Recipe = "fp4", *, rngs: nnx.Rngs
    ) -> None:
        recipe = get_recipe(recipe)
        self.config = config
        self.load: Callable[[Any], Any] = as_stored
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

        Where an id is not in [0, vocab_size) they are NaN, and may be elsewhere too.

        Raises:
            ValueError: ``tokens`` is not a matrix of integers, or has none, or the mesh in force
                does not divide its sequences.
        """
        return self._logits(self._decode(tokens)).astype(jnp.float32)

    def loss(self, tokens: Int[Array, "b s"], targets: Int[Array, "b s"]) -> Float32[Array, ""]:
        """Mean cross-entropy of ``targets`` under the logits of ``tokens``, in nats.

        The logits are those of a call, but stand for ``config.loss_chunk`` tokens at a time
        (``cross_entropy``), in the backward as well. A quantised head takes all tokens at once: its
        thresholds and its gradient's scales are of the tensor that it is given, so that chunks
        would have other ones.

        Raises:
            ValueError: ``tokens`` or ``targets`` is not a matrix of integers or has none, they
                differ in shape, the mesh in force does not divide the sequences, or
                ``config.loss_chunk`` asks for chunks of a quantised head.
        """
        check_tokens(tokens, "tokens")
        check_tokens(targets, "targets")
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets has shape {targets.shape} and tokens {tokens.shape}; expected the same"
            )
        self.check_loss_chunk(tokens.size)
        x = self._decode(tokens)
        chunk = self.config.loss_chunk
        if self._quantises_head():
            return cross_entropy_of_logits(self._logits(x), targets)
        # Where a mesh divides the batch each part makes chunks of its own, and its own gradient of
        # the head; without one, there is one part.
        parts = batch_shards()
        x = constrain(x.reshape(parts, -1, x.shape[-1]), "batch")
        targets = constrain(targets.reshape(parts, -1), "batch")
        if parts == 1:
            return cross_entropy(x[0], self._head_weight(), targets[0], chunk=chunk)
        return loss_of_parts(chunk, x, self._head_weight(), targets)

    def check_loss_chunk(self, tokens: int) -> None:
        """Raises ValueError if ``loss`` of so many tokens would refuse ``config.loss_chunk``."""
        chunk = self.config.loss_chunk
        if self._quantises_head() and chunk is not None and chunk < tokens:
            raise ValueError(
                f"loss_chunk={chunk} with {tokens} tokens and a quantised lm_head; "
                "expected None: its scales are those of all tokens"
            )

    def _quantises_head(self) -> bool:
        return isinstance(self.lm_head, Linear) and self.lm_head.recipe.quantizes

    def prepare(self) -> None:
        """Quantises every layer's weight once for all calls; see ``jfp4.nn.Linear.prepare``."""
        graph, params, rest = split_params(self.layers)

        def layer(states: tuple[Any, Any]) -> Any:
            params, rest = states
            block = nnx.merge(graph, self.load(params), rest)
            _prepare_linears(block)
            return nnx.state(block, Prepared)

        # A layer at a time: so no more than one stands decoded, or in bytes.
        nnx.update(self.layers, jax.lax.map(layer, (params, rest)))
        if self.lm_head is not None:
            head = self._loaded(self.lm_head)
            _prepare_linears(head)
            nnx.update(self.lm_head, nnx.state(head, Prepared))

    def _decode(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        check_tokens(tokens, "tokens")
        if tokens.shape[0] % batch_shards():
            raise ValueError(
                f"tokens has {tokens.shape[0]} sequences, which the mesh in force divides by "
                f"{batch_shards()}; expected a multiple of that"
            )
        x = constrain(self._embedded(tokens), "batch")
        sin_cos = rotary_angles(x.shape[1], self.config.head_dim, self.config.rope_theta)
        graph, params, rest = split_params(self.layers)

        def layer(x: Array, states: tuple[Any, Any]) -> tuple[Array, Any]:
            params, rest = states
            block = nnx.merge(graph, self.load(params), rest)
            x = constrain(block(x, sin_cos), "batch")
            return x, nnx.state(block, _WRITTEN)

        if self.config.remat != "none":
            # Where layers are written out, nothing else keeps what is computed again from being
            # found equal to what was computed before, and kept.
            policy, written_out = REMAT[self.config.remat], not self.config.scan_layers
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=written_out)
        scan = jax.lax.scan if self.config.scan_layers else scan_written_out
        x, written = scan(layer, x, (params, rest))
        nnx.update(self.layers, written)
        norm = self._loaded(self.norm)
        return rms_norm(x, _scale(norm), epsilon=norm.epsilon)

    def _embedded(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        embed, parts = self._loaded(self.embed), batch_shards()
        # What is no id has NaN, but negative ones would count from the end.
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32))
        tokens = jnp.where(tokens < 0, embed.num_embeddings, tokens)
        ids = tokens.reshape(parts, -1, tokens.shape[1])
        found = look_up(embed.embedding[...], ids, _dtype(self.config))
        return found.reshape(*tokens.shape, -1)

    def _logits(self, x: Float[Array, "b s d"]) -> Float[Array, "b s v"]:
        if self.lm_head is None:
            return self._loaded(self.embed).attend(x)
        head = self._loaded(self.lm_head)
        logits = head(x)
        nnx.update(self.lm_head, nnx.state(head, _WRITTEN))
        return logits

    def _head_weight(self) -> Float[Array, "d v"]:
        if self.lm_head is None:
            return self._loaded(self.embed).embedding[...].T
        return self._loaded(self.lm_head).kernel[...]

    def _loaded(self, module: M) -> M:
        graph, params, rest = split_params(module)
        return nnx.merge(graph, self.load(params), rest)


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
        x, normalised = _normalised(self.attention_norm, x)
        x, normalised = _normalised(self.mlp_norm, x, self.attention(normalised, sin_cos))
        return x + self.mlp(normalised)


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
        qkv = checkpoint_name(self.qkv_proj(x), _QKV).reshape(b, s, c.num_kv_heads, -1, c.head_dim)
        # Not by slices, whose gradients are filled up with zeros and added.
        group = c.num_heads // c.num_kv_heads
        q, k, v = jnp.split(qkv, (group, group + 1), axis=-2)
        q = rotate(q.reshape(b, s, c.num_heads, c.head_dim), sin_cos)
        k = rotate(k[..., 0, :], sin_cos)
        y = attend(q, k, v[..., 0, :], attention_implementation(c))
        return checkpoint_name(self.o_proj(y.reshape(b, s, -1)), _PRODUCTS)


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
        # Where the tokens are fewer than the width, XLA would rather divide the gradients of both
        # as it does the weights, and send activations to and fro.
        y = constrain(checkpoint_name(self.gate_up_proj(x), _PRODUCTS), "batch", None, "mlp")
        y = y.reshape(*y.shape[:-1], -1, 2)
        return self.down_proj(constrain(jax.nn.silu(y[..., 0]) * y[..., 1], "batch", None, "mlp"))


def _normalised(norm: nnx.RMSNorm, *terms: Array) -> tuple[Array, Array]:
    """The stream, and what a norm gives of it."""
    return rms_norm_of_stream(terms, _scale(norm), epsilon=norm.epsilon)


def _scale(norm: nnx.RMSNorm) -> Array:
    assert norm.scale is not None
    return norm.scale[...]


def _prepare_linears(module: nnx.Module) -> None:
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Linear):
            layer.prepare()


def as_stored(params: Any) -> Any:
    """The ``load`` of a model whose parameters are stored as they are computed with."""
    return params


def split_params(module: nnx.Module) -> tuple[Any, Any, Any]:
    """Splits a module into its graph, its parameters, and all other state."""
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states
    return graph, params, rest


def by_layers(params: nnx.State) -> nnx.State:
    """A model's parameters with its layers' stacks as ``Slices``.

    Where layers are written out, logits and losses take them so, and so are their gradients then;
    ``Llama.prepare`` wants stacks.
    """

    def cut(path: tuple[Any, ...], variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        if path[0] != "layers":
            return variable
        return variable.replace(Slices.of(variable.get_value()))

    return nnx.map_state(cut, params)


def check_tokens(tokens: Array, name: str) -> None:
    """Raises ValueError, naming the argument, unless ``tokens`` is a matrix of some integers."""
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise ValueError(f"{name} is a {type(tokens).__name__}; expected an array [b, s] of ids")
    if tokens.ndim != 2 or tokens.size == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{name} is {tokens.dtype}{list(tokens.shape)}; expected [b, s] integers, and some"
        )


def attend(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b s g e"],
    v: Float[Array, "b s g e"],
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "b s h e"]:
    """Causal attention; ``g`` key heads are each shared by ``h / g`` query heads."""

    def dot(q: Array, k: Array, v: Array, by: Literal["xla", "cudnn"] = implementation) -> Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=by)

    if q.dtype != jnp.float16:
        return dot(q, k, v)

    def wide(*operands: Array) -> Array:
        q, k, v = (x.astype(jnp.float32) for x in operands)
        # cuDNN refuses float32 even where it is not to compute.
        return dot(q, k, v, "xla").astype(jnp.float16)

    # CPUs have no such product.
    return jax.lax.platform_dependent(q, k, v, cpu=wide, default=dot)


def attention_implementation(
    config: LlamaConfig, platform: str | None = None
) -> Literal["xla", "cudnn"]:
    """What ``config.attention`` means on a platform, by default the default device's.

    Warns:
        UserWarning: "auto" is XLA on a GPU only because cuDNN refuses heads of this size.
    """
    if config.attention != "auto":
        return config.attention
    if (platform or jax.default_backend()) != "gpu" or config.dtype == "float32":
        return "xla"
    if config.head_dim % 8 == 0 and config.head_dim <= 256:
        return "cudnn"
    warnings.warn(
        f"attention is computed by XLA: cuDNN takes heads of up to 256 dimensions, in eights, and "
        f"these have {config.head_dim}",
        stacklevel=2,
    )
    return "xla"


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
