"""The compiled kernels: which path serves an operation, and one function a target.

Every operation that has a kernel has three paths: ``xla``, which is JAX and runs everywhere;
``cuda``, for GPUs of compute capability 9.0; and ``host``, the same targets in C++ on the CPU. All
take and give the same codes. Where a computation is lowered for a GPU whose kernels there are, they
serve, and elsewhere XLA does, unless ``backend`` or the environment's JFP4_BACKEND asks for one.

The functions below are given arrays with any leading (batch) dimensions, which all operands share.
``jax.vmap`` adds one to every operand: what was not batched is broadcast first. ``adamw`` alone is
of one tensor a call, and is called for one after the other.
"""

import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from jfp4.formats import FORMATS, get_format
from jfp4.ops import partition
from jfp4.ops.partition import Rule

T = TypeVar("T")
Backend = Literal["auto", "xla", "host", "cuda"]
Layout = Literal["codes", "codes_t", "packed"]

OPERATIONS = ("quantize", "thresholds", "gemm", "packed_gemm", "adamw", "rms_norm")
"""What has kernels."""

INTERFACE = 14
"""The targets' operands, results and attributes as a number; see cuda_ffi/bindings.cc."""

_BUILD = "`cmake -S . -B build && cmake --build build` in a checkout builds it"

