"""Refreshes: when, for which matrices, how often, and under which control flow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import basis, refresh
from galore_jax.leaf import plan
from galore_jax.refresh import schedule
from tests.problems import grads_like, params_like, train

RANK = 4
SHAPES = {"a": (12, 24), "b": (24, 12), "stack": (5, 16, 20)}


def make(**options):
    options = {"rank": RANK, "weight_dimension_numbers": galore_jax.last_two_axes, **options}
    return galore_jax.galore_adamw(1e-2, **options)


@pytest.fixture
def decompositions(monkeypatch):
    """Count decompositions as they run."""
    runs = []

    def counted(a, rank, previous, key):
        jax.debug.callback(lambda: runs.append(1))
        return basis.randomized(a, rank, previous, key)

    monkeypatch.setitem(basis.METHODS, "randomized", counted)
    refresh.refresh.clear_cache()  # what was traced before calls the method itself

    def count():
        jax.effects_barrier()
        return len(runs)

    yield count
    refresh.refresh.clear_cache()


def computations(hlo):
    """Split a compiled module's text into {computation name: body}."""
    found, name = {}, None
    for line in hlo.splitlines():
        if line.endswith("{") and (line.startswith("%") or line.startswith("ENTRY")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return {k: "\n".join(v) for k, v in found.items()}


@pytest.mark.parametrize("method", ["svd", "eigh", "randomized", "subspace"])
@pytest.mark.parametrize("stagger", [False, True])
def test_decompositions_sit_under_one_conditional(method, stagger):
    params = params_like(SHAPES)
    tx = make(method=method, stagger=stagger)
    state = tx.init(params)
    hlo = jax.jit(tx.update).lower(grads_like(params, 0), state, params).compile().as_text()
    # What runs on every step: the entry and all that it calls except a conditional's branches.
    bodies = computations(hlo)
    entry = next(k for k in bodies if f"ENTRY %{k} " in hlo)
    always, conditionals, todo = set(), 0, [entry]
    while todo:
        name = todo.pop()
        always.add(name)
        for line in bodies[name].splitlines():
            if " conditional(" in line:
                conditionals += 1
                continue
            todo += [k for k in bodies if f"%{k}," in line + "," and k not in always]
    text = "\n".join(bodies[k] for k in always)
    assert "lapack" in hlo and conditionals >= 1
    assert "lapack" not in text


def test_each_matrix_shape_is_decomposed_by_one_piece_of_code():
    def custom_calls(layers):
        params = params_like({str(i): (16, 32) for i in range(layers)})
        tx = make()
        lowered = jax.jit(tx.update).lower(grads_like(params, 0), tx.init(params), params)
        return lowered.compile().as_text().count('custom_call_target="lapack')

    assert custom_calls(8) == custom_calls(2) > 0


def test_a_refresh_decomposes_each_matrix_once(decompositions):
    params = params_like(SHAPES)
    tx = make(update_proj_gap=3)
    state = tx.init(params)
    counts = []
    update = jax.jit(tx.update)
    for step in range(7):
        _, state = update(grads_like(params, step), state, params)
        counts.append(decompositions())
    assert np.diff([0, *counts]).tolist() == [7, 0, 0, 7, 0, 0, 7]


def test_multi_steps_outside_decomposes_once_per_refresh(decompositions):
    params = params_like(SHAPES)
    tx = make(update_proj_gap=2)
    accumulated = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1e9), tx), 4)
    p, state = params, accumulated.init(params)
    update = jax.jit(accumulated.update)
    counts = []
    for step in range(12):  # three updates: a refresh, none, a refresh
        updates, state = update(grads_like(params, step), state, p)
        p = optax.apply_updates(p, updates)
        counts.append(decompositions())
    assert np.diff([0, *counts]).tolist() == [0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 7]

    def mean(params, step):
        several = [grads_like(params, 4 * step + i) for i in range(4)]
        return jax.tree.map(lambda *g: sum(g) / 4, *several)

    q, _ = train(tx, params, 3, grads=mean)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), p, q)


def test_multi_steps_inside_accumulates_in_the_subspace():
    params = params_like({"w": (12, 24)})
    inner = optax.MultiSteps(optax.adamw(1e-2, weight_decay=0.1), 4).gradient_transformation()
    tx = galore_jax.galore(inner, rank=RANK, update_proj_gap=8)
    state = tx.init(params)
    assert state.inner_state.acc_grads["w"].shape == (RANK, 24)
    p, seen = params, []
    update = jax.jit(tx.update)
    for step in range(8):
        updates, state = update(grads_like(params, step), state, p)
        p = optax.apply_updates(p, updates)
        seen.append(p["w"])
    same = [np.array_equal(a, b) for a, b in zip([params["w"], *seen], seen, strict=False)]
    assert same == [True, True, True, False] * 2  # no decay between the updates either

    # Projection is linear: the mean of projected gradients is the projected mean.
    basis_0 = galore_jax.galore_sgd(1.0, rank=RANK)
    _, first = basis_0.update(grads_like(params, 0), basis_0.init(params), params)
    mean = sum(grads_like(params, s)["w"] for s in range(4)) / 4
    low = first.projector["w"].T @ mean
    low_updates, _ = optax.adam(1e-2).update({"w": low}, optax.adam(1e-2).init({"w": low}))
    expected = params["w"] * (1 - 1e-3) + 0.25 * first.projector["w"] @ low_updates["w"]
    np.testing.assert_allclose(seen[3], expected, atol=1e-5)


