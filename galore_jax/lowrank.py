"""Gradients and updates that stay in the subspace, in the place of full-size arrays.

Both are pytree nodes whose arrays scale with the thing they stand for, so that links of a
chain that scale or measure gradients (`optax.clip_by_global_norm`) work on them unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.leaf import Leaf
from galore_jax.projection import INDICES, Stored, lift, load
from galore_jax.quantize import Encoded

# A new projector rides along with the gradient that it projects. Scaled down to this it adds
# nothing to a norm in float32, and the power of two leaves its digits alone.
LIGHT = 2.0**-60


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("low_rank", "rest", "projector", "unit"),
    meta_fields=("leaf",),
)
@dataclasses.dataclass(frozen=True)
class Projected:
    """The gradient of a projected leaf, as `galore_jax.value_and_grad` returns it.

    The global norm of a tree with these nodes is that of the full gradient, since
    `|G|^2 = |R|^2 + |G - P P^T G|^2`; scaling one scales the gradient; adding two adds the
    gradients (`rest` then is an upper bound, by the triangle inequality) when their projectors
    are the same.
    """

    low_rank: jax.Array  # R, shape=leaf.low_rank_shape
    rest: jax.Array  # shape=leaf.batch: norm of the part of G outside the subspace
    projector: jax.Array | None  # shape=leaf.projector_shape: the basis, times `unit`
    unit: jax.Array | None  # shape=leaf.batch: LIGHT, times what the gradient was scaled by
    leaf: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full gradient."""
        return self.leaf.shape

    def new_projector(self, old: jax.Array) -> jax.Array:
        """The basis that came along; where scaling spoilt it, `old`."""
        if self.projector is None or self.unit is None:
            return old
        p = self.projector / self.unit[..., None, None]
        return jnp.where(jnp.all(jnp.isfinite(p), (-2, -1), keepdims=True), p, old)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("projector", "low_rank", "decay", "unit"),
    meta_fields=("leaf", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Factored:
    """The update of a projected leaf, `P N + c W`, not multiplied out.

    `w + update`, and so `optax.apply_updates`, adds it matrix by matrix, in place. Scaling the
    node's arrays scales the update. It has no `__jax_array__`, which JAX would prefer to the
    addition below. A quantised projector's codes come as floating numbers: a link that scales
    would round its factor to the codes' dtype.
    """

    __array_ufunc__ = None  # NumPy's operators leave it to ours

    projector: Stored
    low_rank: jax.Array  # N, shape=leaf.low_rank_shape
    decay: jax.Array | None  # c, shape=leaf.batch
    unit: jax.Array  # shape=(): one, times what the update was scaled by
    leaf: Leaf
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the update."""
        return self.leaf.shape

    def __radd__(self, w: jax.Array) -> jax.Array:
        return self.add_to(w, lambda x, index: x.astype(w.dtype))

    def add_to(self, w: jax.Array, rounded: Callable[[jax.Array, jax.Array], jax.Array]):
        """`w + self`; `rounded(sum, index)` casts the new matrix number `index`."""
        leaf, axes = self.leaf, len(self.leaf.batch)
        one = leaf.below(axes)
        # A scaling reached both factors, and codes too.
        low_rank, projector = self.low_rank / self.unit, self.projector
        if isinstance(projector, Encoded):
            codes = jnp.round(projector.codes.astype(leaf.dtype) / self.unit)
            whole = jnp.uint8 if projector.codes.dtype == jnp.float32 else jnp.int8
            projector = Encoded(codes.astype(whole), projector.scales)

        def added(w, p, low_rank, decay, index):
            wide = w.astype(leaf.dtype)
            new = wide + lift(one, p, low_rank)
            return rounded(new if decay is None else new + decay * wide, index)

        if not axes:
            return added(w, projector, low_rank, self.decay, jnp.int32(0))
        count = math.prod(leaf.batch)
        flat = functools.partial(jax.tree.map, lambda x: x.reshape(count, *x.shape[axes:]))
        parts = flat((projector, low_rank, self.decay))

        def body(i, w):
            def at(x):
                return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

            # Every read of the old matrix comes before the write, or XLA copies the stack.
            projector, low_rank, decay = jax.tree.map(at, parts)
            new = added(at(w), projector, low_rank, decay, i)
            return jax.lax.dynamic_update_index_in_dim(w, new, i, 0)

        return jax.lax.fori_loop(0, count, body, flat(w)).reshape(w.shape)


def factored(leaf: Leaf, p: Stored, low_rank: jax.Array, decay: Any, dtype: Any) -> Factored:
    """An update `P N + c W` of a weight of this dtype."""
    if isinstance(p, Encoded):
        # Bytes of two 4-bit codes go up to 255, beyond the whole numbers of bfloat16.
        wide = jnp.float32 if p.codes.dtype == jnp.uint8 else jnp.bfloat16
        p = Encoded(p.codes.astype(wide), p.scales)
    elif p.dtype == INDICES:
        p = load(leaf, p)  # which a scaling may scale
    return Factored(p, low_rank, decay, jnp.ones([], leaf.dtype), leaf, dtype)


def is_projected(x: Any) -> bool:
    """Whether a leaf is a gradient in the subspace."""
    return isinstance(x, Projected)


def wide(x: jax.Array) -> jax.Array:
    """Float32 at least, for the arithmetic and the state of the inner optimizer."""
    if is_projected(x):
        return x
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32))
    return x
