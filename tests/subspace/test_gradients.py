import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import galore_jax
from galore_jax.matrix.trees import bare
from galore_jax.projector.gradient import ProjectedGradient, is_projected, received, unpack
from tests.models import HIDDEN, LAYERS, MODELS, OPTIONS, WIDTH, NnxNet, batches, plain
from tests.problems import once_but


def close(a, b, tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance),
        bare(a),
        bare(b),
    )


def relative(a, b, start):
    """Distance of two trees of weights over the way that the first has gone."""
    away = optax.tree.norm(jax.tree.map(jnp.subtract, bare(a), bare(b)))
    return float(away / optax.tree.norm(jax.tree.map(jnp.subtract, bare(a), bare(start))))


def train(gradient, tx, params, data, apply=optax.apply_updates):
    """Weights, state and losses after one step for each batch."""

    @jax.jit
    def step(params, state, x):
        loss, grads = gradient(params, state, x)
        updates, state = tx.update(grads, state, params)
        return apply(params, updates), state, loss

    state, losses = tx.init(params), []
    for x in data:
        params, state, loss = step(params, state, x)
        losses.append(float(loss))
    return params, state, losses


def full(loss_fn):
    return lambda params, state, x: jax.value_and_grad(loss_fn)(params, x)


# Of a wide and a tall kernel `std` and `reverse_std` are each side once, as `left` and `right` are;
# each other way to tap a kernel on one side or on both.
PAIRS = [("plain", side) for side in ("std", "reverse_std", "full")]
PAIRS += [("hooked", "full"), ("linen", "std"), ("nnx", "full")]


@pytest.mark.parametrize(
    ("name", "side"),
    once_but([("plain", "std"), ("hooked", "full"), ("linen", "std"), ("nnx", "full")], PAIRS),
)
def test_gradients_are_the_projected_full_ones(name, side):
    params, loss_fn = MODELS[name]()
    tx = galore_jax.galore_adamw(1e-2, proj_type=side, **OPTIONS)
    x = batches(1)[0]
    # A projector that is neither the default nor due: that of another batch's gradient.
    full_gradient = jax.jit(jax.value_and_grad(loss_fn))
    _, state = jax.jit(tx.update)(full_gradient(params, x[:, ::-1])[1], tx.init(params), params)
    loss, grads = jax.jit(galore_jax.value_and_grad(loss_fn, tx))(params, state, x)
    want_loss, want = full_gradient(params, x)
    assert loss == pytest.approx(float(want_loss), rel=1e-6)
    treedef = jax.tree.structure(bare(params))
    nodes = treedef.flatten_up_to(bare(grads))
    projectors = treedef.flatten_up_to(state.projector)
    found = 0
    for got, g, p in zip(nodes, jax.tree.leaves(want), projectors, strict=True):
        if not is_projected(got):
            np.testing.assert_allclose(got, g, atol=1e-6, rtol=1e-5)
            continue
        found += 1
        m, n = got.view.m, got.view.n
        low = g
        if got.view.side != "out":
            low = jnp.swapaxes(p[..., :m, :], -1, -2) @ low
        if got.view.side != "in":
            low = low @ p[..., -n:, :]
        np.testing.assert_allclose(got.low_rank, low, atol=1e-6, rtol=1e-5)
        norms = jnp.linalg.norm(g, axis=(-2, -1))
        squares = jnp.sum(got.low_rank**2, (-2, -1)) + got.rest**2
        np.testing.assert_allclose(jnp.sqrt(squares), norms, rtol=1e-5)
    assert found == {"plain": 2, "hooked": 2, "linen": 3, "nnx": 3}[name]
    assert float(optax.tree.norm(grads)) == pytest.approx(float(optax.tree.norm(want)), rel=1e-5)


TRAININGS = {
    "svd": dict(method="svd"),
    "eigh, both sides": dict(method="eigh", proj_type="full"),
    "randomized, staggered": dict(stagger=True),
    "subspace, rotated": dict(method="subspace", moments="rotate"),
    "random, reset": dict(method="random", moments="reset"),
    "bfloat16 projectors": dict(projector_dtype="bfloat16"),
    "int8 projectors": dict(projector_dtype="int8"),
    "int4 projectors": dict(projector_dtype="int4"),
}


# Rounding turns bases of nearly equal singular values, and codes of 4 bits at a border.
LOOSE = ("eigh, both sides", "int4 projectors")


