"""Element formats: their grids, rounding, and the packing of two 4-bit codes a byte.

A *code* is a value on a format's grid (``value = code * scale``). Codes are carried one byte each
in a float8 dtype that holds the grid exactly, so that every back end reads the same bytes; only
storage and communication pack them.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

TINY = float(np.finfo(np.float32).tiny)
"""The smallest normal float32, 2**-126."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A signed floating-point element format without infinities.

    Attributes:
        name: the field's name for it, lower case.
        mantissa_bits: explicit mantissa bits.
        min_exponent: exponent of the smallest normal value; the step below it is constant.
        max: largest magnitude; rounding saturates there.
        bits: width of a code in storage, 4 or 8.
        dtype: the one-byte dtype that carries codes of this format exactly.
    """

    name: str
    mantissa_bits: int
    min_exponent: int
    max: float
    bits: int
    dtype: np.dtype

    @functools.cached_property
    def grid(self) -> np.ndarray:
        """The non-negative values, ascending, float64; a value's index is its magnitude code."""
        values = [0.0]
        while values[-1] < self.max:
            values.append(values[-1] + self.step(values[-1]))
        return np.array(values)

    def step(self, magnitude: float) -> float:
        """Distance from the grid value ``magnitude`` to the next one above."""
        exponent = np.floor(np.log2(magnitude)) if magnitude > 0 else self.min_exponent
        return float(2.0 ** (max(exponent, self.min_exponent) - self.mantissa_bits))

    def fits(self, dtype: jax.typing.DTypeLike) -> bool:
        """Whether a dtype holds the grid exactly."""
        return bool(np.all(self.grid.astype(jnp.dtype(dtype)).astype(np.float64) == self.grid))

    @property
    def min_scale(self) -> float:
        """The smallest scale: under it a subnormal float32 could reach a code other than zero.

        Back ends disagree on subnormals (CPUs here flush them to zero, GPUs do not); with this
        bound they are all rounded to code zero, and nobody's codes depend on the back end.
        """
        return TINY / (self.grid[1] / 2)

    @functools.cached_property
    def lattice(self) -> int:
        """For a 4-bit format, the factor that makes every code an int8 integer."""
        return int(1 / self.grid[1])


_E4M3, _E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)

FORMATS = {
    f.name: f
    for f in (
        Format("e2m1", 1, 0, 6.0, 4, _E4M3),
        # One exponent bit: the single normal binade continues the subnormals' step of 0.5.
        Format("e1m2", 2, 1, 3.5, 4, _E4M3),
        Format("e3m0", 0, -2, 16.0, 4, _E4M3),
        # E2M1 over four, by an exponent bias of 3: see ``operand_format``.
        Format("e2m1b3", 1, -2, 1.5, 4, _E4M3),
        Format("e4m3", 3, -6, 448.0, 8, _E4M3),
        Format("e5m2", 2, -14, 57344.0, 8, _E5M2),
    )
}


def get_format(name: str) -> Format:
    """Looks up a format by name.

    Raises:
        ValueError: ``name`` is none of ``FORMATS``.
    """
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is unknown; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def operand_format(name: str) -> str:
    """The format in which codes of a format are best multiplied as bytes.

    For E2M1 it is E2M1 over four: the same nibbles, codes a quarter, scales four times as large,
    values the same to the last bit. In E4M3 bytes E2M1's values lie about the exponents 0111 and
    1000, which share no bit; a quarter of them stays below. Large products, in which a GPU runs at
    its power's limit, are faster for it (docs/kernels.md has by how much).
    """
    return "e2m1b3" if name == "e2m1" else name


