"""8-bit moments: against bitsandbytes and optax, layouts of the state, memory, users' loops."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp_v0
import pytest
from flax import nnx
from hypothesis import strategies as st

import galore_jax
from galore_jax import adamw8bit, lion8bit
from galore_jax.optimizers import blockwise
from galore_jax.optimizers.blockwise import MIN_SIZE
from galore_jax.optimizers.eightbit import (
    ScaleByAdam8bitState,
    scale_by_adam8bit,
    scale_by_lion8bit,
)
from galore_jax.quantize import DYNAMIC, DYNAMIC_UNSIGNED, decode
from tests.models import nnx_stack
from tests.problems import grads_like, normal, params_like, train

SHAPES = {"kernel": (64, 128), "stack": (3, 64, 256), "odd": (67, 131), "bias": (300,)}
BOTH = pytest.mark.parametrize("make", [adamw8bit, lion8bit])
REFERENCE = {adamw8bit: optax.adamw, lion8bit: optax.lion}


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def distance(a, b, start):
    """Of two trained trees, in units of how far the second one moved."""

    def norm(x, y):
        return float(optax.tree.norm(optax.tree.sub(x, y)))

    return norm(a, b) / norm(b, start)


def even_grads(shapes, step):
    """Gradients of one size, part of them steady over steps."""
    return {
        k: 0.5 * normal(i, *shape) + normal(1000 * step + 31 * i, *shape)
        for i, (k, shape) in enumerate(shapes.items())
    }


def spread_grads(shapes, step, seed=0):
    """Gradients whose rows differ in size by three decades, part of them steady over steps."""
    out = {}
    for i, (name, shape) in enumerate(shapes.items()):
        rows = 10.0 ** np.random.default_rng(seed + i).uniform(-3, 0, (*shape[:-1], 1))
        steady, fresh = normal(seed + i, *shape), normal(seed + 1000 * step + 31 * i, *shape)
        out[name] = (rows * (0.5 * steady + fresh)).astype(np.float32)
    return out


def nearest_code(x, code, absmax_out, out, blocksize):
    """What bitsandbytes' GPU kernels do: the nearest level, found in the table itself."""
    import torch

    blocks = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % blocksize))
    blocks = blocks.reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = blocks * torch.where(absmax > 0, 1 / absmax, 0)[:, None]
    found = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    out.copy_(found.reshape(-1)[: x.numel()].reshape(x.shape).to(torch.uint8))
    absmax_out.copy_(absmax)


@pytest.mark.oracle
@BOTH
@pytest.mark.parametrize(
    ("grads", "kernel", "tolerance"),
    [(even_grads, "cpu", 0.01), (spread_grads, "cpu", 0.1), (spread_grads, "exact", 0.002)],
)
def test_against_bitsandbytes(make, grads, kernel, tolerance, monkeypatch):
    """50 steps on the same gradients: the weights' movement, so still less the weights.

    bitsandbytes' CPU kernel (0.50.2) finds codes on a grid coarser than its table, which
    lumps magnitudes below 1e-3 of a block's largest together; where gradients within a block are
    spread that wide, we compare with the table's own nearest codes as well.
    """
    torch = pytest.importorskip("torch", reason="needs the oracles extra")
    bnb = pytest.importorskip("bitsandbytes", reason="needs the oracles extra")
    if kernel == "exact":
        from bitsandbytes.backends.cpu import ops

        monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", nearest_code)
    # Where the longer axis is the last and holds whole blocks, ours are theirs.
    shapes = {"a": (64, 256), "b": (96, 512), "c": (37, 768), "small": (50,)}
    params = params_like(shapes)
    weights = {k: torch.nn.Parameter(torch.tensor(np.array(p))) for k, p in params.items()}
    optimizer_class = bnb.optim.AdamW8bit if make is adamw8bit else bnb.optim.Lion8bit
    betas = (0.9, 0.999 if make is adamw8bit else 0.99)
    optimizer = optimizer_class(weights.values(), lr=1e-2, betas=betas, weight_decay=0.1)
    for step in range(50):
        for k, g in grads(shapes, step).items():
            weights[k].grad = torch.tensor(g)
        optimizer.step()
    ours, _ = train(make(1e-2, weight_decay=0.1), params, 50, grads=lambda p, i: grads(shapes, i))
    theirs = {k: jnp.asarray(p.detach().numpy()) for k, p in weights.items()}
    assert distance(ours, theirs, params) < tolerance