@functools.cache
def trained_in_full(name, kind):
    """An optimizer, and what 20 steps with full gradients give; the clip acts on most of them."""
    params, loss_fn = MODELS[name]()
    options = OPTIONS | {"update_proj_gap": 8} | TRAININGS[kind]
    inner = galore_jax.galore_adamw(1e-2, weight_decay=0.1, **options)
    tx = optax.chain(optax.clip_by_global_norm(0.2), inner)
    return inner, tx, train(full(loss_fn), tx, params, batches(20))


@pytest.mark.parametrize(
    ("name", "kind"),
    once_but(
        [("hooked", "int8 projectors"), ("linen", "svd")],
        [*(("hooked", kind) for kind in TRAININGS), ("linen", "svd")],
    ),
)
def test_training_is_that_of_full_gradients(name, kind):
    params, loss_fn = MODELS[name]()
    # Of kernels that are not tapped the hooked model is the plain one.
    _, tx, (want, _, want_losses) = trained_in_full("plain" if name == "hooked" else name, kind)
    got, state, losses = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(20))
    loose = kind in LOOSE
    assert relative(want, got, params) < (1e-2 if loose else 5e-4)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-2 if loose else 1e-4)
    assert state[1].count == 20


def test_the_projectors_really_change():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    gradient = galore_jax.value_and_grad(loss_fn, tx)
    seen = [train(gradient, tx, params, batches(n))[1].projector["blocks"]["up"] for n in (1, 4, 5)]
    assert jnp.array_equal(seen[0], seen[1]) and not jnp.allclose(seen[1], seen[2], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner", [optax.lion(1e-3), optax.sgd(0.1, momentum=0.9), galore_jax.adamw8bit(1e-2)]
)
def test_any_inner_optimizer_takes_them(inner):
    params, loss_fn = plain(hooked=True)
    tx = galore_jax.galore(inner, **OPTIONS | {"method": "svd"})
    want, *_ = train(full(loss_fn), tx, params, batches(6))
    got, *_ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(6))
    assert relative(want, got, params) < 1e-2


@pytest.mark.slow
def test_a_plain_step_is_that_of_the_program_that_can_refresh():
    params, loss_fn = plain(hooked=True)
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    params, state, _ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(1))
    x = batches(2)[1]
    both = galore_jax.value_and_grad(loss_fn, tx)(params, state, x)[1]
    alone = galore_jax.value_and_grad(loss_fn, tx, refresh=False)(params, state, x)[1]
    a, b = both["blocks"]["up"], alone["blocks"]["up"]
    close((a.low_rank, a.rest), (b.low_rank, b.rest), 1e-6)
    assert b.basis is None
    close(
        *(optax.apply_updates(params, tx.update(g, state, params)[0]) for g in (both, alone)), 1e-6
    )
    lowered = jax.jit(galore_jax.value_and_grad(loss_fn, tx, refresh=False)).lower(params, state, x)
    assert "lapack" not in lowered.as_text()


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("refresh", [False, True])
def test_microbatches_are_one_batch(has_aux, refresh):
    params, loss_fn = plain(hooked=True)
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    params, state, _ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(1))
    x = batches(2)[1]

    def loss_and_mean(params, x):
        loss = loss_fn(params, x)
        return (loss, jnp.mean(x)) if has_aux else loss

    options = dict(has_aux=has_aux, refresh=refresh)
    value, grads = galore_jax.value_and_grad(loss_and_mean, tx, **options)(params, state, x)
    several = galore_jax.value_and_grad(loss_and_mean, tx, microbatches=4, **options)
    value4, grads4 = jax.jit(several)(params, state, x)
    if has_aux:
        (value, _), (value4, aux) = value, value4
        assert aux.shape == (4,)
    # Sums of float32 in another order.
    assert value4 == pytest.approx(float(value), rel=4e-6)
    close(
        *(optax.apply_updates(params, tx.update(g, state, params)[0]) for g in (grads, grads4)),
        1e-6,
    )
    a, b = grads["blocks"]["up"], grads4["blocks"]["up"]
    close(a.low_rank, b.low_rank, 1e-6)
    assert jnp.all(b.rest >= a.rest * (1 - 1e-5))


