"""LDAdam against its equations."""

import jax
import jax.numpy as jnp
import numpy as np

import galore_jax
from tests.optimizers.equations import (
    DECAY,
    RANK,
    RATE,
    SHAPES,
    Adam,
    by_matrix,
    check,
    check_svd,
    gradients,
    run,
)
from tests.problems import params_like


def test_ldadam():
    b1, b2, rho = 0.9, 0.99, 0.8
    tx = galore_jax.ldadam(RATE, b1, b2, weight_decay=DECAY, rank=RANK, rho=rho)
    params, states = run(tx)

    def ldadam(w, grads, projector, tall):
        del tall
        adam, error, old = Adam(b1, b2), 0.0, None
        for t, g in enumerate(grads):
            a, p = g + error, projector(t)
            lifted = 0.0 if old is None else old @ adam.mu
            if old is None:
                check_svd(p, a)
            else:
                b = rho * old @ adam.mu_hat + (1 - rho) * a
                q = np.linalg.qr(b @ (b.T @ old))[0]
                np.testing.assert_allclose(p @ p.T, q @ q.T, atol=1e-3)
                c = p.T @ old
                spread = c**2 @ (adam.nu_hat - adam.mu_hat**2) + (c @ adam.mu_hat) ** 2
                adam.nu = (1 - b2**adam.t) * np.abs(spread)
                adam.mu = c @ adam.mu
            n = adam(p.T @ a)
            x = a + b1 / (1 - b1) * lifted
            error, old = x - p @ (p.T @ x), p
            w = w - RATE * (p @ n + DECAY * w)
        return w

    check(params, by_matrix(ldadam, [s[0].galore.projector for s in states]), 1e-4)


def test_ldadams_account_is_what_the_subspace_did_not_show():
    """Without momentum, updates' sources and the error add up to all gradients so far."""
    params = params_like(SHAPES)
    tx = galore_jax.scale_by_ldadam(b1=0.0, rank=RANK)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(4):
        before = state
        _, state = update(jax.tree.map(jnp.asarray, gradients(t)), state, params)
        for k in SHAPES:
            whole = gradients(t)[k] + np.asarray(before.error[k])
            p = np.asarray(state.galore.projector[k])
            shown = p @ p.T @ whole if k == "wide" else whole @ p @ p.T
            np.testing.assert_allclose(shown + state.error[k], whole, atol=1e-5)