@BOTH
def test_small_leaves_are_as_in_optax(make):
    params = params_like({"kernel": (20, 30), "bias": (31,)})
    ours, _ = train(make(1e-2), params, 20)
    theirs, _ = train(REFERENCE[make](1e-2), params, 20)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@BOTH
def test_near_float32(make):
    params = params_like(SHAPES)
    grads = lambda p, i: spread_grads(SHAPES, i)  # noqa: E731
    ours, _ = train(make(1e-2), params, 50, grads=grads)
    theirs, _ = train(REFERENCE[make](1e-2), params, 50, grads=grads)
    assert distance(ours, theirs, params) < 0.05


@BOTH
def test_minimises(make):
    """A regression: the loss falls as far as with float32 moments."""
    x, target = normal(0, 256, 64), normal(1, 64, 128)
    y = x @ target

    def loss(params):
        return jnp.mean(jnp.square(x @ params["w"] - y))

    def final(tx):
        params = {"w": jnp.zeros((64, 128))}

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=400)
        return float(loss(params))

    schedule = optax.cosine_decay_schedule(3e-2, 400)
    ours, theirs = final(make(schedule)), final(REFERENCE[make](schedule))
    start = float(loss({"w": jnp.zeros((64, 128))}))
    assert max(ours, theirs) < 1e-3 * start


def test_zero_gradients_let_the_second_moment_decay():
    """Codes do not move at a decay of 0.001 a step, but the scale of each block does."""
    params = {"w": jnp.ones((64, 256))}
    tx = scale_by_adam8bit()
    update = jax.jit(tx.update)
    _, state = update({"w": jnp.asarray(normal(0, 64, 256))}, tx.init(params))
    nu = lambda s: np.asarray(decode(s.nu["w"], s.nu_scale["w"], DYNAMIC_UNSIGNED, (64, 256)))  # noqa: E731
    before = nu(state)
    for _ in range(150):
        _, state = update({"w": jnp.zeros((64, 256))}, state)
    ratio = nu(state).sum() / before.sum()
    assert ratio == pytest.approx(0.999**150, rel=1e-3)


@BOTH
def test_bytes_a_number(make):
    params = {"stack": (8, 128, 1376), "kernel": (512, 1376), "wide": (4096,), "odd": (67, 131)}
    for name, shape in params.items():
        state = jax.eval_shape(make(1e-3).init, {name: jax.ShapeDtypeStruct(shape, jnp.float32)})
        moments = 2 if make is adamw8bit else 1
        assert (nbytes(state[0]) - 4) / moments / np.prod(shape) <= 1.04


def test_layout():
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    state = scale_by_adam8bit().init(params)
    assert isinstance(state, ScaleByAdam8bitState)
    for moments, scales in ((state.mu, state.mu_scale), (state.nu, state.nu_scale)):
        assert {k: (x.shape, x.dtype) for k, x in moments.items()} == {
            k: (s, np.float32 if k == "bias" else np.uint8) for k, s in SHAPES.items()
        }
        assert scales["bias"] == optax.MaskedNode()
        shapes = {k: s.shape for k, s in scales.items() if k != "bias"}
        assert shapes == {"kernel": (64, 1), "stack": (3, 64, 1), "odd": (67, 1)}
    assert jax.tree.structure(state.mu) == jax.tree.structure(params)
    assert all(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((512, 1376), (512, 6)),  # six blocks of 230, the last one of 226
        ((1376, 512), (6, 512)),
        ((8, 128, 512), (8, 128, 2)),
        ((8, 67, 131), (8, 67, 1)),
        ((30, 576), (30, 3)),  # stacked vectors, of a width that is no multiple of 256
        ((4096,), (16,)),
    ],
)
def test_scales_belong_to_blocks_along_the_longer_axis(shape, scales):
    assert scale_by_lion8bit().init(jnp.zeros(shape)).mu_scale.shape == scales