@pytest.mark.parametrize("by_name", [False, True])
def test_each_microbatch_has_a_random_key_of_its_own(by_name):
    tx, params = galore_jax.galore_adamw(1e-2, rank=4), {"w": jnp.ones((16, 32))}

    def loss_fn(params, x, key):
        mask = jax.random.bernoulli(key, 0.5, (x.shape[0], 32))
        return jnp.mean((x @ params["w"] * mask) ** 2), mask

    f = galore_jax.value_and_grad(loss_fn, tx, has_aux=True, microbatches=2)
    x, key = jnp.ones((8, 16)), jax.random.key(0)
    more = ((), {"key": key}) if by_name else ((key,), {})
    (_, masks), _ = f(params, tx.init(params), x, *more[0], **more[1])
    assert np.any(masks[0] != masks[1])
    for i in range(2):
        again = loss_fn(params, x[i::2], jax.random.fold_in(key, i))[1]
        np.testing.assert_array_equal(masks[i], again)
    with pytest.raises(ValueError, match="argument 1 looks like a random key of the old kind"):
        f(params, tx.init(params), x, jax.random.PRNGKey(0))


def beside_another_tree(w):
    """As `eqx.combine` with what is not trained."""
    return jax.tree.map(lambda a, b: a, w, [None] * len(w), is_leaf=lambda x: x is None)


def cast_as_a_tree(w):
    return jax.tree.map(lambda a: a.astype(jnp.float16).astype(a.dtype), w)


def doubled_as_a_tree(w):
    return jax.tree.map(lambda a: 2 * a if jnp.issubdtype(a.dtype, jnp.floating) else a, w)


def stacked_in_the_loss(w):
    return list(jnp.stack(w))


def stacked_as_trees(w):
    w = jax.tree.map(lambda *a: jnp.stack(a), *w)
    return [w[i] for i in range(2)]


def by_lax(w):
    return [jax.lax.mul(a, jnp.float32(2)) for a in w]


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize(
    "given",
    once_but(
        [beside_another_tree, cast_as_a_tree],
        [
            beside_another_tree,
            cast_as_a_tree,
            doubled_as_a_tree,
            stacked_in_the_loss,
            stacked_as_trees,
            by_lax,
        ],
    ),
)
def test_a_loss_that_takes_no_nodes_gets_arrays(given, refresh):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": [jax.random.normal(k, (WIDTH, WIDTH)) / 4 for k in keys]}
    tx, x = galore_jax.galore_adamw(1e-2, rank=4), batches(1)[0]
    state = tx.init(params)

    def loss_fn(params, x):
        a, b = given(params["w"])
        return jnp.mean((jnp.tanh(x @ a) @ b - 1) ** 2)

    want_loss, want = jax.value_and_grad(loss_fn)(params, x)
    loss, grads = jax.jit(galore_jax.value_and_grad(loss_fn, tx, refresh=refresh))(params, state, x)
    assert loss == pytest.approx(float(want_loss), rel=1e-5)
    assert optax.tree.norm(grads) == pytest.approx(float(optax.tree.norm(want)), rel=1e-3)
    updates = [jax.jit(tx.update)(g, state, params)[0] for g in (want, grads)]
    close(*(optax.apply_updates(params, u) for u in updates), 1e-4 if refresh else 1)


def test_a_penalty_on_the_tree_of_parameters():
    params = {"w": jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)) / 4}
    tx, x = galore_jax.galore_adamw(1e-2, rank=4), batches(1)[0]

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"]) ** 2) + 0.1 * optax.tree.norm(params, squared=True)

    want_loss, want = jax.value_and_grad(loss_fn)(params, x)
    loss, grads = galore_jax.value_and_grad(loss_fn, tx)(params, tx.init(params), x)
    assert loss == pytest.approx(float(want_loss), rel=1e-5)
    assert optax.tree.norm(grads) == pytest.approx(float(optax.tree.norm(want)), rel=1e-3)


def test_a_stack_that_reaches_the_loss_whole_is_a_warning():
    params, loss_fn = plain(hooked=True)
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    state, x = tx.init(params), batches(1)[0]

    def cast(params, x):
        def half(a):
            return a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a

        return loss_fn(jax.tree.map(half, params), x)

    with pytest.warns(UserWarning, match=r"whole stack 'blocks/down' exists before"):
        loss, _ = galore_jax.value_and_grad(cast, tx)(params, state, x)
    assert loss == pytest.approx(float(cast(params, x)), rel=1e-5)


def test_an_error_of_the_loss_is_the_users_own():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)

    def wrong(params, x):
        return loss_fn(params, x) + params["nothing"]

    with pytest.raises(KeyError, match="nothing"):
        galore_jax.value_and_grad(wrong, tx)(params, tx.init(params), batches(1)[0])


