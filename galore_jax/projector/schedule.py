"""When a matrix is due for a new projector.

Its turns come at steps `offset, offset + T, offset + 2T, ...`. The state knows, by matrix, the step
of the last successful refresh; a matrix is due when a turn has come since, and stays due until a
refresh succeeds: a gradient that was zero or not finite, or a program compiled without refreshes,
costs a step and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from galore_jax.call import Call
from galore_jax.matrix.view import MatrixView

NEVER = -1  # the step of the last refresh before the first one


class Schedule(NamedTuple):
    """Which of the K matrices, in the order of the views, refresh at this step."""

    due: jax.Array  # shape=(K,), bool
    layer: jax.Array  # shape=(K,), int32: their numbers in their stacks
    step: jax.Array  # shape=(K,), int32: see `made_at`
    last: jax.Array  # shape=(K,), int32: the step of their last refresh, or NEVER
    count: jax.Array  # shape=(), int32: this step
    any_due: jax.Array | bool  # shape=(), bool; False where no program for it is wanted

    def of(self, views: Sequence[MatrixView], at: Sequence[int]) -> Schedule:
        """The part of the views at these positions."""
        numbers = np.split(np.arange(self.due.size), cuts(sizes(views)))
        some = np.concatenate([numbers[i] for i in at]) if at else np.zeros(0, int)
        due, layer, step, last = (x[some] for x in (self.due, self.layer, self.step, self.last))
        return Schedule(due, layer, step, last, self.count, self.any_due)


def schedule(
    views: Sequence[MatrixView],
    count: jax.Array,
    refreshed: Sequence[jax.Array],
    turns_between: Sequence[jax.Array] | None,
    update_proj_gap: Any,
    stagger: bool,
    call: Call,
) -> Schedule:
    """Decide which matrices refresh at a step.

    Args:
        views: the projected leaves.
        count: int32 scalar, the step.
        refreshed: by view, int32 of its batch shape: the step of the last refresh, or NEVER.
        turns_between: likewise, of lazy refreshes: every how many turns; None for every turn.
        update_proj_gap: T.
        stagger: whether matrix j of K has its turns at floor(j T / K) + i T instead of at i T.
        call: see `Call`.

    Returns:
        A `Schedule`. Step 0 refreshes every matrix: there is no projector to go on with.
    """
    layer = jnp.asarray(layer_numbers(views, call.layer))
    if not views or not call.refresh:
        zeros = jnp.zeros_like(layer)
        return Schedule(zeros.astype(bool), layer, zeros, zeros, count, False)
    offset = _offsets(views, update_proj_gap, stagger, call)
    last = jnp.concatenate([x.ravel() for x in refreshed])
    every: Any = 1
    if turns_between is not None:
        every = jnp.concatenate([x.ravel() for x in turns_between])
    # Floored, also before the first turn: T stands in for the gap of a schedule at this step.
    turns = (count - offset) // update_proj_gap - (last - offset) // update_proj_gap
    due = (last == NEVER) | (turns >= every)
    emits: Any = True if call.emits is None else call.emits
    any_due = _decision(jnp.any(due) & emits)
    return Schedule(due, layer, made_at(count, last), last, count, any_due)


def made_at(count: jax.Array, last: jax.Array) -> jax.Array:
    """The step that a refresh is made as one of: a matrix' first one is as at step 0."""
    return jnp.where(last == NEVER, 0, count)


def layer_numbers(
    views: Sequence[MatrixView], layer: jax.typing.ArrayLike | None = None
) -> jax.Array | np.ndarray:
    """The K matrices' numbers in their stacks, int32: what tells their random bases apart.

    Args:
        views: the projected leaves.
        layer: of one layer's slices, which it is.
    """
    numbers = np.concatenate([np.arange(s, dtype=np.int32) for s in [0, *sizes(views)]])
    if layer is None:
        return numbers
    stacks = np.repeat(sizes(views), sizes(views)).astype(np.int32)
    return jnp.asarray(numbers + stacks * layer)


def _offsets(views: Sequence[MatrixView], gap: Any, stagger: bool, call: Call) -> Any:
    """The step of each matrix's first turn."""
    if not stagger:
        return 0
    count_of = sizes(views)
    j, total = np.arange(sum(count_of), dtype=np.int32), sum(count_of)
    if call.layer is not None:  # numbered as in the whole model
        first = {path: (start, total) for path, start, total in call.matrices}
        total = max([first[x.path][1] for x in views], default=1)
        starts = np.repeat([first[x.path][0] for x in views], count_of).astype(np.int32)
        j = starts + layer_numbers(views, call.layer)
    # floor(j T / K) without the overflow of j T
    return j * (gap // total) + j * (gap % total) // total


@custom_vmap
def _decision(any_due: jax.Array) -> jax.Array:
    """One decision for all that are mapped over: a conditional for each would become a select."""
    return any_due


@_decision.def_vmap
def _(axis_size, in_batched, any_due):
    del axis_size
    return (jnp.any(any_due, axis=0) if in_batched[0] else any_due), False


def per_view(views: Sequence[MatrixView], x: Any) -> list[Any]:
    """Split an array over the K matrices into one of shape `view.batch` per view."""
    if not views:
        return []
    split = np.split if isinstance(x, np.ndarray) else jnp.split
    pieces = split(x, cuts(sizes(views)))
    return [piece.reshape(view.batch) for view, piece in zip(views, pieces, strict=True)]


def sizes(views: Sequence[MatrixView]) -> list[int]:
    """How many matrices each view stacks."""
    return [math.prod(view.batch) for view in views]


def cuts(sizes: Sequence[int]) -> list[int]:
    """Where to cut a row of all matrices into those of each view."""
    return [int(c) for c in np.cumsum(sizes)[:-1]]
