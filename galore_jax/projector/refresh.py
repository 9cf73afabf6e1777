"""How projectors are recomputed.

One `lax.cond` around everything decides whether a step refreshes at all, so a plain step
runs no decomposition. Matrices of one shape, layers of a stacked leaf or leaves of an
unrolled model, share one loop, so the program holds each decomposition once. On a mesh of several
devices each takes its share of them.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.compiler import in_one_piece
from galore_jax.control import cond
from galore_jax.matrix.view import MatrixView
from galore_jax.meshes import auto_mesh
from galore_jax.projector.basis import Method, Methods, align_signs, at_step, looks_at_gradients
from galore_jax.projector.gradient import ProjectedGradient, is_projected, unpack
from galore_jax.projector.schedule import Schedule, cuts, sizes
from galore_jax.projector.shares import each_its_share, one_by_one
from galore_jax.projector.storage import Stored, load, storage_of, store

# Leaves of one shape share a loop by stacking their gradients, which is a copy. Up to this
# size less code is worth it; a leaf of stacked layers is never copied.
_STACK_BYTES = 2**28


class Projectors(NamedTuple):
    """Projectors to use at a step."""

    stored: list[Stored]
    refreshed: list[jax.Array]  # by view, int32 of its batch shape: the step of the last refresh
    count: jax.Array  # this step
    possible: jax.Array | bool  # bool; False in a program without refreshes

    @property
    def renewed(self) -> list[jax.Array]:
        """By view, bool of its batch shape: which are new at this step."""
        return [step == self.count for step in self.refreshed]


def refresh(
    views: Sequence[MatrixView],
    grads: Sequence[jax.Array | ProjectedGradient],
    old: Sequence[Stored],
    last: Sequence[jax.Array],
    when: Schedule,
    methods: Methods,
    few: bool = False,
) -> Projectors:
    """The projectors that are due, from this step's gradients or as these bring them.

    A gradient that arrives projected brings its projector along, or none when it comes from a
    program without refreshes.

    Args:
        views: the projected leaves.
        grads: their gradients.
        old: the present projectors, as stored.
        last: the steps that they were made at, int32 of each view's batch shape.
        when: from `schedule`.
        methods: from `basis.methods`.
        few: whether few matrices are due at a step, rather than all at some.

    Returns:
        A `Projectors`. A matrix whose gradient is zero or not finite keeps its projector, and so
        does one whose new basis is not finite.
    """
    new, refreshed = list(old), list(last)
    possible: jax.Array | bool = False
    for i, (view, g) in enumerate(zip(views, grads, strict=True)):
        if is_projected(g) and g.basis is not None:  # type: ignore[union-attr]
            new[i], done = unpack(view, g.basis, old[i])  # type: ignore[union-attr]
            refreshed[i] = jnp.where(done, when.count, last[i])
            possible = True if when.any_due is False else when.any_due
    full = [i for i, g in enumerate(grads) if not is_projected(g)]
    if full and when.any_due is not False:
        some = when.of(views, full)
        picked = ([x[i] for i in full] for x in (views, grads, old, last))
        made = _recompute(*map(tuple, picked), some, methods, few)
        for i, p, step in zip(full, *made, strict=True):
            new[i], refreshed[i] = p, step
        possible = when.any_due
    return Projectors(new, refreshed, when.count, possible)


# Under jit, so that without an outer one decompositions are not compiled anew at every refresh.
@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _recompute(
    views: tuple[MatrixView, ...],
    grads: Sequence[jax.Array],
    old: Sequence[Stored],
    last: Sequence[jax.Array],
    when: Schedule,
    methods: Methods,
    few: bool,
) -> tuple[list[Stored], list[jax.Array]]:
    """The projectors, and the steps that they were made at."""
    groups: dict[tuple, list[list[int]]] = {}
    for i, view in enumerate(views):
        kind = (view.m, view.n, view.side, view.rank, view.dtype, storage_of(old[i]))
        chunks = groups.setdefault(kind, [[]])
        if chunks[-1] and sum(grads[j].nbytes for j in [*chunks[-1], i]) > _STACK_BYTES:
            chunks.append([])
        chunks[-1].append(i)

    def recompute():
        new, refreshed = keep()
        for members in (chunk for chunks in groups.values() for chunk in chunks):
            made = _together(
                [views[i] for i in members],
                [grads[i] for i in members],
                [old[i] for i in members],
                when.of(views, members),
                methods,
                few,
            )
            for i, p, step in zip(members, *made, strict=True):
                new[i], refreshed[i] = p, step
        return new, refreshed

    def keep():
        return list(old), list(last)

    return cond(when.any_due, recompute, keep)


def _together(views, grads, old, when: Schedule, methods: Methods, few: bool):
    """Refresh matrices of one shape: one after the other in one loop, on a mesh in shares."""
    view, size_of = views[0], sizes(views)
    mesh = auto_mesh(grads)
    if len(views) == 1 and mesh is None:
        matrix = functools.partial(view.matrix_at, grads[0])
    else:
        flat = [x.to_matrix(g).reshape(-1, x.m, x.n) for x, g in zip(views, grads, strict=True)]
        matrices = jnp.concatenate(flat)
        matrix = functools.partial(jax.lax.dynamic_index_in_dim, matrices, keepdims=False)

    def in_a_row(view, p):  # an array, or codes and scales
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(view.batch) :]), p)

    rows = map(in_a_row, views, old)
    slots = {
        "at": np.arange(sum(size_of), dtype=np.int32),
        "layer": when.layer,
        "step": when.step,
        "seed": np.repeat(np.array([seed_of(x) for x in views], np.uint32), size_of),
        "old": jax.tree.map(lambda *x: jnp.concatenate(x), *rows),
        "last": when.last,
        "due": when.due,
        "count": jnp.broadcast_to(when.count, when.due.shape),
    }

    def one(slot, gradient):
        def due():
            seed, largest = (slot["seed"], slot["step"], slot["layer"]), slot.get("largest")
            p, done = renew(view.matrix, gradient(), slot["old"], seed, methods, largest)
            return p, jnp.where(done, slot["count"], slot["last"])

        return cond(slot["due"], due, lambda: (slot["old"], slot["last"]))

    if mesh is None:
        made = jax.lax.map(lambda slot: one(slot, lambda: matrix(slot["at"])), slots)
    else:
        # Found where the gradients lie, before any is moved.
        slots["largest"] = jnp.max(jnp.abs(matrices.astype(view.dtype)), axis=(1, 2))
        if looks_at_gradients(methods):
            slots["gradient"] = matrices

        def alone(slot):
            nothing = jnp.zeros((view.m, view.n), view.dtype)
            return one(slot, lambda: slot.get("gradient", nothing))

        made = _on_mesh(mesh, alone, slots, few)
    like = [(p, jax.ShapeDtypeStruct(v.batch, jnp.int32)) for v, p in zip(views, old, strict=True)]
    if len(views) == 1:
        parts = [jax.tree.map(lambda x, p: x.reshape(p.shape), made, like[0])]
    else:
        # Slices at offsets that the compiler cannot see through share one kernel.
        starts = [0, *cuts(size_of)]
        hidden = in_one_piece(lambda: [jnp.int32(s) for s in starts], when.step[0])

        def part(start, size, like):
            def cut(x, like):
                at, sizes = [start, *[np.int32(0)] * (x.ndim - 1)], (size, *x.shape[1:])
                x = jax.lax.dynamic_slice(x, at, sizes, allow_negative_indices=False)
                return x.reshape(like.shape)

            return jax.tree.map(cut, made, like)

        parts = [part(*x) for x in zip(hidden, size_of, like, strict=True)]
    return [p for p, _ in parts], [step for _, step in parts]


def _on_mesh(mesh: Any, one: Callable, slots: dict[str, Any], few: bool) -> Any:
    """Refresh matrices in shares, or, where no more are due than are a share, each everywhere."""
    old, replicated = (slots["old"], slots["last"]), NamedSharding(mesh, PartitionSpec())

    def shared():
        made = each_its_share(mesh, functools.partial(jax.lax.map, one), slots)
        # Else it would be brought together after the conditional, at every step.
        return jax.lax.with_sharding_constraint(made, replicated)

    if not few:
        return shared()
    no_more = jnp.sum(slots["due"]) <= -(-slots["due"].size // mesh.size)
    return cond(no_more, lambda: one_by_one(slots["due"], one, slots, old), shared)


def renew(
    view: MatrixView,
    g: jax.Array,
    old: Stored,
    seed: Any,
    methods: Methods,
    largest: jax.Array | None = None,
) -> tuple[Stored, jax.Array]:
    """The projector of one matrix from its gradient.

    Args:
        view: a view of one matrix.
        g: its gradient (m, n).
        old: its present projector, as stored.
        seed: integers that tell this matrix and step from others, for random bases: of the
            leaf, the step (which also decides the method), the number in the stack.
        methods: from `basis.methods`.
        largest: the gradient's largest magnitude, where it is known.

    Returns:
        The new projector, stored as the old one, and True; where the gradient is zero or not
        finite, or the basis is not, the old one and False.
    """

    def key(side):
        key = jax.random.key(seed[0])
        for part in (*seed[1:], side):
            key = jax.random.fold_in(key, part)
        return key

    def decompose():
        # A Gram matrix may over- or underflow; bases do not depend on the gradient's scale.
        scaled = jnp.where(usable, g.astype(view.dtype), 0) / jnp.where(usable, size, 1)
        new = _basis(view, scaled, load(view, old), key, at_step(methods, seed[1]))
        finite = jnp.all(jnp.isfinite(new))
        stored = store(view, new, storage_of(old))
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), stored, old), finite

    # LAPACK may never return from a matrix with infinities or NaNs in it, and under a `vmap`
    # over models one that is not usable runs beside one that is.
    size = jnp.max(jnp.abs(g.astype(view.dtype))) if largest is None else largest
    usable = (size > 0) & jnp.isfinite(size)
    return cond(usable, decompose, lambda: (old, jnp.zeros([], bool)))


def seed_of(view: MatrixView) -> int:
    """A leaf's name, not its position, seeds a random basis: the tree around it may change."""
    return zlib.crc32(view.path.encode())


def _basis(view: MatrixView, g, old, key: Callable[[int], jax.Array], method: Method) -> jax.Array:
    """New basis (or both, stacked) for one matrix (m, n)."""
    sides = []
    if view.side in ("in", "both"):
        sides.append((0, g, old[: view.m]))
    if view.side in ("out", "both"):
        sides.append((1, g.T, old[-view.n :]))
    return jnp.concatenate(
        [
            align_signs(method(a, view.rank, previous, functools.partial(key, i)), previous)
            for i, a, previous in sides
        ]
    )