def new_projector(gradient, old):
    p, renewed = unpack(gradient.view, received(gradient).basis, old)
    assert renewed.all()
    return p


def test_microbatches_share_the_projector_of_the_first():
    params, loss_fn = plain(hooked=True)
    tx = galore_jax.galore_adamw(1e-2, method="svd", **OPTIONS)
    x, state = batches(1)[0], tx.init(params)
    _, grads = jax.jit(galore_jax.value_and_grad(loss_fn, tx, microbatches=4))(params, state, x)
    _, first = galore_jax.value_and_grad(loss_fn, tx)(params, state, x[::4])
    p = new_projector(grads["blocks"]["up"], state.projector["blocks"]["up"])
    close(p, new_projector(first["blocks"]["up"], p), 1e-5)
    g = jax.grad(loss_fn)(params, x)["blocks"]["up"]
    close(grads["blocks"]["up"].low_rank, jnp.swapaxes(p, -1, -2) @ g, 1e-6)


def test_gradients_scale_and_add_as_arrays_do():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    state, x = tx.init(params), batches(1)[0]
    _, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, x)
    halved = jax.tree.map(lambda g: g / 2, grads)
    twice = jax.tree.map(jnp.add, halved, halved)
    _, want = tx.update(grads, state, params)
    _, got = tx.update(twice, state, params)
    close(got, want, 1e-6)
    assert float(optax.tree.norm(halved)) == pytest.approx(float(optax.tree.norm(grads)) / 2)


def test_a_non_finite_gradient_keeps_the_projector():
    params, loss_fn = plain(hooked=True)
    tx = optax.chain(optax.clip_by_global_norm(1.0), galore_jax.galore_adamw(1e-2, **OPTIONS))
    params, state, _ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(4))
    x = batches(1)[0].at[0, 0, 0].set(jnp.nan)
    _, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, x)
    _, after = tx.update(grads, state, params)
    assert not jnp.isfinite(optax.tree.norm(grads))
    close(after[1].projector, state[1].projector, 0)


@pytest.mark.parametrize("refresh", [False, True])
def test_bfloat16_activations_run_on_every_backend(refresh):
    # XLA's CPU backend has no product of transposed bfloat16 operands with a float32 result.
    w = jax.random.normal(jax.random.key(0), (WIDTH, HIDDEN), jnp.bfloat16)
    tx = galore_jax.galore_adamw(1e-2, rank=4)

    def loss_fn(params, x):
        y = galore_jax.dot_general(x, params["w"], (((1,), (0,)), ((), ())))
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    params, x = {"w": w}, batches(1, dtype=jnp.bfloat16)[0, :, 0]
    gradient = jax.jit(galore_jax.value_and_grad(loss_fn, tx, refresh=refresh))
    _, grads = gradient(params, tx.init(params), x)
    want = jax.grad(loss_fn)(params, x)["w"].astype(jnp.float32)
    assert float(optax.tree.norm(grads)) == pytest.approx(float(optax.tree.norm(want)), rel=0.02)


@pytest.mark.slow
def test_bfloat16_weights_have_float32_gradients_in_the_subspace():
    params, loss_fn = plain(jnp.bfloat16, hooked=True)
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    data = batches(3, dtype=jnp.bfloat16)
    _, grads = galore_jax.value_and_grad(loss_fn, tx)(params, tx.init(params), data[0])
    assert grads["blocks"]["up"].low_rank.dtype == jnp.float32
    gradient = galore_jax.value_and_grad(loss_fn, tx)
    after, *_ = train(gradient, tx, params, data)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, params)

    def apply(params, updates):
        return galore_jax.apply_updates(params, updates, jax.random.key(0))

    rounded, *_ = train(gradient, tx, params, data, apply)
    assert relative(after, rounded, params) < 0.5
    assert not jnp.array_equal(after["blocks"]["up"], rounded["blocks"]["up"])


