import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from tests.models import LAYERS, OPTIONS, WIDTH, batches, plain
from tests.problems import normal, once_but, run_with_devices
from tests.subspace.test_gradients import LOOSE, TRAININGS, full, relative, train, trained_in_full


def train_layerwise(loss_fn, tx, params, data, state=None, **options):
    step = jax.jit(galore_jax.value_and_update(loss_fn, tx, **options), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params) if state is None else state
    losses = []
    for x in data:
        loss, params, state = step(params, state, x)
        losses.append(float(loss))
    return params, state, losses


# Codes as the state keeps them in two widths; what stays an array is one thing to a scan.
KINDS = [kind for kind in TRAININGS if kind != "bfloat16 projectors"]


@pytest.mark.parametrize("kind", once_but(["svd", "int8 projectors"], KINDS))
def test_training_is_that_of_full_gradients(kind):
    params, loss_fn = plain()
    inner, _, (want, (_, want_state), want_losses) = trained_in_full("plain", kind)
    got, state, losses = train_layerwise(loss_fn, inner, params, batches(20), clip_norm=0.2)
    loose = kind in LOOSE
    assert relative(want, got, params) < (1e-2 if loose else 5e-4)
    # Adam's steps along directions of next to no gradient are those of the machine's rounding.
    np.testing.assert_allclose(losses, want_losses, rtol=1e-2 if loose else 1e-4)
    assert jax.tree.structure(state) == jax.tree.structure(want_state)
    assert state.count == 20


INNERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "masked": optax.adamw(1e-2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "lion": galore_jax.galore_lion(1e-3, method="svd", **OPTIONS),
    "adafactor": galore_jax.galore_adafactor(1e-2, method="svd", **OPTIONS),
    "accumulation inside": galore_jax.galore(
        optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(), **OPTIONS
    ),
    "injected": optax.inject_hyperparams(
        galore_jax.galore_adamw, static_args=("rank", "weight_dimension_numbers")
    )(learning_rate=optax.linear_schedule(1e-2, 0.0, 20), **OPTIONS),
    "partition": optax.partition(
        {"low": galore_jax.galore_adamw(1e-2, **OPTIONS), "full": optax.adamw(1e-3)},
        {"embed": "full", "blocks": "low", "head": "full"},
    ),
}


@pytest.mark.parametrize("name", once_but(["adamw", "partition"], INNERS))
def test_any_optimizer_that_treats_leaves_separately(name):
    params, loss_fn = plain()
    tx, data = INNERS[name], batches(6)
    want, *_ = train(full(loss_fn), tx, params, data)
    got, *_ = train_layerwise(loss_fn, tx, params, data)
    # Adafactor takes the norms' layers for one leaf, or one by one.
    assert relative(want, got, params) < (2e-2 if name == "adafactor" else 1e-3)


def test_links_that_follow_the_loss_get_it():
    params, loss_fn = plain()
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=0)
    tx = optax.chain(galore_jax.galore_adamw(0.3, **OPTIONS), plateau)

    def full_step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, value=loss)
        return loss, optax.apply_updates(params, updates), state

    ends = []
    for step in (jax.jit(full_step), jax.jit(galore_jax.value_and_update(loss_fn, tx))):
        p, state = params, tx.init(params)
        for x in batches(4):
            _, p, state = step(p, state, x)
        ends.append((p, float(state[1].scale)))
    (want, scale), (got, other) = ends
    assert scale == other < 1
    assert relative(want, got, params) < 1e-4


