"""Coordinate directions, stored as indices, against the bases that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_jax
from galore_jax.matrix.plan import plan
from galore_jax.projector.project import lift, outside, project
from galore_jax.projector.storage import INDICES, load, store
from tests.problems import grads_like, normal, params_like, train

RANK = 3
OPTIONS = dict(rank=RANK, weight_dimension_numbers=galore_jax.last_two_axes)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["std", "left", "right"]),
    st.sampled_from([(8, 12), (12, 8), (2, 8, 12), (2, 3, 12, 8)]),
    st.integers(0, 99),
)
def test_indices_do_as_their_basis(proj_type, shape, seed):
    leaf = plan({"w": jnp.zeros(shape)}, proj_type=proj_type, **OPTIONS)[0]
    rng = np.random.default_rng(seed)
    rows, count = leaf.projector_shape[-2], int(np.prod(leaf.batch))
    flat = np.stack([rng.permutation(rows)[:RANK] for _ in range(count)])
    indices = jnp.asarray(flat.reshape(*leaf.batch, RANK), INDICES)
    basis = load(leaf, indices)
    assert basis.shape == leaf.projector_shape
    np.testing.assert_array_equal(store(leaf, -basis, INDICES), indices)
    g = jnp.asarray(normal(seed, *shape))
    r = project(leaf, indices, g)
    np.testing.assert_array_equal(r, project(leaf, basis, g))
    np.testing.assert_array_equal(lift(leaf, indices, r), lift(leaf, basis, r))
    np.testing.assert_array_equal(outside(leaf, indices, g), outside(leaf, basis, g, r))


def test_a_state_keeps_indices_that_change_at_refreshes():
    params = params_like({"w": (3, 8, 12), "v": (12, 8)})
    tx = galore_jax.galore_adamw(1e-2, method="coordinates", update_proj_gap=3, **OPTIONS)
    _, before = train(tx, params, 3)
    _, after = train(tx, params, 4)
    for k, rows in {"w": 8, "v": 8}.items():
        chosen = np.asarray(before.projector[k])
        assert chosen.dtype == np.int32 and chosen.shape == (*params[k].shape[:-2], RANK)
        assert chosen.min() >= 0 and chosen.max() < rows
        assert np.all(np.diff(chosen) > 0)
        assert np.any(chosen != after.projector[k])
    assert len({row.tobytes() for row in np.asarray(before.projector["w"])}) > 1


def test_rotated_moments_follow_their_rows():
    """A row in both subspaces keeps its momentum, one that is new begins at zero."""
    params = {"w": jnp.asarray(normal(0, 8, 12))}
    tx = galore_jax.galore_sgd(
        1e-2, momentum=0.9, method="coordinates", moments="rotate", update_proj_gap=3, rank=5
    )
    _, old = train(tx, params, 3)
    gradient = grads_like(params, 3)
    _, new = jax.jit(tx.update)(gradient, old, params)
    was, now = (np.asarray(s.projector["w"]).tolist() for s in (old, new))
    assert was != now and set(was) & set(now)
    for slot, row in enumerate(now):
        trace = np.asarray(gradient["w"])[row]
        if row in was:
            trace = trace + 0.9 * np.asarray(old.inner_state[0].trace["w"])[was.index(row)]
        np.testing.assert_allclose(new.inner_state[0].trace["w"][slot], trace, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_dtype": "int8"}, "projector_dtype has no meaning"),
        ({"proj_type": "full"}, "one"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        galore_jax.galore_adamw(1e-2, rank=2, method="coordinates", **options)