def test_under_inject_hyperparams_partition_and_nnx_optimizer():
    params, loss_fn = plain()
    static = ("rank", "weight_dimension_numbers")
    injected = optax.inject_hyperparams(galore_jax.galore_adamw, static_args=static)
    tx = injected(learning_rate=optax.linear_schedule(1e-2, 0.0, 20), method="svd", **OPTIONS)
    want, *_ = train(full(loss_fn), tx, params, batches(6))
    got, *_ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(6))
    assert relative(want, got, params) < 1e-3

    def by_rank(params):
        labels = jax.tree.map(lambda _: "adam", params)
        return labels | {"blocks": {"up": "four", "down": "two", "norm": "adam"}}

    two = galore_jax.galore_adamw(1e-2, **OPTIONS | {"rank": 2, "method": "svd"})
    four = galore_jax.galore_adamw(1e-2, **OPTIONS | {"method": "svd"})
    tx = optax.partition({"two": two, "four": four, "adam": optax.adamw(1e-2)}, by_rank)
    want, *_ = train(full(loss_fn), tx, params, batches(6))
    got, *_ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(6))
    assert relative(want, got, params) < 1e-3
    grads = galore_jax.value_and_grad(loss_fn, tx)(params, tx.init(params), batches(1)[0])[1]
    assert [grads["blocks"][k].view.rank for k in ("up", "down")] == [4, 2]

    _, nnx_loss = MODELS["nnx"]()
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, four, wrt=nnx.Param)
    before = float(nnx_loss(nnx.state(model, nnx.Param), batches(1)[0]))
    for x in batches(3):
        params = nnx.state(model, nnx.Param)
        _, grads = galore_jax.value_and_grad(nnx_loss, four)(params, optimizer.opt_state, x)
        optimizer.update(model, grads)
    assert float(nnx_loss(nnx.state(model, nnx.Param), batches(1)[0])) < before


def test_a_kernel_acts_as_an_array():
    w = jnp.arange(12.0 * 20).reshape(12, 20) / 100
    tx = galore_jax.galore_sgd(0.1, rank=3)
    x = jax.random.normal(jax.random.key(0), (5, 12))

    def loss_fn(params, x):
        w = params["w"]
        assert w.shape == (12, 20) and w.ndim == 2 and w.size == 240 and w.dtype == jnp.float32
        y = x @ w + jnp.einsum("bi,io->bo", x, w) + x @ (2 * w - w / 3) + (-w).T[0, 0] + w[1, 2]
        y += jnp.dot(x, w.astype(jnp.float32)) + jnp.sum(w**2) + (w @ jnp.ones((20, 1))).sum()
        return jnp.mean(y**2)

    params = {"w": w}
    _, grads = galore_jax.value_and_grad(loss_fn, tx, refresh=False)(params, tx.init(params), x)
    p = tx.init(params).projector["w"]
    want = p.T @ jax.grad(loss_fn)(params, x)["w"]
    np.testing.assert_allclose(
        grads["w"].low_rank, want, rtol=1e-5, atol=1e-5 * jnp.abs(want).max()
    )


def test_stacks_on_another_axis_get_full_gradients():
    w = jax.random.normal(jax.random.key(0), (WIDTH, LAYERS, HIDDEN))
    spec = optax.contrib.GaLoreDimensionNumbers(0, 2)
    tx = galore_jax.galore_adamw(1e-2, rank=4, weight_dimension_numbers=spec)

    def loss_fn(params, x):
        return jnp.mean(jnp.einsum("bti,ilo->btlo", x, params["w"]) ** 2)

    grads = galore_jax.value_and_grad(loss_fn, tx)({"w": w}, tx.init({"w": w}), batches(1)[0])[1]
    assert grads["w"].shape == w.shape and not isinstance(grads["w"], ProjectedGradient)
    updates, _ = tx.update(grads, tx.init({"w": w}), {"w": w})
    assert updates["w"].shape == w.shape


