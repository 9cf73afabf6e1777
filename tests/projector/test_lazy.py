import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_jax
from galore_jax.matrix.plan import plan
from galore_jax.projector.lazy import MOST_TURNS, STILL, overlap
from tests.problems import low_rank_gradient, normal

RANK, GAP = 2, 3
OPTIONS = dict(rank=RANK, update_proj_gap=GAP, weight_dimension_numbers=galore_jax.last_two_axes)


def leaf_of(*shape, proj_type="std"):
    return plan(
        {"w": jnp.zeros(shape)}, rank=RANK, proj_type=proj_type,
        weight_dimension_numbers=galore_jax.last_two_axes,
    )[0]  # fmt: skip


def basis(seed, rows, columns=RANK):
    return np.linalg.qr(normal(seed, rows, columns))[0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([(8, 12), (12, 8), (9, 9)]))
def test_overlap_knows_neither_signs_nor_rotations(seed, shape):
    leaf = leaf_of(*shape)
    p, q, turn = basis(seed, min(shape)), basis(seed + 1, min(shape)), basis(seed + 2, RANK)
    value = overlap(leaf, p, q)
    np.testing.assert_allclose(overlap(leaf, p @ turn, -q), value, atol=1e-5)
    np.testing.assert_allclose(overlap(leaf, q, p), value, atol=1e-5)
    np.testing.assert_allclose(overlap(leaf, p, p @ turn), 1, atol=1e-5)
    assert value < 1


def test_overlap_is_zero_by_chance_and_least_for_orthogonal_subspaces():
    leaf = leaf_of(40, 60)
    values = [overlap(leaf, basis(i, 40), basis(1000 + i, 40)) for i in range(200)]
    assert abs(np.mean(values)) < 0.02
    whole = np.eye(40, dtype=np.float32)
    assert overlap(leaf, whole[:, :2], whole[:, 2:4]) < 0


def test_overlap_of_two_sides_is_their_mean():
    leaf = leaf_of(8, 12, proj_type="full")
    p, q = basis(0, 8), basis(1, 12)
    same, other = np.concatenate([p, q]), np.concatenate([p, basis(2, 12)])
    one = overlap(leaf_of(8, 12, proj_type="left"), q, basis(2, 12))
    np.testing.assert_allclose(overlap(leaf, same, other), (1 + one) / 2, atol=1e-5)


def refreshes(tx, gradient, steps, shape=(8, 12)):
    """At which steps each matrix's projector changed, and the state in the end."""
    params = {"w": jnp.asarray(normal(0, *shape))}
    state, update = tx.init(params), jax.jit(tx.update)
    changed = []
    for step in range(steps):
        old = state.projector["w"]
        _, state = update({"w": jnp.asarray(gradient(step))}, state, params)
        moved = np.abs(np.asarray(state.projector["w"]) - np.asarray(old)).max((-2, -1)) > 0
        changed.append(moved)
    return np.array(changed), state


def still_then_moving(moves_from):
    def gradient(step):
        noise = 1e-3 * normal(step, 8, 12)
        return low_rank_gradient(0 if step < moves_from else step, 8, 12) + noise

    return gradient


def test_a_still_subspace_waits_longer_and_a_moving_one_no_longer():
    tx = galore_jax.galore_adamw(1e-3, refresh="lazy", **OPTIONS)
    changed, state = refreshes(tx, still_then_moving(30), 60)
    # At 3 it is found still: gap 2, then 4, then 8. At 45 it has moved: back to every 3.
    assert np.flatnonzero(changed).tolist() == [0, 3, 9, 21, 45, 48, 51, 54, 57]
    assert int(state.turns_between["w"]) == 1


def test_the_gap_has_an_end():
    tx = galore_jax.galore_adamw(1e-3, refresh="lazy", **(OPTIONS | {"update_proj_gap": 1}))
    changed, state = refreshes(tx, still_then_moving(1000), 100)
    assert int(state.turns_between["w"]) == MOST_TURNS
    assert np.diff(np.flatnonzero(changed))[-3:].tolist() == [MOST_TURNS] * 3


