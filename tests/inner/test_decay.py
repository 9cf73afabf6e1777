"""The update's part that is affine in the parameters, and optimizers that have another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax.inner.decay import split_affine
from tests.problems import grads_like, params_like, train

SHAPES = {"a": (12, 24), "b": (24, 12)}
ADAMW = optax.adamw(1e-2, weight_decay=0.3)  # The one that is not compiled.


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner",
    [
        ADAMW,
        optax.lion(1e-2, weight_decay=0.3),
        optax.adan(1e-2, weight_decay=0.3),
        optax.nadamw(1e-2, weight_decay=0.3),
        optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.3), optax.scale(-1e-2)),
        optax.inject_hyperparams(optax.adamw)(1e-2, weight_decay=0.3),
        optax.apply_if_finite(optax.adamw(1e-2, weight_decay=0.3), 3),
        optax.MultiSteps(optax.adamw(1e-2, weight_decay=0.3), 1).gradient_transformation(),
    ],
)
def test_decay_of_the_full_weight(inner):
    params = params_like(SHAPES)
    tx = galore_jax.galore(inner, rank=4)
    update = tx.update if inner is ADAMW else jax.jit(tx.update)
    grads, state = grads_like(params, 0), tx.init(params)
    at_w, _ = update(grads, state, params)
    at_0, _ = update(grads, state, jax.tree.map(jnp.zeros_like, params))
    for k in SHAPES:
        np.testing.assert_allclose(at_w[k] - at_0[k], -3e-3 * params[k], rtol=1e-3, atol=1e-6)


def test_scheduled_decay_and_learning_rate():
    params = params_like(SHAPES)
    schedule = optax.linear_schedule(1e-1, 0.0, 4)
    tx = galore_jax.galore_adamw(schedule, weight_decay=0.5, rank=4)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for step in range(4):
        updates, state = tx.update(zeros, state, params)
        np.testing.assert_allclose(updates["a"], -0.5 * schedule(step) * params["a"], rtol=1e-5)


def test_without_decay_the_weights_are_not_read():
    params = params_like(SHAPES)
    tx = galore_jax.galore(optax.adam(1e-2), rank=4)
    nans = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, _ = tx.update(grads_like(params, 0), tx.init(params), nans)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
        optax.novograd(1e-2, weight_decay=0.3),
    ],
)
def test_decay_that_enters_the_moments_is_a_warning(inner):
    params = params_like(SHAPES)
    tx = galore_jax.galore(inner, rank=4)
    with pytest.warns(UserWarning, match=r"feeds params into its moments \(leaf 'a'\)"):
        tx.update(grads_like(params, 0), tx.init(params), params)


def test_an_inner_that_keeps_the_weights_is_refused_at_init():
    tx = galore_jax.galore(optax.contrib.schedule_free_adamw(1e-3), rank=4)
    with pytest.raises(ValueError, match=r"keeps the weights themselves.*leaf 'a'"):
        tx.init(params_like(SHAPES))
    around = optax.contrib.schedule_free(galore_jax.galore(optax.sgd(1e-2), rank=4), 1e-2)
    trained, _ = train(around, params_like(SHAPES), 3)
    assert np.linalg.norm(trained["a"]) > 1


def test_the_leaf_that_is_not_affine_is_named():
    params = params_like(SHAPES)
    inner = optax.partition(
        {"plain": optax.adam(1e-2), "lamb": optax.lamb(1e-2)}, {"a": "plain", "b": "lamb"}
    )
    tx = galore_jax.galore(inner, rank=4)
    with pytest.raises(ValueError, match=r"not affine.*leaf 'b'"):
        tx.update(grads_like(params, 0), tx.init(params), params)


@pytest.mark.parametrize(
    "inner", [optax.lamb(1e-2), optax.lars(1e-2), optax.adafactor(1e-2), optax.fromage(1e-2)]
)
def test_other_uses_of_params_are_refused(inner):
    params = params_like(SHAPES)
    tx = galore_jax.galore(inner, rank=4)
    with pytest.raises(ValueError, match=r"not affine in params.*leaf 'a'.*galore_adafactor"):
        jax.jit(tx.update)(grads_like(params, 0), tx.init(params), params)


def test_the_alternative_that_the_message_names_works():
    params = params_like(SHAPES)
    tx = optax.chain(
        galore_jax.galore(optax.scale_by_adam(), rank=4),
        optax.scale_by_trust_ratio(),
        optax.scale_by_learning_rate(1e-2),
    )
    trained, _ = train(tx, params, 3)
    assert not np.allclose(trained["a"], params["a"])


def test_split_of_a_function_written_out():
    def update(w):
        return [3.0 * w[0] + 1.0, jnp.full_like(w[1], 2.0)], "rest"

    like = [jnp.zeros((2, 3, 4)), jnp.zeros((3, 4))]
    with pytest.raises(TypeError):  # the rest has to be arrays
        split_affine(update, like, ["a", "b"])
    at_zero, (rest, _), slopes = split_affine(
        lambda w: (update(w)[0], ({"n": 5.0}, 0)), like, ["a", "b"]
    )
    np.testing.assert_allclose(at_zero[0], 1.0)
    np.testing.assert_allclose(at_zero[1], 2.0)
    np.testing.assert_allclose(slopes[0], [3.0, 3.0])
    np.testing.assert_allclose(slopes[1], 0.0)
    assert rest["n"] == 5.0


@pytest.mark.parametrize("weights", [np.arange(24.0), np.arange(4.0)[:, None], np.eye(4, 24)])
def test_a_decay_that_is_not_one_number_for_a_matrix_is_not_a_number(weights):
    """Its columns and elements are those of the subspace: the weight's own have no decay."""
    uneven = optax.stateless(lambda u, p: jax.tree.map(lambda u, p: u - weights * p, u, p))
    params = params_like({"a": (12, 24)})
    tx = galore_jax.galore(uneven, rank=4)
    updates, _ = jax.jit(tx.update)(grads_like(params, 0), tx.init(params), params)
    assert np.all(np.isnan(updates["a"]))
    even = optax.stateless(lambda u, p: jax.tree.map(lambda u, p: u - np.full(24, 0.5) * p, u, p))
    tx = galore_jax.galore(even, rank=4)
    updates, _ = jax.jit(tx.update)(grads_like(params, 0), tx.init(params), params)
    assert np.all(np.isfinite(updates["a"]))