@pytest.mark.parametrize("shape", [(512, 16), (16, 512), (3, 512, 16)])
def test_a_weak_direction_is_as_in_float32(shape):
    """A falling spectrum: 1e-5 in the gradient is 1e-10 in the second moment."""
    spectrum = 10.0 ** -(np.arange(16) / 3)
    spectrum = spectrum if shape[-1] == 16 else spectrum[:, None]
    grads = [jnp.asarray(normal(i, *shape) * spectrum) for i in range(30)]
    results = []
    for tx in (scale_by_adam8bit(eps=1e-30), optax.scale_by_adam(eps=1e-30)):
        state, update = tx.init(jnp.zeros(shape)), jax.jit(tx.update)
        for g in grads:
            u, state = update(g, state)
        results.append(np.asarray(u))
    ours, theirs = results
    assert np.max(np.abs(ours)) < 1.1 * np.max(np.abs(theirs))
    along = -2 if shape[-1] == 16 else -1
    error = np.linalg.norm(ours - theirs, axis=along) / np.linalg.norm(theirs, axis=along)
    assert np.max(error) < 0.05


@BOTH
@pytest.mark.parametrize("shape", [(3, 64, 256), (3, 67, 131), (2, 2, 64, 96)])
def test_slices_of_a_stack_are_independent(make, shape):
    """What a loop over layers needs: slice i of the state is the state of slice i."""
    tx = make(1e-2, weight_decay=0.1)
    params = jnp.asarray(normal(0, *shape))
    state = tx.init(params)
    for step in range(3):
        grads = jnp.asarray(normal(step, *shape))
        updates, new_state = jax.jit(tx.update)(grads, state, params)

        def at(i, state):
            return jax.tree.map(lambda x: x[i] if x.ndim else x, state)

        for i in range(shape[0]):
            u, s = jax.jit(tx.update)(grads[i], at(i, state), params[i])
            np.testing.assert_allclose(u, updates[i], rtol=1e-6)
            for a, b in zip(jax.tree.leaves(s), jax.tree.leaves(at(i, new_state)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)
        state = new_state


@pytest.mark.parametrize("make", [scale_by_lion8bit, lambda: adamw8bit(1e-3)])
@pytest.mark.parametrize("shape", [(16, 512, 1024), (16, 128, 1376), (50_000, 256), (250, 40_000)])
def test_no_full_float32_moments(make, shape, monkeypatch):
    """Temporaries: 7 float32 slices of a stack of 16, a fifth of the two float32 moments.

    Of a large matrix, such as an embedding, parts with whole blocks.
    """
    monkeypatch.setattr(blockwise, "_AT_ONCE", 2**19)
    blockwise._quantised.clear_cache()
    tx = make()
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = step.lower(w, jax.eval_shape(tx.init, w), w).compile()
    memory = compiled.memory_analysis()
    moments = 2 * 4 * np.prod(shape)
    assert memory.temp_size_in_bytes < 0.25 * moments
    state = nbytes(jax.eval_shape(tx.init, w))
    assert memory.alias_size_in_bytes >= state  # updated where it lies


@pytest.mark.parametrize(
    "make",
    [
        lambda: galore_jax.galore_adamw8bit(1e-3, rank=4),
        lambda: galore_jax.chain(galore_jax.galore(rank=4), adamw8bit(1e-3)),
        lambda: galore_jax.galore(scale_by_lion8bit(), rank=4),
        lambda: galore_jax.chain(
            galore_jax.galore(rank=4), scale_by_adam8bit(), optax.scale_by_learning_rate(1e-3)
        ),
        lambda: galore_jax.scale_by_apollo(scale_by_adam8bit(), rank=4),
    ],
)
def test_no_float32_copy_of_an_embedding(make, monkeypatch):
    """In bfloat16 it and its gradient are the largest arrays there are, and are not projected."""
    monkeypatch.setattr(blockwise, "_AT_ONCE", 2**19)
    blockwise._quantised.clear_cache()
    tx = make()
    params = {
        "embedding": jax.ShapeDtypeStruct((50_000, 256), jnp.bfloat16),
        "kernel": jax.ShapeDtypeStruct((32, 64), jnp.bfloat16),
    }
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), params).compile()
    copy = 4 * 50_000 * 256
    assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * copy


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("make", [adamw8bit, lion8bit])
def test_galore_around_gives_what_it_leaves_alone_the_same_update(make, dtype):
    """Within a rounding of their dtype, as the direction is rounded before rate and decay are."""
    params = params_like({"embedding": (100, 64), "kernel": (32, 64)})
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    alone, around = (
        make(1e-2, weight_decay=0.1),
        galore_jax.galore(make(1e-2, weight_decay=0.1), rank=4),
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    state, want_state = around.init(params), alone.init(wide)
    for seed in range(3):
        grads = jax.tree.map(lambda x: x.astype(dtype), grads_like(params, seed))
        updates, state = around.update(grads, state, params)
        as_wide = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        want, want_state = alone.update(as_wide, want_state, wide)
        got, eps = updates["embedding"], 3 * float(jnp.finfo(dtype).eps)
        assert got.dtype == dtype
        got = np.asarray(got, np.float32)
        np.testing.assert_allclose(got, want["embedding"], rtol=eps, atol=1e-2 * eps)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (37, 300), (2, 60, 300), (2, 3, 300, 41)])
