"""Lazy refreshes: matrices whose subspace barely moves are decomposed less often.

Two bases P and Q of r columns in k dimensions span subspaces that overlap by

    |P^T Q|_F^2 / r,    from 0 (orthogonal) over r / k (chance) to 1 (equal),

the mean squared cosine of the principal angles between them, whatever the signs of their
columns and however they are rotated. Q-GaLore (https://arxiv.org/abs/2407.08296) doubles a
layer's gap while its first singular vector stays; here the whole subspace is asked, and the gap
falls back when it moves again.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from galore_jax.control import cond
from galore_jax.matrix.view import MatrixView
from galore_jax.projector.project import bases, contract
from galore_jax.projector.refresh import Projectors
from galore_jax.projector.storage import Stored

# Of the way from chance to equality. Q-GaLore's threshold is 0.4, on a cosine.
STILL = 0.4
MOST_TURNS = 16  # from a refresh to the next: a subspace that moves again is noticed in time


def overlap(view: MatrixView, old: Stored, new: Stored) -> jax.Array:
    """How much two projectors' subspaces have in common, 0 by chance, 1 if equal; view.batch."""
    shares = []
    for k, p, q in zip((view.m, view.n), bases(view, old), bases(view, new), strict=True):
        if p is not None and q is not None:
            share = jnp.sum(jnp.square(contract(p, -2, q, -2)), axis=(-2, -1)) / view.rank
            chance = view.rank / k
            shares.append((share - chance) / (1 - chance))
    return sum(shares[1:], shares[0]) / len(shares)


def next_turns(
    views: Sequence[MatrixView],
    turns: Sequence[jax.Array],
    old: Sequence[Stored],
    now: Projectors,
) -> list[jax.Array]:
    """Double the turns to the next refresh of matrices that barely moved; one for the others.

    Args:
        views: the projected leaves.
        turns: theirs so far, int32 of their batch shapes.
        old: their projectors before this step.
        now: those of this step. A matrix without a new one keeps its number of turns.

    Returns:
        The numbers from here on.
    """

    def judged():
        doubled = []
        for view, t, p, q in zip(views, turns, old, now.stored, strict=True):
            still = overlap(view, p, q) >= STILL
            doubled.append(jnp.where(still, jnp.minimum(2 * t, MOST_TURNS), 1))
        return doubled

    if now.possible is False:
        return list(turns)
    new = cond(now.possible, judged, lambda: list(turns))
    return [jnp.where(done, n, t) for done, n, t in zip(now.renewed, new, turns, strict=True)]
