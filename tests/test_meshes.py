"""Training on meshes of several devices, each in a process of its own, against one device."""

import pytest

from tests.problems import run_with_devices

# What the programs below have in common.
COMMON = """
import re
import jax, jax.numpy as jnp, numpy as np, optax, galore_jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.models import OPTIONS, batches, plain

def full_step(tx, loss_fn):
    def step(params, state, x):
        grads = jax.grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state
    return step

def alike(got, want, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)

def compiled_update(tx, params, where, spread=True):
    of_state = galore_jax.state_sharding(tx, params, where, spread=spread)
    like = lambda tree, at: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, at)
    p, s = like(params, where), like(jax.eval_shape(tx.init, params), of_state)
    return jax.jit(tx.update, out_shardings=(where, of_state)).lower(p, s, p).compile()

def together(tree):
    for x in jax.tree.leaves(tree):
        one, *others = (np.asarray(s.data) for s in x.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(one, other)
"""


@pytest.mark.slow
def test_gradients_are_averaged_in_the_subspace():
    """`axis_name` under `shard_map`: on refreshes, between them, with an exact norm and without."""
    run_with_devices(
        4,
        COMMON
        + """
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

def on_devices(tx, checked=True, **options):
    def step(params, state, x):
        loss, grads = galore_jax.value_and_grad(loss_fn, tx, axis_name="data", **options)(
            params, state, x)
        norm = optax.tree.norm(grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, norm
    return jax.jit(jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=checked))

for hooked, checked, options in (
    (True, True, dict(method="subspace", proj_type="full")),
    (True, False, dict(method="randomized", stagger=True, projector_dtype="int8")),
):
    params, loss_fn = plain(hooked=hooked)
    clip = optax.clip_by_global_norm(0.3)
    tx = optax.chain(clip, galore_jax.galore_adamw(1e-2, **OPTIONS | options))
    one, several = jax.jit(full_step(tx, loss_fn)), on_devices(tx, checked)
    a = b = params, tx.init(params)
    wanted_norm = jax.jit(lambda p, x: optax.tree.norm(jax.grad(loss_fn)(p, x)))
    for x in batches(6):
        wanted = wanted_norm(a[0], x)
        a, (*b, loss, norm) = one(*a, x), several(*b, x)
        np.testing.assert_allclose(norm, wanted, rtol=1e-3)
    alike(b[0], a[0], 1e-3)
    together(b[:2])

# Between refreshes no full gradient of a kernel goes from device to device.
plain_step = on_devices(tx, refresh=False, norm="subspace")
text = plain_step.lower(*b, batches(1)[0]).compile().as_text()
sent = re.findall(r"= \\(?(.*?)\\)? all-reduce\\(", text)
found = [s for line in sent for s in re.findall(r"\\[([\\d,]+)\\]", line)]
shapes = [tuple(map(int, s.split(","))) for s in found]
kernels = {tuple(sorted(params["blocks"][k].shape[1:])) for k in ("up", "down")}
assert shapes and not any(tuple(sorted(s[-2:])) in kernels for s in shapes), shapes
_, _, _, norm = on_devices(tx, norm="subspace")(*b, batches(1)[0])
_, _, _, exact = several(*b, batches(1)[0])
assert 0 < norm < exact
""",
    )


@pytest.mark.slow
def test_devices_that_do_not_say_how_they_share_a_batch_are_refused():
    """Not where each trains a model of its own, nor where no projector can be made."""
    run_with_devices(
        2,
        COMMON
        + """
import pytest
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
params, loss_fn = plain()
tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
state, x = tx.init(params), batches(1)[0]

def losses(*args, **options):
    return lambda *given: jnp.stack([args[0](*args[1:], **options)(*given)[0]])

def traced(f, **options):
    mapped = jax.shard_map(
        losses(f, loss_fn, tx, **options),
        mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P("data"), check_vma=False)
    return jax.eval_shape(mapped, params, state, x)

for f in (galore_jax.value_and_grad, galore_jax.value_and_update):
    with pytest.raises(ValueError, match=f"{f.__name__}: under a shard_map .*axis_name='data'"):
        traced(f)
    traced(f, axis_name="data")
    traced(f, axis_name=())
traced(galore_jax.value_and_grad, refresh=False)
""",
    )