def test_parts_of_a_matrix_are_what_they_are_together(shape, monkeypatch):
    tx = scale_by_adam8bit()
    grads = [jnp.asarray(normal(seed, *shape)) for seed in range(3)]

    def steps(at_once):
        monkeypatch.setattr(blockwise, "_AT_ONCE", at_once)
        blockwise._quantised.clear_cache()
        state = tx.init(grads[0])
        for g in grads:
            out, state = tx.update(g, state)
        return out, state

    want, got = steps(2**24), steps(3 * 300)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("shape", [(64, 256), (3, 64, 256), (20,)])
def test_not_finite_resets_its_element(make, bad, shape):
    tx = make(1e-2, weight_decay=0.0)
    params, at = jnp.zeros(shape), (0,) * (len(shape) - 1) + (7,)
    _, state = tx.update(jnp.asarray(normal(0, *shape)), tx.init(params), params)
    g = jnp.asarray(normal(1, *shape))
    u_bad, s_bad = tx.update(g.at[at].set(bad), state, params)
    u, s = tx.update(g, state, params)
    assert u_bad[at] == 0
    rest = np.ones(shape, bool)
    rest[at] = False
    np.testing.assert_array_equal(np.asarray(u_bad)[rest], np.asarray(u)[rest])
    for a, b in zip(jax.tree.leaves(s_bad), jax.tree.leaves(s), strict=True):
        if a.shape == shape:
            assert a[at] in ((127, 0) if a.dtype == np.uint8 else (0,))
            same = np.asarray(a)[rest] == np.asarray(b)[rest]
            assert np.mean(same) > 0.9  # the block's scale may have moved


@pytest.mark.slow
@hypothesis.given(
    st.lists(st.lists(st.sampled_from([1, 3, 7, 64, 130]), max_size=4), max_size=3),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=10)
def test_any_tree(shapes, dtype, grad_dtype, with_params):
    shapes = [s for s in shapes if np.prod(s) < 300_000]
    params = {str(i): jnp.asarray(normal(i, *s), dtype) for i, s in enumerate(shapes)}
    # None so small that Adam's eps shows in its first step.
    drawn = [normal(9 + i, *s) for i, s in enumerate(shapes)]
    drawn = [g + 1e-3 * np.where(g < 0, -1, 1) for g in drawn]
    grads = {str(i): jnp.asarray(g, grad_dtype) for i, g in enumerate(drawn)}
    for tx in (scale_by_adam8bit(), scale_by_lion8bit()):
        state = tx.init(params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, params)
        )
        assert all(
            x.dtype == (jnp.uint8 if x.size >= MIN_SIZE else jnp.float32)
            for x in jax.tree.leaves(state.mu)
        )
        updates, new = tx.update(grads, state, params if with_params else None)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        wanted = dtype if with_params else grad_dtype
        assert all(u.dtype == wanted for u in jax.tree.leaves(updates))
        # On the first step both are the sign of the gradient, as far as codes resolve it.
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(
                np.asarray(u, np.float32), np.sign(np.asarray(g, np.float32)), atol=0.01
            )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )


