"""Weights in 8-bit codes: what is kept of them, and that they train as what they stand for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_jax
from galore_jax.int8 import Int8Weight
from galore_jax.quantize import INT8, decode, recode
from tests.models import OPTIONS, batches, plain
from tests.problems import normal, once_but

MATRICES = {"weight_dimension_numbers": OPTIONS["weight_dimension_numbers"]}


@settings(deadline=None, max_examples=12)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 600)),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
def test_rounded_at_random_to_a_neighbour(shape, size, seed):
    x = jnp.asarray(normal(seed, *shape) * size)
    start = Int8Weight.of(x)
    codes, scales = recode(1.01 * x, start.scales, jax.random.key(seed))
    # One level, each number's.
    levels = np.abs(decode(jnp.ones_like(codes), scales, INT8, shape))
    error = np.abs(decode(codes, scales, INT8, shape) - 1.01 * x)
    assert np.all(error <= levels * (1 + 1e-3) + 1e-6 * size)


def test_what_does_not_change_keeps_its_codes():
    """Which a warm-up from a rate of zero does not, and no rounding behind it."""
    for shape in ((40, 30), (3, 7, 600), (2, 300)):
        weight = Int8Weight.of(jnp.asarray(normal(0, *shape)))
        for key in (None, jax.random.key(0)):
            new = weight.plus(jnp.zeros(()), key)
            np.testing.assert_array_equal(new.scales, weight.scales)
            assert np.mean(np.asarray(new.codes != weight.codes)) < 1e-3  # 5.9999 is no 6
        assert np.max(np.abs(new - normal(0, *shape))) < 0.51 * np.max(weight.scales)


def test_the_mean_of_rounded_sums_is_the_sum():
    weight = Int8Weight.of(jnp.asarray(normal(0, 4, 300)))
    update = jnp.asarray(1e-3 * normal(1, 4, 300))  # a tenth of a level
    start = weight.decoded()
    mean = jnp.mean(
        jnp.stack([weight.plus(update, jax.random.key(i)).decoded() for i in range(400)]), 0
    )
    level = float(jnp.max(weight.scales))
    assert np.max(np.abs(mean - start - update)) < 4 * level / 2 / 400**0.5
    nearest = weight.plus(update, None).decoded()
    assert np.mean(np.asarray(nearest == start)) > 0.8  # and most are lost without


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_numbers_too_small_for_a_level(value):
    weight = Int8Weight.of(jnp.full((2, 8), value))
    np.testing.assert_array_equal(weight.decoded(), 0)
    np.testing.assert_array_equal(weight.plus(jnp.full((2, 8), value), jax.random.key(0)), 0)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_numbers_that_are_none_are_not_hidden(value):
    weight = Int8Weight.of(jnp.ones((2, 300)))
    new = weight.plus(jnp.zeros((2, 300)).at[1, 299].set(value), jax.random.key(0))
    assert np.all(np.isnan(np.asarray(new)[1, 150:])) and np.all(np.isfinite(np.asarray(new)[0]))
    assert np.any(np.isnan(np.asarray(new.plus(jnp.zeros(()), None))))


def coded(dtype=jnp.float32, hooked=False):
    params, loss_fn = plain(hooked=hooked)
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    return galore_jax.quantize_weights(cast, **MATRICES), loss_fn


def test_those_that_galore_projects_are_coded():
    params, _ = plain()
    tx = galore_jax.galore_adamw(1e-3, **OPTIONS)
    projected = {r.path for r in galore_jax.summary(tx, params).rows if r.rank}
    leaves = jax.tree_util.tree_leaves_with_path(
        coded()[0], is_leaf=lambda x: isinstance(x, Int8Weight)
    )
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in leaves
        if isinstance(x, Int8Weight)
    }
    assert found == projected and found
    again = galore_jax.quantize_weights(coded()[0], **MATRICES)
    jax.tree.map(np.testing.assert_array_equal, again, coded()[0])


def step_in_full(tx, params, state, loss_fn, x):
    """The step of the weights that the codes stand for."""
    whole = galore_jax.dequantize_weights(params)
    loss, grads = jax.value_and_grad(loss_fn)(whole, x)
    updates, state = tx.update(grads, state, whole)
    return loss, optax.apply_updates(whole, updates), state


@pytest.mark.parametrize(
    ("tier", "optimizer"),
    once_but(
        [("subspace", "galore_adamw"), ("layerwise", "galore_adamw")],
        [
            ("subspace", "galore_adamw"),
            ("layerwise", "galore_adamw"),
            ("layerwise", "galore_adamw8bit"),
            ("layerwise", "adamw"),
        ],
    ),
)
def test_steps_are_those_of_the_weights(tier, optimizer):
    if optimizer == "adamw":
        tx = optax.adamw(0.1, weight_decay=0.1)
    else:
        tx = getattr(galore_jax, optimizer)(0.3, weight_decay=0.1, method="svd", **OPTIONS)
    params, loss_fn = coded(hooked=True)
    state = tx.init(galore_jax.dequantize_weights(params))

    @jax.jit
    def step(params, state, x):
        if tier == "layerwise":
            return galore_jax.value_and_update(loss_fn, tx)(params, state, x)
        loss, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, x)
        updates, state = tx.update(grads, state, params)
        return loss, galore_jax.apply_updates(params, updates), state

    for x in batches(2):
        want_loss, want, _ = step_in_full(tx, params, state, loss_fn, x)
        loss, params, state = step(params, state, x)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
        half_a_level = jax.tree.map(
            lambda p: np.max(np.abs(p.scales)) / 2 if isinstance(p, Int8Weight) else 1e-5,
            params, is_leaf=lambda x: isinstance(x, Int8Weight),
        )  # fmt: skip
        jax.tree.map(
            lambda a, b, level: np.testing.assert_allclose(a, b, atol=1.01 * level + 1e-5),
            galore_jax.dequantize_weights(params), want, half_a_level,
        )  # fmt: skip


def test_tiny_steps_add_up_with_a_key_alone():
    params, loss_fn = coded(jnp.bfloat16)
    tx = galore_jax.galore_adamw(1e-4, method="random", **OPTIONS)
    losses = {}
    for name, rounded in (("nearest", False), ("at random", True)):
        step = jax.jit(galore_jax.value_and_update(loss_fn, tx))
        p, state = params, tx.init(params)
        for i, x in enumerate([batches(1)[0]] * 60):
            key = jax.random.key(i) if rounded else None
            loss, p, state = step(p, state, x, rounding_key=key)
        losses[name] = float(loss)
        assert jax.tree.structure(p) == jax.tree.structure(params)
    assert losses["at random"] < losses["nearest"]


def test_gradients_are_those_of_the_weights():
    """In heads, in microbatches, in variables of NNX."""
    model = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    heads = {"q": jnp.asarray(normal(0, 16, 4, 8))}

    def in_heads(params, x):
        return jnp.mean(jnp.square(jnp.einsum("bm,mhd->bhd", x, params["q"])))

    spec = optax.contrib.MuonDimensionNumbers((0,), (1, 2))
    x = jnp.asarray(normal(1, 12, 16))
    for params, loss_fn, numbers in (
        (heads, in_heads, {"q": spec}),
        (state, lambda p, x: jnp.mean(jnp.square(nnx.merge(graph, p)(x))), None),
    ):
        options = {"weight_dimension_numbers": numbers}
        params = galore_jax.quantize_weights(params, **options)
        assert "Int8Weight" in repr(params)
        tx = galore_jax.galore_adamw(1e-2, rank=3, **options)
        opt_state, whole = tx.init(params), galore_jax.dequantize_weights(params)
        jax.tree.map(np.testing.assert_array_equal, opt_state, tx.init(whole))
        assert galore_jax.summary(tx, params).total.weights < 16 * 40 * 2
        for k in (1, 3):
            step = galore_jax.value_and_grad(loss_fn, tx, microbatches=k)
            got, want = step(params, opt_state, x), step(whole, opt_state, x)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                jax.tree.leaves(got), jax.tree.leaves(want),
            )  # fmt: skip
            updates, _ = tx.update(got[1], opt_state, params)
            new = galore_jax.apply_updates(params, updates, jax.random.key(0))
            assert jax.tree.structure(new) == jax.tree.structure(params)


def test_errors_and_warnings_say_what_to_do():
    params, loss_fn = coded()
    adamw = optax.adamw(1e-2)
    with pytest.raises(ValueError, match=r"tx\.init\(galore_jax\.dequantize_weights\(p\)\)"):
        galore_jax.value_and_update(loss_fn, adamw)(params, adamw.init(params), batches(1)[0])
    with pytest.warns(UserWarning, match="a new one for each step"):
        galore_jax.apply_updates(params, jax.tree.map(jnp.zeros_like, plain()[0]))


def test_trees_of_other_things_can_be_printed():
    params, _ = coded()
    shown = repr(jax.tree.map(lambda x: x.shape, params))
    assert "codes=(3, 16, 24)" in shown


def test_layers_of_flax_take_them():
    kernel, x = jnp.asarray(normal(0, 10, 6)), jnp.asarray(normal(1, 3, 10))
    node = Int8Weight.of(kernel)
    want = x @ node.decoded()
    linen = nn.Dense(6, use_bias=False)
    np.testing.assert_allclose(linen.apply({"params": {"kernel": node}}, x), want, rtol=1e-5)
    layer = nnx.Linear(10, 6, use_bias=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    state["kernel"] = state["kernel"].replace(node)
    np.testing.assert_allclose(nnx.merge(graph, state)(x), want, rtol=1e-5)
    for form in (x @ node, x @ node[...], x @ node.T.T, (node.T @ x.T).T):
        np.testing.assert_allclose(form, want, rtol=1e-5)
    assert node.astype(jnp.bfloat16).decoded().dtype == jnp.bfloat16
    assert (node.shape, node.ndim, node.size, len(node)) == ((10, 6), 2, 60, 10)
    stack = Int8Weight.of(jnp.asarray(normal(0, 3, 10, 6)))
    assert [type(w) for w in stack] == [Int8Weight] * 3
    np.testing.assert_array_equal(np.asarray(stack[1]), stack.decoded()[1])


def test_no_stack_is_decoded_as_a_whole():
    layers, width = 64, 96
    params = {
        "blocks": {"kernel": jnp.zeros((layers, width, width))},
        "head": jnp.zeros((width, 3)),
    }
    params = galore_jax.quantize_weights(params, exclude="head", **MATRICES)

    def loss_fn(params, x):
        x = galore_jax.layerwise(lambda p, x: x + x @ p["kernel"], params["blocks"], x)
        return jnp.mean(x @ params["head"])

    tx = galore_jax.galore_adamw8bit(1e-3, rank=8, exclude="head", **MATRICES)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(
        lambda *args: galore_jax.value_and_update(loss_fn, tx, refresh=False)(
            *args, rounding_key=jax.random.key(0)
        ),
        donate_argnums=(0, 1),
    )
    found = step.lower(params, state, jnp.ones((2, width))).compile().memory_analysis()
    stack = layers * width * width * 4
    assert found.temp_size_in_bytes < stack / 3
    assert found.argument_size_in_bytes < stack / 2


def test_the_table_counts_codes():
    params, _ = coded()
    tx = galore_jax.galore_adamw(1e-3, **OPTIONS)
    summary = galore_jax.summary(tx, params)
    assert summary.total.weights == sum(x.nbytes for x in jax.tree.leaves(params))
    assert [step.tier for step in summary.steps] == ["subspace", "layerwise"]
    whole = galore_jax.summary(tx, galore_jax.dequantize_weights(params))
    assert summary.total.state == whole.total.state
    gib = max(step.total for step in summary.steps) / 2**30
    assert summary.fits(gib) == ("subspace", "layerwise") and summary.fits(gib / 100) == ()
