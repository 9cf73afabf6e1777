"""Optimistix: it turns what an optimizer's functions close over into a tree."""

import jax
import jax.numpy as jnp
import pytest

from tests.trainers.training import STEPS, X, check_near, full_gradients, mean_square, optimizer

optx = pytest.importorskip("optimistix")


def test_minimise():
    params, tx = {"w": jax.random.normal(jax.random.key(0), (16, 8)) / 4}, optimizer()

    def loss_fn(params, args=None):
        return mean_square(jnp.tanh(X @ params["w"]))

    solver = optx.OptaxMinimiser(tx, rtol=1e-9, atol=1e-9)

    def after(steps):
        solution = optx.minimise(loss_fn, solver, params, max_steps=steps, throw=False)
        return float(loss_fn(solution.value))

    want = full_gradients(loss_fn, tx, params)
    check_near([want[0], after(STEPS - 1)], [want[0], want[-1]])