@pytest.mark.parametrize("width", [576, 896, 960, 1000])
def test_widths_that_are_no_power_of_two(width):
    """At most 1.05 bytes a number; vectors of however many layers in float32; no block of two."""
    layers = 30
    params = {
        "norm": {"scale": jnp.ones((layers, width))},
        "up": {"kernel": jnp.ones((layers, width, 3 * width + 8))},
    }
    state = jax.eval_shape(scale_by_lion8bit().init, params)
    mu, scale = state.mu["up"]["kernel"], state.mu_scale["up"]["kernel"]
    assert mu.dtype == jnp.uint8 and state.mu["norm"]["scale"].dtype == jnp.float32
    assert mu.size + 4 * scale.size <= 1.05 * params["up"]["kernel"].size
    assert scale.shape[0] == layers


def test_bfloat16_gradients_do_not_coarsen_float32_updates():
    """Also where a stack's updates are written over its gradients."""
    tx = scale_by_adam8bit()
    params = jnp.zeros((3, 64, 256))
    g = jnp.asarray(normal(0, 3, 64, 256), jnp.bfloat16)
    updates, state = jax.jit(tx.update)(g, tx.init(params), params)
    updates, state = jax.jit(tx.update)(g * 3, state, params)
    wide, _ = jax.jit(tx.update)(
        (g * 3).astype(jnp.float32),
        *(jax.jit(tx.update)(g.astype(jnp.float32), tx.init(params), params)[1], params),
    )
    np.testing.assert_allclose(updates, wide, rtol=1e-5)
    assert len(np.unique(np.asarray(updates))) > 300


@pytest.mark.slow
@BOTH
def test_in_galore(make):
    """Wrapped: decay on the full weight, codes of the low-rank shape, near float32."""
    params = {
        "kernel": jnp.asarray(normal(0, 64, 320)),
        "stack": jnp.asarray(normal(1, 3, 96, 200)),
    }
    options = dict(rank=32, update_proj_gap=7, weight_dimension_numbers=galore_jax.last_two_axes)
    grads = lambda p, i: spread_grads({k: x.shape for k, x in p.items()}, i)  # noqa: E731
    ours, state = train(
        galore_jax.galore(make(1e-2, weight_decay=0.1), **options), params, 20, grads=grads
    )
    inner = state.inner_state[0]
    assert inner.mu["kernel"].dtype == inner.mu["stack"].dtype == jnp.uint8
    assert inner.mu["stack"].shape == (3, 32, 200)
    theirs, _ = train(
        galore_jax.galore(REFERENCE[make](1e-2, weight_decay=0.1), **options),
        params,
        20,
        grads=grads,
    )
    assert distance(ours, theirs, params) < (0.05 if make is adamw8bit else 0.1)

    zero = jax.tree.map(jnp.zeros_like, params)
    tx = galore_jax.galore(make(1e-2, weight_decay=0.1), **options)
    updates, _ = tx.update(zero, tx.init(params), params)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(u, -1e-3 * p, rtol=1e-4, atol=1e-7)


def test_derivative_in_params():
    """galore takes the update's slope in params; integer codes stand in its way nowhere."""
    tx = adamw8bit(0.5, weight_decay=0.1)
    params, g = jnp.asarray(normal(0, 3, 64, 256)), jnp.asarray(normal(1, 3, 64, 256))
    state = tx.init(params)
    slope = jax.jvp(lambda p: tx.update(g, state, p)[0], (params,), (jnp.ones_like(params),))[1]
    np.testing.assert_allclose(slope, -0.05, rtol=1e-6)


@BOTH
def test_inject_hyperparams(make):
    params = params_like(SHAPES)
    tx = optax.inject_hyperparams(make)(learning_rate=1e-2, weight_decay=0.1)
    ours, _ = train(tx, params, 3)
    theirs, _ = train(make(1e-2, weight_decay=0.1), params, 3)
    assert distance(ours, theirs, params) < 1e-3


