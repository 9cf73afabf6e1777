"""Conditionals outside a jit and under shard_map; JAX's strict promotion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import control
from tests.optimizers.members import FULL
from tests.problems import grads_like, params_like, run_with_devices

OPTIONS = dict(rank=4, update_proj_gap=100, weight_dimension_numbers=galore_jax.last_two_axes)
FEW = {"stack": (2, 16, 24), "bias": (24,)}
SHAPES = FEW | {"large": (64, 512)}


def test_a_known_answer_takes_one_branch():
    called = []

    def branch(name):
        return lambda: called.append(name) or jnp.ones(2)

    control.cond(jnp.asarray(True), branch("true"), branch("false"))
    control.cond(False, branch("true"), branch("false"))
    assert called == ["true", "false"]
    jax.jit(lambda x: control.cond(x > 0, branch("true"), branch("false")))(1.0)
    assert sorted(called[2:]) == ["false", "true"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tx", "shapes"),
    [  # Each operation on each shape is a program: codes alone want large leaves.
        (galore_jax.galore_adamw(1e-2, refresh="lazy", moments="rotate", **OPTIONS), FEW),
        (galore_jax.galore_muon(1e-2, **OPTIONS), FEW),
        (galore_jax.ldadam(1e-2, rank=4, weight_dimension_numbers=galore_jax.last_two_axes), FEW),
        (galore_jax.adamw8bit(1e-2), SHAPES),
    ],
    ids=["lazy, rotate", "muon", "ldadam", "8-bit"],
)
def test_a_loop_that_is_not_jitted_compiles_nothing_anew(tx, shapes, caplog):
    params = params_like(shapes)
    state, grads = tx.init(params), grads_like(params, 0)
    for step in range(4):
        if step == 2:
            caplog.clear()
        with jax.log_compiles(step >= 2):
            _, state = tx.update(grads, state, params)
    assert "Compiling" not in caplog.text


def test_a_loop_in_the_subspace_that_is_not_jitted_compiles_nothing_anew(caplog):
    params = {"w": jnp.ones((2, 16, 24))}
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    state, x = tx.init(params), jax.random.normal(jax.random.key(0), (8, 16))

    def loss_fn(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"][0] + x @ params["w"][1]))

    for step in range(4):
        if step == 2:
            caplog.clear()
        with jax.log_compiles(step >= 2):
            grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, x)[1]
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    assert "Compiling" not in caplog.text


def test_an_ensemble_under_shard_map_with_checked_axes():
    run_with_devices(
        2,
        """
        import jax, jax.numpy as jnp, numpy as np, optax, galore_jax
        from jax.sharding import AxisType, PartitionSpec as P

        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        weights = jax.random.normal(jax.random.key(0), (2, 64, 96))
        for tx in (
            galore_jax.galore_adamw(1e-2, rank=4, moments="rotate", refresh="lazy"),
            galore_jax.galore_adamw8bit(1e-2, rank=48),
        ):
            def train(w):
                params = {"w": w}
                state = tx.init(params)
                for _ in range(2):
                    updates, state = tx.update(params, state, params)
                    params = optax.apply_updates(params, updates)
                return params["w"]

            each = jax.shard_map(
                lambda w: train(w[0])[None], mesh=mesh, in_specs=P("d"), out_specs=P("d")
            )
            one = jax.jit(train)
            alone = jnp.stack([one(w) for w in weights])
            np.testing.assert_allclose(jax.jit(each)(weights), alone, atol=1e-4)
        """,
    )


def in_strict_floats(moment, decay, count):
    """Optax's own bias correction takes the power of an integer."""
    weight = 1 - decay ** count.astype(jnp.float32)
    return jax.tree.map(lambda m: m / weight.astype(m.dtype), moment)


STRICT = FULL | {
    "adamw": lambda **options: galore_jax.galore_adamw(1e-2, **options),
    "reset, int8": lambda **options: galore_jax.galore_adamw(
        1e-2, moments="reset", projector_dtype="int8", **options
    ),
    "8-bit": lambda **options: galore_jax.galore_adamw8bit(1e-2, **options),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRICT)
def test_strict_promotion(name, monkeypatch):
    monkeypatch.setattr(optax.tree, "bias_correction", in_strict_floats)
    tx, params = STRICT[name](**OPTIONS), params_like(SHAPES)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)


def test_gradients_in_the_subspace_under_strict_promotion(monkeypatch):
    monkeypatch.setattr(optax.tree, "bias_correction", in_strict_floats)
    tx, params = galore_jax.galore_adamw(1e-2, **OPTIONS), {"w": jnp.ones((16, 24))}

    def step(params, state, x):
        grads = galore_jax.value_and_grad(lambda p, x: jnp.mean(x @ p["w"]), tx)(params, state, x)[
            1
        ]
        return tx.update(grads, state, params)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(step, params, jax.eval_shape(tx.init, params), jnp.ones((8, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_an_eager_loop_makes_no_nan_on_the_way(moments):
    """With zero gradients, and a kernel that the loss does not use."""
    params = {"used": jnp.ones((16, 24)), "unused": jnp.ones((16, 24))}
    tx = galore_jax.galore_adamw(1e-2, rank=4, update_proj_gap=2, moments=moments)
    state, x = tx.init(params), jax.random.normal(jax.random.key(0), (8, 16))
    with jax.debug_nans(True):
        for _ in range(3):
            grads = galore_jax.value_and_grad(lambda p, x: jnp.mean((x @ p["used"]) ** 2), tx)(
                params, state, x
            )[1]
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_array_equal(state.refreshed["unused"], -1)
