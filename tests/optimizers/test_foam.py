"""FOAM against its equations."""

import numpy as np
import optax
import pytest

import galore_jax
from tests.optimizers.equations import DECAY, RATE, Adam, by_matrix, check, limited, run


def folded(x, width):
    """Means of neighbours on the last axis, and what repeats them."""
    starts = range(0, x.shape[-1], width)
    means = np.stack([x[..., i : i + width].mean(-1) for i in starts], -1)
    return means, lambda m: np.repeat(m, width, -1)[..., : x.shape[-1]]


@pytest.mark.parametrize(("level", "gamma"), [(0, 1e6), (2, 1e6), (1, 1.01)])
def test_foam(level, gamma):
    tx = galore_jax.foam(RATE, weight_decay=DECAY, level=level, scale=0.5, gamma=gamma)
    params, states = run(tx)
    assert states[0].inner_states["foam"].inner_state[0][0].mu["wide"].shape == (
        8,
        -(-14 // 2**level),
    )
    binds = []

    def foam(w, grads, projector, tall):
        del projector
        adam, last = Adam(), None
        for g in [g.T if tall else g for g in grads]:
            mean, repeat = folded(g, 2**level)
            adam(mean)
            rest = g - repeat(mean)
            m, v = repeat(adam.mu_hat) + rest, repeat(adam.nu_hat) + rest**2
            u = m / (np.sqrt(v) + 1e-8)
            binds.append(last is not None and np.linalg.norm(u) > gamma * last)
            u, last = limited(u, last, gamma)
            w = w - RATE * (0.5 * (u.T if tall else u) + DECAY * w)
        return w

    check(params, by_matrix(foam, None))
    assert any(binds) == (gamma < 2)
    if level == 0:  # Nothing is folded: Adam.
        check(params, run(optax.adamw(RATE * 0.5, weight_decay=2 * DECAY))[0])


@pytest.mark.parametrize("level", [-1, 1.5, True])
def test_foams_level_is_a_whole_number(level):
    with pytest.raises(ValueError, match="level must be a whole number"):
        galore_jax.foam(0.1, level=level)
