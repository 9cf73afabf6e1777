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

def together(tree):
    for x in jax.tree.leaves(tree):
        one, *others = (np.asarray(s.data) for s in x.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(one, other)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checked", [True, False])
def test_gradients_are_averaged_in_the_subspace(checked):
    """`axis_name` under `shard_map`: on refreshes, between them, with an exact norm and without."""
    run_with_devices(
        4,
        COMMON
        + f"""
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

def on_devices(tx, **options):
    def step(params, state, x):
        loss, grads = galore_jax.value_and_grad(loss_fn, tx, axis_name="data", **options)(
            params, state, x)
        norm = optax.tree.norm(grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, norm
    return jax.jit(jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma={checked}))

for hooked, options in (
    (False, dict(method="svd")),
    (True, dict(method="subspace", proj_type="full")),
    (True, dict(method="randomized", stagger=True, projector_dtype="int8")),
):
    params, loss_fn = plain(hooked=hooked)
    clip = optax.clip_by_global_norm(0.3)
    tx = optax.chain(clip, galore_jax.galore_adamw(1e-2, **OPTIONS | options))
    one, several = jax.jit(full_step(tx, loss_fn)), on_devices(tx)
    a = b = params, tx.init(params)
    for x in batches(6):
        wanted = optax.tree.norm(jax.grad(loss_fn)(a[0], x))
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
kernels = {{tuple(sorted(params["blocks"][k].shape[1:])) for k in ("up", "down")}}
assert shapes and not any(tuple(sorted(s[-2:])) in kernels for s in shapes), shapes
_, _, _, norm = on_devices(tx, norm="subspace")(*b, batches(1)[0])
_, _, _, exact = on_devices(tx)(*b, batches(1)[0])
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
