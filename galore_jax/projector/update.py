"""The update of a projected leaf that is not multiplied out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.control import alike
from galore_jax.int8 import is_int8
from galore_jax.matrix.view import MatrixView
from galore_jax.meshes import as_auto, auto_mesh, explicit_mesh, sharding_of
from galore_jax.precision import wide
from galore_jax.projector.gradient import LIGHT, ProjectedGradient
from galore_jax.projector.project import bases, contract, lift
from galore_jax.projector.storage import Stored, load


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("norm", "projector", "low_rank", "decay", "unit"),
    meta_fields=("view", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class FactoredUpdate:
    """The update of a projected leaf, `P N + c W`, as its factors.

    `w + update`, and so `optax.apply_updates`, adds it matrix by matrix, in place. Scaling the
    node's arrays scales the update, and their norm is the update's. It has no `__jax_array__`,
    which JAX would prefer to the addition below.
    """

    __array_ufunc__ = None  # NumPy's operators leave it to ours

    norm: jax.Array  # shape=view.batch: of the update
    # All else in units of `unit`, which add nothing to a norm.
    # view.projector_shape: the basis, in view.dtype: in another one scaling would round it.
    projector: jax.Array
    low_rank: jax.Array  # N, shape=view.low_rank_shape
    decay: jax.Array | None  # c, shape=view.batch
    unit: jax.Array  # shape=(): LIGHT, times what the update was scaled by
    view: MatrixView
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the update."""
        return self.view.shape

    def __radd__(self, w: jax.Array) -> jax.Array:
        return _add_cast(w, self)

    def add_to(self, w: Any, rounded: Callable[..., Any], *more: Any):
        """`w + self`; `rounded(sum, w, index, *more)` casts the new matrix number `index`."""
        if (mesh := explicit_mesh(w)) is not None:
            args = w, self, *more
            return as_auto(
                mesh,
                lambda w, u, *more: u.add_to(w, rounded, *more),
                *args,
                like=lambda _: sharding_of(w),
            )
        view, axes = self.view, len(self.view.batch)
        one = view.below(axes)
        low_rank = self.low_rank / LIGHT
        decay = None if self.decay is None else self.decay / LIGHT
        # Scaled by zero, the projector is gone, and so is the update.
        projector = self.projector * jnp.where(self.unit == 0, 0, 1 / self.unit)

        def added(w, p, low_rank, decay, index):
            old, w = w, w.decoded(view.dtype) if is_int8(w) else wide(w)
            new = w + lift(one, p, low_rank)
            return rounded(new if decay is None else new + decay * w, old, index, *more)

        if not axes:
            return added(w, projector, low_rank, decay, jnp.int32(0))
        count = math.prod(view.batch)
        flat = functools.partial(jax.tree.map, lambda x: x.reshape(count, *x.shape[axes:]))
        parts = flat((projector, low_rank, decay))

        def whole(new):
            return jax.tree.map(lambda x, like: x.reshape(like.shape), new, w)

        if auto_mesh(w) is not None:  # a loop over an axis that is cut would bring along all of it
            all_of_them = flat(w), *parts, np.arange(count, dtype=np.int32)
            return whole(jax.vmap(lambda x: added(*x))(all_of_them))

        def body(i, w):
            def at(x):
                return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

            # Every read of the old matrix comes before the write, or XLA copies the stack.
            old, (projector, low_rank, decay) = jax.tree.map(at, (w, parts))
            new = added(old, projector, low_rank, decay, i)
            return jax.tree.map(
                lambda w, x: jax.lax.dynamic_update_index_in_dim(w, x, i, 0), w, new
            )

        carried, *_ = alike((flat(w), parts))
        return whole(jax.lax.fori_loop(0, count, body, carried))


# Compiled once where steps are not.
@jax.jit
def _add_cast(w: jax.Array, update: FactoredUpdate) -> jax.Array:
    return update.add_to(w, lambda x, old, index: x.astype(w.dtype))


def lifted(
    view: MatrixView, p: Stored, low_rank: jax.Array, decay: Any, w: jax.Array, gradient: Any
) -> jax.Array | FactoredUpdate:
    """`P N + c W`; not multiplied out for a gradient that never was full either."""
    if isinstance(gradient, ProjectedGradient):
        return factored(view, p, low_rank, decay, w)
    update = lift(view, p, low_rank)
    return update if decay is None else update + _over(view, decay) * w.astype(view.dtype)


def _over(view: MatrixView, per_matrix: jax.Array) -> jax.Array:
    """Lay one number per stacked matrix out against an array of the leaf's shape."""
    shape = [1] * len(view.shape)
    for axis in view.batch_axes:
        shape[axis] = view.shape[axis]
    return per_matrix.reshape(shape)


def factored(view: MatrixView, p: Stored, low_rank: jax.Array, decay: Any, w: jax.Array):
    """An update `P N + c W` of a weight W, as a `FactoredUpdate`."""
    norm = _norm(view, p, low_rank, decay, w)
    factors = load(view, p), low_rank, decay
    basis, low_rank, decay = jax.tree.map(lambda x: x.astype(view.dtype) * LIGHT, factors)
    unit = jnp.asarray(LIGHT, view.dtype)
    return FactoredUpdate(norm, basis, low_rank, decay, unit, view, jnp.result_type(w))


def _norm(view: MatrixView, p: Stored, low_rank: jax.Array, decay: Any, w: jax.Array) -> jax.Array:
    """`|P N + c W|` by matrix, from small products; dead code where nobody measures it."""
    p_in, p_out = bases(view, p)
    inside, weights = low_rank, view.to_matrix(w)
    # <P N, P N> = <N, P^T P N>, and P is not quite orthonormal where it is quantised.
    if p_in is not None:
        inside = contract(contract(p_in, -2, p_in, -2), -1, inside, -2)
    if p_out is not None:
        inside = contract(inside, -1, contract(p_out, -2, p_out, -2), -2)
    square = jnp.sum(low_rank * inside, axis=(-2, -1))
    if decay is not None:
        # Weights are never cast as a whole; their sums are wide.
        across = weights
        if p_in is not None:
            across = contract(p_in.astype(w.dtype), -2, across, -2, view.dtype)
        if p_out is not None:
            across = contract(across, -1, p_out.astype(across.dtype), -2, view.dtype)
        cross = jnp.sum(low_rank * across, axis=(-2, -1))
        batch = tuple(range(len(view.batch)))
        both = (len(batch), len(batch) + 1)
        dims = (both, both), (batch, batch)
        own = jax.lax.dot_general(weights, weights, dims, preferred_element_type=view.dtype)
        square += 2 * decay * cross + decay**2 * own
    return jnp.sqrt(jnp.maximum(square, 0))
