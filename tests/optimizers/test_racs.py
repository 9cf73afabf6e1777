"""RACS against its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax
from tests.optimizers.equations import DECAY, RATE, by_matrix, check, limited, run
from tests.problems import low_rank_gradient


def test_racs():
    tx = galore_jax.racs(RATE, 0.9, DECAY, scale=0.05, gamma=1.01)
    params, states = run(tx)
    numbers = [x.size for x in jax.tree.leaves(states[0].inner_states["racs"])]
    assert sum(numbers) == 2 * (8 + 14 + 1)

    def racs(w, grads, projector, tall):
        del projector
        rows, columns, last = 0.0, 0.0, None
        for g in [g.T if tall else g for g in grads]:
            q = np.ones(len(g))
            for _ in range(5):
                s = (g**2).T @ q / (q @ q)
                q = g**2 @ s / (s @ s)
            rows, columns = 0.9 * rows + 0.1 * q, 0.9 * columns + 0.1 * s
            u = g / np.sqrt(np.outer(rows, columns))
            u, last = limited(u, last, 1.01)
            w = w - RATE * (0.05 * (u.T if tall else u) + DECAY * w)
        return w

    check(params, by_matrix(racs, None))


@pytest.mark.parametrize("factor", [1e-17, 1e-6, 1e17])
def test_racs_at_any_size_of_gradient(factor):
    """Squares of squares neither vanish nor overflow, and a row or column of zeros stays."""
    g = jnp.asarray(low_rank_gradient(0, 8, 14)).at[2].set(0).at[:, 3].set(0)
    tx = galore_jax.scale_by_row_and_column()
    want, _ = tx.update(g, tx.init(g))
    got, state = tx.update(factor * g, tx.init(g))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert not np.any(got[2]) and not np.any(got[:, 3])
    again, _ = tx.update(0 * g, state)
    assert not np.any(again)
