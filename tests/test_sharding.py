"""How an optimizer's state lies on a mesh."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax
from galore_jax.quantize import BLOCK
from tests.problems import on_mesh, run_with_devices

L, M, N, R = 8, 64, 128, 6
OPTIONS = dict(rank=R, weight_dimension_numbers=galore_jax.last_two_axes)
SHAPES = {
    "blocks": {"up": (L, M, N), "down": (L, N, M)},
    "embed": (16, M),
    "norm": (L, M),
    "out": (M, N),
}
OPTIMIZERS = {
    "adamw": galore_jax.galore_adamw(1e-2, **OPTIONS),
    "full": galore_jax.galore_adamw(1e-2, proj_type="full", **OPTIONS),
    "lazy": galore_jax.galore_adamw(1e-2, refresh="lazy", **OPTIONS),
    "8-bit": galore_jax.galore_adamw8bit(1e-2, **OPTIONS),
    "int8": galore_jax.galore_adamw(1e-2, projector_dtype="int8", **OPTIONS),
    "int4": galore_jax.galore_adamw8bit(1e-2, projector_dtype="int4", **OPTIONS),
    "adafactor": galore_jax.galore_adafactor(1e-2, **OPTIONS),
    "muon": galore_jax.galore_muon(1e-2, **OPTIONS),
    "fira": galore_jax.fira(1e-2, **OPTIONS),
    "apollo": galore_jax.apollo(1e-2, **OPTIONS),
    "ldadam": galore_jax.ldadam(1e-2, **OPTIONS),
    "plain": optax.adamw(1e-2),
    "plain 8-bit": galore_jax.adamw8bit(1e-2),
}


def tree_of(shapes):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )


def shardings_of(mesh, spec):
    specs = {
        "blocks": {"up": spec["up"], "down": spec["down"]},
        "embed": P(None, *spec["out"][-1:]),
        "norm": P(*spec["up"][:1]),
        "out": spec["out"],
    }
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))


def mesh_of(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes))


FSDP = mesh_of(fsdp=8)
MESHES = {
    "replicated": (FSDP, dict(up=P(), down=P(), out=P())),
    "outputs": (
        FSDP,
        dict(up=P(None, None, "fsdp"), down=P(None, None, "fsdp"), out=P(None, "fsdp")),
    ),
    "inputs": (FSDP, dict(up=P(None, "fsdp"), down=P(None, "fsdp"), out=P("fsdp"))),
    "stack": (FSDP, dict(up=P("fsdp"), down=P("fsdp"), out=P())),
    "two": (
        mesh_of(data=2, fsdp=4),
        dict(up=P(None, "fsdp"), down=P(None, None, "fsdp"), out=P("fsdp")),
    ),
    "tensor": (
        mesh_of(fsdp=2, tensor=4),
        dict(up=P(None, "fsdp", "tensor"), down=P(None, "tensor", "fsdp"), out=P("fsdp", "tensor")),
    ),
}


def of(tx, mesh_name, **options):
    """Shapes of the state, and how it is sharded, by path."""
    mesh, spec = MESHES[mesh_name]
    params = tree_of(SHAPES)
    where = galore_jax.state_sharding(tx, params, shardings_of(mesh, spec), **options)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(where)
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): (x, s)
        for (path, x), s in zip(paths, jax.tree.leaves(where), strict=True)
    }


def per_device(found):
    return sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in found.values()
    ), sum(x.size * x.dtype.itemsize for x, _ in found.values())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_device_holds_its_share(name, mesh):
    found = of(OPTIMIZERS[name], mesh)
    large = {path: x for path, x in found.items() if x[0].size >= 2048}
    here, all_of_it = per_device(large)
    assert here <= 1.1 * all_of_it / 8


def test_axes_follow_the_weights():
    found = of(OPTIMIZERS["adamw"], "tensor", spread=False)
    specs = {path: s.spec for path, (_, s) in found.items()}
    up, down = "['blocks']['up']", "['blocks']['down']"
    assert specs[f".projector{up}"] == P(None, "fsdp", None)
    assert specs[f".inner_state[0].mu{up}"] == P(None, None, "tensor")
    # More inputs than outputs: its outputs are projected.
    assert specs[f".projector{down}"] == P(None, "fsdp", None)
    assert specs[f".inner_state[0].nu{down}"] == P(None, "tensor", None)
    assert specs[".inner_state[0].mu['embed']"] == P(None, "tensor")
    assert specs[".count"] == P()


def test_what_is_left_over_goes_to_stacked_axes_first():
    found = of(OPTIMIZERS["adamw"], "two")
    specs = {path: s.spec for path, (_, s) in found.items()}
    assert specs[".projector['blocks']['up']"] == P("data", "fsdp", None)
    assert specs[".inner_state[0].mu['blocks']['up']"] == P(("data", "fsdp"), None, None)
    # Too small to be worth it.
    assert specs[".inner_state[0].mu['out']"] == P(None, None)


sizes = st.sampled_from([1, 3, 8, 40, 96, 260, 520, 1024])
placed = st.sampled_from([None, "a", "b", ("a", "b"), ("b", "a")])


@hypothesis.given(
    shape=st.lists(sizes, min_size=1, max_size=4),
    names=st.lists(placed, min_size=4, max_size=4),
    rank=st.sampled_from([1, 3, 8, 50]),
    proj_type=st.sampled_from(["std", "reverse_std", "full"]),
    name=st.sampled_from(["adamw", "8-bit", "int8", "int4", "adafactor", "muon", "apollo"]),
    spread=st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_shape(shape, names, rank, proj_type, name, spread):
    """Every part is a whole one, the rank is never cut, nor is a block of quantised numbers."""
    mesh = mesh_of(a=2, b=4)
    sizes, used, spec = dict(mesh.shape), set(), []
    for n, entry in zip(shape, names, strict=False):
        given = (entry,) if isinstance(entry, str) else entry or ()
        fits = not used & set(given) and n % math.prod(sizes[a] for a in given) == 0
        spec.append(given if fits and given else None)
        used |= set(given) if fits else set()
    options = OPTIONS | dict(rank=rank)
    make = {
        "adamw": lambda: galore_jax.galore_adamw(1e-2, proj_type=proj_type, **options),
        "8-bit": lambda: galore_jax.galore_adamw8bit(1e-2, proj_type=proj_type, **options),
        "int8": lambda: galore_jax.galore_adamw(1e-2, projector_dtype="int8", **options),
        "int4": lambda: galore_jax.galore_adamw8bit(1e-2, projector_dtype="int4", **options),
        "adafactor": lambda: galore_jax.galore_adafactor(1e-2, **options),
        "muon": lambda: galore_jax.galore_muon(1e-2, **options),
        "apollo": lambda: galore_jax.apollo(1e-2, **options),
    }
    tx, params = make[name](), {"w": jax.ShapeDtypeStruct(tuple(shape), jnp.float32)}
    where = galore_jax.state_sharding(
        tx, params, {"w": NamedSharding(mesh, P(*spec))}, spread=spread
    )
    state = jax.eval_shape(tx.init, params)
    projected = len(shape) > 1 and rank < min(shape[-2:])
    for x, s in zip(*map(jax.tree.leaves, (state, where)), strict=True):
        part = s.shard_shape(x.shape)  # raises where an axis does not divide
        if projected:
            for n, here in zip(x.shape[len(shape) - 2 :], part[len(shape) - 2 :], strict=True):
                assert n != rank or here == n or n in shape[-2:]
        if x.dtype in (jnp.uint8, jnp.int8):
            axis = len(x.shape) - 2 if len(x.shape) > 1 and x.shape[-2] > x.shape[-1] else -1
            length = x.shape[axis] / -(-x.shape[axis] // BLOCK)
            assert part[axis] == x.shape[axis] or part[axis] % length == 0


@pytest.mark.parametrize("spread", [False, True])
def test_partition_specs_are_for_the_mesh_at_hand(spread):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, params = galore_jax.galore_adamw(1e-2, rank=2), {"w": jnp.ones((8, 16))}
    with pytest.raises(ValueError, match="PartitionSpecs do not say on which mesh"):
        galore_jax.state_sharding(tx, params, {"w": P(None, "fsdp")})
    with on_mesh(mesh):
        found = galore_jax.state_sharding(tx, params, {"w": P(None, "fsdp")}, spread=spread)
    assert found.inner_state[0].mu["w"] == P(None, "fsdp")
    assert found.projector["w"] == P(None, None)


def test_one_sharding_serves_a_tree():
    mesh = mesh_of(fsdp=8)
    tx, params = optax.adam(1e-2), tree_of({"a": (8, 8), "b": {"c": (16,)}})
    found = galore_jax.state_sharding(tx, params, NamedSharding(mesh, P("fsdp")))
    assert found[0].mu == {
        "a": NamedSharding(mesh, P("fsdp", None)),
        "b": {"c": NamedSharding(mesh, P("fsdp"))},
    }


def test_mistakes():
    mesh, tx, params = mesh_of(fsdp=8), optax.adam(1e-2), tree_of({"w": (8,)})
    with pytest.raises(ValueError, match="leaf 'w' has 1 axes, fewer than"):
        galore_jax.state_sharding(tx, params, NamedSharding(mesh, P(None, "fsdp")))
    with pytest.raises(TypeError, match=r"tree like params of NamedShardings.*NoneType"):
        galore_jax.state_sharding(tx, params, {"w": None})


@pytest.mark.slow
def test_a_state_is_made_trained_and_restored_on_other_meshes():
    """Save on 8 devices, restore on 4 and 1: training goes on as it would have."""
    run_with_devices(
        8,
        """
        import tempfile, jax, numpy as np, optax, orbax.checkpoint as ocp, galore_jax
        from jax.sharding import NamedSharding, PartitionSpec as P
        from tests.models import OPTIONS, batches, plain

        params, loss_fn = plain()
        tx = galore_jax.galore_adamw8bit(1e-2, method="eigh", **OPTIONS)

        def step(params, state, x):
            grads = jax.grad(loss_fn)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def placed(devices):
            auto = (jax.sharding.AxisType.Auto,)
            mesh = jax.make_mesh((devices,), ("fsdp",), auto, devices=jax.devices()[:devices])
            def spec(x):
                axis = next((a for a in range(x.ndim)[::-1] if x.shape[a] % devices == 0), None)
                return P(*["fsdp" if a == axis else None for a in range(x.ndim)])
            where = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), params)
            of_state = galore_jax.state_sharding(tx, params, where)
            return where, of_state, jax.jit(step, out_shardings=(where, of_state))

        where, of_state, sharded = placed(8)
        a, one = (params, tx.init(params)), jax.jit(step)
        b = jax.device_put(params, where), jax.jit(tx.init, out_shardings=of_state)(params)
        data = batches(6)
        for x in data[:3]:
            a, b = one(*a, x), sharded(*b, x)
        folder = tempfile.mkdtemp()
        with ocp.StandardCheckpointer() as saver:
            saver.save(folder + "/state", b)
        for devices in (4, 1):
            where, of_state, sharded = placed(devices)
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                jax.eval_shape(lambda p: (p, tx.init(p)), params), (where, of_state),
            )
            with ocp.StandardCheckpointer() as saver:
                c = saver.restore(folder + "/state", like)
            jax.tree.map(np.testing.assert_array_equal, b, c)
            d = a
            for x in data[3:]:
                d, c = one(*d, x), sharded(*c, x)
            for x, y in zip(*map(jax.tree.leaves, (d[0], c[0]))):
                np.testing.assert_allclose(x, y, atol=1e-3)
        """,
    )
