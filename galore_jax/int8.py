"""A weight in 8-bit codes, in the place of an array in the tree of parameters.

One byte a number and a float32 scale for each block of up to 256. Where a module uses it, it is
an array: the layer's weight is decoded when the layer runs, and forgotten.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.node import ArrayNode
from galore_jax.quantize import INT8, decode, encode, recode


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
        """The weight, rounded to the nearest codes."""
        codes, scales = encode(weight, INT8)
        return cls(codes, scales, jnp.result_type(weight))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
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
        return f"Int8Weight(shape={self.shape}, dtype={jnp.dtype(self._dtype).name})"

    def astype(self, dtype: Any) -> Int8Weight:
        """Used in another dtype."""
        return Int8Weight(self.codes, self.scales, jnp.dtype(dtype))

    def decoded(self, dtype: Any = None) -> Any:
        """The weight as an array, in its dtype or another; of shapes its shape."""
        dtype = dtype or self._dtype
        if isinstance(self.codes, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.shape, dtype)
        return decode(self.codes, self.scales, INT8, self.shape, dtype)

    def __jax_array__(self) -> jax.Array:
        return self.decoded()

    def plus(self, update: jax.Array, key: jax.Array | None) -> Int8Weight:
        """The weight with an update; the sum, in float32, is rounded at random with a key."""
        return self.put(self.decoded(jnp.float32) + update.astype(jnp.float32), key)

    def put(self, new: jax.Array, key: jax.Array | None) -> Int8Weight:
        """Other numbers in its place, to the nearest codes or, with a key, at random."""
        codes, scales = recode(new, self.scales, key)
        return Int8Weight(codes, scales, self._dtype)


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
