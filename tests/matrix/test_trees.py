"""Trees like the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax
from galore_jax.matrix.trees import owners
from tests.problems import params_like


def shared_init():
    """Adam whose init gives all leaves of one shape the same array."""
    zeros = {}

    def init(params):
        return jax.tree.map(lambda x: zeros.setdefault(x.shape, jnp.zeros(x.shape)), params)

    def update(updates, state, params=None):
        return updates, jax.tree.map(jnp.add, state, updates)

    return optax.GradientTransformation(init, update)


def test_arrays_are_told_apart_by_where_they_stand():
    params = params_like({"a": (8, 12), "b": (8, 12), "c": (4,)})
    tx = shared_init()
    state = tx.init(params)
    assert state["a"] is state["b"]
    assert owners(tx.init, state, params) == [0, 1, 2]
    adam = optax.adam(1.0)
    assert owners(adam.init, adam.init(params), params) == [None, 0, 1, 2, 0, 1, 2]


def test_layer_by_layer_with_an_init_that_shares_arrays():
    params = {"a": jnp.ones((3, 4, 4)), "b": 2 * jnp.ones((3, 4, 4))}
    tx = shared_init()

    def loss_fn(params, x):
        block = lambda p, x: x @ p["a"] @ p["b"] / 10  # noqa: E731
        return jnp.sum(galore_jax.layerwise(block, params, x))

    x, state = jnp.arange(4.0)[None], tx.init(params)
    grads = jax.grad(loss_fn)(params, x)
    _, new, state = galore_jax.value_and_update(loss_fn, tx)(params, state, x)
    for k, g in grads.items():
        np.testing.assert_allclose(state[k], g, rtol=1e-5)
        np.testing.assert_allclose(new[k], params[k] + g, rtol=1e-5)
