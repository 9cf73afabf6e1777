"""Keep, reset and rotate: what a new projector does to the inner optimizer's moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from tests.problems import grads_like, params_like, train

RANK, GAP = 4, 3
SHAPES = {"tall": (24, 12), "wide": (12, 24)}


def adamw(moments, **options):
    options = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "std", **options}
    return galore_jax.galore_adamw(1e-2, weight_decay=0.0, moments=moments, **options)


def moments_before_and_after_a_refresh(tx, params):
    """Run up to the refresh at step GAP with a zero gradient there, to see it alone."""
    _, before = train(tx, params, GAP)
    grads = grads_like(params, GAP)
    _, after = jax.jit(tx.update)(grads, before, params)
    return before, after, grads


def test_rotated_moments_follow_ldadams_rule_in_numpy():
    params = params_like(SHAPES)
    before, after, grads = moments_before_and_after_a_refresh(adamw("rotate"), params)
    t = GAP
    for k in SHAPES:
        old, new = (np.asarray(s.projector[k], np.float64) for s in (before, after))
        c = new.T @ old

        def turn(matrix, x, k=k):
            return matrix @ x if k == "wide" else x @ matrix.T

        mu, nu = (
            np.asarray(getattr(before.inner_state[0], f)[k], np.float64) for f in ("mu", "nu")
        )
        mu_hat, nu_hat = mu / (1 - 0.9**t), nu / (1 - 0.999**t)
        mu_new = turn(c, mu)
        nu_new = (1 - 0.999**t) * np.abs(turn(c**2, nu_hat - mu_hat**2) + turn(c, mu_hat) ** 2)
        g = np.asarray(grads[k])
        r = new.T @ g if k == "wide" else g @ new
        np.testing.assert_allclose(
            after.inner_state[0].mu[k], 0.9 * mu_new + 0.1 * r, rtol=1e-3, atol=1e-6
        )
        np.testing.assert_allclose(
            after.inner_state[0].nu[k], 0.999 * nu_new + 0.001 * r**2, rtol=1e-3, atol=1e-7
        )


@pytest.mark.slow
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_a_rotation_into_the_same_subspace_changes_no_update(proj_type):
    """With one gradient at every step the subspace stays, and so do the moments in it.

    Two-sided, that gradient is diagonal in the subspace, and Adam with a small eps would
    blow the rounding errors off the diagonal up to full size.
    """
    params = params_like(SHAPES)

    def same(params, step):
        return grads_like(params, 0)

    kept, _ = train(adamw("keep", proj_type=proj_type, eps=1e-3), params, 7, grads=same)
    turned, _ = train(adamw("rotate", proj_type=proj_type, eps=1e-3), params, 7, grads=same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, turned)


def test_rotated_momentum_lifts_to_the_old_one_projected():
    params = params_like(SHAPES)
    tx = galore_jax.galore_sgd(1e-2, momentum=0.9, rank=RANK, update_proj_gap=GAP, moments="rotate")
    before, after, grads = moments_before_and_after_a_refresh(tx, params)
    p, q = before.projector["wide"], after.projector["wide"]
    lifted = p @ before.inner_state[0].trace["wide"]
    expected = 0.9 * q.T @ lifted + q.T @ grads["wide"]
    np.testing.assert_allclose(after.inner_state[0].trace["wide"], expected, rtol=1e-3, atol=1e-5)


def test_reset_moments_start_like_a_fresh_optimizer():
    """From a refresh on, updates equal those of an optimizer that starts there."""
    params = params_like(SHAPES)
    tx = adamw("reset", update_proj_gap=5)
    _, state = train(tx, params, 5)
    fresh = adamw("keep", update_proj_gap=1000)
    fresh_state = fresh.init(params)
    # The fresh run refreshes at its step 0 from the same gradient; align its signs to ours.
    for step in range(5, 10):
        grads = grads_like(params, step)
        updates, state = jax.jit(tx.update)(grads, state, params)
        if step == 5:
            fresh_state = fresh_state._replace(
                count=fresh_state.count + 1, projector=state.projector
            )
        fresh_updates, fresh_state = jax.jit(fresh.update)(grads, fresh_state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            updates,
            fresh_updates,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "moments", "stagger"),
    [  # every pair of options
        (inner, moments, (i + j) % 2 == 0)
        for i, inner in enumerate(
            (optax.lion(1e-3), optax.sgd(1e-2, momentum=0.9), optax.rmsprop(1e-2), optax.sgd(1e-2))
        )
        for j, moments in enumerate(("reset", "rotate"))
    ],
)
def test_policies_work_for_other_inner_optimizers(inner, moments, stagger):
    params = params_like(SHAPES)
    tx = galore_jax.galore(inner, rank=RANK, update_proj_gap=GAP, moments=moments, stagger=stagger)
    trained, state = train(tx, params, 8)
    kept, _ = train(
        galore_jax.galore(inner, rank=RANK, update_proj_gap=GAP, stagger=stagger), params, 8
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((trained, state)))
    stateless = not any(jnp.ndim(x) for x in jax.tree.leaves(state.inner_state))
    assert np.allclose(trained["wide"], kept["wide"]) == stateless


@pytest.mark.parametrize("moments", ["reset", "rotate"])
def test_unprojected_moments_are_left_alone(moments):
    params = {**params_like(SHAPES), "embed": jnp.ones((20, 30)), "bias": jnp.ones(5)}
    (_, a), (_, b) = (train(adamw(m), params, GAP + 1) for m in (moments, "keep"))
    for k in ("embed", "bias"):
        np.testing.assert_allclose(a.inner_state[0].nu[k], b.inner_state[0].nu[k])


@pytest.mark.parametrize("moments", ["reset", "rotate"])
@pytest.mark.parametrize(
    ("inner", "field"),
    [
        (optax.amsgrad(1e-3), "nu_max"),
        (optax.novograd(1e-3), r"\.nu"),
        (optax.adagrad(1e-3), "sum_of_squares"),
    ],
)
def test_states_without_a_rule_are_refused_at_init(inner, field, moments):
    tx = galore_jax.galore(inner, rank=RANK, moments=moments)
    with pytest.raises(ValueError, match=rf"moments='{moments}'.*{field}.*leaf 'tall'"):
        tx.init(params_like(SHAPES))


def test_reset_corrects_each_leaf_by_its_own_optimizer():
    params = params_like(SHAPES)
    labels = {"tall": "adam", "wide": "sgd"}
    pair = {"adam": optax.adam(1e-2), "sgd": optax.sgd(1e-2)}
    both = galore_jax.galore(
        optax.partition(pair, labels), rank=RANK, update_proj_gap=GAP, moments="reset"
    )
    trained, _ = train(both, params, 8)
    for k, label in labels.items():
        alone = galore_jax.galore(pair[label], rank=RANK, update_proj_gap=GAP, moments="reset")
        expected, _ = train(alone, params, 8)
        np.testing.assert_allclose(trained[k], expected[k], rtol=1e-5)


def test_reset_cannot_correct_nesterov():
    with pytest.raises(ValueError, match="nesterov"):
        adamw("reset", nesterov=True)


@pytest.mark.parametrize("moments", ["reset", "rotate"])
def test_parameters_may_be_called_like_fields_of_a_state(moments):
    tx = adamw(moments)
    params = {"count": jnp.ones((12, 24)), "mu": {"count": jnp.ones((24, 12))}}
    assert tx.init(params).inner_state[0].mu["mu"]["count"].shape == (24, RANK)
    assert tx.init(jnp.ones((12, 24))).inner_state[0].nu.shape == (RANK, 24)