@pytest.mark.slow
def test_codes_of_large_stacks_are_cut_into_layers():
    # Leaves beyond 4096 numbers, whose layers are not; layers of whole blocks; vectors of a width
    # that is no multiple of a block's.
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "small": jax.random.normal(keys[0], (8, 16, 64)) / 8,
        "large": jax.random.normal(keys[1], (8, 16, 512)) / 8,
        "vectors": jnp.ones((8, 576)),
    }
    tx = galore_jax.adamw8bit(1e-2)
    assert all(x.dtype == jnp.uint8 for x in tx.init(params)[0].mu.values())

    def loss_fn(params, x):
        def block(p, x):
            return (
                x
                + jnp.tanh(x @ p["small"]) @ jnp.ones((64, 16)) / 64
                + jnp.tanh(x @ p["large"]) @ jnp.ones((512, 16)) / 512
                + jnp.sin(jnp.arange(16.0)) * jnp.mean(p["vectors"])
            )

        return jnp.mean(galore_jax.layerwise(block, params, x) ** 2)

    want, want_state, _ = train(full(loss_fn), tx, params, batches(5))
    got, state, _ = train_layerwise(loss_fn, tx, params, batches(5))
    assert relative(want, got, params) < 1e-2
    np.testing.assert_allclose(
        state[0].mu_scale["large"], want_state[0].mu_scale["large"], rtol=1e-2, atol=1e-7
    )


@pytest.mark.parametrize("tied", [False, True])
def test_what_comes_before_and_after_the_blocks(tied):
    params, _ = plain()
    data = batches(2)

    def loss_fn(params, x, scale):
        embed = params["embed"]

        def block(p, x):
            return x + jnp.tanh(x @ p["up"]) @ p["down"] * p["norm"] * scale

        y = galore_jax.layerwise(block, params["blocks"], x @ embed)
        # The input of the blocks is used again behind them, and so is a tied embedding.
        y = y + 0.1 * (x @ embed)
        head = embed.T if tied else params["head"]
        return jnp.mean((y @ head - jnp.flip(x, -1)) ** 2), jnp.mean(y)

    if tied:
        params = {k: v for k, v in params.items() if k != "head"}
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS | {"method": "svd"})
    step = galore_jax.value_and_update(loss_fn, tx, has_aux=True)  # not under jit
    got, state = params, tx.init(params)
    want, want_state = params, tx.init(params)
    for x in data:
        (value, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(want, x, scale=0.5)
        updates, want_state = tx.update(grads, want_state, want)
        want = optax.apply_updates(want, updates)
        (loss, mean), got, state = step(got, state, x, scale=0.5)
        assert (float(loss), float(mean)) == pytest.approx((float(value), float(aux)), rel=1e-4)
    assert relative(want, got, params) < 1e-3


@pytest.mark.slow
def test_a_plain_step_has_no_refresh_in_it():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, moments="reset", **OPTIONS)
    params, state, _ = train(full(loss_fn), tx, params, batches(1))
    x = batches(2)[1]
    step = {r: jax.jit(galore_jax.value_and_update(loss_fn, tx, refresh=r)) for r in (True, False)}
    assert "lapack" in step[True].lower(params, state, x).as_text()
    assert "lapack" not in step[False].lower(params, state, x).as_text()
    with_branch, without = (step[r](params, state, x)[1] for r in (True, False))
    assert relative(with_branch, without, params) < 1e-4


@pytest.mark.parametrize("make", [galore_jax.apollo, galore_jax.fira, galore_jax.galore_muon])
def test_no_method_decomposes_in_a_plain_step(make):
    params, loss_fn = plain()
    tx = make(1e-2, method="svd", **OPTIONS)
    step = jax.jit(galore_jax.value_and_update(loss_fn, tx, refresh=False))
    assert "lapack" not in step.lower(params, tx.init(params), batches(1)[0]).as_text()


def test_a_loss_that_handles_errors_is_taken_apart_all_the_same():
    params, loss_fn = plain()

    def careful(params, x):
        try:
            return loss_fn(params, x)
        except Exception as error:
            raise RuntimeError("the loss failed") from error

    tx, data = optax.adam(1e-2), batches(2)
    want, got = (train_layerwise(f, tx, params, data)[0] for f in (loss_fn, careful))
    jax.tree.map(np.testing.assert_array_equal, want, got)