def test_each_matrix_of_a_stack_for_itself():
    tx = galore_jax.galore_adamw(1e-3, refresh="lazy", **OPTIONS)

    def gradient(step):
        still = low_rank_gradient(0, 40, 60) + 1e-3 * normal(step, 40, 60)
        return np.stack([still, low_rank_gradient(step, 40, 60)])

    changed, _ = refreshes(tx, gradient, 24, (2, 40, 60))
    assert np.flatnonzero(changed[:, 0]).tolist() == [0, 3, 9, 21]
    assert np.flatnonzero(changed[:, 1]).tolist() == list(range(0, 24, 3))


def test_staggered_turns_are_kept():
    tx = galore_jax.galore_adamw(1e-3, refresh="lazy", stagger=True, **OPTIONS)

    def moving(step):
        return low_rank_gradient(step, 3, 40, 60)

    changed, _ = refreshes(tx, moving, 12, (3, 40, 60))
    for j in range(3):
        later = [t for t in range(1, 12) if t % GAP == j]
        assert np.flatnonzero(changed[:, j]).tolist() == [0, *later]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_no_sign_of_stillness(bad):
    tx = galore_jax.galore_sgd(1e-3, refresh="lazy", **OPTIONS)
    still = still_then_moving(1000)

    def gradient(step):
        g = still(step)
        return np.where(np.arange(12) == 0, bad, g).astype(np.float32) if step == 9 else g

    changed, state = refreshes(tx, gradient, 13)
    assert np.flatnonzero(changed).tolist() == [0, 3, 10]  # 9 failed, and tries again
    assert np.isfinite(state.projector["w"]).all()


def test_reset_moments_know_their_age_under_lazy_refreshes():
    """Between lazy refreshes the correction counts from the last one: as a plain run of T = 6."""
    still = still_then_moving(1000)
    params = {"w": jnp.asarray(normal(0, 8, 12))}
    options = OPTIONS | {"moments": "reset", "method": "svd"}

    def trained(steps, **more):
        tx = galore_jax.galore_adamw(1e-2, **(options | more))
        state, p = tx.init(params), params
        update = jax.jit(tx.update)
        out = []
        for step in range(steps):
            updates, state = update({"w": jnp.asarray(still(step))}, state, p)
            out.append(np.asarray(updates["w"]))
        return out

    # The lazy run refreshes at 0, 3, 9; between 3 and 9 its updates are bounded like Adam's.
    lazy = trained(9, refresh="lazy")
    sizes = [np.abs(u).max() for u in lazy]
    plain = [np.abs(u).max() for u in trained(3)]
    assert max(sizes[3:]) < 2 * max(plain)


def test_a_wrong_refresh_is_refused():
    with pytest.raises(ValueError, match="refresh must be one of fixed, lazy, got 'slow'"):
        galore_jax.galore_adamw(1e-3, rank=2, refresh="slow")


def test_the_threshold_is_what_the_docstring_says():
    assert str(STILL) in galore_jax.galore.__doc__
    assert f"{MOST_TURNS} T" in galore_jax.galore.__doc__


def test_a_turn_in_a_step_compiled_without_refreshes_is_made_up_for():
    params = {"w": jnp.asarray(normal(0, 8, 12))}
    tx = galore_jax.galore_adamw(1e-3, refresh="lazy", **OPTIONS)

    def loss_fn(params, x):
        return jnp.sum(jnp.square(x @ params["w"]))

    state, changed = tx.init(params), []
    for step in range(3 * GAP):
        refresh = step != GAP
        take = galore_jax.value_and_grad(loss_fn, tx, refresh=refresh)
        _, grads = take(params, state, normal(step, 4, 8))
        old = state.projector["w"]
        _, state = tx.update(grads, state, params)
        changed.append(bool(jnp.any(state.projector["w"] != old)))
    assert np.flatnonzero(changed).tolist() == [0, GAP + 1, 2 * GAP]


def test_a_state_of_fixed_refreshes_is_refused():
    params = {"w": jnp.ones((8, 12))}
    fixed = galore_jax.galore_adamw(1e-3, rank=2)
    lazy = galore_jax.galore_adamw(1e-3, rank=2, refresh="lazy")
    with pytest.raises(ValueError, match=r"refresh='fixed'.*turns_between"):
        lazy.update(params, fixed.init(params), params)
    with pytest.raises(ValueError, match=r"galore has refresh='fixed'.*refresh='lazy'"):
        fixed.update(params, lazy.init(params), params)
