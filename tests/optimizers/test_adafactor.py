"""Adafactor in the subspace; trajectories against galore-torch are with the oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax.optimizers.adafactor import scale_by_factored_rms
from tests.problems import grads_like, low_rank_gradient, normal, params_like, train


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_stack_of_many_layers_gives_what_separate_leaves_give(momentum):
    """More layers than rank: a rule that factored the two largest axes would pick the stack."""
    stacked = {"w": jnp.asarray(normal(0, 30, 12, 20))}
    separate = {str(i): stacked["w"][i] for i in range(30)}
    tx = galore_jax.galore_adafactor(
        1e-2,
        min_dim_size_to_factor=1,
        momentum=momentum,
        weight_decay_rate=1e-3,
        rank=4,
        update_proj_gap=2,
        weight_dimension_numbers=galore_jax.last_two_axes,
    )

    def stack(params, step):
        return {"w": jnp.asarray(low_rank_gradient(step, 30, 12, 20))}

    def split(params, step):
        return {str(i): stack(params, step)["w"][i] for i in range(30)}

    a, _ = train(tx, stacked, 4, grads=stack)
    b, _ = train(tx, separate, 4, grads=split)
    expected = jnp.stack([b[str(i)] for i in range(30)])
    np.testing.assert_allclose(a["w"], expected, atol=1e-5)


def test_unprojected_leaves_follow_optaxs_adafactor():
    params = params_like({"embed": (40, 50), "bias": (8,)})
    options = dict(min_dim_size_to_factor=32, momentum=0.9, weight_decay_rate=1e-3)
    with pytest.warns(UserWarning, match="projects no leaf"):
        ours, _ = train(galore_jax.galore_adafactor(0.05, **options, rank=4), params, 6)
    theirs, _ = train(optax.adafactor(0.05, **options), params, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)


@pytest.mark.parametrize("factored", [True, False])
def test_second_moment_against_optax(factored):
    params = params_like({"w": (40, 50)})
    ours = scale_by_factored_rms(factored=factored)
    theirs = optax.scale_by_factored_rms(factored=factored, min_dim_size_to_factor=32)
    a, b = ours.init(params), theirs.init(params)
    for step in range(4):
        grads = grads_like(params, step)
        u, a = ours.update(grads, a)
        v, b = theirs.update(grads, b, params)
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-4)


def test_the_step_is_scaled_by_the_full_weight():
    params = params_like({"w": (40, 50)})
    tx = galore_jax.galore_adafactor(1e-2, rank=4)
    grads = grads_like(params, 0)
    one, _ = tx.update(grads, tx.init(params), params)
    larger = jax.tree.map(lambda x: 10 * x, params)
    ten, _ = tx.update(grads, tx.init(params), larger)
    np.testing.assert_allclose(10 * one["w"], ten["w"], rtol=1e-4)
    with pytest.raises(ValueError, match="multiply_by_parameter_scale=False"):
        tx.update(grads, tx.init(params))
    absolute = galore_jax.galore_adafactor(1e-2, multiply_by_parameter_scale=False, rank=4)
    absolute.update(grads, absolute.init(params))
