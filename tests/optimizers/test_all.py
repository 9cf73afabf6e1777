"""What every member of the family does: stacks, NNX, checkpoints, hyperparameters, tiers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_jax
from tests.layers.test_update import train_layerwise
from tests.models import LAYERS, MODELS, OPTIONS, batches, plain
from tests.optimizers.members import FULL, IN_SUBSPACE, MEMBERS
from tests.problems import grads_like, normal, params_like, train
from tests.subspace.test_gradients import full, relative
from tests.subspace.test_gradients import train as train_model
from tests.test_flax import NNXNet, X, Y

STACK = dict(rank=2, update_proj_gap=3, weight_dimension_numbers=galore_jax.last_two_axes)


# Random projectors differ by the leaf's name, and staggered turns by the number of leaves.
RANDOM = ("golore", "coordinates", "apollo", "apollo_mini", "galore_muon")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MEMBERS if n not in RANDOM and "stagger" not in n])
def test_a_stacked_leaf_is_its_layers(name):
    tx = MEMBERS[name](**STACK)
    stacked = params_like({"w": (3, 8, 12), "v": (3, 12, 8)})
    apart = {f"{k}{i}": w[i] for k, w in stacked.items() for i in range(3)}

    def grads(params, step):
        whole = grads_like(stacked, step)
        return whole if "w" in params else {k: whole[k[0]][int(k[1])] for k in params}

    want, _ = train(tx, apart, 8, grads=grads)
    got, _ = train(tx, stacked, 8, grads=grads)
    for k, w in want.items():
        np.testing.assert_allclose(got[k[0]][int(k[1])], w, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in IN_SUBSPACE | FULL if "muon" not in n])
def test_leaves_outside_have_a_scale_of_their_own(name):
    # Weights of zero do not decay, so that the whole step is seen.
    params = params_like({"w": (8, 12)}) | {"bias": jnp.zeros(12), "head": jnp.zeros((8, 12))}
    updates = []
    for options in ({}, {"unprojected_scale": 0.25}):
        tx = MEMBERS[name](rank=2, update_proj_gap=3, **options)
        state = tx.init(params)
        updates.append(tx.update(grads_like(params, 0), state, params)[0])
    plain, scaled = updates
    np.testing.assert_array_equal(scaled["w"], plain["w"])
    for leaf in ("bias", "head"):
        assert np.any(plain[leaf])
        np.testing.assert_allclose(scaled[leaf], 0.25 * plain[leaf], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_bfloat16_weights_keep_float32_state(name):
    params = params_like({"w": (8, 12), "bias": (12,)}, dtype=jnp.bfloat16)
    tx = MEMBERS[name](**STACK)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads_like(params, 0))
    updates, state = jax.eval_shape(tx.update, grads, tx.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    kept = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert kept == {jnp.dtype("float32")}
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))


def test_fira_has_a_residual_of_its_own():
    with pytest.raises(TypeError, match="residual"):
        galore_jax.fira(1e-3, rank=2, residual=optax.sign_sgd(1e-3))


@pytest.mark.parametrize("options", [{"moments": "reset"}, {"method": "random"}])
def test_the_momentum_of_galore_muon_may_be_codes(options):
    """Carried over to new rows or a new basis, they stay as near as 8 bits are."""
    params, options = params_like({"w": (3, 96, 160)}), STACK | {"rank": 40} | options

    def grads(params, step):  # of full rank: Newton-Schulz makes what there is of any size
        return {"w": 0.5 * normal(0, 3, 96, 160) + normal(step + 1, 3, 96, 160)}

    want, _ = train(galore_jax.galore_muon(1e-2, **options), params, 8, grads=grads)
    tx = galore_jax.galore_muon(1e-2, accumulator_dtype="int8", **options)
    got, state = train(tx, params, 8, grads=grads)
    kept = [x.dtype.name for x in jax.tree.leaves(state) if x.shape == (3, 40, 160)]
    assert kept == ["uint8"]
    off, moved = want["w"] - got["w"], want["w"] - params["w"]
    assert jnp.linalg.norm(off) < 0.02 * jnp.linalg.norm(moved)


def test_the_momentum_of_galore_muon_may_be_bfloat16():
    params = params_like({"w": (3, 8, 12)})
    short = galore_jax.galore_muon(1e-2, accumulator_dtype="bfloat16", **STACK)
    kept = {x.dtype.name for x in jax.tree.leaves(short.init(params)) if x.ndim == 3}
    assert kept == {"bfloat16"}
    want, _ = train(galore_jax.galore_muon(1e-2, **STACK), params, 8)
    got, state = train(short, params, 8)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, short.init(params))
    moved = jnp.linalg.norm(want["w"] - params["w"])
    assert 0 < jnp.linalg.norm(want["w"] - got["w"]) < 0.02 * moved


@functools.cache
def net():
    """An NNX model, and the gradient of its loss, compiled once for all members."""
    graph, start = nnx.split(NNXNet(nnx.Rngs(0)), nnx.Param)
    loss = lambda p: jnp.mean((nnx.merge(graph, p)(X) - Y) ** 2)  # noqa: E731
    return graph, start, jax.jit(jax.value_and_grad(loss))


@nnx.jit
def nnx_update(optimizer, model, grads):
    optimizer.update(model, grads)


# One of each kind of state.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lazy, staggered, reset", "fira", "ldadam", "galore_muon", "foam"]
)
def test_nnx_optimizer_equals_the_functional_loop(name):
    tx = MEMBERS[name](**(STACK | {"rank": 4}))
    graph, start, gradient = net()
    model = nnx.merge(graph, jax.tree.map(jnp.copy, start))
    optimizer, losses = nnx.Optimizer(model, tx, wrt=nnx.Param), []
    for _ in range(6):
        loss, grads = gradient(nnx.state(model, nnx.Param))
        nnx_update(optimizer, model, grads)
        losses.append(float(loss))

    params, update = nnx.to_pure_dict(start), jax.jit(tx.update)
    state, want = tx.init(params), []
    for _ in range(6):
        loss, grads = gradient(params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        want.append(float(loss))
    np.testing.assert_allclose(losses, want, rtol=2e-4)
    assert losses[-1] < losses[0]


# One of each pair that differ by how they come to a projector alone.
APART = [name for name in MEMBERS if name not in ("lazy", "apollo, svd")]


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_layer_by_layer_is_the_same(name):
    params, loss_fn = plain()
    tx, data = MEMBERS[name](**OPTIONS), batches(9)
    want, *_ = train_model(full(loss_fn), tx, params, data)
    got, *_ = train_layerwise(loss_fn, tx, params, data)
    assert relative(want, got, params) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in IN_SUBSPACE if name in APART])
def test_in_the_subspace_is_the_same(name):
    params, loss_fn = MODELS["hooked"]()
    tx, data = MEMBERS[name](**OPTIONS), batches(20)
    want, want_state, _ = train_model(full(loss_fn), tx, params, data)
    got, state, _ = train_model(galore_jax.value_and_grad(loss_fn, tx), tx, params, data)
    assert relative(want, got, params) < 1e-4
    jax.tree.map(np.testing.assert_array_equal, state.turns_between, want_state.turns_between)


@functools.cache
def projected_by_another():
    """Gradients that another optimizer projected."""
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    return galore_jax.value_and_grad(loss_fn, tx)(params, tx.init(params), batches(1)[0])[1]


@pytest.mark.parametrize("name", FULL)
def test_what_needs_the_full_gradient_says_so(name):
    params, loss_fn = plain()
    tx = MEMBERS[name](**OPTIONS)
    with pytest.raises(ValueError, match=r"needs the full gradient.*'blocks/"):
        galore_jax.value_and_grad(loss_fn, tx)(params, tx.init(params), batches(1)[0])
    with pytest.raises(ValueError, match="needs the full gradient"):
        tx.update(projected_by_another(), tx.init(params), params)


INJECTED = {
    "fira": (galore_jax.fira, ("rank", "weight_dimension_numbers")),
    "apollo": (galore_jax.apollo, ("rank", "weight_dimension_numbers")),
    "apollo_mini": (galore_jax.apollo_mini, ("rank", "weight_dimension_numbers")),
    "ldadam": (galore_jax.ldadam, ("rank", "weight_dimension_numbers")),
    "galore_muon": (galore_jax.galore_muon, ("rank", "weight_dimension_numbers")),
    "scale_sgd": (galore_jax.scale_sgd, ()),
    "alice": (galore_jax.alice, ("rank", "leading", "weight_dimension_numbers")),
    "foam": (galore_jax.foam, ("level", "weight_dimension_numbers")),
    "racs": (galore_jax.racs, ("weight_dimension_numbers",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INJECTED)
def test_hyperparameters_can_be_injected(name):
    make, static = INJECTED[name]
    options = {k: v for k, v in OPTIONS.items() if k in static}
    tx = optax.inject_hyperparams(make, static_args=static)(learning_rate=0.1, **options)
    params = params_like({"w": (2, 8, 12), "lm_head": (8, 20)})
    state = tx.init(params)
    assert state.hyperparams["learning_rate"] == pytest.approx(0.1)
    grads = grads_like(params, 0)
    update = jax.jit(tx.update)
    moved, _ = update(grads, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    twice, _ = update(grads, state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), moved, twice)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_state_is_walked_and_costs_nothing_to_know(name):
    params = jax.eval_shape(lambda: plain()[0])
    tx = MEMBERS[name](**OPTIONS)
    state = jax.eval_shape(tx.init, params)
    found = []
    optax.tree.map_params(tx, lambda x: found.append(x.shape), state)
    assert any(shape[:1] == (LAYERS,) for shape in found)
    assert all(0 not in shape for shape in found)


@pytest.mark.parametrize("name", ["galore_muon", "fira"])
def test_in_a_partition_that_freezes_part_of_an_nnx_model(name):
    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if "up" in jax.tree_util.keystr(path) else "trained", params
        )

    model = NNXNet(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = optax.partition({"trained": MEMBERS[name](rank=2), "frozen": optax.set_to_zero()}, labels)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    )
    assert {"up" in jax.tree_util.keystr(path) for path, x in moved if not x} == {True}
