r"""Blockwise quantisation: arrays as 8-bit or 4-bit codes with one float32 scale a block.

Blocks run along the longer of an array's last two axes, in as few pieces of one size as hold up
to 256 numbers each; all other axes stay as they are. Of low-rank moments and of projectors the
longer axis is never the one of the rank, so a block holds numbers of one direction: a block's
small numbers are coarse, and a weak direction must not pay for a strong one. Nor does a block
cross from one matrix of a stack to the next.

One piece for 8-bit moments and for quantised projectors. `encode` and `decode` are pure
functions over a `Format`; the formats stand in one table, `FORMATS`:

================ ===== ====== =====================================================
name             dtype levels decoded value
================ ===== ====== =====================================================
dynamic          uint8 256    scale * table[code], bitsandbytes' signed dynamic map
dynamic_unsigned uint8 256    the same, unsigned: of what is above zero none becomes zero
int8             int8  256    scale * code
int4             uint8 16     scale * code, two codes a byte
================ ===== ====== =====================================================

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256  # numbers of a block, at most

_ROOMY = 120  # the level of a block's largest number where its scale is new

_DECADES = 7  # of the dynamic maps: magnitudes from 1e-7 to 1
_SMALLEST = np.finfo(np.float32).tiny  # subnormals below it are zero on most devices


@dataclasses.dataclass(frozen=True)
class Format:
    """How numbers are coded."""

    name: str
    bits: int
    dtype: Any  # of the stored codes
    signed: bool = True
    dynamic: bool = False  # a dynamic map; otherwise equal steps

    @property
    def zero(self) -> int:
        """The stored code of the number zero."""
        return 2 ** (self.bits - 1) - 1 if self.dynamic and self.signed else 0


DYNAMIC = Format("dynamic", 8, np.uint8, dynamic=True)
DYNAMIC_UNSIGNED = Format("dynamic_unsigned", 8, np.uint8, signed=False, dynamic=True)
INT8 = Format("int8", 8, np.int8)
INT4 = Format("int4", 4, np.uint8)

FORMATS = {fmt.name: fmt for fmt in (DYNAMIC, DYNAMIC_UNSIGNED, INT8, INT4)}


class Encoded(NamedTuple):
    """Codes and scales of one array."""

    codes: Any  # shape of the array; int4: its last axis halved, rounded up
    scales: Any  # float32, that shape with the number of blocks for the axis of the blocks


def encode(x: jax.Array, fmt: Format) -> Encoded:
    r"""Quantise an array in blocks of up to 256 numbers along the longer of its last two axes.

    Slice i of the codes and scales of a stack of matrices is slice i, encoded. With
    x a block and s its scale, a dynamic format stores

    .. math::
        s = \max |x|, \quad c = \arg\min_k |x / s - t_k|

    with t bitsandbytes' map (either neighbour for numbers within 1e-6 of themselves from the middle
    between two levels). A linear format of b bits puts the number largest in magnitude on the
    lowest level, which the other side has none for, and then fits the scale, which may be negative:

    .. math::
        c = \mathrm{clip}(\mathrm{round}(-2^{b-1} x / x_{max}), -2^{b-1}, 2^{b-1} - 1), \quad
        s = \langle c, x\rangle / \langle c, c\rangle

    A number that is not finite is stored as zero and leaves the rest of its block alone, as
    in bitsandbytes' optimizers. A block of zeros decodes to exact zeros; so does one whose
    largest magnitude lies where float32 has no normal inverse (below 1e-38, above 8e37).
    An unsigned format stores negative numbers as zero, and positive ones at its smallest level at
    least.

    Args:
        x: array of a floating dtype; computed with in float32.
        fmt: one of `FORMATS`.

    Returns:
        An `Encoded`, as `spec` describes it.

    Example:
        >>> import jax.numpy as jnp
        >>> from galore_jax.quantize import INT4, decode, encode
        >>> x = jnp.array([[1.0, -8.0, 3.0], [0.0, 0.5, -2.0]])
        >>> codes, scales = encode(x, INT4)
        >>> codes.shape, scales.shape
        ((2, 2), (2, 1))
        >>> decode(codes, scales, INT4, x.shape)
        Array([[ 1. , -8. ,  3. ],
               [ 0. ,  0.5, -2. ]], dtype=float32)

    References:
        Dettmers et al., `8-bit Optimizers via Block-wise Quantization
        <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    x = x.astype(jnp.float32)
    return encode_finite(jnp.where(jnp.abs(x) < jnp.inf, x, 0), fmt)


# Compiled pieces: traced once for all leaves of a shape.
@functools.partial(jax.jit, static_argnames=("fmt",))
def encode_finite(x: jax.Array, fmt: Format) -> Encoded:
    """Do the work of `encode` on float32 numbers that are known to be finite."""
    axis = layout(x.shape).axis
    encoder = _encode_dynamic if fmt.dynamic else _encode_linear
    codes, scales = encoder(_blocks(x), fmt, axis)
    codes, scales = _unblocks(codes, x.shape), jnp.squeeze(scales, axis)
    return Encoded(_pack(codes) if fmt.bits == 4 else codes.astype(fmt.dtype), scales)


@functools.partial(jax.jit, static_argnames=("fmt", "shape", "dtype"))
def decode(
    codes: jax.Array, scales: jax.Array, fmt: Format, shape: tuple[int, ...], dtype: Any = None
) -> jax.Array:
    """Undo `encode`.

    Args:
        codes: the stored codes.
        scales: the scales of their blocks.
        fmt: the format of `encode`.
        shape: shape of the array (packed codes do not tell an odd last axis).
        dtype: dtype of the result, float32 by default.

    Returns:
        An array of that shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from galore_jax.quantize import INT8, decode, encode
        >>> x = jnp.arange(-4.0, 4.0).reshape(2, 2, 2)
        >>> codes, scales = encode(x, INT8)
        >>> decode(codes[1], scales[1], INT8, (2, 2)).round(1)
        Array([[-0.,  1.],
               [ 2.,  3.]], dtype=float32)
    """
    if fmt.bits == 4:
        codes = _unpack(codes, shape)
    blocks = _blocks(codes)
    if fmt.dynamic:
        # A gather is the fastest of what was tried, and exact (benchmarks/eightbit.py).
        table = jnp.asarray(dynamic_map(fmt.signed))
        values = table.at[blocks.astype(jnp.int32)].get(mode="promise_in_bounds")
    else:
        values = blocks.astype(jnp.float32)
    x = _unblocks(values * jnp.expand_dims(scales, layout(shape).axis), shape)
    return x.astype(jnp.float32 if dtype is None else dtype)


@jax.jit
def recode(x: jax.Array, scales: jax.Array, key: jax.Array | None = None) -> Encoded:
    r"""Quantise an array of numbers that change little by little to `INT8`.

    With x a block, s its scale and u uniform on [0, 1),

    .. math::
        c = \mathrm{clip}(\lfloor x / s + u \rfloor, -128, 127)

    so that the mean of s c is x; without a key u is 1/2, which is to the nearest level. A block
    keeps its scale while its numbers fit and use half of the range: at the same scale a number that
    does not change keeps its code, so there is noise only where there is change. Otherwise the new
    scale leaves 5 % of the range free.
    A block with a number that is not finite decodes to NaN.

    Args:
        x: array of a floating dtype.
        scales: the scales of its blocks before, zero for none.
        key: a JAX random key, or None.

    Returns:
        An `Encoded` as of `encode` with `INT8`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from galore_jax.quantize import INT8, decode, recode
        >>> x = jnp.full(1000, 0.305).at[0].set(1.2)
        >>> codes, scales = recode(x, jnp.full(4, 0.01), jax.random.key(0))
        >>> jnp.unique(codes).tolist()
        [30, 31, 120]
        >>> round(float(decode(codes, scales, INT8, x.shape)[1:].mean()), 3)
        0.305
    """
    x = x.astype(jnp.float32)
    axis = layout(x.shape).axis
    blocks, old = _blocks(x), jnp.expand_dims(scales, axis)
    finite = jnp.all(jnp.isfinite(blocks), axis, keepdims=True)
    blocks = jnp.where(finite, blocks, 0)
    top, bottom = _extremes(blocks, axis)
    largest = jnp.maximum(top, -bottom)
    reach = jnp.abs(old) * 127
    scale = jnp.where((largest <= reach) & (largest >= reach / 2), old, largest / _ROOMY)
    scale, y = _normalise(blocks, scale)
    noise = 0.5
    if key is not None:
        noise = jax.random.bits(key, y.shape, jnp.uint16).astype(jnp.float32) / 2**16
    codes = jnp.clip(jnp.floor(y + noise), -128, 127)
    codes = _unblocks(codes, x.shape).astype(INT8.dtype)
    return Encoded(codes, jnp.squeeze(jnp.where(finite, scale, jnp.nan), axis))


def spec(shape: tuple[int, ...], fmt: Format) -> Encoded:
    """Shapes and dtypes that `encode` gives for an array of a shape.

    Args:
        shape: shape of the array.
        fmt: one of `FORMATS`.

    Returns:
        An `Encoded` of `jax.ShapeDtypeStruct`.

    Example:
        >>> from galore_jax.quantize import INT4, spec
        >>> codes, scales = spec((8, 512, 127), INT4)
        >>> codes.shape, scales.shape
        ((8, 512, 64), (8, 2, 127))
    """
    stored = (*shape[:-1], -(-math.prod(shape[-1:]) // 2)) if fmt.bits == 4 else shape
    blocks = list(shape or (1,))
    blocks[layout(shape).axis] = layout(shape).count
    return Encoded(
        jax.ShapeDtypeStruct(stored, fmt.dtype), jax.ShapeDtypeStruct(tuple(blocks), np.float32)
    )


def zeros(shape: tuple[int, ...], fmt: Format) -> Encoded:
    """Encode zeros, without ever holding them in full.

    Args:
        shape: shape of the array.
        fmt: one of `FORMATS`.

    Returns:
        An `Encoded` of arrays, equal to `encode(jnp.zeros(shape), fmt)`.

    Example:
        >>> from galore_jax.quantize import DYNAMIC, zeros
        >>> zeros((2,), DYNAMIC)
        Encoded(codes=Array([127, 127], dtype=uint8), scales=Array([0.], dtype=float32))
    """
    codes, scales = spec(shape, fmt)
    filled = jnp.full(codes.shape, fmt.zero, codes.dtype)
    return Encoded(filled, jnp.zeros(scales.shape, scales.dtype))


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 levels of bitsandbytes' `create_dynamic_map(signed, 7, 8)`, bit for bit.

    Decade i in 0..6, from 10^(i-7) to 10^(i-6), holds 2^i levels (unsigned: twice as many) in
    the middles of equal intervals; zero and one are added.
    """
    levels = [np.array([0, 1], np.float32)]
    for i, (count, _) in enumerate(_decades(signed)):
        step = np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count))
        k = np.arange(count + 1)
        # torch.linspace: from either end to the middle, multiplied and added in one rounding.
        low, high = np.float64(np.float32(0.1)) + step * k, 1 - np.float64(step) * (count - k)
        edges = np.where(k < (count + 1) // 2, low, high).astype(np.float32)
        middles = np.float32(10.0 ** (i - _DECADES + 1)) * ((edges[:-1] + edges[1:]) / 2)
        levels += [middles, -middles] if signed else [middles]
    table = np.sort(np.concatenate(levels))
    table.setflags(write=False)
    return table


def _decades(signed: bool) -> list[tuple[int, int]]:
    """Per decade, how many levels of a sign and the first one's distance from zero's code."""
    counts = [2**i if signed else 2 ** (i + 1) for i in range(_DECADES)]
    return [(count, 1 + sum(counts[:i])) for i, count in enumerate(counts)]


def _encode_dynamic(blocks: jax.Array, fmt: Format, axis: int) -> tuple[jax.Array, jax.Array]:
    signed = fmt.signed
    top, bottom = _extremes(blocks, axis) if signed else (jnp.max(blocks, axis, keepdims=True), 0)
    scale, y = _normalise(blocks, jnp.maximum(top, -bottom))
    return nearest_level(y, fmt), scale


def nearest_level(y: jax.Array, fmt: Format) -> jax.Array:
    """Find the codes of a dynamic map's levels nearest to numbers in [-1, 1].

    Of the unsigned map, positive numbers never get zero's.

    First the decade, then linear within it: seven comparisons, which vectorise. A search in the
    table takes 5 to 20 times as long (benchmarks/eightbit.py).
    """
    size = jnp.abs(y) if fmt.signed else y
    levels = dynamic_map(fmt.signed)[fmt.zero :].astype(np.float64)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)

    distance = jnp.zeros_like(size)
    for i, (count, first) in enumerate(_decades(fmt.signed)):
        # Between a decade's last level and the next one's first, the middle is no edge of
        # either's equal intervals: the decade is chosen by it, and the last level cuts off.
        slope, offset = count / 0.9 * 10.0 ** (_DECADES - 1 - i), first - count / 9
        inside = size * np.float32(slope) + np.float32(offset)
        inside = jnp.minimum(inside, np.float32(first + count - 1))
        distance = jnp.where(size > middles[first - 1], inside, distance)
    distance = jnp.where(size > middles[-1], np.float32(len(middles)), distance).astype(jnp.int32)
    if fmt.signed:
        # The map has 1 but not -1, so that the most negative number gets the level before.
        return jnp.where(y < 0, jnp.maximum(-distance, -fmt.zero), distance) + fmt.zero
    return jnp.where(y > 0, jnp.maximum(distance, 1), distance)


def _encode_linear(blocks: jax.Array, fmt: Format, axis: int) -> tuple[jax.Array, jax.Array]:
    """Codes of equal steps, and the scale of least squares.

    For an orthonormal basis in 4 bits, the level more and the fit take the error from 0.126
    to 0.110 of the basis's norm.
    """
    lowest = -(2 ** (fmt.bits - 1))
    top, bottom = _extremes(blocks, axis)
    scale, y = _normalise(blocks, jnp.where(top > -bottom, top, bottom) / lowest)
    codes = jnp.clip(jnp.round(y), lowest, -lowest - 1)
    fit = jnp.sum(codes * y, axis, keepdims=True)
    fit /= jnp.maximum(jnp.sum(jnp.square(codes), axis, keepdims=True), 1)
    return codes.astype(jnp.int32), scale * fit


def _extremes(blocks: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    # Half the time of one maximum of magnitudes, which is no plain reduction on a CPU.
    return jnp.max(blocks, axis, keepdims=True), jnp.min(blocks, axis, keepdims=True)


def _normalise(blocks: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide blocks by their scales; where a scale is none, both are zero."""
    usable = jnp.abs(scale) >= _SMALLEST
    return jnp.where(usable, scale, 0), blocks * jnp.where(usable, 1 / scale, 0)


class Layout(NamedTuple):
    """Blocks of an array: along axis -1 or -2, that of the numbers in an array of blocks."""

    axis: int
    count: int
    length: int  # of each, the last one padded with zeros


def layout(shape: tuple[int, ...]) -> Layout:
    """How an array of this shape is cut into blocks."""
    axis = -2 if len(shape) > 1 and shape[-2] > shape[-1] else -1
    size = max(shape[axis], 1) if shape else 1
    count = -(-size // BLOCK)
    return Layout(axis, count, -(-size // count))


def _blocks(x: jax.Array) -> jax.Array:
    """Cut the axis of the blocks into two: the blocks, and the numbers of each."""
    axis, count, length = layout(x.shape)
    x = jnp.atleast_1d(x)
    at = x.ndim + axis
    if missing := count * length - x.shape[at]:
        x = jnp.pad(x, [(0, missing * (i == at)) for i in range(x.ndim)])
    return x.reshape(*x.shape[:at], count, length, *x.shape[at + 1 :])


def _unblocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_blocks`."""
    axis, count, length = layout(shape)
    padded = list(shape or (1,))
    padded[axis] = count * length
    x = blocks.reshape(padded)
    return jax.lax.slice(x, [0] * x.ndim, shape or (1,)).reshape(shape)


def _pack(codes: jax.Array) -> jax.Array:
    """Put neighbours on the last axis into one byte, as two's complement, the first one low."""
    codes = jnp.atleast_1d(codes)
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    low, high = codes[..., ::2] & 15, codes[..., 1::2] & 15
    return (low | high << 4).astype(jnp.uint8)


def _unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_pack`."""
    pairs = jnp.stack([packed << 4, packed], -1)  # the code in the high half, then its sign
    codes = jax.lax.bitcast_convert_type(pairs, jnp.int8) >> 4
    codes = codes.reshape(*packed.shape[:-1], -1)
    return codes[..., : math.prod(shape[-1:])].reshape(shape)