@pytest.mark.slow
def test_explicit_meshes_as_one_device():
    """Where a sharding is part of an array's type, weights keep theirs and state gets one."""
    run_with_devices(
        4,
        COMMON
        + """
if jax.__version_info__ < (0, 7, 2):  # before `jax.set_mesh`
    raise SystemExit
shapes = {"up": (4, 16, 24), "down": (4, 24, 16), "norm": (4, 16), "out": (16, 40)}
specs = {
    "outputs": {"up": P(None, None, "a"), "down": P(None, None, "a"), "norm": P(),
                "out": P(None, "a")},
    "inputs": {"up": P(None, "a"), "down": P(None, "a"), "norm": P(), "out": P("a")},
    "stack": {"up": P("a"), "down": P("a"), "norm": P("a"), "out": P()},
}
options = dict(rank=3, update_proj_gap=2, weight_dimension_numbers=galore_jax.last_two_axes)
makers = {
    "outputs": lambda: galore_jax.galore_adamw(1e-2, method="svd", **options),
    "stack": lambda: galore_jax.galore_adamw(
        1e-2, method="eigh", stagger=True, moments="rotate", **options),
    "inputs": lambda: galore_jax.galore_adamw8bit(
        1e-2, method="eigh", projector_dtype="int4", **options),
    "inputs, muon": lambda: galore_jax.galore_muon(1e-2, **options),
    "outputs, ldadam": lambda: galore_jax.ldadam(
        1e-2, rank=3, weight_dimension_numbers=galore_jax.last_two_axes),
    "stack, apollo": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), galore_jax.apollo(1e-2, **options)),
}
rng = np.random.default_rng(0)
params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
grads = [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
         for _ in range(3)]
mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Explicit,))

def train(tx, params, grads):
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state

for name, make in makers.items():
    want, _ = train(make(), params, grads)
    put = lambda tree: jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs[name.split(",")[0]])
    with jax.set_mesh(mesh):
        got, state = train(make(), put(params), [put(g) for g in grads])
    alike(got, want, 2e-3)
    for x, s in zip(jax.tree.leaves(got), jax.tree.leaves(put(params))):
        assert x.sharding.is_equivalent_to(s.sharding, x.ndim), (name, x.sharding)
    large = [x for x in jax.tree.leaves(state) if x.size >= 2048]
    assert all(x.addressable_shards[0].data.size * 4 == x.size for x in large)

# Gradients in the subspace, and layer by layer, of a batch that is cut.
params, loss_fn = plain(hooked=True)
tx = galore_jax.galore_adamw(1e-2, method="svd", **OPTIONS)

def projected(params, state, x):
    _, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, x)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

def layerwise(params, state, x):
    return galore_jax.value_and_update(loss_fn, tx)(params, state, x)[1:]

for step in (projected, layerwise):
    step = jax.jit(step)
    a = params, tx.init(params)
    for x in batches(5):
        a = step(*a, x)
    with jax.set_mesh(mesh):
        p = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), params)
        b = p, jax.jit(tx.init)(p)
        for x in batches(5):
            b = step(*b, jax.device_put(x, NamedSharding(mesh, P("a"))))
    alike(b[0], a[0], 1e-4)
""",
    )


@pytest.mark.slow
def test_a_refresh_is_shared():
    """Each device decomposes its share; no device is sent all matrices."""
    run_with_devices(
        8,
        COMMON
        + """
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
params = {"a": jax.ShapeDtypeStruct((12, 32, 64), jnp.float32),
          "b": jax.ShapeDtypeStruct((4, 32, 64), jnp.float32)}

def program(tx, spec, spread=True):
    where = jax.tree.map(lambda _: NamedSharding(mesh, spec), params)
    return compiled_update(tx, params, where, spread).as_text()

def sent(text, how):
    found = re.findall(r"f32\\[([\\d,]+)\\]\\S* " + how + r"\\(", text)
    return [tuple(map(int, s.split(","))) for s in found]

for spec in (P(None, None, "fsdp"), P(None, "fsdp")):
    for more in ({"method": "svd"}, {"method": "eigh", "refresh": "lazy"}, {"method": "random"}):
        options = dict(rank=4, weight_dimension_numbers=galore_jax.last_two_axes) | more
        text = program(galore_jax.galore_adamw(1e-2, **options), spec)
        whole = [s for s in sent(text, "all-gather") if np.prod(s) > 32 * 64]
        assert not [s for s in whole if {32, 64} <= set(s)], whole
        looks = more["method"] != "random"
        # Of 16 matrices each device has two.
        assert ("f32[2,32,64]" in text) == looks, (spec, more)

# Weights on every device: nothing is sent but in a refresh.
tx = galore_jax.galore_adamw(1e-2, **options | {"method": "svd"})
branches, entry = program(tx, P(), spread=False).split("ENTRY ")
assert "all-gather" in branches and not re.search("all-(gather|reduce|to-all)", entry)
""",
    )


@pytest.mark.slow
def test_orthogonalisation_is_shared():
    """As on one device, and no device is sent all matrices."""
    run_with_devices(
        8,
        COMMON
        + """
from galore_jax.optimizers.muon import orthogonalise
from galore_jax.projector.shares import in_shares
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
stacks = [jnp.asarray(rng.standard_normal(s), jnp.float32)
          for s in ((12, 16, 24), (16, 24), (3, 24, 16))]
put = [jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp"))) for x in stacks]
shared = jax.jit(lambda x: in_shares(orthogonalise, x))
alike(shared(put), [orthogonalise(x) for x in stacks], 1e-5)
back = jax.jit(shared, out_shardings=[put[0].sharding])
assert "all-gather" not in back.lower(put[:1]).compile().as_text()
""",
    )


@pytest.mark.slow
def test_weights_cut_within_blocks_exchange_their_gradient_alone():
    """Moments in 8 bits stay where they are, whatever part of a block is a weight's part."""
    run_with_devices(
        8,
        COMMON
        + """
rng = np.random.default_rng(0)
for sizes, names, shape, spec in (
    ((8,), ("a",), (8, 64, 1024), P(None, None, "a")),
    ((8,), ("a",), (1024, 64), P("a")),
    ((8,), ("a",), (40, 576), P(None, "a")),
    ((4, 2), ("a", "b"), (64, 512), P("b", "a")),
):
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    where, params = NamedSharding(mesh, spec), jax.ShapeDtypeStruct(shape, jnp.float32)
    tx = galore_jax.adamw8bit(1e-2)
    update = compiled_update(tx, params, where)
    assert "all-gather" not in update.as_text(), (shape, tx)
    p, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    state = jax.jit(tx.init, out_shardings=update.input_shardings[0][1])(p)
    got = update(jax.device_put(g, where), state, jax.device_put(p, where))
    alike(got, jax.jit(tx.update)(g, tx.init(p), p), 1e-6)
""",
    )
