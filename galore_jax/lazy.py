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
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.leaf import Leaf, Sites
from galore_jax.projection import Stored, bases, contract
from galore_jax.refresh import Pause, Schedule, per_leaf

# Of the way from chance to equality. Q-GaLore's threshold is 0.4, on a cosine.
STILL = 0.4
LARGEST_GAP = 16  # in turns: a subspace that moves again is noticed in time


def overlap(leaf: Leaf, old: Stored, new: Stored) -> jax.Array:
    """How much two projectors' subspaces have in common, 0 by chance, 1 if equal; leaf.batch."""
    shares = []
    for k, p, q in zip((leaf.m, leaf.n), bases(leaf, old), bases(leaf, new), strict=True):
        if p is not None and q is not None:
            share = jnp.sum(jnp.square(contract(p, -2, q, -2)), axis=(-2, -1)) / leaf.rank
            chance = leaf.rank / k
            shares.append((share - chance) / (1 - chance))
    return sum(shares[1:], shares[0]) / len(shares)


def unpaused(leaves: Sequence[Leaf]) -> list[Pause]:
    """Pauses before the first step: none."""
    return [
        Pause(jnp.ones(leaf.batch, jnp.int32), jnp.zeros(leaf.batch, jnp.int32)) for leaf in leaves
    ]


def next_pauses(
    leaves: Sequence[Leaf],
    pauses: Sequence[Pause],
    old: Sequence[Stored],
    new: Sequence[Stored],
    low_grads: Sequence[jax.Array],
    when: Schedule,
) -> list[Pause]:
    """Double the gap of matrices that barely moved, and take that of the others back to one.

    Args:
        leaves: the projected leaves.
        pauses: theirs so far.
        old: their projectors before this step.
        new: and at it.
        low_grads: their projected gradients; where one is not finite nothing was refreshed, and
            the matrix tries again at its next turn.
        when: which of them had a turn, and which of them took it.
    """

    def judged():
        gaps = []
        for leaf, pause, p, q, g in zip(leaves, pauses, old, new, low_grads, strict=True):
            still = overlap(leaf, p, q) >= STILL
            finite = jnp.all(jnp.isfinite(g), axis=(-2, -1))
            longer = jnp.minimum(2 * pause.gap, LARGEST_GAP)
            gaps.append(jnp.where(finite & still, longer, 1))
        return gaps

    gaps = jax.lax.cond(when.any_due, judged, lambda: [p.gap for p in pauses])
    turns, dues = per_leaf(leaves, when.turn), per_leaf(leaves, when.due)
    return [
        Pause(
            jnp.where(due, gap, pause.gap),
            # Not below zero: a turn may pass in a step compiled without refreshes.
            jnp.where(due, gap - 1, jnp.maximum(pause.wait - turn, 0)),
        )
        for pause, gap, turn, due in zip(pauses, gaps, turns, dues, strict=True)
    ]


def pause_tree(where: Sites, pauses: list[Pause], like: optax.Params) -> Pause:
    """The leaves' pauses as two trees like the parameters."""
    return Pause(*(where.only([getattr(p, f) for p in pauses], like) for f in Pause._fields))


def pauses_of(where: Sites, tree: Any) -> list[Pause] | None:
    """Undo `pause_tree`; None where refreshes are not lazy."""
    if not isinstance(tree, Pause):
        return None
    return [Pause(*x) for x in zip(*map(where.pick, tree), strict=True)]