@BOTH
def test_multi_steps(make):
    params = params_like(SHAPES)
    tx = optax.MultiSteps(make(1e-2), 2)
    ours, _ = train(tx, params, 4, grads=lambda p, i: grads_like(p, i // 2))
    theirs, _ = train(make(1e-2), params, 2)
    assert distance(ours, theirs, params) < 1e-3


@BOTH
def test_masked(make):
    params = {**params_like(SHAPES), "tokens": jnp.arange(5)}
    tx = optax.masked(make(1e-2), {k: k != "tokens" for k in params})
    updates, _ = tx.update(
        {**grads_like(params, 0), "tokens": jnp.zeros(5)}, tx.init(params), params
    )
    assert np.all(np.asarray(updates["kernel"]) != 0)


@BOTH
def test_map_params(make):
    params = params_like(SHAPES)
    tx = make(1e-2)
    state = tx.init(params)
    seen = optax.tree.map_params(
        tx,
        lambda x, p: jnp.shape(p),
        state,
        params,
        transform_non_params=lambda x: x,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert seen[0].mu == SHAPES
    same = optax.tree.map_params(tx, lambda x: x, state)
    jax.tree.map(np.testing.assert_array_equal, same, state)


@BOTH
def test_resumes_from_orbax(make, tmp_path):
    params = params_like(SHAPES)
    tx = make(1e-2, weight_decay=0.1)
    straight, _ = train(tx, params, 6)
    half, state = train(tx, params, 3)
    with ocp_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", (half, state))
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda p: (p, tx.init(p)), params)
        half, state = checkpointer.restore(tmp_path / "step", target)
    resumed, _ = train(tx, half, 3, state=state, start=3)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


@BOTH
def test_nnx_optimizer(make):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(16, 512, rngs=rngs)
            self.blocks = nnx_stack(lambda r: nnx.Linear(512, 512, rngs=r), 3, rngs)
            self.down = nnx.Linear(512, 4, rngs=rngs)

        def __call__(self, x):
            x = nnx.tanh(self.up(x))
            for i in range(3):
                x = x + nnx.tanh(x @ self.blocks.kernel[i] + self.blocks.bias[i])
            return self.down(x)

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(1e-3), wrt=nnx.Param)
    x = jnp.asarray(normal(0, 32, 16))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - jnp.sin(x[:, :4])) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]
    dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(optimizer))}
    assert np.dtype(np.uint8) in dtypes


def test_repeated_steps_compile_once_and_keep_shapes():
    params = params_like(SHAPES)
    tx = adamw8bit(1e-2)
    state = tx.init(params)
    traces = []

    @jax.jit
    def update(g, s, p):
        traces.append(1)
        return tx.update(g, s, p)

    for step in range(3):
        _, state = update(grads_like(params, step), state, params)
    assert len(traces) == 1


def test_extra_arguments_pass():
    params = jnp.ones(3)
    tx = adamw8bit(1e-2)
    tx.update(params, tx.init(params), params, value=1.0)


@BOTH
def test_wrong_leaves_and_states(make):
    tx = make(1e-3)
    with pytest.raises(TypeError, match=r"'a/ids' is int32"):
        tx.init({"a": {"ids": jnp.arange(3)}})
    part = scale_by_adam8bit() if make is adamw8bit else scale_by_lion8bit()
    with pytest.raises(TypeError, match="restored with a target"):
        part.update(jnp.ones(3), {"mu": jnp.ones(3)})


def test_first_moment_keeps_signs():
    tx = scale_by_adam8bit()
    g = spread_grads({"w": (64, 256)}, 0)["w"]
    _, state = tx.update(jnp.asarray(g), tx.init(jnp.zeros((64, 256))))
    mu = np.asarray(decode(state.mu, state.mu_scale, DYNAMIC, (64, 256)))
    assert np.all(mu * g >= 0)


@pytest.mark.parametrize("nesterov", [True, False])
def test_trace8bit_is_optaxs_in_codes(nesterov):
    """One step is exact; the momentum of many is as near as 8 bits are."""
    params = params_like(SHAPES)
    ours, theirs = galore_jax.trace8bit(0.9, nesterov), optax.trace(0.9, nesterov)
    grads = spread_grads(SHAPES, 0)
    for a, b in zip(
        jax.tree.leaves(ours.update(grads, ours.init(params))[0]),
        jax.tree.leaves(theirs.update(grads, theirs.init(params))[0]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    pair = (optax.chain(tx, optax.scale(-1e-2)) for tx in (ours, theirs))
    new, old = (train(tx, params, 30, grads=lambda p, i: spread_grads(SHAPES, i)) for tx in pair)
    assert distance(new[0], old[0], params) < 0.02
    np.testing.assert_allclose(new[0]["bias"], old[0]["bias"], rtol=1e-6)
