import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_jax
from galore_jax.inner.residual import column_ratio, limit_norm_growth, scale_by_column_ratio
from galore_jax.matrix.plan import plan
from galore_jax.projector.project import outside, project
from tests.problems import normal, params_like

RANK = 2
OPTIONS = dict(rank=RANK, weight_dimension_numbers=galore_jax.last_two_axes)


def leaf_and_projector(shape, proj_type, seed):
    leaf = plan({"w": jnp.zeros(shape)}, proj_type=proj_type, **OPTIONS)[0]
    sides = {"in": [leaf.m], "out": [leaf.n], "both": [leaf.m, leaf.n]}[leaf.side]
    bases = [np.linalg.qr(normal(seed + i, *leaf.batch, k, RANK))[0] for i, k in enumerate(sides)]
    return leaf, jnp.asarray(np.concatenate(bases, axis=-2))


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([(8, 12), (12, 8), (3, 8, 12)]),
    st.sampled_from(["std", "reverse_std", "full"]),
    st.integers(0, 99),
)
def test_the_residual_is_what_the_subspace_does_not_show(shape, proj_type, seed):
    leaf, p = leaf_and_projector(shape, proj_type, seed)
    g = jnp.asarray(normal(seed + 7, *shape))
    rest = outside(leaf, p, g)
    assert rest.shape == (*leaf.batch, leaf.m, leaf.n)
    np.testing.assert_allclose(project(leaf, p, leaf.from_matrix(rest)), 0, atol=1e-5)
    low = project(leaf, p, g)
    squares = [jnp.sum(jnp.square(x)) for x in (rest, low, g)]
    np.testing.assert_allclose(squares[0] + squares[1], squares[2], rtol=1e-4)
    ratio = column_ratio(leaf, 3 * low, low)
    np.testing.assert_allclose(ratio, 3, rtol=1e-5)
    assert jnp.broadcast_shapes(ratio.shape, rest.shape) == rest.shape


def test_a_column_without_gradient_has_no_infinite_ratio():
    leaf, _ = leaf_and_projector((8, 12), "std", 0)
    zeros = jnp.zeros(leaf.low_rank_shape)
    assert not np.any(column_ratio(leaf, zeros, zeros))


def limited(sizes, gamma=1.5):
    """Norms that come out of the limiter for matrices of these norms, one after the other."""
    tx = limit_norm_growth(gamma)
    state, out = tx.init(jnp.zeros((2, 3))), []
    for size in sizes:
        update, state = tx.update(jnp.full((2, 3), size / 6**0.5), state)
        out.append(float(jnp.linalg.norm(update)))
    return out


def test_the_limiter_holds_growth_and_nothing_else():
    np.testing.assert_allclose(limited([1, 10, 10, 1, 1.2]), [1, 1.5, 2.25, 1, 1.2], rtol=1e-5)
    np.testing.assert_allclose(limited([0, 5, 0, 5]), [0, 5, 0, 5], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_limiter_recovers_from_what_is_not_finite(bad):
    assert limited([1, bad, 2])[2] == pytest.approx(2)


def test_stacked_matrices_are_limited_one_by_one():
    tx = limit_norm_growth(2.0)
    state = tx.init(jnp.zeros((2, 3, 4)))
    _, state = tx.update(jnp.ones((2, 3, 4)), state)
    growth = jnp.array([1.5, 10.0])[:, None, None]
    update, _ = tx.update(growth * jnp.ones((2, 3, 4)), state)
    np.testing.assert_allclose(update[:, 0, 0], [1.5, 2.0], rtol=1e-6)


def test_any_transformation_can_take_the_residual():
    """With plain SGD inside and outside, and a scale of one, GaLore is SGD."""
    params = params_like({"w": (3, 8, 12), "v": (12, 8), "bias": (5,)})
    grads = jax.tree.map(lambda w: jnp.sin(w) + 1, params)
    tx = galore_jax.galore(optax.sgd(0.1), scale=1.0, residual=optax.sgd(0.1), **OPTIONS)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * g, atol=1e-5), updates, grads)
    # One with a state, and one that reads the weights.
    outside = optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1))
    tx = galore_jax.galore(optax.sgd(0.1), residual=outside, **OPTIONS)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params)
    assert state.residual_state[0].trace["w"].shape == (3, 8, 12)
    assert isinstance(state.residual_state[0].trace["bias"], optax.MaskedNode)


def test_a_column_ratio_may_be_limited():
    """Of rows that show next to nothing of a gradient nothing follows for the others."""
    x, ratios = jnp.ones((2, 3)), jnp.array([[0.5, 4.0, 1e9]])
    for largest, want in ((20.0, [0.5, 4.0, 20.0]), (jnp.inf, [0.5, 4.0, 1e9])):
        tx = scale_by_column_ratio(largest)
        out, _ = tx.update(x, tx.init(x), column_ratio=ratios)
        np.testing.assert_allclose(out, [want] * 2)
