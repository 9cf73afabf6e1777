"""When and how projectors are recomputed.

One `lax.cond` around everything decides whether a step refreshes at all, so a plain step
runs no decomposition. Matrices of one shape, layers of a stacked leaf or leaves of an
unrolled model, share one loop, so the program holds each decomposition once.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.basis import Method, Methods, align_signs, at_step
from galore_jax.leaf import Leaf
from galore_jax.projection import Stored, load, storage_of, store

# Leaves of one shape share a loop by stacking their gradients, which is a copy. Up to this
# size less code is worth it; a leaf of stacked layers is never copied.
_STACK_BYTES = 2**28

_emitting: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
    "galore_jax_emitting", default=None
)


@contextlib.contextmanager
def only_if(emitting: jax.Array):
    """Let updates within refresh only where `emitting`: their result is dropped elsewhere."""
    outer = _emitting.get()  # of a MultiSteps around this one
    token = _emitting.set(emitting if outer is None else outer & emitting)
    try:
        yield
    finally:
        _emitting.reset(token)


def in_multi_steps() -> bool:
    """Whether an `optax.MultiSteps` runs this update."""
    return _emitting.get() is not None


class Layer(NamedTuple):
    """One layer of a model, updated by itself: its leaves are slices of stacked ones."""

    index: jax.typing.ArrayLike  # int32 scalar: which slice
    # By path of a leaf: the number of its first matrix, and how many matrices there are.
    numbers: dict[str, tuple[int, int]]


_layer: contextvars.ContextVar[Layer | None] = contextvars.ContextVar(
    "galore_jax_layer", default=None
)
_refreshing: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "galore_jax_refreshing", default=True
)


@contextlib.contextmanager
def one_layer(layer: Layer, refreshing: bool):
    """Let updates within number their matrices as those of the whole model are."""
    tokens = _layer.set(layer), _refreshing.set(refreshing)
    try:
        yield
    finally:
        _layer.reset(tokens[0])
        _refreshing.reset(tokens[1])


class Pause(NamedTuple):
    """How a leaf's matrices let turns to refresh pass, or a tree of such for all leaves.

    A matrix that refreshed waits for `gap - 1` turns, then refreshes again.
    """

    gap: Any  # shape=leaf.batch, int32: refresh at every gap-th turn
    wait: Any  # shape=leaf.batch, int32: turns still to pass


class Schedule(NamedTuple):
    """Which of the K matrices, in the order of the leaves, refresh at this step."""

    turn: jax.Array  # shape=(K,), bool: would refresh, if it did not pause
    due: jax.Array  # shape=(K,), bool
    age: jax.Array  # shape=(K,), int32: steps since the last refresh, this one included
    layer: jax.Array  # shape=(K,), int32: their numbers in their leaves' stacks
    any_due: jax.Array | bool  # shape=(), bool; False where no program for it is wanted

    def of(self, leaves: Sequence[Leaf], at: Sequence[int]) -> Schedule:
        """The part of the leaves at these positions."""
        numbers = np.split(np.arange(self.due.size), _cuts(_sizes(leaves)))
        some = np.concatenate([numbers[i] for i in at]) if at else np.zeros(0, int)
        turn, due, age, layer = (x[some] for x in (self.turn, self.due, self.age, self.layer))
        return Schedule(turn, due, age, layer, self.any_due)

    def without(self, leaves: Sequence[Leaf], fixed: Sequence[bool]) -> Schedule:
        """The schedule of a program that refreshes none of the leaves that are fixed."""
        free = np.repeat(np.logical_not(fixed), _sizes(leaves))
        return self._replace(due=self.due & free, any_due=self.any_due if any(free) else False)


def schedule(
    leaves: Sequence[Leaf],
    count: jax.Array,
    update_proj_gap: Any,
    stagger: bool,
    pauses: Sequence[Pause] | None = None,
) -> Schedule:
    """Refresh at steps 0, T, 2T, ...; staggered, matrix j of K at floor(j T / K) + i T too.

    Step 0 refreshes every matrix in both cases: there is no projector to go on with. A matrix
    that pauses lets some of its turns pass.
    """
    sizes = _sizes(leaves)
    layer = np.concatenate([np.arange(s, dtype=np.int32) for s in [0, *sizes]])
    total, j = sum(sizes), np.arange(sum(sizes), dtype=np.int32)
    if (slices := _layer.get()) is not None:
        layer += np.repeat(sizes, sizes).astype(np.int32) * slices.index
        first = [slices.numbers[x.path][0] for x in leaves]
        j = np.repeat(first, sizes).astype(np.int32) + layer
        total = max([slices.numbers[x.path][1] for x in leaves], default=1)
    offset = 0
    if stagger:  # floor(j T / K) without the overflow of j T
        offset = j * (update_proj_gap // total) + j * (update_proj_gap % total) // total
    phase = jnp.where(count < offset, count, (count - offset) % update_proj_gap)
    turn = (phase == 0) & ((count >= offset) | (count == 0))
    due, age = turn, phase.astype(jnp.int32) + 1
    if pauses:
        gap, wait = (
            jnp.concatenate([x.ravel() for x in part]) for part in zip(*pauses, strict=True)
        )
        due = turn & (wait == 0)
        passed = gap - wait - jnp.where(turn, 0, 1)
        age += jnp.where(due, 0, passed * update_proj_gap).astype(jnp.int32)
    any_due = jnp.any(due)
    if (emitting := _emitting.get()) is not None:
        any_due &= emitting
    if not _refreshing.get():
        due, any_due = jnp.zeros_like(due), False
    turn, due, age, layer = (jnp.broadcast_to(x, j.shape) for x in (turn, due, age, layer))
    return Schedule(turn, due, age, layer, any_due)


def per_leaf(leaves: Sequence[Leaf], x: jax.Array) -> list[jax.Array]:
    """Split an array over the K matrices into one of shape `leaf.batch` per leaf."""
    if not leaves:
        return []
    pieces = jnp.split(x, _cuts(_sizes(leaves)))
    return [piece.reshape(leaf.batch) for leaf, piece in zip(leaves, pieces, strict=True)]


# Under jit, so that without an outer one the conditional is not compiled anew at every step.
@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def refresh(
    leaves: tuple[Leaf, ...],
    grads: Sequence[jax.Array],
    projectors: Sequence[Stored],
    count: jax.Array,
    when: Schedule,
    methods: Methods,
    stagger: bool,
) -> list[Stored]:
    """Recompute the projectors that are due, from this step's gradients.

    A matrix whose gradient or new basis is not finite keeps its old projector.

    Args:
        leaves: the projected leaves.
        grads: their gradients, each of `leaf.shape`.
        projectors: the present projectors, as stored.
        count: int32 scalar, the step.
        when: from `schedule`.
        methods: from `basis.methods`.
        stagger: whether some matrices may be due and others not.

    Returns:
        The projectors to use at this step, as stored.
    """
    if not leaves:
        return list(projectors)
    groups: dict[tuple, list[list[int]]] = {}
    for i, leaf in enumerate(leaves):
        kind = (leaf.m, leaf.n, leaf.side, leaf.rank, leaf.dtype, storage_of(projectors[i]))
        chunks = groups.setdefault(kind, [[]])
        if chunks[-1] and sum(grads[j].nbytes for j in [*chunks[-1], i]) > _STACK_BYTES:
            chunks.append([])
        chunks[-1].append(i)

    def recompute():
        new = list(projectors)
        for members in (chunk for chunks in groups.values() for chunk in chunks):
            renewed = _refresh_together(
                [leaves[i] for i in members],
                [grads[i] for i in members],
                [projectors[i] for i in members],
                when.of(leaves, members),
                count,
                methods,
                stagger,
            )
            for i, p in zip(members, renewed, strict=True):
                new[i] = p
        return new

    return jax.lax.cond(when.any_due, recompute, lambda: list(projectors))


def _refresh_together(leaves, grads, projectors, when, count, methods, stagger) -> list[Stored]:
    """Refresh matrices of one shape, one after the other in one loop."""
    leaf, sizes = leaves[0], _sizes(leaves)
    if len(leaves) == 1:
        matrix = functools.partial(leaf.matrix_at, grads[0])
    else:
        flat = [x.to_matrix(g).reshape(-1, x.m, x.n) for x, g in zip(leaves, grads, strict=True)]
        matrix = functools.partial(
            jax.lax.dynamic_index_in_dim, jnp.concatenate(flat), keepdims=False
        )

    def one(slot):
        def renewed():
            seed = (slot["seed"], count, slot["layer"])
            return renew(leaf.matrix, matrix(slot["at"]), slot["old"], seed, methods)

        return jax.lax.cond(slot["due"], renewed, lambda: slot["old"]) if stagger else renewed()

    def in_a_row(leaf, p):  # an array, or codes and scales
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(leaf.batch) :]), p)

    old = map(in_a_row, leaves, projectors)
    slots = {
        "at": np.arange(sum(sizes), dtype=np.int32),
        "layer": when.layer,
        "seed": np.repeat(np.array([seed_of(x) for x in leaves], np.uint32), sizes),
        "old": jax.tree.map(lambda *x: jnp.concatenate(x), *old),
        "due": when.due,
    }
    new = jax.lax.map(one, slots)
    if len(leaves) == 1:
        return [jax.tree.map(lambda x, p: x.reshape(p.shape), new, projectors[0])]
    # XLA's CPU compiler spends 10 ms on each distinct kernel and nothing on a repeated one.
    # Slices at constant offsets are all distinct; offsets it cannot see through are not.
    starts = [0, *_cuts(sizes)]
    hidden = jax.lax.cond(
        count >= 0,
        lambda: [jnp.int32(s) for s in starts],
        lambda: [jnp.int32(0) for _ in starts],
    )

    def part(start, size, p):
        return jax.tree.map(
            lambda x, o: jax.lax.dynamic_slice_in_dim(x, start, size).reshape(o.shape), new, p
        )

    return [part(*x) for x in zip(hidden, sizes, projectors, strict=True)]


def renew(leaf: Leaf, g: jax.Array, old: Stored, seed: Any, methods: Methods) -> Stored:
    """The projector of one matrix from its gradient; the old one where that is not finite.

    Args:
        leaf: a leaf of one matrix.
        g: its gradient (m, n).
        old: its present projector, as stored.
        seed: integers that tell this matrix and step from others, for random bases: of the
            leaf, the step, the number in the stack.
        methods: from `basis.methods`.

    Returns:
        The new projector, stored as the old one.
    """

    def key(side):
        key = jax.random.key(seed[0])
        for part in (*seed[1:], side):
            key = jax.random.fold_in(key, part)
        return key

    # LAPACK may never return from a matrix with infinities or NaNs in it, and a Gram matrix
    # may over- or underflow; bases do not depend on the gradient's scale.
    g = g.astype(leaf.dtype)
    largest = jnp.max(jnp.abs(g))
    finite = jnp.isfinite(largest)
    g = jnp.where(finite, g / jnp.where(largest > 0, largest, 1), 0)
    new = _basis(leaf, g, load(leaf, old), key, at_step(methods, seed[1]))
    usable = finite & jnp.all(jnp.isfinite(new))
    stored = store(leaf, new, storage_of(old))
    return jax.tree.map(lambda n, o: jnp.where(usable, n, o), stored, old)


def seed_of(leaf: Leaf) -> int:
    """A leaf's name, not its position, seeds a random basis: the tree around it may change."""
    return zlib.crc32(leaf.path.encode())


def _basis(leaf: Leaf, g, old, key: Callable[[int], jax.Array], method: Method) -> jax.Array:
    """New basis (or both, stacked) for one matrix (m, n)."""
    sides = []
    if leaf.side in ("in", "both"):
        sides.append((0, g, old[: leaf.m]))
    if leaf.side in ("out", "both"):
        sides.append((1, g.T, old[-leaf.n :]))
    return jnp.concatenate(
        [
            align_signs(method(a, leaf.rank, previous, functools.partial(key, i)), previous)
            for i, a, previous in sides
        ]
    )


def _sizes(leaves: Sequence[Leaf]) -> list[int]:
    return [math.prod(leaf.batch) for leaf in leaves]


def _cuts(sizes: Sequence[int]) -> list[int]:
    return [int(c) for c in np.cumsum(sizes)[:-1]]