def test_the_gradient_of_a_stack_never_exists():
    layers, d = 64, 64
    params = {"w": jax.ShapeDtypeStruct((layers, d, d), jnp.float32)}
    options = OPTIONS | {"rank": 4, "method": "subspace"}
    tx = galore_jax.galore_sgd(0.1, **options)

    def loss_fn(params, x):
        return jnp.sum(galore_jax.layerwise(lambda w, x: jnp.tanh(x @ w["w"]), params, x) ** 2)

    def temporaries(gradient):
        def step(params, state, x):
            _, grads = gradient(params, state, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        x = jax.ShapeDtypeStruct((1, d), jnp.float32)
        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (layers * d * d * 4)

    assert temporaries(full(loss_fn)) > 1
    assert temporaries(galore_jax.value_and_grad(loss_fn, tx)) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("projector_dtype", [None, "int4"])
def test_updates_scale_after_galore(projector_dtype):
    params, loss_fn = plain()
    options = OPTIONS | {"method": "svd", "projector_dtype": projector_dtype}
    adam = galore_jax.galore(optax.scale_by_adam(), scale=1.0, **options)
    tx = optax.chain(adam, optax.scale_by_schedule(lambda _: -1e-2))
    want, *_ = train(full(loss_fn), tx, params, batches(3))
    got, *_ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(3))
    assert relative(want, got, params) < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f, tx, p, s, x: galore_jax.value_and_grad(f, optax.sgd(1e-3))(
                p, optax.sgd(1e-3).init(p), x
            ),
            "no galore",
        ),
        (
            lambda f, tx, p, s, x: galore_jax.value_and_grad(f, tx)(
                p, galore_jax.galore_adamw(1e-2, rank=4).init(p), x
            ),
            "state does not fit leaf",
        ),
        (
            lambda f, tx, p, s, x: galore_jax.value_and_grad(f, tx, microbatches=3)(p, s, x),
            r"microbatches=3 does not divide the rows of argument 0 of shape \(8, 5, 16\)",
        ),
        (lambda f, tx, p, s, x: galore_jax.value_and_grad(f, tx, microbatches=0), "an int >= 1"),
        (
            lambda f, tx, p, s, x: tx.update(galore_jax.value_and_grad(f, tx)(p, s, x)[1], s),
            "need the parameters",
        ),
        (
            lambda f, tx, p, s, x: galore_jax.value_and_grad(f, optax.MultiSteps(tx, 2))(
                p, optax.MultiSteps(tx, 2).init(p), x
            ),
            "MultiSteps around galore",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        call(loss_fn, tx, params, tx.init(params), batches(1)[0])


def used_twice(params, x):
    return jnp.mean(((x @ params["w"]) @ params["w"].T) ** 2)


def used_by_a_scan(params, x):
    return jnp.mean(jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["w"]), None), x, length=3)[0])


def used_by_each_example(params, x):
    def matmul(x):
        return galore_jax.dot_general(x, params["w"], (((x.ndim - 1,), (0,)), ((), ())))

    return jnp.mean(jax.vmap(lambda x: jnp.tanh(matmul(x)))(x))


@pytest.mark.parametrize("loss_fn", [used_twice, used_by_a_scan, used_by_each_example])
def test_a_kernel_that_would_be_refreshed_twice_is_refused(loss_fn):
    params = {"w": jax.random.normal(jax.random.key(0), (WIDTH, WIDTH))}
    tx, x = galore_jax.galore_adamw(1e-2, rank=4), batches(1)[0]
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"kernel 'w' more than once"):
        jax.jit(galore_jax.value_and_grad(loss_fn, tx))(params, state, x)
    _, grads = galore_jax.value_and_grad(loss_fn, tx, refresh=False)(params, state, x)
    want = state.projector["w"].T @ jax.grad(loss_fn)(params, x)["w"]
    np.testing.assert_allclose(grads["w"].low_rank, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 1, 0)])
def test_a_layer_that_comes_twice_is_refused(layers):
    params = {"w": jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / 4}

    def loss_fn(params, x):
        for i in layers:
            x = jnp.tanh(x @ params["w"][i])
        return jnp.mean(x**2)

    tx, x = galore_jax.galore_adamw(1e-2, **OPTIONS), batches(1)[0]
    gradient = jax.jit(galore_jax.value_and_grad(loss_fn, tx))
    if len(set(layers)) == LAYERS:
        loss, _ = gradient(params, tx.init(params), x)
        assert loss == pytest.approx(float(loss_fn(params, x)), rel=1e-5)
    else:
        with pytest.raises(ValueError, match=r"kernel 'w' more than once"):
            gradient(params, tx.init(params), x)


def test_what_is_not_differentiated_is_no_use():
    params = {"w": jax.random.normal(jax.random.key(0), (WIDTH, WIDTH))}
    tx, x = galore_jax.galore_adamw(1e-2, rank=4), batches(1)[0]

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"]) ** 2), jnp.linalg.norm(jnp.asarray(params["w"]))

    gradient = galore_jax.value_and_grad(loss_fn, tx, has_aux=True)
    (_, norm), _ = gradient(params, tx.init(params), x)
    assert float(norm) == pytest.approx(float(jnp.linalg.norm(params["w"])))


def test_layers_of_a_stack_taken_one_by_one():
    params = {"w": jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / 4}
    tx = galore_jax.galore_adamw(1e-2, method="svd", **OPTIONS)

    def by_index(params, x):
        for i in range(LAYERS):
            x = jnp.tanh(x @ params["w"][i])
        return jnp.mean(x**2)

    def by_iteration(params, x):
        for w in params["w"]:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def by_slices(params, x):
        for i in range(LAYERS):
            x = jnp.tanh(x @ jax.tree.map(lambda a: a[i], params)["w"])  # noqa: B023
        return jnp.mean(x**2)

    want, *_ = train(full(by_index), tx, params, batches(6))
    for loss_fn in (by_index, by_iteration, by_slices):
        got, *_ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(6))
        assert relative(want, got, params) < 1e-3


