"""Fira and FRUGAL against their equations: what becomes of what is outside the subspace."""

import numpy as np
import optax
import pytest

import galore_jax
from tests.optimizers.equations import (
    DECAY,
    GAP,
    RANK,
    RATE,
    Adam,
    by_matrix,
    check,
    check_svd,
    limited,
    run,
)


@pytest.mark.parametrize("gamma", [1.01, 1e6])
def test_fira(gamma):
    tx = galore_jax.fira(
        RATE, weight_decay=DECAY, rank=RANK, gamma=gamma, update_proj_gap=GAP, method="svd"
    )
    params, states = run(tx)
    binds = []

    def fira(w, grads, projector, tall):
        del tall
        adam, last = Adam(), None
        for t, g in enumerate(grads):
            p = projector(t)
            if t % GAP == 0:
                check_svd(p, g)
            r = p.T @ g
            n = adam(r)
            phi = np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0)
            rest = phi * (g - p @ r)
            s, last_now = limited(rest, last, gamma)
            binds.append(last is not None and np.linalg.norm(rest) > gamma * last)
            last = last_now
            w = w - RATE * (0.25 * (p @ n + s) + DECAY * w)
        return w

    want = by_matrix(fira, [s[0].projector for s in states])
    check(params, want)
    assert any(binds) == (gamma < 2) and not all(binds)


def test_frugal_signs_what_is_outside():
    inner = optax.adamw(RATE, weight_decay=DECAY)
    tx = galore_jax.galore(
        inner, residual=optax.sign_sgd(0.003), rank=RANK, update_proj_gap=GAP, moments="reset"
    )
    params, states = run(tx, GAP)  # up to the first reset

    def frugal(w, grads, projector, tall):
        del tall
        adam = Adam()
        for t, g in enumerate(grads[:GAP]):
            p = projector(t)
            r = p.T @ g
            rest = g - p @ r
            w = w - RATE * (0.25 * p @ adam(r) + DECAY * w) - 0.003 * np.sign(rest)
        return w

    check(params, by_matrix(frugal, [s.projector for s in states]))
