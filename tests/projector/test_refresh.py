"""Refreshes: when, for which matrices, how often, and under which control flow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_jax
from galore_jax.call import Call
from galore_jax.matrix.plan import plan
from galore_jax.projector import basis, refresh
from galore_jax.projector.schedule import NEVER, per_view, schedule
from tests.problems import grads_like, normal, params_like, train

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
    refresh._recompute.clear_cache()  # what was traced before calls the method itself

    def count():
        jax.effects_barrier()
        return len(runs)

    yield count
    refresh._recompute.clear_cache()


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


@pytest.mark.parametrize(
    ("method", "stagger"),
    [
        ("svd", False),
        ("eigh", True),
        ("randomized", False),
        ("randomized", True),
        ("subspace", True),
    ],
)
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
    due = np.stack([d for _, d in staggered(gap, 1 + 3 * gap)])
    assert due[0].all()
    for start in range(1, 2 * gap):
        assert (due[start : start + gap].sum(0) == 1).all()


def staggered(gap, steps, succeeds=lambda step: True):
    """Steps, and which of the matrices are due, when refreshes succeed or do not."""
    views = plan(params_like(SHAPES), rank=RANK, weight_dimension_numbers=galore_jax.last_two_axes)
    refreshed = [np.full(view.batch, NEVER, np.int32) for view in views]
    for step in range(steps):
        when = schedule(views, jnp.int32(step), refreshed, None, gap, True, Call())
        yield step, np.asarray(when.due)
        if succeeds(step):
            due = per_view(views, when.due)
            refreshed = [np.where(d, step, r) for d, r in zip(due, refreshed, strict=True)]


@pytest.mark.slow
@given(gap=st.integers(1, 30), failing=st.sets(st.integers(0, 60)))
@settings(max_examples=30, deadline=None)
def test_a_turn_that_fails_is_taken_at_the_next_step_and_moves_no_other(gap, failing):
    """Due at its turns and, until one succeeds, from a turn on; never twice for one turn."""
    missed = np.ones(7, bool)  # the first refresh is still to come
    offsets = np.arange(7) * gap // 7
    for step, due in staggered(gap, 60, lambda step: step not in failing):
        turn = (step >= offsets) & ((step - offsets) % gap == 0)
        missed |= turn
        np.testing.assert_array_equal(due, missed)
        if step not in failing:
            missed[:] = False


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
    monkeypatch.setattr("galore_jax.projector.refresh._STACK_BYTES", 2 * params["a"].nbytes)
    refresh._recompute.clear_cache()  # traced with the other size
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
    due = [d.sum() for _, d in staggered(10**9, 8)]
    assert due == [7, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("method", ["svd", "randomized", "subspace"])
def test_a_zero_or_non_finite_gradient_costs_a_step_and_no_more(method):
    """At step 0 one layer of a stack has no gradient: a zero-initialised head, an expert unused."""
    params = params_like({"w": (3, 12, 24)})
    tx = galore_jax.galore_sgd(1e-2, rank=2, method=method, update_proj_gap=200,
                               weight_dimension_numbers=galore_jax.last_two_axes)  # fmt: skip
    update = jax.jit(tx.update)
    g = normal(0, 3, 12, 2) @ normal(1, 3, 2, 24)  # of rank 2
    for bad in (0.0, np.nan, np.inf):
        first = jnp.asarray(np.where(np.arange(3)[:, None, None] == 1, np.float32(bad), g))
        updates, state = update({"w": first}, tx.init(params), params)
        assert state.refreshed["w"].tolist() == [0, -1, 0]
        if bad == 0:
            assert not np.any(updates["w"][1])
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        assert state.refreshed["w"].tolist() == [0, 1, 0]
        p = np.asarray(state.projector["w"][1])
        np.testing.assert_allclose(p @ p.T @ g[1], g[1], atol=1e-4)
        _, state = update({"w": jnp.asarray(g)}, state, params)
        assert state.refreshed["w"].tolist() == [0, 1, 0]


def test_nothing_is_decomposed_for_a_zero_gradient(decompositions):
    params = params_like({"a": (12, 24), "b": (12, 24)})
    tx = make()
    update, state = jax.jit(tx.update), tx.init(params)
    grads = grads_like(params, 0)
    for _ in range(3):
        _, state = update({"a": grads["a"], "b": 0 * grads["b"]}, state, params)
    assert decompositions() == 1
    assert (int(state.refreshed["a"]), int(state.refreshed["b"])) == (0, -1)


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"refresh": "lazy"}])
def test_an_ensemble_is_its_members_and_decomposes_when_they_do(decompositions, options):
    """Under `vmap` a conditional becomes a select, unless what it decides is one for all."""
    tx = make(update_proj_gap=3, **options)
    members = [params_like({"w": (12, 24)}, seed=i) for i in range(4)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    params, state = stack(members), jax.vmap(tx.init)(stack(members))
    update, run, want = jax.jit(jax.vmap(tx.update)), [], [tx.init(p) for p in members]
    for step in range(5):
        grads = [grads_like(p, 10 * i + step) for i, p in enumerate(members)]
        before = decompositions()
        updates, state = update(stack(grads), state, params)
        run.append(decompositions() > before)
        alone = [tx.update(*x) for x in zip(grads, want, members, strict=True)]
        want = [s for _, s in alone]
        expected = stack([u for u, _ in alone])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updates, expected)
    assert run == [True, False, False, True, False]


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_no_decomposition_meets_a_gradient_that_is_not_usable(monkeypatch, method):
    """Under `vmap` it runs beside those that are: LAPACK may never return from a NaN."""
    met = []

    def watched(a, rank, previous, key):
        jax.debug.callback(lambda a: met.append(np.isfinite(a).all()), a)
        return basis.METHODS["eigh"](a, rank, previous, key)

    monkeypatch.setitem(basis.METHODS, method, watched)
    refresh._recompute.clear_cache()
    params = {"w": jnp.stack([params_like({"w": (12, 24)}, seed=i)["w"] for i in range(4)])}
    grads = {"w": normal(0, 4, 12, 24) * np.array([1, 0, np.nan, np.inf])[:, None, None]}
    tx = make(method=method)
    state = jax.vmap(tx.init)(params)
    _, state = jax.jit(jax.vmap(tx.update))(jax.tree.map(jnp.asarray, grads), state, params)
    jax.effects_barrier()
    refresh._recompute.clear_cache()
    assert met and all(met)
    assert state.refreshed["w"].tolist() == [0, -1, -1, -1]


def test_a_first_refresh_is_made_as_one_at_step_0():
    """A schedule's later method may need a projector to start from."""
    params, grads = params_like({"w": (12, 24)}), grads_like(params_like({"w": (12, 24)}), 0)
    tx = make(method={0: "svd", 1: "subspace"}, update_proj_gap=1)
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, grads), state, params)
    _, state = tx.update(grads, state, params)
    p = np.asarray(state.projector["w"])
    best = np.linalg.svd(np.asarray(grads["w"]))[0][:, :RANK]
    np.testing.assert_allclose(p @ p.T, best @ best.T, atol=1e-4)