def test_kernels_of_several_axes():
    params = {"q": jax.random.normal(jax.random.key(0), (WIDTH, 4, 4)) / 4}
    spec = optax.contrib.GaLoreDimensionNumbers(0, (1, 2))
    tx = galore_jax.galore_adamw(1e-2, rank=4, weight_dimension_numbers=spec, method="svd")

    def loss_fn(params, x):
        return jnp.mean((jnp.einsum("btd,dhc->bthc", x, params["q"]) - 1) ** 2)

    want, *_ = train(full(loss_fn), tx, params, batches(6))
    got, *_ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(6))
    assert relative(want, got, params) < 1e-3


def test_numpy_operands():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    x = np.asarray(batches(1)[0])
    host = jax.tree.map(np.asarray, params)
    loss, grads = galore_jax.value_and_grad(loss_fn, tx)(host, tx.init(params), x)
    updates, _ = tx.update(grads, tx.init(params), host)
    after = optax.apply_updates(host, updates)
    assert loss == pytest.approx(float(loss_fn(params, x)), rel=1e-5)
    assert jnp.all(jnp.isfinite(after["blocks"]["up"]))


@pytest.mark.slow
def test_a_plain_program_resets_no_moments():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, moments="reset", **OPTIONS)
    gradient = galore_jax.value_and_grad(loss_fn, tx)
    params, state, _ = train(gradient, tx, params, batches(4))  # the next step is due
    x = batches(1)[0]
    _, grads = galore_jax.value_and_grad(loss_fn, tx, refresh=False)(params, state, x)
    _, after = tx.update(grads, state, params)
    before, now = (s.inner_state[0].mu["blocks"]["up"] for s in (state, after))
    g = grads["blocks"]["up"].low_rank
    close(now, 0.9 * before + 0.1 * g, 1e-6)


def test_a_vmap_over_experts_is_no_repeated_use():
    w = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, HIDDEN))
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(lambda w: jnp.tanh(x @ w))(params["w"]) ** 2)

    state, x = tx.init({"w": w}), batches(1)[0]
    _, grads = galore_jax.value_and_grad(loss_fn, tx)({"w": w}, state, x)
    p = new_projector(grads["w"], state.projector["w"])
    want = jnp.swapaxes(p, -1, -2) @ jax.grad(loss_fn)({"w": w}, x)["w"]
    np.testing.assert_allclose(grads["w"].low_rank, want, atol=1e-6, rtol=1e-4)


def test_gradients_made_for_another_rank_are_refused():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    other = galore_jax.galore_adamw(1e-2, **OPTIONS | {"rank": 2})
    _, grads = galore_jax.value_and_grad(loss_fn, other)(params, other.init(params), batches(1)[0])
    with pytest.raises(ValueError, match=r"leaf 'blocks/down'.*rank 2.*rank 4"):
        tx.update(grads, tx.init(params), params)
    assert dataclasses.is_dataclass(grads["blocks"]["up"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"projector_dtype": "int8"}, {"method": "random"},
                                     {"method": "coordinates"}, {"proj_type": "full"}])  # fmt: skip
