r"""Blockwise quantisation: arrays as 8-bit or 4-bit codes with one float32 scale a block.

One piece for 8-bit moments and for quantised projectors. `encode` and `decode` are pure
functions over a `Format`; the formats stand in one table, `FORMATS`:

================ ===== ====== =====================================================
name             dtype levels decoded value
================ ===== ====== =====================================================
dynamic          uint8 256    scale * table[code], bitsandbytes' signed dynamic map
dynamic_unsigned uint8 256    the same with the unsigned map, for second moments
int8             int8  256    scale * code
int4             uint8 16     scale * code, two codes a byte
================ ===== ====== =====================================================

Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256

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
    scales: Any  # float32, batch + (blocks,)


def encode(x: jax.Array, fmt: Format, batch: int = 0) -> Encoded:
    r"""Quantise an array, or each slice of a stack of arrays, in blocks of 256 numbers.

    Blocks run over the flattened content of each slice, the last one padded with zeros. With
    x a block and s its scale, a dynamic format stores

    .. math::
        s = \max |x|, \quad c = \arg\min_k |x / s - t_k|

    with t bitsandbytes' map (either neighbour for numbers within 1e-6 of themselves from the
    middle between two levels). A linear format of b bits
    puts the number largest in magnitude on the lowest level, which one more level than on
    the other side is open to, and then fits the scale, which may be negative:

    .. math::
        c = \mathrm{clip}(\mathrm{round}(-2^{b-1} x / x_{max}), -2^{b-1}, 2^{b-1} - 1), \quad
        s = \langle c, x\rangle / \langle c, c\rangle

    A number that is not finite is stored as zero and leaves the rest of its block alone, as
    in bitsandbytes' optimizers. A block of zeros decodes to exact zeros; so does one whose
    largest magnitude lies where float32 has no normal inverse (below 1e-38, above 8e37).
    An unsigned format stores negative numbers as zero.

    Args:
        x: array of a floating dtype; computed with in float32.
        fmt: one of `FORMATS`.
        batch: number of leading axes that are stacked: slice i of the codes and of the scales
            is slice i of `x`, encoded.

    Returns:
        An `Encoded`, as `spec` describes it.

    Example:
        >>> import jax.numpy as jnp
        >>> from galore_jax.quantize import INT4, decode, encode
        >>> x = jnp.array([[1.0, -8.0, 3.0], [0.0, 0.5, 6.0]])
        >>> codes, scales = encode(x, INT4)
        >>> codes.shape, scales.shape
        ((2, 2), (1,))
        >>> decode(codes, scales, INT4, x.shape)
        Array([[ 1., -8.,  3.],
               [ 0.,  0.,  6.]], dtype=float32)

    References:
        Dettmers et al., `8-bit Optimizers via Block-wise Quantization
        <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    x = x.astype(jnp.float32)
    return encode_finite(jnp.where(jnp.abs(x) < jnp.inf, x, 0), fmt, batch)


# Compiled pieces: traced once for all leaves of a shape.
@functools.partial(jax.jit, static_argnames=("fmt", "batch"))
def encode_finite(x: jax.Array, fmt: Format, batch: int = 0) -> Encoded:
    """Do the work of `encode` on float32 numbers that are known to be finite."""
    blocks = _blocks(x, batch)
    codes, scales = (_encode_dynamic if fmt.dynamic else _encode_linear)(blocks, fmt)
    codes = _unblocks(codes, x.shape, batch)
    return Encoded(_pack(codes) if fmt.bits == 4 else codes.astype(fmt.dtype), scales[..., 0])


@functools.partial(jax.jit, static_argnames=("fmt", "shape", "dtype"))
def decode(
    codes: jax.Array, scales: jax.Array, fmt: Format, shape: tuple[int, ...], dtype: Any = None
) -> jax.Array:
    """Undo `encode`.

    Args:
        codes: the stored codes.
        scales: float32, batch + (blocks,); its axes tell how many axes are stacked.
        fmt: the format of `encode`.
        shape: shape of the array (packed codes do not tell an odd last axis).
        dtype: dtype of the result, float32 by default.

    Returns:
        An array of that shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from galore_jax.quantize import INT8, decode, encode
        >>> x = jnp.arange(-4.0, 4.0).reshape(2, 2, 2)
        >>> codes, scales = encode(x, INT8, batch=1)
        >>> decode(codes[1], scales[1], INT8, (2, 2)).round(1)
        Array([[-0.,  1.],
               [ 2.,  3.]], dtype=float32)
    """
    if fmt.bits == 4:
        codes = _unpack(codes, shape)
    batch = scales.ndim - 1
    blocks = _blocks(codes, batch)
    if fmt.dynamic:
        # A gather is the fastest of what was tried, and exact (benchmarks/eightbit.py).
        table = jnp.asarray(dynamic_map(fmt.signed))
        values = table.at[blocks.astype(jnp.int32)].get(mode="promise_in_bounds")
    else:
        values = blocks.astype(jnp.float32)
    x = _unblocks(values * scales[..., None], shape, batch)
    return x.astype(jnp.float32 if dtype is None else dtype)


def spec(shape: tuple[int, ...], fmt: Format, batch: int = 0) -> Encoded:
    """Shapes and dtypes that `encode` gives for an array of a shape.

    Args:
        shape: shape of the array.
        fmt: one of `FORMATS`.
        batch: number of leading axes that are stacked.

    Returns:
        An `Encoded` of `jax.ShapeDtypeStruct`.

    Example:
        >>> from galore_jax.quantize import INT4, spec
        >>> codes, scales = spec((8, 512, 127), INT4, batch=1)
        >>> codes.shape, scales.shape
        ((8, 512, 64), (8, 254))
    """
    stored = (*shape[:-1], -(-math.prod(shape[-1:]) // 2)) if fmt.bits == 4 else shape
    blocks = -(-math.prod(shape[batch:]) // BLOCK)
    return Encoded(
        jax.ShapeDtypeStruct(stored, fmt.dtype),
        jax.ShapeDtypeStruct((*shape[:batch], blocks), np.float32),
    )


def zeros(shape: tuple[int, ...], fmt: Format, batch: int = 0) -> Encoded:
    """Encode zeros, without ever holding them in full.

    Args:
        shape: shape of the array.
        fmt: one of `FORMATS`.
        batch: number of leading axes that are stacked.

    Returns:
        An `Encoded` of arrays, equal to `encode(jnp.zeros(shape), fmt, batch)`.

    Example:
        >>> from galore_jax.quantize import DYNAMIC, zeros
        >>> zeros((2,), DYNAMIC)
        Encoded(codes=Array([127, 127], dtype=uint8), scales=Array([0.], dtype=float32))
    """
    codes, scales = spec(shape, fmt, batch)
    return Encoded(jnp.full(codes.shape, fmt.zero, codes.dtype), jnp.zeros(scales.shape))


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


def _encode_dynamic(blocks: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    top, bottom = _extremes(blocks) if fmt.signed else (jnp.max(blocks, -1, keepdims=True), 0)
    scale, y = _normalise(blocks, jnp.maximum(top, -bottom))
    return nearest_level(y, fmt), scale


def nearest_level(y: jax.Array, fmt: Format) -> jax.Array:
    """Find the codes of a dynamic map's levels nearest to numbers in [-1, 1].

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
        distance = jnp.where(y < 0, jnp.maximum(-distance, -fmt.zero), distance)
    return distance + fmt.zero


def _encode_linear(blocks: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    """Codes of equal steps, and the scale of least squares.

    For an orthonormal basis in 4 bits, the level more and the fit take the error from 0.126
    to 0.110 of the basis's norm.
    """
    lowest = -(2 ** (fmt.bits - 1))
    top, bottom = _extremes(blocks)
    scale, y = _normalise(blocks, jnp.where(top > -bottom, top, bottom) / lowest)
    codes = jnp.clip(jnp.round(y), lowest, -lowest - 1)
    fit = jnp.sum(codes * y, -1, keepdims=True)
    fit /= jnp.maximum(jnp.sum(jnp.square(codes), -1, keepdims=True), 1)
    return codes.astype(jnp.int32), scale * fit


def _extremes(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    # On a CPU these two take half the time of one maximum of magnitudes, which is no plain
    # reduction there.
    return jnp.max(blocks, -1, keepdims=True), jnp.min(blocks, -1, keepdims=True)


def _normalise(blocks: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide blocks by their scales; where a scale is none, both are zero."""
    usable = jnp.abs(scale) >= _SMALLEST
    return jnp.where(usable, scale, 0), blocks * jnp.where(usable, 1 / scale, 0)


def _blocks(x: jax.Array, batch: int) -> jax.Array:
    """View an array as batch + (blocks, 256), padded with zeros."""
    x = x.reshape(*x.shape[:batch], math.prod(x.shape[batch:]))
    if missing := -x.shape[-1] % BLOCK:
        x = jnp.pad(x, [(0, 0)] * batch + [(0, missing)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def _unblocks(blocks: jax.Array, shape: tuple[int, ...], batch: int) -> jax.Array:
    """Undo `_blocks`."""
    size = math.prod(shape[batch:])
    x = blocks.reshape(*shape[:batch], blocks.shape[-2] * BLOCK)
    return (x if x.shape[-1] == size else x[..., :size]).reshape(shape)


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
