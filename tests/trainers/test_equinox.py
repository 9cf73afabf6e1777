"""Equinox: modules as trees of parameters, `combine` in the loss."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax
from tests.trainers.training import (
    STEPS,
    X,
    Y,
    check_near,
    full_gradients,
    in_the_subspace,
    mean_square,
    optimizer,
)

eqx = pytest.importorskip("equinox")

# Weights are (outputs, inputs).
OUT_IN = optax.contrib.GaLoreDimensionNumbers(1, 0)


@pytest.mark.parametrize("first", ["params", "static"])
def test_combine_in_either_order(first):
    model = eqx.nn.MLP(16, 8, 24, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = optimizer(weight_dimension_numbers=OUT_IN)

    def loss_fn(params):
        pair = (params, static) if first == "params" else (static, params)
        return mean_square(jax.vmap(eqx.combine(*pair))(X))

    want = full_gradients(loss_fn, tx, params)
    check_near(in_the_subspace(loss_fn, tx, params), want)


def test_the_whole_module_is_updated():
    model = eqx.nn.MLP(16, 8, 24, 1, activation=jnp.tanh, key=jax.random.key(0))
    tx = optimizer(weight_dimension_numbers=OUT_IN)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    want = full_gradients(lambda p: mean_square(jax.vmap(eqx.combine(p, static))(X)), tx, params)

    @eqx.filter_jit
    def step(model, state):
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss_fn(params):
            return jnp.mean((jax.vmap(eqx.combine(params, static))(X) - Y) ** 2)

        loss, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state)
        updates, state = tx.update(grads, state, params)
        return galore_jax.apply_updates(model, updates), state, loss

    state, got = tx.init(params), []
    for _ in range(STEPS):
        model, state, loss = step(model, state)
        got.append(float(loss))
    check_near(got, want)


def test_a_scan_over_stacked_layers():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))(keys)
    params, static = eqx.partition(layers, eqx.is_array)
    tx = optimizer(weight_dimension_numbers=optax.contrib.GaLoreDimensionNumbers(2, 1))

    def loss_fn(params):
        def body(x, layer):
            return x + jnp.tanh(jax.vmap(eqx.combine(static, layer))(x)), None

        return mean_square(jax.lax.scan(body, X, params)[0][:, :8])

    check_near(in_the_subspace(loss_fn, tx, params), full_gradients(loss_fn, tx, params))
