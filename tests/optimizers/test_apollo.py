"""APOLLO against its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax
from tests.optimizers.equations import (
    DECAY,
    GAP,
    RANK,
    RATE,
    SHAPES,
    STEPS,
    Adam,
    by_matrix,
    check,
    check_svd,
    limited,
    run,
)


def gaussian(name, shape, layer, draw):
    """The projector APOLLO draws, which it does not keep."""
    from galore_jax.matrix.plan import plan
    from galore_jax.optimizers.apollo import _gaussian

    params = {k: jnp.zeros(s) for k, s in SHAPES.items()}
    leaf = next(x for x in plan(params, rank=RANK) if x.path == name)
    return np.asarray(_gaussian(leaf, jnp.asarray(layer), jnp.asarray(draw)), np.float64)


@pytest.mark.parametrize("gamma", [1.01, 1e6])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo(granularity, gamma):
    tx = galore_jax.apollo(
        RATE, weight_decay=DECAY, rank=RANK, update_proj_gap=GAP, granularity=granularity,
        scale=1.5, gamma=gamma,
    )  # fmt: skip
    params, _ = run(tx)
    projectors = [
        {name: gaussian(name, SHAPES[name], 0, t // GAP) for name in SHAPES} for t in range(STEPS)
    ]
    assert not np.allclose(projectors[0]["wide"], projectors[GAP]["wide"])

    def apollo(w, grads, projector, tall):
        del tall
        adam, last = Adam(), None
        for t, g in enumerate(grads):
            p = projector(t)
            r = p.T @ g
            n = adam(r)
            axis = 0 if granularity == "channel" else None
            s = np.linalg.norm(n, axis=axis) / np.linalg.norm(r, axis=axis)
            u, last = limited(g * s, last, gamma)
            w = w - RATE * (1.5 * u + DECAY * w)
        return w

    check(params, by_matrix(apollo, projectors))


def test_apollos_random_projectors_are_gaussian_and_of_each_layer():
    draws = np.stack([gaussian("wide", SHAPES["wide"], layer, 0) for layer in range(200)])
    assert np.std(draws) == pytest.approx(RANK**-0.5, rel=0.05)
    assert len({d.tobytes() for d in draws}) == 200


def test_apollo_mini_is_apollo_of_rank_one():
    options = dict(rank=1, scale=128**0.5, granularity="tensor")
    want, _ = run(galore_jax.apollo(RATE, **options))
    got, states = run(galore_jax.apollo_mini(RATE))
    check(got, want, 0)
    kept = sum(x.size for x in jax.tree.leaves(states[0]))
    assert kept == 2 * 2 * 14 + 2 + 2  # two moments, two norms, two counts


def test_apollo_with_the_gradients_own_subspace():
    tx = galore_jax.apollo(RATE, rank=RANK, update_proj_gap=GAP, method="svd", gamma=1e6)
    params, states = run(tx)

    def apollo(w, grads, projector, tall):
        del tall
        adam = Adam()
        for t, g in enumerate(grads):
            p = projector(t)
            if t % GAP == 0:
                check_svd(p, g)
            r = p.T @ g
            n = adam(r)
            w = w - RATE * g * (np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0))
        return w

    check(params, by_matrix(apollo, [s[0].projector for s in states]))
