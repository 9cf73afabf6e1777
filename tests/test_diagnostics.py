"""What `metrics` says, beside the same in NumPy."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st

import galore_jax
from galore_jax import diagnostics
from galore_jax.matrix.view import MatrixView
from galore_jax.projector.project import bases
from galore_jax.projector.storage import INDICES, from_tree, is_indices, storage_of, store, to_tree
from galore_jax.quantize import INT4
from galore_jax.state import ask, is_state
from tests.models import OPTIONS, batches, plain
from tests.problems import normal, once_but, run_with_devices

SHAPES = {"stack": (3, 8, 12), "tall": (14, 6), "square": (9, 9), "bias": (12,)}
PARAMS = {k: jnp.asarray(normal(i, *s)) for i, (k, s) in enumerate(SHAPES.items())}
PROJECTED = {"stack", "tall", "square"}
WITH = dict(rank=4, weight_dimension_numbers=galore_jax.last_two_axes)


GRADS = {k: jnp.asarray(normal(10 + i, *s)) for i, (k, s) in enumerate(SHAPES.items())}
UPDATES = {k: 0.01 * g for k, g in GRADS.items()}


def basis(seed, k, rank, aligned=False):
    random = np.random.default_rng(seed)
    if aligned:
        return np.eye(k, dtype=np.float32)[:, random.permutation(k)[:rank]]
    return np.linalg.qr(random.standard_normal((k, rank)).astype(np.float32))[0]


def turned(tx, seed, step, state=None):
    """A state with random projectors that were made at some step."""
    state = tx.init(PARAMS) if state is None else state
    told = iter(ask(tx, PARAMS, state))

    def projector(view, old):
        parts = {"in": [view.m], "out": [view.n], "both": [view.m, view.n]}[view.side]
        made = [
            np.concatenate(
                [basis((seed, i, j), k, view.rank, is_indices(old)) for j, k in enumerate(parts)]
            )
            for i in range(math.prod(view.batch))
        ]
        return store(view, jnp.asarray(made).reshape(view.projector_shape), storage_of(old))

    def turn(x):
        if not is_state(x):
            return x
        where = next(told).answer.where
        old = from_tree(where, x.projector)
        new = [projector(*pair) for pair in zip(where.views, old, strict=True)]
        steps = where.only(jnp.full(view.batch, step) for view in where.views)
        return x._replace(projector=to_tree(where, new, storage_of(old[0])), refreshed=steps)

    return jax.tree.map(turn, state, is_leaf=is_state)


def metrics(tx, state, grads=GRADS, params=PARAMS, **given):
    def found(state, grads, params, given):
        return galore_jax.metrics(state, grads, tx, params=params, **given)

    return {k: float(x) for k, x in jax.jit(found)(state, grads, params, given).items()}


def energies_in_numpy(tx, state):
    """1 - |G - P P^T G Q Q^T|^2 / |G|^2 by leaf, the mean over its matrices."""
    found, every = {}, []
    for answer, own, _ in ask(tx, PARAMS, state):
        where = answer.where
        for view, stored in zip(where.views, from_tree(where, own.projector), strict=True):
            g = np.asarray(view.to_matrix(GRADS[view.path]), np.float64)
            p, q = bases(view, stored)
            kept = g
            if p is not None:
                p = np.asarray(p, np.float64)
                kept = p @ (np.swapaxes(p, -1, -2) @ kept)
            if q is not None:
                q = np.asarray(q, np.float64)
                kept = (kept @ q) @ np.swapaxes(q, -1, -2)
            lost = np.sum((g - kept) ** 2, (-2, -1)) / np.sum(g**2, (-2, -1))
            found[f"captured_energy/{view.path}"] = np.mean(1 - lost)
            every.append(np.ravel(1 - lost))
    return found | {"captured_energy": np.mean(np.concatenate(every))}


def of(found, name):
    return {k: x for k, x in found.items() if k.partition("/")[0] == name}


# --- Captured energy ---

KINDS = [
    dict(),
    dict(proj_type="left"),
    dict(proj_type="right"),
    dict(proj_type="full"),
    dict(method="random", proj_type="reverse_std"),
    dict(method="coordinates"),
    dict(projector_dtype="bfloat16"),
    dict(projector_dtype="int8", proj_type="full"),
    dict(projector_dtype="int4"),
]


@pytest.mark.parametrize("options", once_but([KINDS[0], KINDS[-1]], KINDS), ids=str)
def test_energy_is_what_numpy_says(options):
    check_energies(galore_jax.galore_adamw(1e-2, **WITH, **options))


def check_energies(tx):
    state = turned(tx, 0, 0)
    found, wanted = of(metrics(tx, state), "captured_energy"), energies_in_numpy(tx, state)
    assert set(wanted) == {"captured_energy", *(f"captured_energy/{x}" for x in PROJECTED)}
    assert found == pytest.approx(wanted, abs=1e-5)
    assert all(0.05 < x < 0.95 for x in found.values())


FAMILY = (galore_jax.galore_muon, galore_jax.fira, galore_jax.ldadam)


@pytest.mark.parametrize("make", once_but(FAMILY[:1], FAMILY))
def test_the_family_has_it_too(make):
    check_energies(make(1e-2, **WITH))


M, N, R = 6, 9, 3


def view_of(side):
    return MatrixView("w", (M, N), (), (0,), (1,), side, R, jnp.float32)


def projector(seed, side):
    parts = {"in": [M], "out": [N], "both": [M, N]}[side]
    return np.concatenate([basis((seed, i), k, R) for i, k in enumerate(parts)])


energy = jax.jit(diagnostics.captured_energy, static_argnums=0)
overlap = jax.jit(diagnostics.overlap, static_argnums=0)
seeds, sides = st.integers(0, 1000), st.sampled_from(["in", "out", "both"])


@hypothesis.given(seed=seeds, side=sides, exponent=st.integers(-35, 35), rank=st.integers(0, 5))
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_gradient(seed, side, exponent, rank):
    g = (normal(seed, M, rank) @ normal(seed + 1, rank, N)).astype(np.float64)
    p = projector(seed + 2, side)
    found = float(energy(view_of(side), p, np.float32(g * 10.0**exponent)))
    assert 0 <= found <= 1
    if rank == 0:
        assert found == 0
        return
    kept = g
    if side != "out":
        kept = p[:M].T @ kept
    if side != "in":
        kept = kept @ p[-N:]
    np.testing.assert_allclose(found, np.sum(kept**2) / np.sum(g**2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["in", "both"])
def test_a_gradient_that_is_not_finite_has_none(bad, side):
    g = normal(0, M, N)
    g[2, 3] = bad
    assert np.isnan(energy(view_of(side), projector(0, side), g))


def test_rows_that_are_not_taken_count():
    view = view_of("in")
    g = normal(0, M, N)
    g[5] = np.inf
    rows = jnp.arange(R, dtype=INDICES)
    assert np.isnan(energy(view, rows, g))
    g[5] = 0
    share = np.sum(g[:R] ** 2) / np.sum(g**2)
    np.testing.assert_allclose(energy(view, rows, g), share, rtol=1e-5)


def test_a_rank_that_is_the_gradients_loses_nothing():
    """And one below it does."""
    params = {"w": jnp.ones((8, 12))}
    grads = {"w": jnp.asarray(normal(1, 8, 4) @ normal(2, 4, 12))}
    for rank, low, high in ((4, 0.99999, 1), (3, 0.3, 0.999)):
        tx = galore_jax.galore_adamw(1e-2, method="svd", rank=rank)
        _, state = jax.jit(tx.update)(grads, tx.init(params), params)
        found = metrics(tx, state, grads, params)
        assert low <= found["captured_energy"] <= high
        assert found["captured_energy/w"] == found["captured_energy"]


# --- Overlap ---


@hypothesis.given(seed=seeds, other=seeds, side=sides)
@hypothesis.settings(deadline=None, max_examples=40)
def test_overlap_is_what_numpy_says(seed, other, side):
    view, p, q = view_of(side), projector(seed, side), projector(5000 + other, side)
    cut = {"in": [slice(0, M)], "out": [slice(0, N)], "both": [slice(0, M), slice(M, M + N)]}[side]
    wanted = np.mean([np.sum((p[c].T @ q[c]) ** 2) / R for c in cut])
    found = float(overlap(view, p, q))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(overlap(view, q, p), wanted, atol=1e-5)
    turn = np.linalg.qr(normal(seed, R, R))[0]
    np.testing.assert_allclose(overlap(view, p, p @ turn), 1, atol=1e-5)


def test_equal_and_orthogonal_subspaces_however_stored():
    view = view_of("in")
    whole = np.linalg.qr(normal(0, M, M))[0]
    first, rest = jnp.asarray(whole[:, :R]), jnp.asarray(whole[:, R:])
    np.testing.assert_allclose(overlap(view, first, rest), 0, atol=1e-6)
    for storage in (INT4, jnp.bfloat16):
        stored = store(view, first, storage)
        np.testing.assert_allclose(overlap(view, stored, stored), 1, atol=0.02)
        assert overlap(view, stored, store(view, rest, storage)) < 0.03
    rows = [jnp.asarray(x, INDICES) for x in ((0, 2, 4), (2, 3, 0), (1, 3, 5))]
    np.testing.assert_allclose(overlap(view, *rows[:2]), 2 / 3, rtol=1e-6)
    assert overlap(view, rows[0], rows[2]) == 0


def test_overlap_is_that_of_what_was_refreshed():
    tx = galore_jax.galore_adamw(1e-2, **WITH)
    before, state = turned(tx, 0, 2), turned(tx, 1, 4)
    wanted = {}
    for k, (p, q) in {k: (before.projector[k], state.projector[k]) for k in PROJECTED}.items():
        wanted[k] = np.sum(np.square(np.swapaxes(p, -1, -2) @ q), (-2, -1)) / 4
    found = metrics(tx, state, before=before)
    assert set(of(found, "refreshed").values()) == {1}
    for k, x in wanted.items():
        np.testing.assert_allclose(found[f"subspace_overlap/{k}"], x.mean(), atol=1e-5)
    every = np.concatenate([x.ravel() for x in wanted.values()])
    np.testing.assert_allclose(found["subspace_overlap"], every.mean(), atol=1e-5)
    # Of a stack those alone that have another one.
    same = {"stack": jnp.array([4, 2, 2]), "tall": jnp.array(4)}
    some = before._replace(refreshed=before.refreshed | same)
    found = metrics(tx, state, before=some)
    np.testing.assert_allclose(found["refreshed/stack"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(found["refreshed"], 3 / 5, rtol=1e-6)
    np.testing.assert_allclose(found["subspace_overlap/stack"], wanted["stack"][1:].mean(), 1e-5)
    assert found["subspace_overlap/tall"] == 1


@pytest.mark.parametrize("first", [False, True])
def test_nothing_refreshed(first):
    """The same state overlaps with itself, and the first projector has none before it."""
    tx = galore_jax.galore_adamw8bit(1e-2, projector_dtype="int4", **WITH)
    state = turned(tx, 0, 0)
    found = metrics(tx, state, before=tx.init(PARAMS) if first else state)
    assert set(of(found, "subspace_overlap").values()) == {1}
    assert set(of(found, "refreshed").values()) == {0}


# --- Whatever the optimizer ---


def in_parts(tx):
    labels = dict.fromkeys(PARAMS, "matrix") | {"bias": "other"}
    return optax.partition({"matrix": tx, "other": optax.sgd(0.1)}, labels)


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "partition": in_parts,
    "hyperparameters": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(tx, optax.scale(learning_rate))
    )(1.0),
}


@pytest.mark.parametrize("wrap", once_but(["partition"], WRAPPED))
def test_states_are_found_wherever_they_are(wrap):
    inner = galore_jax.galore_adamw(1e-2, **WITH)
    wanted, found = (
        metrics(tx, turned(tx, 1, 4), before=turned(tx, 0, 2), updates=UPDATES)
        for tx in (inner, WRAPPED[wrap](inner))
    )
    del wanted["state_bytes"], found["state_bytes"]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert len(of(found, "captured_energy")) == 4 and len(of(found, "update_to_weight")) == 5


def test_nnx():
    class Net(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(8, 12, rngs=nnx.Rngs(0))

    model = Net()
    tx = galore_jax.galore_adamw(1e-2, rank=3, method="random", projector_dtype="int8")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.asarray(normal(0, 5, 8))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(jnp.square(m.up(x) - 1)))(model)
        before = nnx.clone(optimizer).opt_state
        optimizer.update(model, grads)
        params = nnx.state(model, nnx.Param)
        return galore_jax.metrics(
            optimizer.opt_state, grads, optimizer.tx, params=params, before=before
        )

    found = step(model, optimizer)
    assert 0.05 < found["captured_energy/up/kernel"] < 0.95
    assert found["subspace_overlap/up/kernel"] == 1
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}


WITHOUT = {
    "adamw": optax.adamw(1e-2),
    "alice": galore_jax.alice(1e-2, rank=2),
    "foam": galore_jax.foam(1e-2),
    "racs": galore_jax.racs(1e-2),
    "muon8bit": galore_jax.muon8bit(1e-2),
    "apollo": galore_jax.apollo(1e-2, **WITH),  # draws its projectors
}


@pytest.mark.parametrize("name", once_but(["adamw", "apollo"], WITHOUT))
def test_optimizers_without_a_stored_subspace(name):
    tx = WITHOUT[name]
    state = tx.init(PARAMS)
    found = metrics(tx, state, before=state, updates=UPDATES)
    assert {k.partition("/")[0] for k in found} == {"update_to_weight", "state_bytes"}
    ratios = {}
    for k, w in PARAMS.items():
        ratios[k] = np.linalg.norm(np.ravel(UPDATES[k])) / np.linalg.norm(np.ravel(w))
        np.testing.assert_allclose(found[f"update_to_weight/{k}"], ratios[k], rtol=1e-5)
    np.testing.assert_allclose(found["update_to_weight"], np.mean([*ratios.values()]), rtol=1e-5)
    assert found["state_bytes"] == sum(x.nbytes for x in jax.tree.leaves(state))


def test_zeros():
    tx, zeros = galore_jax.galore_adamw(1e-2, **WITH), jax.tree.map(jnp.zeros_like, PARAMS)
    found = metrics(tx, turned(tx, 0, 0), zeros, PARAMS | {"bias": UPDATES["bias"] * 0})
    assert set(of(found, "captured_energy").values()) == {0}
    found = metrics(tx, turned(tx, 0, 0), zeros, zeros, updates=UPDATES)
    assert set(of(found, "update_to_weight").values()) == {0}


# --- The ways to take a step ---


@functools.cache
def of_a_step(tier):
    """The figures of a step of one model; in the subspace also with weights in codes."""
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, weight_decay=0.1, method="random", **OPTIONS)
    state = tx.init(params)
    if tier == "codes":
        axes = OPTIONS["weight_dimension_numbers"]
        params = galore_jax.quantize_weights(params, weight_dimension_numbers=axes)

    @jax.jit
    def step(params, state, batch):
        if tier == "full":
            grads = jax.grad(loss_fn)(params, batch)
        else:
            grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, batch)[1]
        updates, new = tx.update(grads, state, params)
        return galore_jax.metrics(new, grads, tx, params=params, updates=updates, before=state)

    return step(params, state, batches(1)[0])


def test_gradients_in_the_subspace_have_no_energy():
    full, subspace = of_a_step("full"), of_a_step("subspace")
    assert len(of(full, "captured_energy")) == 3 and not of(subspace, "captured_energy")
    assert set(full) - set(subspace) == set(of(full, "captured_energy"))
    for name, x in subspace.items():
        np.testing.assert_allclose(x, full[name], rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_weights_in_codes():
    wanted, found = of_a_step("subspace"), of_a_step("codes")
    assert set(found) == set(wanted)
    for name, x in of(wanted, "update_to_weight").items():
        np.testing.assert_allclose(found[name], x, rtol=0.1, err_msg=name)


# --- Mistakes ---


def test_mistakes():
    tx = galore_jax.galore_adamw(1e-2, **WITH)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="grads is None, so give params="):
        galore_jax.metrics(state, None, tx)
    with pytest.raises(ValueError, match="before is not an earlier state"):
        galore_jax.metrics(state, GRADS, tx, before=optax.adam(1.0).init(PARAMS))
    wrong = GRADS | {"tall": jnp.zeros((6, 14))}
    with pytest.raises(ValueError, match=r"the gradient of leaf 'tall' has shape \(6, 14\)"):
        galore_jax.metrics(state, wrong, tx, params=PARAMS)
    with pytest.raises(ValueError, match="does not fit leaf 'square'"):
        galore_jax.metrics(state, GRADS, galore_jax.galore_adamw(1e-2, **WITH | {"rank": 3}))


# --- Many devices ---


@pytest.mark.slow
def test_on_eight_devices():
    """As on one, with axes that XLA cuts, and with those that types cut."""
    run_with_devices(
        8,
        """
        import jax, jax.numpy as jnp, numpy as np, galore_jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from tests.problems import on_mesh
        from tests.models import OPTIONS, batches, plain

        params, loss_fn = plain()
        tx = galore_jax.galore_adamw(1e-2, projector_dtype="int8", **OPTIONS)
        grads = jax.grad(loss_fn)(params, batches(1)[0])

        def at(state, seed, step):
            # With other codes, made at a step.
            def codes(x):
                made = np.random.default_rng(seed).integers(-127, 128, x.shape)
                return jax.device_put(made.astype(x.dtype), x.sharding)
            projector = state.projector._replace(
                codes=jax.tree.map(codes, state.projector.codes)
            )
            refreshed = jax.tree.map(lambda x: jnp.full_like(x, step), state.refreshed)
            return state._replace(projector=projector, refreshed=refreshed)

        @jax.jit
        def figures(before, state, grads, params):
            seen = dict(params=params, updates=grads, before=before)
            return galore_jax.metrics(state, grads, tx, **seen)

        def of(state, grads, params):
            return figures(at(state, 0, 2), at(state, 1, 4), grads, params)

        wanted = of(tx.init(params), grads, params)
        assert 0.01 < wanted["subspace_overlap"] < 0.9
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((8,), ("fsdp",), (kind,))
            def spec(x):
                axis = next((a for a in range(x.ndim)[::-1] if x.shape[a] % 8 == 0), None)
                return P(*["fsdp" if a == axis else None for a in range(x.ndim)])
            where = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), params)
            cut, cut_grads = jax.device_put((params, grads), (where, where))
            with on_mesh(mesh):
                own = galore_jax.state_sharding(tx, params, where)
                found = of(jax.jit(tx.init, out_shardings=own)(cut), cut_grads, cut)
            assert set(found) == set(wanted)
            for name, x in found.items():
                np.testing.assert_allclose(x, wanted[name], rtol=1e-4, err_msg=name)
        """,
    )
