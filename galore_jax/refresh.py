"""When and how projectors are recomputed.

One `lax.cond` around everything decides whether a step refreshes at all, so a plain step
runs no decomposition, and leaves of one matrix shape share one loop, so the program holds
each decomposition once however many layers there are.
"""

from __future__ import annotations

import contextlib
import contextvars
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.basis import Method
from galore_jax.leaf import Leaf

_emitting: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
    "galore_jax_emitting", default=None
)


@contextlib.contextmanager
def only_if(emitting: jax.Array):
    """Let updates within refresh only where `emitting`: their result is dropped elsewhere."""
    token = _emitting.set(emitting)
    try:
        yield
    finally:
        _emitting.reset(token)


class Schedule(NamedTuple):
    """Which matrices refresh at this step.

    Fields:
      due: one bool array of shape `leaf.batch` per leaf.
      age: likewise int32, the number of steps since the last refresh, this step included.
      any_due: bool scalar.
    """

    due: list[jax.Array]
    age: list[jax.Array]
    any_due: jax.Array


def schedule(
    leaves: Sequence[Leaf], count: jax.Array, update_proj_gap: jax.Array | int, stagger: bool
) -> Schedule:
    """Refresh at steps 0, T, 2T, ...; staggered, matrix j of K at floor(j T / K) + i T too.

    Step 0 refreshes every matrix in both cases: there is no projector to go on with.
    """
    sizes = [int(np.prod(leaf.batch, dtype=np.int64)) for leaf in leaves]
    total = sum(sizes)
    index = jnp.arange(total, dtype=jnp.int32)
    offset = index * update_proj_gap // total if stagger else jnp.zeros_like(index)
    phase = jnp.where(count < offset, count, (count - offset) % update_proj_gap)
    due = (phase == 0) & ((count >= offset) | (count == 0))
    any_due = jnp.any(due)
    emitting = _emitting.get()
    if emitting is not None:
        any_due &= emitting
    cuts = list(np.cumsum(sizes)[:-1])

    def split(x):
        pieces = jnp.split(x, cuts)
        return [p.reshape(leaf.batch) for leaf, p in zip(leaves, pieces, strict=True)]

    return Schedule(split(due), split((phase + 1).astype(jnp.int32)), any_due)


def refresh(
    leaves: Sequence[Leaf],
    grads: Sequence[jax.Array],
    projectors: Sequence[jax.Array],
    count: jax.Array,
    when: Schedule,
    method: Method,
) -> list[jax.Array]:
    """Recompute the projectors that are due, from this step's gradients.

    A matrix whose gradient or new basis is not finite keeps its old projector.

    Args:
        leaves: the projected leaves.
        grads: their gradients, each of `leaf.shape`.
        projectors: the present projectors, each of `leaf.projector_shape`.
        count: int32 scalar, the step.
        when: from `schedule`.
        method: one of `basis.METHODS`.

    Returns:
        The projectors to use at this step.
    """
    groups: dict[tuple, list[int]] = {}
    for i, leaf in enumerate(leaves):
        kind = (leaf.m, leaf.n, leaf.side, leaf.rank, leaf.dtype, projectors[i].dtype)
        groups.setdefault(kind, []).append(i)

    def recompute():
        new = list(projectors)
        for members in groups.values():
            renewed = _refresh_group(
                [leaves[i] for i in members],
                [grads[i] for i in members],
                [projectors[i] for i in members],
                [when.due[i] for i in members],
                count,
                method,
            )
            for i, p in zip(members, renewed, strict=True):
                new[i] = p
        return new

    return jax.lax.cond(when.any_due, recompute, lambda: list(projectors))


def _refresh_group(leaves, grads, projectors, due, count, method) -> list[jax.Array]:
    """Refresh matrices of one shape in one loop that picks them out one at a time.

    Stacking the gradients instead would copy them all; here one matrix is copied.
    """
    sizes = [d.size for d in due]
    member = np.repeat(np.arange(len(leaves)), sizes)
    index = np.concatenate([np.arange(s) for s in sizes])
    # A name rather than a position, so that random bases survive a change of the tree.
    name = np.array([zlib.crc32(leaf.path.encode()) for leaf in leaves], np.uint32)[member]

    def pick(leaf, g, p):
        def take(i):
            basis = p.reshape(-1, *p.shape[-2:])[i]
            return leaf.matrix_at(g, i).astype(leaf.dtype), basis

        return take

    takes = [pick(*args) for args in zip(leaves, grads, projectors, strict=True)]

    def one(slot):
        g, old = jax.lax.switch(slot["member"], takes, slot["index"])

        def decompose():
            key = jax.random.fold_in(jax.random.key(slot["name"]), slot["index"])
            new = _basis(leaves[0], g, old, jax.random.fold_in(key, count), method)
            usable = jnp.all(jnp.isfinite(g)) & jnp.all(jnp.isfinite(new))
            return jnp.where(usable, new, old)

        return jax.lax.cond(slot["due"], decompose, lambda: old)

    slots = {
        "member": jnp.asarray(member, jnp.int32),
        "index": jnp.asarray(index, jnp.int32),
        "name": jnp.asarray(name),
        "due": jnp.concatenate([d.reshape(-1) for d in due]),
    }
    stacked = jax.lax.map(one, slots)
    pieces = jnp.split(stacked, list(np.cumsum(sizes)[:-1]))
    return [x.reshape(p.shape) for x, p in zip(pieces, projectors, strict=True)]


def _basis(leaf: Leaf, g: jax.Array, old: jax.Array, key: jax.Array, method: Method):
    """New basis (or both, stacked) for one matrix (m, n), in the stored dtype."""
    sides = []
    wide = old.astype(leaf.dtype)
    if leaf.side in ("in", "both"):
        sides.append(method(g, leaf.rank, wide[: leaf.m], jax.random.fold_in(key, 0)))
    if leaf.side in ("out", "both"):
        sides.append(method(g.T, leaf.rank, wide[-leaf.n :], jax.random.fold_in(key, 1)))
    return jnp.concatenate(sides).astype(old.dtype)
