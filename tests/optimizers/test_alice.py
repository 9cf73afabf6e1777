"""Alice against its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax
from tests.optimizers.equations import DECAY, GAP, RANK, RATE, by_matrix, check, limited, run
from tests.problems import normal


def check_switch(new, gram, old, g, leading, b3):
    """The leading Ritz vectors of what is tracked are in a new basis, the rest is beside all."""
    np.testing.assert_allclose(new.T @ new, np.eye(RANK), atol=1e-5)
    tracked = b3 * old @ gram @ old.T + (1 - b3) * g @ g.T
    q = np.linalg.qr(tracked @ old)[0]
    ritz = q @ np.linalg.eigh(q.T @ tracked @ q)[1][:, ::-1]
    kept = ritz[:, :leading]
    np.testing.assert_allclose(np.abs(np.sum(kept * new[:, :leading], 0)), 1, atol=1e-4)
    np.testing.assert_allclose(ritz.T @ new[:, leading:], 0, atol=1e-4)


@pytest.mark.parametrize(
    ("leading", "b3", "gamma"), [(0.34, 0.9, 1e6), (1.0, 0.9, 1.01), (0.0, 0.0, 1.01)]
)
def test_alice(leading, b3, gamma):
    b1, b2 = 0.8, 0.9
    options = dict(rank=RANK, update_proj_gap=GAP, leading=leading, gamma=gamma)
    tx = galore_jax.alice(RATE, b1, b2, b3, weight_decay=DECAY, scale=0.5, **options)
    params, states = run(tx)
    inner = [s.inner_states["alice"].inner_state[0][0] for s in states]
    binds = []

    def alice(w, grads, basis, tall):
        gram, m, v, p, last = 0.0, 0.0, 0.0, 0.0, None
        for t, g in enumerate(grads):
            u = basis(t)
            if t and t % GAP == 0:
                check_switch(u, gram, basis(t - 1), g, round(leading * RANK), b3)
            elif t:
                np.testing.assert_array_equal(u, basis(t - 1))
            s = u.T @ g
            gram = b3 * gram + (1 - b3) * s @ s.T
            m, v = b1 * m + (1 - b1) * s, b2 * v + (1 - b2) * s**2
            p = b1 * p + (1 - b1) * (np.sum(g**2, 0) - np.sum(s**2, 0))
            c = np.sqrt(8 - RANK) * (g - u @ s) / np.sqrt(p)
            binds.append(last is not None and np.linalg.norm(c) > gamma * last)
            c, last = limited(c, last, gamma)
            w = w - RATE * (0.5 * (u @ (m / (np.sqrt(v) + 1e-8)) + 0.4 * c) + DECAY * w)
        return w

    check(params, by_matrix(alice, [s.basis for s in inner]), 1e-4)
    assert any(binds) == (gamma < 2)


def test_alice_follows_the_gradients_directions():
    """Gradients of one subspace are found, through T steps with noise, and signs do not flip."""
    directions = np.linalg.qr(normal(0, 12, 3))[0]
    tx = galore_jax.scale_by_alice(4, update_proj_gap=2, leading=0.75)
    state, update = tx.init(jnp.zeros((12, 30))), jax.jit(tx.update)
    for t in range(9):
        g = directions @ normal(t + 1, 3, 30) + 0.01 * normal(t + 50, 12, 30)
        old, (_, state) = state, update(jnp.asarray(g), state)
    found = np.asarray(state.basis)[:, :3]
    np.testing.assert_allclose(np.linalg.norm(directions.T @ found, axis=0), 1, atol=1e-3)
    assert np.all(np.sum(found * np.asarray(old.basis)[:, :3], axis=0) > 0)


def test_alice_and_gradients_that_show_nothing():
    """Zeros move nothing, and a basis is found after them; what is not finite changes none."""
    tx = galore_jax.scale_by_alice(2, update_proj_gap=1)
    good = jnp.asarray(normal(0, 6, 9))
    out, state = tx.update(0 * good, tx.init(good))
    assert not np.any(out)
    _, state = tx.update(good, state)
    np.testing.assert_allclose(state.basis.T @ state.basis, np.eye(2), atol=1e-5)
    _, after = tx.update(jnp.nan * good, state)
    np.testing.assert_array_equal(after.basis, state.basis)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 6, 6)])
@pytest.mark.parametrize("rank", [5, 6, 20])
def test_alice_where_the_complement_is_small_or_none(shape, rank):
    """What cannot be drawn from it is taken from the directions that are not leading ones."""
    tx = galore_jax.scale_by_alice(rank, update_proj_gap=1, leading=0.2)
    state = tx.init(jnp.zeros(shape))
    for step in range(2):
        out, state = tx.update(jnp.asarray(normal(step, *shape)), state)
    r = min(rank, 6)
    basis = np.asarray(state.basis)
    assert out.shape == shape and basis.shape[-2:] == (6, r)
    assert np.any(state.limit.norm) == (r < 6)
    products = np.swapaxes(basis, -1, -2) @ basis
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(r), products.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank"),
        (dict(rank=lambda path, shape: 2), "rank must be an int or a share here"),
        (dict(rank=2, leading=1.5), "leading must be a share"),
        (dict(rank=2, leading=jnp.ones([])), r"static_args=\('rank', 'leading'\)"),
        (dict(rank=2, update_proj_gap=0), "update_proj_gap"),
    ],
)
def test_alices_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        galore_jax.alice(0.1, **options)
