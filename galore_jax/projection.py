"""Into the subspace and back: R = P^T G (or G P, or P^T G Q), and its transpose.

A projector is stored as an array, as codes and scales (`quantize.Encoded`) or, of coordinate
directions, as indices; `load` gives the basis that every product uses, so what is projected and
what is lifted agree.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.leaf import Leaf, Sites
from galore_jax.quantize import INT4, INT8, Encoded, Format, decode, encode, spec

QUANTISED = {"int8": INT8, "int4": INT4}

Storage = Any  # a dtype (an integer one for indices), or a quantize.Format
Stored = jax.Array | Encoded
INDICES = jnp.dtype(jnp.int32)  # shape=batch + (r,): which rows, for one-sided projections


def default_projector(leaf: Leaf, storage: Storage) -> Stored:
    """An orthonormal basis to start from: the first coordinate directions."""
    rows = (leaf.m, leaf.n) if leaf.side == "both" else (leaf.projector_shape[-2],)
    basis = jnp.concatenate([jnp.eye(k, leaf.rank, dtype=leaf.dtype) for k in rows])
    one = store(leaf.matrix, basis, storage)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*leaf.batch, *x.shape)), one)


def store(leaf: Leaf, p: jax.Array, storage: Storage) -> Stored:
    """Cast or quantise a projector of `leaf.projector_shape`."""
    if isinstance(storage, Format):
        return encode(p, storage, batch=len(leaf.batch))
    if storage == INDICES:
        return jnp.argmax(jnp.abs(p), axis=-2).astype(INDICES)
    return p.astype(storage)


def load(leaf: Leaf, stored: Stored) -> jax.Array:
    """The basis that a stored projector stands for, in the dtype of the arithmetic."""
    if isinstance(stored, Encoded):
        return decode(*stored, storage_of(stored), leaf.projector_shape, leaf.dtype)
    if stored.dtype == INDICES:
        return jax.nn.one_hot(stored, leaf.projector_shape[-2], axis=-2, dtype=leaf.dtype)
    return stored.astype(leaf.dtype)


def storage_of(stored: Stored) -> Storage:
    """How a projector is stored."""
    if isinstance(stored, Encoded):
        return next(f for f in QUANTISED.values() if f.dtype == stored.codes.dtype)
    return stored.dtype


def stored_shapes(leaf: Leaf, storage: Storage) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays that hold a leaf's projector."""
    if isinstance(storage, Format):
        return tuple(x.shape for x in spec(leaf.projector_shape, storage, len(leaf.batch)))
    if storage == INDICES:
        return ((*leaf.batch, leaf.rank),)
    return (leaf.projector_shape,)


def to_tree(
    where: Sites, stored: list[Stored], like: optax.Params, storage: Storage
) -> optax.Params:
    """The projectors as a tree like the parameters, or as one of codes and one of scales.

    Two trees, since `nnx.Optimizer` does not keep a struct in the place of a parameter.
    """
    if isinstance(storage, Format):
        parts = (where.only([getattr(p, f) for p in stored], like) for f in Encoded._fields)
        return Encoded(*parts)
    return where.only(stored, like)


def from_tree(where: Sites, tree: optax.Params) -> list[Stored]:
    """Undo `to_tree`."""
    if isinstance(tree, Encoded):
        return [Encoded(*x) for x in zip(*map(where.pick, tree), strict=True)]
    return where.pick(tree)


def bases(leaf: Leaf, stored: Stored) -> tuple[jax.Array | None, jax.Array | None]:
    """The bases (P, Q) that a stored projector holds, None on a side left full."""
    p = load(leaf, stored)
    if leaf.side == "in":
        return p, None
    if leaf.side == "out":
        return None, p
    return p[..., : leaf.m, :], p[..., leaf.m :, :]


def project(leaf: Leaf, p: Stored, g: jax.Array) -> jax.Array:
    """Project a gradient of the leaf's shape, giving `leaf.low_rank_shape`."""
    r = leaf.to_matrix(g).astype(leaf.dtype)
    if _are_indices(p):
        return _take(leaf, r, p)
    p_in, p_out = bases(leaf, p)
    if p_in is not None:
        r = contract(p_in, -2, r, -2)
    if p_out is not None:
        r = contract(r, -1, p_out, -2)
    return r


def lift(leaf: Leaf, p: Stored, r: jax.Array) -> jax.Array:
    """Lift a low-rank update to the leaf's shape."""
    u = r.astype(leaf.dtype)
    if _are_indices(p):
        # Rows not among the indices come from one of zeros behind the others: a gather, which
        # is faster than a scatter.
        slots = jnp.arange(leaf.rank) - leaf.rank
        hot = jax.nn.one_hot(p, leaf.projector_shape[-2], dtype=INDICES)
        places = leaf.rank + jnp.sum(slots[:, None] * hot, axis=-2)
        widths = [(0, 0)] * u.ndim
        widths[-2 if leaf.side == "in" else -1] = (0, 1)
        return leaf.from_matrix(_take(leaf, jnp.pad(u, widths), places))
    p_in, p_out = bases(leaf, p)
    if p_out is not None:
        u = contract(u, -1, p_out, -1)
    if p_in is not None:
        u = contract(p_in, -1, u, -2)
    return leaf.from_matrix(u)


def _are_indices(stored: Stored) -> bool:
    return not isinstance(stored, Encoded) and stored.dtype == INDICES


def _take(leaf: Leaf, x: jax.Array, indices: Any) -> jax.Array:
    """Rows of matrices where inputs are projected, columns where outputs are."""
    if leaf.side == "in":
        return jnp.take_along_axis(x, indices[..., :, None], axis=-2)
    return jnp.take_along_axis(x, indices[..., None, :], axis=-1)


def contract(a: jax.Array, axis_a: int, b: jax.Array, axis_b: int) -> jax.Array:
    """Batched matrix product that sums over the given one of each operand's two last axes.

    One `dot_general`: traced much faster than einsum, which tells with hundreds of leaves.
    """
    batch = tuple(range(a.ndim - 2))
    dims = ((axis_a % a.ndim,), (axis_b % b.ndim,)), (batch, batch)
    return jax.lax.dot_general(a, b, dims)