@pytest.mark.slow
def test_devices_that_share_a_batch_stay_together():
    """`axis_name` under `shard_map`, in a process with two devices."""
    run_with_devices(
        2,
        """
        import jax, numpy as np, optax, galore_jax
        from jax.sharding import PartitionSpec as P
        from tests.models import OPTIONS, batches, plain
        params, loss_fn = plain()
        tx = galore_jax.galore_adamw(1e-2, method="svd", **OPTIONS)
        options = dict(clip_norm=0.2)
        whole = jax.jit(galore_jax.value_and_update(loss_fn, tx, **options))
        parts = galore_jax.value_and_update(loss_fn, tx, axis_name="data", **options)
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        parts = jax.jit(jax.shard_map(
            parts, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P(), P()),
            check_vma=False,
        ))
        a = b = params, tx.init(params)
        for x in batches(6):
            _, *a = whole(*a, x)
            _, *b = parts(*b, x)
        for w in jax.tree.leaves(b[0]):
            one, two = (np.asarray(s.data) for s in w.addressable_shards)
            np.testing.assert_array_equal(one, two)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a[0], b[0])
        """,
    )


@pytest.mark.slow
def test_stochastic_rounding_lets_small_updates_through():
    params, loss_fn = plain(jnp.bfloat16)
    data = batches(1, dtype=jnp.bfloat16)[0]
    tx = optax.sign_sgd(5e-5)
    step = jax.jit(galore_jax.value_and_update(loss_fn, tx))
    _, nearest, _ = step(params, tx.init(params), data)
    _, rounded, _ = step(params, tx.init(params), data, rounding_key=jax.random.key(0))
    _, again, _ = step(params, tx.init(params), data, rounding_key=jax.random.key(0))
    # Where the update is at most a fifth of the distance to the next number of 8 bits.
    large = [jnp.abs(params["blocks"][k]) > 1 / 8 for k in ("up", "down")]
    for k, at in zip(("up", "down"), large, strict=True):
        assert not jnp.any((nearest["blocks"][k] != params["blocks"][k]) & at)
        moved = (rounded["blocks"][k] != params["blocks"][k]) & at
        assert 0.01 < jnp.sum(moved) / jnp.sum(at) < 0.2
        assert not jnp.array_equal(moved[0], moved[1])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, rounded, again))


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("eight_bits", [True, False])
def test_weights_and_state_are_updated_in_place(refresh, eight_bits):
    layers, d = 64, 256
    params = {k: jax.ShapeDtypeStruct((layers, d, d), jnp.float32) for k in ("a", "b", "c", "d")}
    kind = galore_jax.galore_adamw8bit if eight_bits else galore_jax.galore_adamw
    tx = kind(1e-2, projector_dtype="int8" if eight_bits else None, **OPTIONS | {"rank": d // 4})

    def loss_fn(params, x):
        def block(p, x):
            for k in "abcd":
                x = x + jnp.tanh(x @ p[k])
            return x

        return jnp.mean(galore_jax.layerwise(block, params, x) ** 2)

    x = jax.ShapeDtypeStruct((8, d), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(galore_jax.value_and_update(loss_fn, tx, refresh=refresh), donate_argnums=(0, 1))
    found = step.lower(params, state, x).compile().memory_analysis()
    weights = 4 * layers * d * d * 4
    saved = layers * 8 * d * 4
    # A few layers' worth; one copy of the smallest stack would be 16 of them, one of a stack of
    # projectors in float32 4.
    assert found.temp_size_in_bytes - saved < (8 if refresh else 6) * weights / layers
    assert found.output_size_in_bytes - found.alias_size_in_bytes < 2**16


def test_layerwise_is_a_scan_elsewhere():
    params, loss_fn = plain()

    def scanned(params, x):
        def block(x, p):
            return x + jnp.tanh((x * p["norm"]) @ p["up"]) @ p["down"], None

        y, _ = jax.lax.scan(block, x @ params["embed"], params["blocks"])
        return jnp.mean(jnp.square(y @ params["head"] - jnp.flip(x, -1)))

    x = batches(1)[0]
    got, want = (jax.value_and_grad(f)(params, x) for f in (loss_fn, scanned))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    assert len(params["blocks"]["up"]) == LAYERS


def no_layers(params, x):
    return jnp.mean((x @ params["embed"]) ** 2)


def cast_layers(params, x):
    blocks = jax.tree.map(lambda w: 2 * w, params["blocks"])
    return jnp.mean(galore_jax.layerwise(lambda p, x: x * p["norm"], blocks, x) ** 2)


def two_stacks(params, x):
    for _ in range(2):
        x = galore_jax.layerwise(lambda p, x: x * p["norm"], params["blocks"], x)
    return jnp.mean(x**2)


@pytest.mark.parametrize(
    ("loss_fn", "tx", "message"),
    [
        (no_layers, optax.adam(1e-3), "calls no galore_jax.layerwise"),
        (cast_layers, optax.adam(1e-3), "leaves of params as they are"),
        (two_stacks, optax.adam(1e-3), "more than once"),
        (
            None,
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
            "depends on the gradient of leaf 'blocks/[a-z]+'.*clip_norm=",
        ),
        (None, optax.apply_if_finite(optax.adam(1e-3), 3), "depends on the gradient of leaf"),
    ],
)
def test_errors_say_what_to_do(loss_fn, tx, message):
    params, whole = plain()
    step = galore_jax.value_and_update(loss_fn or whole, tx)
    with pytest.raises(ValueError, match=message):
        step(params, tx.init(params), batches(1)[0])


def test_scales_that_are_no_rows_of_layers_are_refused():
    # Blocks run along the longer axis of a matrix, which is what stacked vectors look like.
    params = {"g": jnp.ones((80, 64))}
    tx = galore_jax.adamw8bit(1e-2)

    def loss_fn(params, x):
        return jnp.mean(galore_jax.layerwise(lambda p, x: x * jnp.sum(p["g"]), params, x))

    with pytest.raises(ValueError, match=r"for leaf 'g' of 80 layers, which cannot be cut"):
        galore_jax.value_and_update(loss_fn, tx)(params, tx.init(params), batches(1)[0])


def test_one_array_at_two_places_is_refused():
    w = jnp.ones((LAYERS, WIDTH, WIDTH))
    params = {"a": w, "b": w}

    def loss_fn(params, x):
        return jnp.mean(galore_jax.layerwise(lambda w, x: x @ w, params["a"], x))

    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="one array stands at two places"):
        galore_jax.value_and_update(loss_fn, tx)(params, tx.init(params), batches(1)[0])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="clip_norm must be positive or None, got -1"):
        galore_jax.value_and_update(no_layers, optax.adam(1e-3), clip_norm=-1)


@pytest.mark.slow
@pytest.mark.parametrize("width", [576, 1000])
def test_eight_bits_at_widths_of_real_models_in_all_tiers(width):
    """More than 4,096 numbers of stacked norms, blocks that are no multiples of 256."""
    layers, x = 9, jnp.asarray(normal(0, 3, width))
    params = {
        "blocks": {"norm": 1 + 0.1 * normal(1, layers, width), "up": normal(2, layers, width, 40)},
        "head": normal(3, width, 7) / width,
    }

    def loss_fn(params, x):
        def block(p, x):
            return x + 0.1 * jnp.tanh((x * p["norm"]) @ p["up"] / 24) @ jnp.ones((40, width)) / 40

        x = galore_jax.layerwise(block, params["blocks"], x)
        return jnp.mean(jnp.square(x @ params["head"] - 1))

    tx = galore_jax.galore_adamw8bit(
        1e-2, rank=8, weight_dimension_numbers=galore_jax.matrix_axes, method="svd"
    )
    data = [x] * 3
    want, *_ = train(full(loss_fn), tx, params, data)
    for got in (
        train(galore_jax.value_and_grad(loss_fn, tx), tx, params, data)[0],
        train_layerwise(loss_fn, tx, params, data)[0],
    ):
        assert relative(want, got, params) < 1e-2