def test_staggered_refreshes_are_spread_evenly(decompositions):
    params = params_like(SHAPES)  # 7 matrices
    tx = make(update_proj_gap=14, stagger=True)
    update, state, counts = jax.jit(tx.update), tx.init(params), []
    for step in range(43):
        _, state = update(grads_like(params, step), state, params)
        counts.append(decompositions())
    per_step = np.diff([0, *counts])
    assert per_step[0] == 7
    assert max(per_step[1:]) == 1
    assert per_step[15:29].sum() == 7


@pytest.mark.parametrize("gap", [1, 3, 7, 20])
def test_every_matrix_is_due_once_in_every_gap(gap):
    leaves = plan(params_like(SHAPES), rank=RANK, weight_dimension_numbers=galore_jax.last_two_axes)
    due = np.stack(
        [schedule(leaves, jnp.int32(t), gap, True).due for t in range(1 + 3 * gap)]
    ).astype(int)
    assert due[0].all()
    for start in range(1, 2 * gap):
        assert (due[start : start + gap].sum(0) == 1).all()
    age = np.stack([schedule(leaves, jnp.int32(t), gap, True).age for t in range(1 + 3 * gap)])
    np.testing.assert_array_equal(age == 1, due)
    np.testing.assert_array_equal(age[1:][due[1:] == 0], age[:-1][due[1:] == 0] + 1)


def test_random_projectors_are_new_at_each_refresh_and_the_same_in_each_run():
    params = params_like({"a": (12, 24), "b": (12, 24), "stack": (2, 12, 24)})
    tx = make(method="random", update_proj_gap=2)
    _, first = train(tx, params, 1)
    _, again = train(tx, params, 1, jit=False)
    _, later = train(tx, params, 3)
    bases = [first.projector["a"], first.projector["b"], *first.projector["stack"]]
    bases += [later.projector["a"]]
    for i, p in enumerate(bases):
        for q in bases[:i]:
            assert not np.allclose(p, q, atol=1e-2)
    np.testing.assert_allclose(first.projector["a"], again.projector["a"], atol=1e-5)
    _, alone = train(tx, {"a": params["a"]}, 1)
    np.testing.assert_allclose(first.projector["a"], alone.projector["a"], atol=1e-5)


def test_large_leaves_of_one_shape_are_not_stacked(monkeypatch):
    params = params_like({"a": (12, 24), "b": (12, 24), "c": (12, 24)})
    expected, _ = train(make(), params, 2)
    monkeypatch.setattr("galore_jax.refresh._STACK_BYTES", 2 * params["a"].nbytes)
    refresh.refresh.clear_cache()  # traced with the other size
    actual, _ = train(make(), params, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)


@pytest.mark.parametrize("method", ["eigh", "randomized", "subspace"])
@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_subspace_does_not_depend_on_the_gradients_scale(method, scale):
    params = params_like({"w": (12, 24)})
    tx = galore_jax.galore_sgd(1.0, rank=RANK, method=method)
    state, grads = tx.init(params), grads_like(params, 0)
    _, plain = tx.update(grads, state, params)
    _, scaled = tx.update({"w": grads["w"] * scale}, state, params)
    p, q = plain.projector["w"], scaled.projector["w"]
    np.testing.assert_allclose(p @ p.T, q @ q.T, atol=1e-3)


def test_nested_multi_steps_decompose_once_per_refresh(decompositions):
    params = params_like({"w": (12, 24)})
    tx = optax.MultiSteps(optax.MultiSteps(make(update_proj_gap=1), 2).gradient_transformation(), 2)
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(8):
        _, state = update(grads_like(params, step), state, params)
    assert decompositions() == 2


def test_a_gap_longer_than_any_run_still_refreshes_all_at_step_0():
    leaves = plan(params_like(SHAPES), rank=RANK, weight_dimension_numbers=galore_jax.last_two_axes)
    assert schedule(leaves, jnp.int32(0), 10**9, True).due.all()
    assert schedule(leaves, jnp.int32(7), 10**9, True).due.sum() == 0
