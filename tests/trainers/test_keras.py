"""Keras on JAX: `model.fit` with the adapter of the examples."""

import os

import jax.numpy as jnp
import pytest

from tests.trainers.training import STEPS, X, Y, check_near, full_gradients, optimizer

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "jax":
    pytest.skip("Keras runs on another backend than JAX", allow_module_level=True)


def test_fit():
    from examples.keras_optimizer import OptaxOptimizer

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(24, activation="tanh"),
            layers.Dense(8, name="lm_head"),
        ]
    )
    tx, weights = optimizer(), model.trainable_variables
    params = {v.path: jnp.copy(v.value) for v in weights}

    def loss_fn(params):
        y, _ = model.stateless_call([params[v.path] for v in weights], [], X)
        return jnp.mean((y - Y) ** 2)

    want = full_gradients(loss_fn, tx, params)
    model.compile(OptaxOptimizer(tx), "mse")
    fitted = model.fit(X, Y, batch_size=len(X), epochs=STEPS, shuffle=False, verbose=0)
    check_near(fitted.history["loss"], want)
    assert int(model.optimizer.opt_state[1].count) == STEPS
