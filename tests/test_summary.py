"""The memory table: its bytes are those of the state."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax
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
    assert table.total.state == nbytes(found)
    assert table.total.weights == nbytes(params)
    assert table.total.projector == nbytes([s.projector for s in found])
    rows = {row.path: row for row in table.rows}
    assert rows["stack"].projector == nbytes(found[0].projector["stack"])
    assert rows["stack"].rank == 8 and rows["embed"].rank is None
    if name != "adafactor":
        full = optax.adamw(1e-3).init(params)
        assert table.total.without_galore == nbytes(full)
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
    assert table.total.state == 4 * layers * per_layer + 8
    assert "optimizer state" in str(table) and len(str(table).splitlines()) == len(shapes) + 6


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(ValueError, match="no galore"):
        galore_jax.summary(optax.adamw(1e-3), params_like(SHAPES))


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