def test_gradients_averaged_over_different_bases_are_not_a_number(options):
    """By hand, under `shard_map` or over microbatches: NaN rather than a step that is wrong."""
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **(OPTIONS | options))
    state = tx.init(params)
    take = jax.jit(galore_jax.value_and_grad(loss_fn, tx))

    def step(state, *parts):
        grads = [take(params, state, x)[1] for x in parts]
        mean = jax.tree.map(lambda *g: sum(g) / len(g), *grads)
        updates, state = tx.update(mean, state, params)
        return optax.apply_updates(params, updates)["blocks"]["up"], state

    data = batches(2)
    new, _ = step(state, data[0], data[1])
    looks = options.get("method") not in ("random", "coordinates")  # at the gradient
    assert np.all(np.isnan(new)) == looks
    same, state = step(state, data[0], data[0])
    want, _ = step(tx.init(params), data[0])
    np.testing.assert_allclose(same, want, atol=1e-6)
    # Between refreshes the mean of projected gradients is the projected mean.
    new, _ = step(state, data[0], data[1])
    assert np.all(np.isfinite(new))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({}, 0.0),
        ({}, 0.3),
        ({"proj_type": "full"}, 0.3),
        ({"projector_dtype": "int4"}, 0.3),
        ({"method": "coordinates"}, 0.3),
    ],
)
def test_links_behind_measure_the_update(options, decay):
    params, loss_fn = plain()
    inner = galore_jax.galore(
        optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(decay)),
        **(OPTIONS | options | {"moments": "keep"}),
    )
    tx = optax.chain(inner, optax.clip_by_global_norm(0.05), optax.scale(-1))
    x, state = batches(1)[0], tx.init(params)
    _, grads = jax.jit(galore_jax.value_and_grad(loss_fn, tx))(params, state, x)
    measured, _ = inner.update(grads, state[0], params)
    want, _ = inner.update(jax.grad(loss_fn)(params, x), state[0], params)
    norm = float(optax.tree.norm(want))
    assert float(optax.tree.norm(measured)) == pytest.approx(norm, rel=1e-4)
    halved = jax.tree.map(lambda u: u / 2, measured)
    assert float(optax.tree.norm(halved)) == pytest.approx(norm / 2, rel=1e-4)
    got = optax.apply_updates(params, tx.update(grads, state, params)[0])
    want = tx.update(jax.grad(loss_fn)(params, x), state, params)[0]
    close(got, optax.apply_updates(params, want), 1e-5)


@pytest.mark.parametrize("factor", [0.0, 1e-20])
def test_a_warm_up_behind_that_begins_at_zero(factor):
    """The factors of an update that is scaled to nothing are still numbers."""
    params, loss_fn = plain()
    tx = optax.chain(galore_jax.galore_adamw(1e-2, **OPTIONS), optax.scale(factor))
    state = tx.init(params)
    _, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, batches(1)[0])
    updates, _ = tx.update(grads, state, params)
    close(optax.apply_updates(params, updates), params, 1e-9)


def test_a_mixed_basis_is_not_kept_where_its_step_is_skipped():
    params, loss_fn = plain()
    tx = galore_jax.galore(optax.apply_if_finite(optax.adam(1e-2), 5), **OPTIONS)
    state, data = tx.init(params), batches(2)
    parts = [galore_jax.value_and_grad(loss_fn, tx)(params, state, x)[1] for x in data]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    _, new = tx.update(mean, state, params)
    close(new.projector, state.projector, 0)
    close(new.refreshed, state.refreshed, 0)


@pytest.mark.slow
@pytest.mark.parametrize("projector_dtype", ["float32", "bfloat16", "int4"])
def test_projectors_are_left_alone_between_refreshes(projector_dtype):
    """A program that may refresh hands all of them through links that scale, and back."""
    params, loss_fn = plain(hooked=True)
    galore = galore_jax.galore_adamw(1e-2, projector_dtype=projector_dtype, **OPTIONS)
    tx = optax.chain(optax.scale(0.37), galore, optax.scale(0.37))
    params, state, _ = train(galore_jax.value_and_grad(loss_fn, tx), tx, params, batches(1))
    _, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, batches(2)[1])
    updates, new = tx.update(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, new[1].projector, state[1].projector)
    want, _ = tx.update(jax.grad(loss_fn)(params, batches(2)[1]), state, params)
    close(optax.apply_updates(params, updates), optax.apply_updates(params, want), 1e-5)


def test_linen_layers_take_both_hooks():
    """Linen gives `promote_dtype` its arrays one by one, NNX in a tuple."""
    hooks = dict(dot_general=galore_jax.dot_general, promote_dtype=galore_jax.promote_dtype)
    layer, x = nn.Dense(HIDDEN, **hooks), batches(1)[0]
    params = layer.init(jax.random.key(0), x)

    def loss_fn(params, x):
        return jnp.mean(jnp.square(layer.apply(params, x) - 1))

    np.testing.assert_allclose(layer.apply(params, x), nn.Dense(HIDDEN).apply(params, x), atol=1e-6)
    tx = galore_jax.galore_adamw(1e-2, rank=4)
    state = tx.init(params)
    _, grads = galore_jax.value_and_grad(loss_fn, tx, refresh=False)(params, state, x)
    full = jax.grad(loss_fn)(params, x)["params"]["kernel"]
    p = state.projector["params"]["kernel"]
    np.testing.assert_allclose(grads["params"]["kernel"].low_rank, p.T @ full, atol=1e-6)
