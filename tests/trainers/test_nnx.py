"""Flax NNX: modules with dropout and batch statistics, and parts of them that are not trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_jax
from tests.problems import once_but
from tests.trainers.training import STEPS, TOLERANCE, X, check_near, mean_square, optimizer


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.mix = nnx.Linear(24, 24, rngs=rngs)
        self.lm_head = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.norm(jnp.tanh(self.up(x))))
        return self.lm_head(jnp.tanh(self.mix(x)))


ALL = nnx.Param
SOME = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("up")))


def by_nnx(model, tx, wrt):
    """What `nnx.value_and_grad` does: other state changes in place."""
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.value_and_grad(lambda m: mean_square(m(X)), argnums=nnx.DiffState(0, wrt))
        loss, grads = gradient(model)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer)) for _ in range(STEPS)]


def in_the_subspace(model, tx, wrt):
    """The README's pattern: other state goes in as an argument and comes out as `aux`."""
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        graph, params, rest = nnx.split(model, wrt, ...)

        def loss_fn(params, rest):
            model = nnx.merge(graph, params, rest, copy=True)
            return mean_square(model(X)), nnx.state(model, nnx.Not(wrt))

        gradient = galore_jax.value_and_grad(loss_fn, tx, has_aux=True)
        (loss, rest), grads = gradient(params, optimizer.opt_state, rest)
        nnx.update(model, rest)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer)) for _ in range(STEPS)]


@pytest.mark.parametrize("wrt", once_but([ALL], [ALL, SOME]), ids=["all", "some"])
def test_other_state_is_what_nnx_makes_of_it(wrt):
    theirs, ours = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    want = by_nnx(theirs, optimizer(), wrt)
    check_near(in_the_subspace(ours, optimizer(), wrt), want)
    states = (jax.tree.leaves(nnx.state(m, nnx.Not(nnx.RngState))) for m in (theirs, ours))
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
    assert theirs.dropout.rngs.count[...] == ours.dropout.rngs.count[...] == STEPS


def test_each_microbatch_has_noise_of_its_own():
    """State goes by keyword: it is no batch, and its random keys are folded."""
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    tx = optimizer()

    def loss_fn(params, x, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        return jnp.mean(model(x) ** 2), model.dropout(jnp.ones(24))

    gradient = galore_jax.value_and_grad(loss_fn, tx, has_aux=True, microbatches=2, refresh=False)
    (_, noise), _ = gradient(params, tx.init(params), X, rest=rest)
    assert noise.shape == (2, 24) and jnp.any(noise[0] != noise[1])


@pytest.mark.slow
def test_dropout_layer_by_layer():
    """Each layer's key comes from the one before, as part of what the blocks hand on."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "blocks": {"mix": jax.random.normal(keys[0], (3, 16, 16)) / 4},
        "lm_head": jax.random.normal(keys[1], (16, 8)) / 4,
    }
    tx = galore_jax.galore_adamw(
        1e-2, rank=4, update_proj_gap=3, weight_dimension_numbers=galore_jax.last_two_axes
    )

    def block(p, carry):
        x, key = carry
        key, now = jax.random.split(key)
        kept = jax.random.bernoulli(now, 0.8, x.shape)
        return x + jnp.where(kept, jnp.tanh(x @ p["mix"]) / 0.8, 0), key

    def loss_fn(params, key):
        x, _ = galore_jax.layerwise(block, params["blocks"], (X, key))
        return mean_square(x @ params["lm_head"])

    @jax.jit
    def full(params, state, key):
        loss, grads = jax.value_and_grad(loss_fn)(params, key)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    losses = []
    for step in (full, jax.jit(galore_jax.value_and_update(loss_fn, tx))):
        p, state = params, tx.init(params)
        losses.append([])
        for i in range(STEPS):
            loss, p, state = step(p, state, jax.random.key(i))
            losses[-1].append(float(loss))
    np.testing.assert_allclose(*losses, rtol=0, atol=TOLERANCE)
