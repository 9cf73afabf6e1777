"""SCALE against its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax
from tests.optimizers.equations import DECAY, RATE, Adam
from tests.problems import grads_like, params_like, train


def test_scale():
    shapes = {"embed": (10, 6), "mlp": (2, 6, 8), "norm": (2, 6), "lm_head": (6, 10)}
    params = params_like(shapes)
    tx = galore_jax.scale_sgd(RATE, 0.9, DECAY, adam_learning_rate=0.005)
    got, state = train(tx, params, 5)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 60 + 2 * 12
    want = {k: np.asarray(w, np.float64) for k, w in params.items()}
    momentum, adam = 0.0, Adam()
    for t in range(5):
        grads = {k: np.asarray(g, np.float64) for k, g in grads_like(params, t).items()}
        momentum = 0.9 * momentum + 0.1 * grads["lm_head"]
        grads["lm_head"] = momentum
        for k in shapes:
            g = grads[k]
            if k == "norm":
                want[k] = want[k] - 0.005 * (adam(g) + DECAY * want[k])
                continue
            columns = g / np.sqrt(np.mean(g**2, axis=-2, keepdims=True))
            want[k] = want[k] - RATE * (columns + DECAY * want[k])
    for k in shapes:
        np.testing.assert_allclose(got[k], want[k], atol=1e-5)


def test_scale_wants_to_know_the_output_layer():
    with pytest.raises(ValueError, match=r"output_layer.*the paths are kernel"):
        galore_jax.scale_sgd(0.1).init({"kernel": jnp.ones((4, 4))})
    tied = galore_jax.scale_sgd(0.1, output_layer="embed")
    tied.init({"embed": jnp.ones((4, 4)), "mlp": jnp.ones((4, 4))})
