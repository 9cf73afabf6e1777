"""Stochastic rounding: unbiased, to neighbours only, and otherwise optax.apply_updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax.rounding import apply_updates
from tests.problems import normal


def bits(x):
    return np.asarray(x).view(np.uint16).astype(int)


def test_mean_is_the_sum():
    """Over many draws, for weights and updates of all sizes and both signs."""
    p = jnp.asarray(normal(0, 64) * 10.0 ** np.linspace(-30, 30, 64), jnp.bfloat16)
    u = p.astype(jnp.float32) * normal(1, 64) * 10.0 ** np.linspace(-4, 1, 64).astype(np.float32)
    draws = jax.jit(jax.vmap(lambda k: apply_updates(p, u, k)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    exact = np.asarray(p, np.float64) + np.asarray(u, np.float64)
    rounded = np.asarray(draws, np.float64)
    down, up = rounded.min(0), rounded.max(0)
    gap = np.abs(exact) * 2.0**-7  # at least the gap between neighbours
    assert np.all(np.abs(rounded.mean(0) - exact) < 5 * gap / 2 / np.sqrt(20_000) + gap / 2**15)
    # Only the two neighbours occur.
    assert np.all((rounded == down) | (rounded == up))
    assert np.all((down <= exact + 1e-6 * gap) & (exact - 1e-6 * gap <= up))
    assert np.all(np.abs(bits(draws.min(0)) - bits(draws.max(0))) <= 1)


def test_small_updates_add_up():
    p = jnp.ones(4096, jnp.bfloat16)
    u = jnp.float32(-1e-4)  # a 40th of the gap below 1

    @jax.jit
    def train(p):
        def step(p, key):
            return apply_updates(p, u, key), None

        return jax.lax.scan(step, p, jax.random.split(jax.random.key(0), 500))[0]

    stuck = p
    for _ in range(3):
        stuck = apply_updates(stuck, u)
    np.testing.assert_array_equal(stuck, p)
    mean = np.mean(np.asarray(train(p), np.float64))
    assert mean == pytest.approx(0.95, abs=1e-3)


def test_exact_and_not_finite_sums_stay():
    p = jnp.array([1.0, -2.0, 0.0, -0.0, np.inf, -np.inf, np.nan, np.inf, 3e38], jnp.bfloat16)
    u = jnp.array([0.5, 2.0, 0.0, -0.0, 1.0, 5.0, 1.0, -np.inf, 3e38], jnp.float32)
    out = apply_updates(p, u, jax.random.key(0))
    expected = optax.apply_updates(p, u)
    np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16


def test_not_a_number_stays_one():
    payload = jnp.full(1000, 0x7FFFFFFF, jnp.uint32)
    u = jax.lax.bitcast_convert_type(payload, jnp.float32)
    assert np.all(np.isnan(apply_updates(jnp.zeros(1000, jnp.bfloat16), u, jax.random.key(0))))


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["nearest", "stochastic"])
def test_like_optax_elsewhere(key):
    params = {
        "a": jnp.asarray(normal(0, 7)),
        "none": None,
        "masked": optax.MaskedNode(),
        "half": jnp.asarray(normal(1, 3), jnp.float16),
        "scalar": jnp.float32(2),
        "empty": {},
    }
    updates = {**params, "a": jnp.asarray(normal(2, 7)), "half": jnp.float32(1e-3)}
    ours, theirs = apply_updates(params, updates, key), optax.apply_updates(params, updates)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_without_a_key_to_nearest():
    p, u = jnp.asarray(normal(0, 99), jnp.bfloat16), jnp.asarray(normal(1, 99))
    np.testing.assert_array_equal(apply_updates(p, u), optax.apply_updates(p, u))


def test_a_key_for_every_leaf():
    """Equal leaves are rounded apart; the draw depends on key and position alone."""
    p, u = jnp.ones(1000, jnp.bfloat16), jnp.float32(1e-3)
    key = jax.random.key(1)
    out = apply_updates([p, p], [u, u], key)
    assert np.any(np.asarray(out[0]) != np.asarray(out[1]))
    again = jax.jit(apply_updates)([p.astype(jnp.float32), p], [u, u], key)
    np.testing.assert_array_equal(out[1], again[1])


def test_what_has_no_update_stays():
    """As in a module of Equinox, whose functions are leaves."""
    params = {"w": jnp.ones(3), "activation": jnp.tanh, "frozen": jnp.ones(2), "none": None}
    updates = {"w": jnp.ones(3), "activation": None, "frozen": None, "none": None}
    for key in (None, jax.random.key(0)):
        new = apply_updates(params, updates, key)
        np.testing.assert_array_equal(new["w"], 2.0)
        assert all(new[k] is params[k] for k in ("activation", "frozen", "none"))