# ------------------------------------------------------------------------------------ the module


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why there is none to use."""
    try:
        module = importlib.import_module("jfp4._kernels")
    except ModuleNotFoundError:
        return None, f"jfp4._kernels is not built; {_BUILD}"
    except ImportError as error:
        return None, f"jfp4._kernels does not load: {error}"
    if getattr(module, "interface", None) != INTERFACE:
        return None, "jfp4._kernels was built for another version of jfp4; build it again"
    if _numbers(module.jaxlib) > _numbers(jaxlib.version.__version__):
        return None, (
            f"jfp4._kernels was built with jaxlib {module.jaxlib}, newer than the "
            f"{jaxlib.version.__version__} that runs; build it again"
        )
    return module, ""


def _numbers(version: str) -> list[int]:
    # A part may end in letters, such as a release candidate's.
    return [int(re.sub(r"\D.*", "", part) or 0) for part in version.split(".")[:3]]


def _register(module: ModuleType) -> frozenset[str]:
    """Makes the targets known to XLA; returns the platforms that there are some for."""
    registrations = module.registrations()
    for platform, targets in registrations.items():
        for name, handler in targets.items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)
    return frozenset(platform.lower() for platform, targets in registrations.items() if targets)


_module, _why_no_module = _load()
_platforms = frozenset() if _module is None else _register(_module)


def missing(path: Literal["host", "cuda"]) -> str:
    """Why this path cannot serve on this machine; empty if it can."""
    if _module is None:
        return _why_no_module
    return "" if path == "host" else _missing_cuda()


def _missing_cuda() -> str:
    if "cuda" not in _platforms:
        return "jfp4._kernels was built without a CUDA compiler (12.5 or newer)"
    return _unfit_devices() or _old_driver()


@functools.cache
def _unfit_devices() -> str:
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return "JAX has no CUDA device"
    for device in devices:
        if device.compute_capability != "9.0":
            return (
                f"{device.device_kind} has compute capability {device.compute_capability}, not 9.0"
            )
    return ""


@functools.cache
def _old_driver() -> str:
    assert _module is not None
    built, driver = _module.cuda_versions()
    # A driver runs what was built with its own major version; before 12.3 it does not record
    # kernels that begin before the last has ended, in the graphs that XLA makes.
    if driver // 1000 >= built // 1000 and driver >= 12030:
        return ""
    major, minor = (built // 1000, 0) if driver // 1000 < built // 1000 else (12, 3)
    return (
        f"the driver has CUDA {driver // 1000}.{driver % 1000 // 10}; expected {major}.{minor} or "
        f"newer, of kernels built with {built // 1000}.{built % 1000 // 10}"
    )


# -------------------------------------------------------------------------------------- choosing

_asked = jax.make_user_context(os.environ.get("JFP4_BACKEND", "auto"))


def backend(name: Backend) -> AbstractContextManager[None]:
    """Asks for one path in place of the default: ``with jfp4.backend("xla"): ...``.

    It holds for what is traced in the context; ``jax.jit`` compiles a function anew when it is
    called in another. JFP4_BACKEND in the environment sets what holds outside of any.

    Args:
        name: "auto", "cuda" where a GPU and its kernels are there and "xla" elsewhere; "xla";
            "host", the targets on the CPU; "cuda", those of compute capability 9.0. What has no
            kernel is computed by XLA under any of them.

    Raises:
        ValueError: another name.
        RuntimeError: not here, but when an operation is traced: the path is missing.
    """
    return _asked(_checked(name))


def _checked(name: str, what: str = "backend") -> Any:
    if name not in get_args(Backend):
        raise ValueError(f"{what}={name!r}; expected one of {', '.join(get_args(Backend))}")
    return name


@dataclasses.dataclass(frozen=True)
class Served:
    """The path that serves an operation, and why, where that is not a matter of course."""

    path: Literal["xla", "host", "cuda"]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.path} ({self.why})" if self.why else self.path


@dataclasses.dataclass(frozen=True)
class Backends:
    """Which path serves each operation on a platform.

    Attributes:
        platform: as JAX names it, but cuda for a GPU of NVIDIA's.
        operations: by name.
    """

    platform: str
    operations: dict[str, Served]

    def __str__(self) -> str:
        by_path: dict[str, list[str]] = {}
        for operation, served in self.operations.items():
            by_path.setdefault(str(served), []).append(operation)
        parts = (f"{', '.join(names)} by {path}" for path, names in by_path.items())
        return f"on {self.platform}: {'; '.join(parts)}"


def backends() -> Backends:
    """Which path serves each operation on the default platform, here and now, and why.

    On a CPU that is XLA unless the host path is asked for. Scales of whole tensors, shifts, the
    estimator's slope by itself and norms of more than 8,192 columns have no kernels: XLA computes
    them always. As a factor of a product, in its epilogue, E2M1's slope with k above 1 has one,
    unless fsdp divides the product or its sum is made in FP8.

    Raises:
        RuntimeError: the path asked for (``backend``) is missing, or cannot serve on this mesh.
    """
    platform = jax.default_backend()
    if platform == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower():
        platform = "cuda"
    return Backends(platform, dict.fromkeys(OPERATIONS, _served(platform)))


def _served(platform: str) -> Served:
    asked = _asked_for()
    if asked == "xla":
        return Served("xla", "asked for")
    if asked == "auto" and platform != "cuda":
        return Served("xla")
    if why := _unfit():
        return Served("xla", why)
    if asked != "auto":
        return Served(asked, "asked for")
    return Served("xla", why) if (why := missing("cuda")) else Served("cuda")


def _asked_for() -> Backend:
    # What a context asks for has been checked.
    asked = _checked(_asked.value, "JFP4_BACKEND")
    if asked in ("host", "cuda") and (why := missing(asked)):
        raise RuntimeError(f"the backend asked for, {asked!r}, is missing: {why}")
    return asked


def _unfit() -> str | None:
    """Why kernels cannot serve on this mesh, if so; an error where they are asked for."""
    why = partition.unfit()
    if why and (asked := _asked_for()) != "auto":
        raise RuntimeError(f"the backend asked for, {asked!r}, cannot serve: {why}")
    return why


def kernel_platforms() -> tuple[str, ...]:
    """The platforms on which kernels serve, as things are now.

    Raises:
        RuntimeError: the path asked for is missing.
    """
    asked = _asked_for()
    if asked == "host":
        return ("cpu",)
    return ("cuda",) if asked == "cuda" or (asked == "auto" and not missing("cuda")) else ()


def dispatch(
    kernel: Callable[..., T], xla: Callable[..., T], *operands: Any, rule: Rule | None = None
) -> T:
    """Computes by ``kernel`` on the platforms that it serves and by ``xla`` on the others.

    Both are given ``operands`` and return arrays of the same shapes and dtypes; only the one that
    serves is compiled. Under ``backend("host")`` and ``backend("cuda")`` there are no others: a
    computation lowered for another platform is an error of JAX's.

    Args:
        kernel: by FFI targets.
        xla: by JAX's own operations.
        operands: of both.
        rule: how they are divided over a mesh; both functions are given a ``Part`` first then.
            Without one ``kernel`` sees to it that it is not given what is divided.

    Raises:
        RuntimeError: the path asked for is missing, or cannot serve on this mesh.
    """
    platforms = kernel_platforms()
    if platforms and _unfit():
        platforms = ()
    if rule is not None:
        kernel, xla = partition.divided(kernel, rule), partition.divided(xla, rule)
    if not platforms:
        return xla(*operands)
    branches: dict[str, Any] = dict.fromkeys(platforms, kernel)
    if _asked.value == "auto":
        branches["default"] = xla
    return lax.platform_dependent(*operands, **branches)


# --------------------------------------------------------------------------------------- targets


class Quantized(NamedTuple):
    """What a quantiser wrote; None for a layout that was not wanted."""

    codes: Array | None
    codes_t: Array | None
    packed: Array | None
    scale: Array


def quantize_rows(
    x: Float[Array, "*b m k"],
    *,
    format: str,
    want: Collection[Layout],
    outliers: tuple[Float32[Array, "*b"], Float32[Array, "*b"]] | None = None,
    amax_floor: Float32[Array, "*b m 1"] | None = None,
) -> Quantized:
    """Quantises with a scale a row.

    Args:
        x: bfloat16, float16 or float32; no axis is empty.
        format: the codes' format, before compensation.
        want: of codes [m, k], codes_t [k, m] and packed, uint8 [m, ceil(k / 2)], those to write.
        outliers: thresholds to clamp at; what was clamped off is added to the codes, of four bits,
            which are E4M3 then.
        amax_floor: what the largest magnitude of each row, clamped, is at least, its sign bit
            clear: of a part of a tensor the whole's.

    Returns:
        What was wanted, and the scale [m, 1].
    """
    *batch, m, k = x.shape
    lo, hi = _thresholds(batch, outliers)
    dtype = get_format("e4m3" if outliers else format).dtype
    shapes = {"codes": (m, k), "codes_t": (k, m), "packed": (m, (k + 1) // 2)}
    results = (*_results(batch, shapes, dtype, want), _float32(*batch, m, 1))
    *outputs, scale = _call("jfp4_quantize_rows", results)(
        x, lo, hi, _floor(batch, amax_floor), format=_index(format)
    )
    return _quantized(outputs, shapes, want, scale)


def quantize_columns(
    x: Float[Array, "*b k n"],
    *,
    format: str,
    want: Collection[Layout],
    outliers: tuple[Float32[Array, "*b"], Float32[Array, "*b"]] | None = None,
    amax_floor: Float32[Array, "*b 1 n"] | None = None,
) -> Quantized:
    """Quantises with a scale a column; see ``quantize_rows``.

    Codes are [k, n], codes_t [n, k]; packed is of the transpose, uint8 [n, ceil(k / 2)]; the scale
    is [1, n].
    """
    *batch, k, n = x.shape
    lo, hi = _thresholds(batch, outliers)
    dtype = get_format("e4m3" if outliers else format).dtype
    shapes = {"codes": (k, n), "codes_t": (n, k), "packed": (n, (k + 1) // 2)}
    results = (
        *_results(batch, shapes, dtype, want),
        _float32(*batch, 1, n),
        _float32(*batch, n),  # scratch
    )
    *outputs, scale, _ = _call("jfp4_quantize_columns", results)(
        x, lo, hi, _floor(batch, amax_floor), format=_index(format)
    )
    return _quantized(outputs, shapes, want, scale)


def gradient_amax(
    dy: Float[Array, "*b m n"],
    col_factor: Float32[Array, "*b 1 n"],
    row_factor: Float32[Array, "*b m 1"],
) -> tuple[Float32[Array, "*b m 1"], Float32[Array, "*b 1 n"]]:
    """Largest magnitudes of the rows of ``dy * col_factor`` and the columns of ``dy * row_factor``.

    NaN where there is one. See ``quantize_gradient``.
    """
    *batch, m, n = dy.shape
    results = _float32(*batch, m, 1), _float32(*batch, 1, n), _counter(batch)
    of_rows, of_columns, _ = _call("jfp4_gradient_amax", results)(dy, col_factor, row_factor)
    return of_rows, of_columns


def quantize_gradient(
    dy: Float[Array, "*b m n"],
    col_factor: Float32[Array, "*b 1 n"],
    row_factor: Float32[Array, "*b m 1"],
    row_amax: Float32[Array, "*b m 1"],
    col_amax: Float32[Array, "*b 1 n"],
    *,
    format: str,
) -> tuple[Array, Float32[Array, "*b m 1"], Array, Float32[Array, "*b 1 n"]]:
    """Quantises a gradient for both of its products in one call.

    Args:
        dy: bfloat16, float16 or float32; no axis is empty.
        col_factor: multiplies dy for the product that contracts over n.
        row_factor: multiplies dy for the product that contracts over m.
        row_amax: by ``gradient_amax``; of a part of a gradient, the whole's.
        col_amax: likewise.
        format: the codes' format.

    Returns:
        Codes [m, n] of ``dy * col_factor`` and their scale a row; codes [n, m] of
        ``(dy * row_factor)^T`` and their scale a column of dy.
    """
    *batch, m, n = dy.shape
    dtype = get_format(format).dtype
    results = (
        jax.ShapeDtypeStruct((*batch, m, n), dtype),
        _float32(*batch, m, 1),
        jax.ShapeDtypeStruct((*batch, n, m), dtype),
        _float32(*batch, 1, n),
    )
    codes, row_scale, codes_t, col_scale = _call("jfp4_quantize_gradient", results)(
        dy, col_factor, row_factor, row_amax, col_amax, format=_index(format)
    )
    return codes, row_scale, codes_t, col_scale


def thresholds(
    x: Float[Array, "*b size"], *, stride: int, count: int, low_rank: int, high_rank: int
) -> tuple[Float32[Array, "*b"], Float32[Array, "*b"]]:
    """Order statistics of the elements 0, stride, 2 stride, ... (``count`` of them).

    Args:
        x: bfloat16, float16 or float32, not empty.
        stride: distance between the elements looked at.
        count: how many they are.
        low_rank: rank of the first result, from 0.
        high_rank: rank of the second.

    Returns:
        The elements at these ranks, float32; NaN if an element looked at is NaN.
    """
    batch = x.shape[:-1]
    lo, hi = _call("jfp4_thresholds", (_float32(*batch), _float32(*batch)))(
        x, stride=stride, count=count, low_rank=low_rank, high_rank=high_rank
    )
    return lo, hi


ROW_BYTES = 16
"""Rows of codes are padded to a multiple of what GPUs copy at a time."""


def gemm(
    a: Float[Array, "*b m k"],
    a_scale: Float32[Array, "*b #m 1"],
    b: Float[Array, "*b n k"],
    b_scale: Float32[Array, "*b 1 #n"],
    *,
    u: Float32[Array, "*b m r"] | None = None,
    v: Float32[Array, "*b r n"] | None = None,
    bias: Float32[Array, "*b n"] | None = None,
    slope: tuple[Float[Array, "*b m n"], Float32[Array, "*b 1 #n"], float, float] | None = None,
    out_dtype: jax.typing.DTypeLike,
    promote: bool = False,
) -> Float[Array, "*b m n"]:
    """``((a b^T) * a_scale * b_scale + u v + bias) * slope``, rounded once to ``out_dtype``.

    Where k is not a multiple of ``ROW_BYTES`` the codes are padded with zeros, which is exact and
    costs a copy of each.

    Args:
        a: codes, float8_e4m3fn or float8_e5m2; no axis is empty.
        a_scale: a number a row, or one.
        b: codes likewise, but not float8_e5m2 as well; transposed: the contraction is last.
        b_scale: a number a row of b, or one.
        u: with ``v``, a product of low rank in float32.
        v: see ``u``.
        bias: added to every row.
        slope: a weight in bfloat16, float16 or float32 and its scales, for E2M1, with the
            estimator's steepness, above 1, and cap.
        out_dtype: bfloat16, float16 or float32.
        promote: add up every 128 products along k in float32 registers.
    """
    *batch, m, _ = a.shape
    n = b.shape[-2]
    u = jnp.zeros((*batch, m, 0), jnp.float32) if u is None else u
    v = jnp.zeros((*batch, 0, n), jnp.float32) if v is None else v
    bias = jnp.zeros((*batch, 0), jnp.float32) if bias is None else bias
    a, b = (_pad_last(codes, ROW_BYTES) for codes in (a, b))
    if slope is None:
        slope = (
            jnp.zeros((*batch, m, 0), jnp.float32),
            jnp.ones((*batch, 1, 1), jnp.float32),
            0,
            0,
        )
    w, w_scale, k, cap = slope
    results = jax.ShapeDtypeStruct((*batch, m, n), out_dtype), _counter(batch)
    y, _ = _call("jfp4_gemm", results)(
        *(a, a_scale, b, b_scale, u, v, bias, w, w_scale),
        promote=promote,
        slope_k=np.float32(k),
        slope_cap=np.float32(cap),
    )
    return y


def packed_gemm(
    a: UInt8[Array, "*b m p"],
    a_scale: Float32[Array, "*b #m 1"],
    b: UInt8[Array, "*b n p"],
    b_scale: Float32[Array, "*b 1 #n"],
    *,
    bias: Float32[Array, "*b n"] | None = None,
    out_dtype: jax.typing.DTypeLike,
) -> Float[Array, "*b m n"]:
    """``gemm`` of E2M1 codes packed two a byte, the earlier in the low nibble; padded as there."""
    *batch, m, _ = a.shape
    bias = jnp.zeros((*batch, 0), jnp.float32) if bias is None else bias
    a, b = (_pad_last(packed, ROW_BYTES) for packed in (a, b))
    y = jax.ShapeDtypeStruct((*batch, m, b.shape[-2]), out_dtype)
    return _call("jfp4_packed_gemm", y)(a, a_scale, b, b_scale, bias)


NORM_COLUMNS = 8192
"""Most columns of a norm: a row waits in the registers of one block."""

NORM_PARTS = 384
"""Most parts that the rows of a norm's gradient are summed up in, a block each: as many as are
resident at once. Sums are in an order that follows from the shape alone."""


def rms_norm(
    x: Float[Array, "*b m d"],
    scale: Float32[Array, "*b d"],
    *,
    epsilon: float,
    added: Float[Array, "*b m d"] | None = None,
) -> tuple[Float[Array, "*b m d"] | None, Float[Array, "*b m d"]]:
    """``x + added`` in ``x``'s dtype, None where nothing is added, and its ``rms_norm``.

    Args:
        x: bfloat16, float16 or float32; no axis is empty, nor the last longer than
            ``NORM_COLUMNS``.
        scale: a factor a column.
        epsilon: added to the mean square.
        added: as x.
    """
    columns = x.shape[-1] if added is not None else 0
    results = (
        jax.ShapeDtypeStruct((*x.shape[:-1], columns), x.dtype),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    )
    total, y = _call("jfp4_rms_norm", results)(
        x, _or_absent(added, x), scale, epsilon=np.float32(epsilon)
    )
    return None if added is None else total, y


def rms_norm_gradient(
    x: Float[Array, "*b m d"],
    scale: Float32[Array, "*b d"],
    dy: Float[Array, "*b m d"],
    *,
    epsilon: float,
    dsum: Float[Array, "*b m d"] | None = None,
) -> tuple[Float[Array, "*b m d"], Float32[Array, "*b d"]]:
    """The gradients of ``rms_norm`` by what it normalises, and by the scale.

    Args:
        x: what was normalised.
        scale: as there.
        dy: the gradient of the norm, of x's dtype.
        epsilon: as there.
        dsum: what is added to the first, of x's dtype.
    """
    *batch, m, d = x.shape
    parts = min(NORM_PARTS, m)
    results = jax.ShapeDtypeStruct(x.shape, x.dtype), _float32(*batch, parts, d)
    dx, dscale = _call("jfp4_rms_norm_gradient", results)(
        x, scale, dy, _or_absent(dsum, x), epsilon=np.float32(epsilon)
    )
    return dx, jnp.sum(dscale, axis=-2)


def _or_absent(x: Array | None, like: Array) -> Array:
    return jnp.zeros((*like.shape[:-1], 0), like.dtype) if x is None else x


Moment = TypeVar("Moment")  # Blocks, or float32


def adamw(
    grads: Sequence[Float[Array, "*g n"]],
    param: Float[Array, "*m n"],
    first: Moment,
    second: Moment,
    rates: Float32[Array, "5"],
    keys: UInt32[Array, "slices 3"],
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    bound: float,
    root: bool,
    stochastic: bool,
) -> tuple[Float[Array, "*m n"], Moment, Moment]:
    """A step of AdamW in place; ``jfp4.adamw.AdamW`` says what it computes.

    Args:
        grads: the gradient, bfloat16, float16 or float32: an array of ``param``'s shape, or equal
            parts of its rows, as many as divide the slices.
        param: as ``jfp4.master`` stores it, in any of these.
        first: ``jfp4.optim.Blocks`` of the same shape, or float32.
        second: likewise.
        rates: the gradient's factor, the learning rate, 1 / (1 - b1^t), 1 / sqrt(1 - b2^t), and 0
            to change nothing.
        keys: of the bits that param and the moments are rounded by, and the number of the first
            column, in each of as many equal parts of the rows.
        b1: decay rate of the first moment.
        b2: decay rate of the second.
        eps: added to the root of the second moment.
        weight_decay: times the learning rate.
        bound: the first moment is clipped to this many of the second's roots; infinite, to none.
        root: whether the second moment is kept as its root.
        stochastic: whether moments are rounded so.

    Returns:
        The new param, first and second, in the operands' memory where XLA may have that.
    """
    *shape, _ = param.shape
    # A float32 moment is one array, without scales.
    pairs = [jax.tree.leaves(moment) for moment in (first, second)]
    operands = [
        param,
        *(array for pair in pairs for array in (*pair, jnp.zeros((*shape, 0), jnp.uint8))[:2]),
    ]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    param, *new = _call(
        "jfp4_adamw",
        results,
        vmap_method="sequential",  # a call is one tensor's, with its own rates
        input_output_aliases={i: i for i in range(len(operands))},
    )(
        *operands,
        rates,
        keys,
        *grads,
        b1=np.float32(b1),
        rest1=np.float32(1 - b1),
        b2=np.float32(b2),
        rest2=np.float32(1 - b2),
        eps=np.float32(eps),
        weight_decay=np.float32(weight_decay),
        bound=np.float32(bound),
        root=root,
        stochastic=stochastic,
    )
    new_first, new_second = (
        jax.tree.unflatten(jax.tree.structure(moment), made[: len(pair)])
        for moment, pair, made in zip((first, second), pairs, (new[:2], new[2:]), strict=True)
    )
    return param, new_first, new_second


def _call(
    target: str, results: Any, vmap_method: str = "broadcast_all", **options: Any
) -> Callable[..., Any]:
    call = jax.ffi.ffi_call(target, results, vmap_method=vmap_method, **options)

    def varying(*operands: Array, **attributes: Any) -> Any:
        return partition.varying_alike(call(*operands, **attributes), operands)

    return varying


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _counter(batch: Sequence[int]) -> jax.ShapeDtypeStruct:
    """Scratch by which the blocks of a kernel agree on who has done what."""
    return jax.ShapeDtypeStruct((*batch, 4), jnp.uint32)


def _index(format: str) -> np.int32:
    return np.int32(list(FORMATS).index(format))


def _pad_last(x: Array, multiple: int) -> Array:
    excess = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, excess)]) if excess else x


def _thresholds(
    batch: list[int], outliers: tuple[Array, Array] | None
) -> tuple[Float32[Array, "*b t"], Float32[Array, "*b t"]]:
    if outliers is None:
        absent = jnp.zeros((*batch, 0), jnp.float32)
        return absent, absent
    lo, hi = outliers
    return lo[..., None], hi[..., None]


def _floor(batch: list[int], amax_floor: Array | None) -> Float32[Array, "*b f"]:
    if amax_floor is None:
        return jnp.zeros((*batch, 0), jnp.float32)
    return amax_floor.reshape(*batch, -1)


def _results(
    batch: list[int], shapes: dict[str, tuple[int, int]], dtype: Any, want: Collection[Layout]
) -> list[jax.ShapeDtypeStruct]:
    """Of what is not wanted an array that is empty along its last axis."""
    return [
        jax.ShapeDtypeStruct(
            (*batch, rows, columns if name in want else 0), jnp.uint8 if name == "packed" else dtype
        )
        for name, (rows, columns) in shapes.items()
    ]


def _quantized(
    outputs: list[Array], names: Collection[str], want: Collection[Layout], scale: Array
) -> Quantized:
    codes, codes_t, packed = (
        output if name in want else None for name, output in zip(names, outputs, strict=True)
    )
    return Quantized(codes, codes_t, packed, scale)