def round_to_format(v: Float[Array, "..."], format: str = "e2m1") -> Float[Array, "..."]:
    """Rounds to the nearest value of a format: ties to the even code, saturating, NaN stays NaN.

    4-bit formats compare with the table of midpoints. 8-bit ones round the mantissa in float32
    arithmetic, which is exact and, unlike a cast to float8 and back, nothing that a compiler
    allowed to keep excess precision may take out; the cast that follows is then exact too.

    Args:
        v: values in code units, already divided by the scale; computed in float32.
        format: a name from ``FORMATS``.

    Returns:
        Float32 values on the grid, of ``v``'s shape and signs (negative zero included).

    Raises:
        ValueError: unknown format.
    """
    f = get_format(format)
    v = v.astype(jnp.float32)
    magnitude = jnp.abs(v)
    if f.bits == 4:
        rounded = jnp.zeros_like(magnitude)
        for i, (below, above) in enumerate(itertools.pairwise(f.grid)):
            middle = (below + above) / 2
            # A tie goes to the even one of codes i and i + 1.
            up = magnitude > middle if i % 2 == 0 else magnitude >= middle
            rounded = jnp.where(up, np.float32(above), rounded)
        rounded = jnp.where(jnp.isnan(v), v, rounded)
    else:
        magnitude = jnp.minimum(magnitude, f.max)  # minimum() keeps NaN
        exponent_bits = lax.bitcast_convert_type(magnitude, jnp.uint32) & np.uint32(0x7F800000)
        binade = lax.bitcast_convert_type(exponent_bits, jnp.float32)
        # Adding 1.5 * 2**23 steps leaves no bits below the step, and float32's own rounding, to
        # nearest even, does the work; subtracting it again is exact.
        shifter = jnp.maximum(binade, 2.0**f.min_exponent) * (1.5 * 2.0 ** (23 - f.mantissa_bits))
        rounded = (magnitude + shifter) - shifter
    sign = lax.bitcast_convert_type(v, jnp.uint32) & np.uint32(0x80000000)
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(rounded, jnp.uint32) | sign, jnp.float32
    )


def to_bits(codes: Float[Array, "..."], format: str) -> UInt8[Array, "..."]:
    """The 4-bit pattern of each code: sign in bit 3, index into the grid in bits 0 to 2.

    Args:
        codes: values on the grid of ``format``, any float dtype. What is none of them goes down to
            the next in magnitude, and NaN, which has no pattern, to zero.
        format: a 4-bit format.

    Raises:
        ValueError: ``format`` is unknown or not a 4-bit one.
    """
    f = _four_bit(format)
    v = codes.astype(jnp.float32)
    index = jnp.zeros(v.shape, jnp.uint8)
    for value in f.grid[1:]:
        index += (jnp.abs(v) >= np.float32(value)).astype(jnp.uint8)
    return index | (jnp.signbit(v).astype(jnp.uint8) << 3)


def from_bits(bits: UInt8[Array, "..."], format: str) -> Float[Array, "..."]:
    """Inverse of ``to_bits``: codes in the format's one-byte dtype; higher bits are ignored.

    Raises:
        TypeError: ``bits`` is not of uint8.
        ValueError: ``format`` is unknown or not a 4-bit one.
    """
    _check_bytes("bits", bits)
    f = _four_bit(format)
    patterns = f.grid.astype(f.dtype).view(np.uint8)
    index, byte = bits & 7, (bits & 8) << 4
    # Patterns ascend with their values. Sums of steps are fused into what reads them, as a table
    # that is looked up would not be.
    for i, step in enumerate(np.diff(patterns), start=1):
        byte += jnp.where(index >= i, step, np.uint8(0))
    return lax.bitcast_convert_type(byte, f.dtype)


def pack(codes: Float[Array, "*b n"], format: str = "e2m1") -> UInt8[Array, "*b p"]:
    """Packs two 4-bit codes a byte along the last axis, the earlier one in the low nibble.

    Args:
        codes: values on the grid of ``format``, any float dtype; others as in ``to_bits``.
        format: a 4-bit format.

    Returns:
        ``p = ceil(n / 2)`` bytes; an odd ``n`` is padded with the code of zero.

    Raises:
        ValueError: ``format`` is not a 4-bit one, or ``codes`` is a scalar.
    """
    if codes.ndim == 0:
        raise ValueError("codes has shape (); expected at least one axis to pack along")
    bits = to_bits(codes, format)
    bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, bits.shape[-1] % 2)])
    return bits[..., 0::2] | (bits[..., 1::2] << 4)


def unpack(packed: UInt8[Array, "*b p"], n: int, format: str = "e2m1") -> Float[Array, "*b n"]:
    """Inverse of ``pack``; ``n`` is the last axis before packing, since padding hides its parity.

    Raises:
        TypeError: ``packed`` is not of uint8.
        ValueError: ``format`` is not a 4-bit one, or ``n`` codes do not fill ``p`` bytes.
    """
    _check_bytes("packed", packed)
    if packed.ndim == 0 or packed.shape[-1] != (n + 1) // 2:
        raise ValueError(f"packed has shape {packed.shape}; {n} codes take {(n + 1) // 2} bytes")
    bits = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return from_bits(bits.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :n], format)


def _check_bytes(name: str, array: UInt8[Array, "..."]) -> None:
    if array.dtype != jnp.uint8:
        raise TypeError(f"{name} is {array.dtype}; expected uint8")


def _four_bit(format: str) -> Format:
    f = get_format(format)
    if f.bits != 4:
        raise ValueError(f"format={format!r} has {f.bits} bits; expected a 4-bit format")
    return f
