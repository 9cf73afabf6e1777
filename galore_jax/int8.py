"""A weight in 8-bit codes, in the place of an array in the tree of parameters.

One byte a number and a float32 scale for each block of up to 256. Where a module uses it, it is
an array: the layer's weight is decoded when the layer runs, and forgotten.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.node import ArrayNode
from galore_jax.quantize import INT8, decode, recode, spec


@jax.tree_util.register_pytree_with_keys_class
class Int8Weight(ArrayNode):
    """A weight as blockwise int8 codes and scales; layers meet an array, by `__jax_array__`."""

    def __init__(self, codes: jax.Array, scales: jax.Array, dtype: Any):
        self.codes, self.scales, self._dtype = codes, scales, dtype

    def tree_flatten_with_keys(self):
        """Codes and scales, by name."""
        keys = map(jax.tree_util.GetAttrKey, ("codes", "scales"))
        return tuple(zip(keys, (self.codes, self.scales), strict=True)), self._dtype

    @classmethod
    def tree_unflatten(cls, dtype, children):
        """Undo `tree_flatten_with_keys`."""
        codes, scales = children
        return cls(codes, scales, dtype)

    @classmethod
    def of(cls, weight: jax.Array) -> Int8Weight:
        """The weight, or its shape, rounded to the nearest codes; a stack layer by layer."""
        if isinstance(weight, jax.ShapeDtypeStruct):
            return jax.eval_shape(cls.of, weight)
        weight = jnp.asarray(weight)
        codes, scales = _coded(weight) if weight.ndim < 3 else jax.lax.map(_coded, weight)
        return cls(codes, scales, weight.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """Dtype that the weight is used in."""
        return self._dtype

    @property
    def sharding(self) -> Any:
        """Sharding of the codes."""
        return self.codes.sharding

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):  # what a map over a tree has put there
            return f"Int8Weight(codes={self.codes!r}, scales={self.scales!r})"
        return f"Int8Weight(shape={self.shape}, dtype={jnp.dtype(self._dtype).name})"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and self.ndim > 2:  # one of the stack
            return Int8Weight(self.codes[index], self.scales[index], self._dtype)
        return super().__getitem__(index)

    def astype(self, dtype: Any) -> Int8Weight:
        """Used in another dtype."""
        return Int8Weight(self.codes, self.scales, jnp.dtype(dtype))

    def decoded(self, dtype: Any = None) -> Any:
        """The weight as an array, in its dtype or another.

        Of shapes its shape; of what else stands for arrays, as a sharding, that of the codes.
        """
        dtype = dtype or self._dtype
        if not hasattr(self.codes, "shape"):
            return self.codes
        if isinstance(self.codes, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.shape, dtype)
        return decode(self.codes, self.scales, INT8, self.shape, dtype)

    def __jax_array__(self) -> jax.Array:
        return self.decoded()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.decoded(), dtype)

    def plus(self, update: jax.Array, key: jax.Array | None) -> Int8Weight:
        """The weight with an update; the sum, in float32, is rounded at random with a key."""
        return self.put(self.decoded(jnp.float32) + jnp.asarray(update, jnp.float32), key)

    def put(self, new: jax.Array, key: jax.Array | None) -> Int8Weight:
        """Other numbers in its place, to the nearest codes or, with a key, at random."""
        codes, scales = recode(new, self.scales, key)
        return Int8Weight(codes, scales, self._dtype)


def _coded(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    scales = spec(weight.shape, INT8).scales
    codes, scales = recode(weight, jnp.zeros(scales.shape, scales.dtype))
    return codes, scales


def is_int8(x: Any) -> bool:
    """Whether a node is an `Int8Weight`."""
    return isinstance(x, Int8Weight)


def dequantize_weights(params: Any) -> Any:
    """Undo `quantize_weights`: arrays in each weight's dtype, to export or to compare.

    Args:
        params: tree of parameters.

    Returns:
        The tree with an array in the place of each weight in codes, other leaves as they are.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> params = {"kernel": jnp.ones((8, 16), jnp.bfloat16), "bias": jnp.ones(16)}
        >>> whole = galore_jax.dequantize_weights(galore_jax.quantize_weights(params))
        >>> whole["kernel"].dtype, float(whole["kernel"][0, 0])
        (dtype(bfloat16), 1.0)
    """
    return jax.tree.map(lambda x: x.decoded() if is_int8(x) else x, params, is_leaf=is_int8)
