"""The memory table: its bytes are those of the state."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import galore_jax
from galore_jax.quantize import Encoded
from tests.problems import params_like

SHAPES = {"embed": (100, 64), "stack": (3, 64, 96), "w": (64, 64), "bias": (64,)}


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def transformations():
    options = dict(rank=8, weight_dimension_numbers=galore_jax.last_two_axes)
    adamw = galore_jax.galore_adamw(1e-3, **options)
    yield "alias", adamw
    yield (
        "chain",
        optax.chain(
            optax.clip_by_global_norm(1.0), galore_jax.galore(**options), optax.adamw(1e-3)
        ),
    )
    yield "multi steps", optax.MultiSteps(adamw, 4).gradient_transformation()
    yield (
        "inject",
        optax.inject_hyperparams(
            galore_jax.galore_adamw, static_args=("rank", "weight_dimension_numbers")
        )(1e-3, **options),
    )
    yield "bfloat16", galore_jax.galore_adamw(1e-3, projector_dtype="bfloat16", **options)
    yield "int4", galore_jax.galore_adamw(1e-3, projector_dtype="int4", **options)
    yield "adafactor", galore_jax.galore_adafactor(1e-3, min_dim_size_to_factor=8, **options)


@pytest.mark.parametrize(("name", "tx"), list(transformations()))
def test_bytes_are_those_of_the_state(name, tx):
    params = params_like(SHAPES)
    table = galore_jax.summary(tx, params)
    state = tx.init(params)
    found = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, galore_jax.GaLoreState))
        if isinstance(x, galore_jax.GaLoreState)
    ]
    assert table.total.state == nbytes(state)
    assert table.total.weights == nbytes(params)
    assert table.total.projector == nbytes([s.projector for s in found])
    rows = {row.path: row for row in table.rows}
    tree = found[0].projector
    parts = tree if isinstance(tree, Encoded) else (tree,)
    assert rows["stack"].projector == nbytes([part["stack"] for part in parts])
    assert rows["stack"].rank == 8 and rows["embed"].rank is None
    if name != "adafactor":
        full = optax.adamw(1e-3).init(params)
        outside = nbytes(state) - nbytes(found)  # accumulated gradients, injected numbers
        assert table.total.without_galore == nbytes(full) + outside
        assert rows["stack"].inner_state == 2 * 4 * 3 * 8 * 96
        assert rows["embed"].side == "path matches exclude"


def test_a_7b_model_costs_nothing():
    d, ff, layers = 4096, 11008, 32
    shapes = {
        "q": (d, d),
        "k": (d, d),
        "v": (d, d),
        "o": (d, d),
        "up": (d, ff),
        "gate": (d, ff),
        "down": (ff, d),
    }
    params = {k: jax.ShapeDtypeStruct((layers, *s), jnp.bfloat16) for k, s in shapes.items()}
    tx = galore_jax.galore_adamw(1e-3, rank=1024, weight_dimension_numbers=galore_jax.last_two_axes)
    table = galore_jax.summary(tx, params)
    per_layer = 4 * (d * 1024 * 3) + 3 * (d * 1024 + 2 * 1024 * ff)
    steps = 4 * layers * len(shapes)  # of the last refresh, by matrix
    assert table.total.state == 4 * layers * per_layer + steps + 8
    assert "optimizer state" in str(table) and len(str(table).splitlines()) == len(shapes) + 12


def test_a_step_in_each_tier():
    layers, m, n, r, rows = 6, 32, 64, 4, 10
    params = {"embed": jnp.ones((50, m)), "blocks": jnp.ones((layers, m, n))}
    tx = galore_jax.galore_adamw8bit(
        1e-3, rank=r, weight_dimension_numbers=galore_jax.last_two_axes
    )

    def loss_fn(params, x):
        x = galore_jax.layerwise(lambda w, x: jnp.tanh(x @ w)[:, :m], params["blocks"], x)
        return jnp.sum(x @ params["embed"].T)

    x = jax.ShapeDtypeStruct((rows, m), jnp.float32)
    table = galore_jax.summary(tx, jax.eval_shape(lambda: params), loss_fn, x)
    full, subspace, layerwise = table.steps
    assert [s.tier for s in table.steps] == ["full", "subspace", "layerwise"]
    assert full.weights == full.gradients == nbytes(params)
    assert subspace.gradients == 4 * (50 * m + layers * r * n)
    assert layerwise.gradients == 4 * (50 * m + m * n)
    assert full.state == nbytes(tx.init(params))
    # The blocks' inputs, and little beside: far from all that a block computes.
    assert layers * rows * m * 4 <= full.activations <= 3 * layers * rows * m * 4
    assert full.total == sum((full.weights, full.gradients, full.state, full.activations))
    assert "not projected: 11.5% of the weights" in str(table)
    unknown = galore_jax.summary(tx, params)
    assert unknown.steps[0].activations is None and "?" in str(unknown)


def test_only_ways_that_are_taken_are_listed():
    params = {"blocks": jnp.ones((6, 32, 64)), "head": jnp.ones((32, 8))}
    rule = {"blocks": optax.contrib.GaLoreDimensionNumbers(1, 2), "head": None}
    tx = galore_jax.galore_adamw(1e-3, rank=4, weight_dimension_numbers=rule)

    def twice(w, x):
        return jnp.tanh(x @ w @ w.T)

    def by_layers(params, x):
        return jnp.sum(galore_jax.layerwise(twice, params["blocks"], x) @ params["head"])

    def by_scan(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w)[:, :32], None), x, params["blocks"])
        return jnp.sum(x @ params["head"])

    x = jax.ShapeDtypeStruct((10, 32), jnp.float32)
    for loss, tiers in ((by_layers, ["full", "layerwise"]), (by_scan, ["full", "subspace"])):
        found = galore_jax.summary(tx, jax.eval_shape(lambda: params), loss, x)
        assert [step.tier for step in found.steps] == tiers


STACKS = dict(weight_dimension_numbers=galore_jax.last_two_axes)
MOMENTS = {
    "adamw": (optax.adamw(1e-3), 2 * 4 * 3 * 64 * 96),
    "muon8bit": (galore_jax.muon8bit(1e-3, **STACKS), 3 * (64 * 96 + 4 * 64)),
    "racs": (galore_jax.racs(1e-3, **STACKS), 3 * 4 * (64 + 96 + 1)),
    "foam": (galore_jax.foam(1e-3, level=2, **STACKS), 2 * 4 * 3 * 64 * 96 // 4 + 12),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_optimizers_without_a_subspace_have_rows_to_compare(name):
    tx, stack = MOMENTS[name]
    params = params_like(SHAPES)
    table = galore_jax.summary(tx, params, lambda p: sum(map(jnp.sum, p.values())))
    rows = {row.path: row for row in table.rows}
    assert rows["stack"].inner_state == rows["stack"].without_galore == stack
    assert (rows["stack"].rank, rows["stack"].side, rows["stack"].projector) == (
        None,
        "no galore",
        0,
    )
    assert table.total.state == nbytes(jax.eval_shape(tx.init, params))
    assert [step.tier for step in table.steps] == ["full"] and table.fits(1) == ("full",)
    assert "without GaLore" not in str(table) and "of the weights' bytes" in str(table)


@pytest.mark.parametrize("name", MOMENTS)
def test_rows_are_the_same_in_boxes_in_codes_and_under_accumulation(name):
    tx, stack = MOMENTS[name]
    arrays = params_like(SHAPES)
    plain = galore_jax.summary(tx, arrays)
    boxes = {
        "nnx": nnx.State({k: nnx.Param(x) for k, x in arrays.items()}),
        "linen": {k: nn.Partitioned(x, names=(None,) * x.ndim) for k, x in arrays.items()},
    }
    for boxed in boxes.values():
        assert galore_jax.summary(tx, boxed).rows == plain.rows

    codes = galore_jax.quantize_weights(arrays, **STACKS)
    for given in (codes, nnx.State({k: nnx.Param(x) for k, x in codes.items()})):
        table = galore_jax.summary(tx, given)
        assert [row.path for row in table.rows] == [row.path for row in plain.rows]
        assert table.total.weights == nbytes(codes) and table.rows[-1].weights == 0
        assert table.total.state == plain.total.state

    steps = optax.MultiSteps(tx, 4)
    rows = {row.path: row for row in galore_jax.summary(steps, arrays).rows}
    assert rows["stack"].inner_state == stack
    assert rows["(other)"].state >= nbytes(arrays)


def test_a_single_array():
    table = galore_jax.summary(galore_jax.galore_adamw(1e-3, rank=2), jnp.ones((8, 16)))
    assert "(params)" in str(table) and table.rows[0].projector == 4 * 8 * 2


def test_several_galores_and_parameters_called_like_fields():
    params = {"mu": jnp.ones((12, 24)), "z": jnp.ones((24, 32))}
    tx = optax.partition(
        {"b": galore_jax.galore_adamw(1e-3, rank=2), "a": galore_jax.galore_sgd(1e-3, rank=5)},
        {"mu": "b", "z": "a"},
    )
    rows = {row.path: row for row in galore_jax.summary(tx, params).rows}
    assert (rows["mu"].projector, rows["mu"].inner_state) == (4 * 12 * 2, 2 * 4 * 2 * 24)
    assert (rows["z"].projector, rows["z"].inner_state) == (4 * 24 * 5, 0)


def test_what_needs_full_gradients_has_no_row_for_the_subspace():
    params = {"w": jax.ShapeDtypeStruct((3, 64, 128), jnp.float32)}
    options = dict(rank=16, weight_dimension_numbers=galore_jax.last_two_axes)
    tiers = {
        name: [step.tier for step in galore_jax.summary(make(1e-3, **options), params).steps]
        for name, make in {
            "galore": galore_jax.galore_adamw,
            "fira": galore_jax.fira,
            "muon": galore_jax.galore_muon,
            "ldadam": galore_jax.ldadam,
        }.items()
    }
    assert tiers.pop("galore") == ["full", "subspace", "layerwise"]
    assert all(found == ["full", "layerwise"] for found in tiers.values())


@pytest.mark.parametrize("name", ["apollo", "apollo svd", "apollo_mini", "ldadam", "galore_muon"])
def test_the_familys_state_is_counted(name):
    params = {
        "embed": jax.ShapeDtypeStruct((100, 64), jnp.float32),
        "w": jax.ShapeDtypeStruct((3, 64, 128), jnp.float32),
    }
    name, *svd = name.split()
    options = {"method": "svd"} if svd else {}
    tx = getattr(galore_jax, name)(
        1e-3, rank=16, weight_dimension_numbers=galore_jax.last_two_axes, **options
    )
    state = jax.eval_shape(tx.init, params)
    table = galore_jax.summary(tx, params)
    assert table.total.state == nbytes(state) == table.steps[0].state
    assert table.total.weights == nbytes(params) == table.steps[0].weights
    rows = {row.path: row for row in table.rows}
    moments = 1 if name == "galore_muon" else 2
    assert rows["w"].inner_state == moments * 4 * 3 * 16 * 128
    bases = {"galore_muon": 3 * 16, "ldadam": 3 * 64 * 16, "apollo": 3 * 64 * 16 if svd else 0}
    assert rows["w"].projector == 4 * bases.get(name, 0)
    errors = 3 * 64 * 128 if name == "ldadam" else 0
    assert rows["(other)"].state - rows["(other)"].without_galore <= 4 * errors + 40
    assert rows["(other)"].state >= 4 * errors
    # As full AdamW would keep for what galore sees, and galore_muon's own Adam for the others.
    kept = 3 * 64 * 128 * moments + 100 * 64 * 2
    kept += 3 * 128 * (name == "galore_muon")  # mean squares of its outputs
    assert 4 * kept <= table.total.without_galore <= 4 * kept + 40


def test_pauses_and_the_residuals_state_are_counted():
    params = {"w": jax.ShapeDtypeStruct((3, 64, 128), jnp.float32)}
    options = dict(rank=16, weight_dimension_numbers=galore_jax.last_two_axes)
    tx = galore_jax.galore_adamw(1e-3, refresh="lazy", residual=optax.trace(0.9), **options)
    state = jax.eval_shape(tx.init, params)
    total = galore_jax.summary(tx, params).total
    assert total.state == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_gradients_in_the_subspace_are_not_offered_inside_multi_steps():
    tx = optax.MultiSteps(galore_jax.galore_adamw(1e-3, rank=2), 2)
    table = galore_jax.summary(tx, {"w": jnp.ones((8, 16))})
    assert [step.tier for step in table.steps] == ["full", "layerwise"]
