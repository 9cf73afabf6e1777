"""In Flax loops: Linen's TrainState, nnx.Optimizer, functional NNX, and orbax checkpoints."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp_v0
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import galore_jax
from galore_jax import galore
from tests.models import nnx_stack
from tests.optimizers.members import MEMBERS
from tests.problems import on_mesh, once_but, params_like

OPTIONS = dict(rank=4, update_proj_gap=3, weight_dimension_numbers=galore_jax.last_two_axes)
X = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
Y = np.sin(X @ np.random.default_rng(1).standard_normal((12, 8))).astype(np.float32)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(24, name="up")(x)
        x = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
            name="blocks"
        )(x, None)[0]
        return nn.Dense(8, name="lm_head")(x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(24, name="mix")(nn.tanh(x)), None


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.mix = nnx.Linear(24, 24, rngs=rngs)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(12, 24, rngs=rngs)
        self.blocks = nnx_stack(NNXBlock, 3, rngs)
        self.lm_head = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        x = self.up(x)
        x, _ = nnx.scan(
            lambda x, block: (x + block.mix(nnx.tanh(x)), None),
            in_axes=(nnx.Carry, 0),
            out_axes=(nnx.Carry, 0),
        )(x, self.blocks)
        return self.lm_head(x)


def line(**options):
    """The line everyone writes."""
    inner = optax.adamw(1e-2, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), galore(**OPTIONS | options), inner)


def test_linen_train_state():
    net = LinenNet()
    params = net.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=line())

    @jax.jit
    def step(state):
        def loss(p):
            return jnp.mean((state.apply_fn({"params": p}, X) - Y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(60):
        state, value = step(state)
        losses.append(float(value))
    projector = state.opt_state[1].projector
    assert projector["blocks"]["mix"]["kernel"].shape == (3, 24, 4)
    assert projector["up"]["kernel"].shape == (12, 4)
    assert isinstance(projector["lm_head"]["kernel"], optax.MaskedNode)
    assert losses[-1] < 0.6 * losses[0]


@nnx.jit
def nnx_step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.parametrize(
    ("moments", "proj_type"),
    once_but([("rotate", "std")], [("keep", "std"), ("reset", "full"), ("rotate", "std")]),
)
def test_nnx_optimizer_equals_the_functional_loop(moments, proj_type):
    tx = line(moments=moments, proj_type=proj_type)
    model = NNXNet(nnx.Rngs(0))
    graphdef, start = nnx.split(model, nnx.Param)
    start = jax.tree.map(jnp.copy, start)  # the model's own variables change in place
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(nnx_step(model, optimizer)) for _ in range(8)]

    # The state as a pytree of variables, as in Flax's guide to JAX transformations.
    params, state = start, tx.init(start)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((nnx.merge(graphdef, p)(X) - Y) ** 2))(
            params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    functional = []
    for _ in range(8):
        params, state, loss = step(params, state)
        functional.append(float(loss))
    np.testing.assert_allclose(losses, functional, rtol=1e-4)
    assert losses[-1] < losses[0]
    trained = nnx.state(model, nnx.Param)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), trained, params)


def test_nnx_optimizer_with_specs_given_as_a_dict():
    model = NNXNet(nnx.Rngs(0))
    spec = optax.contrib.MuonDimensionNumbers(-2, -1)
    tree = {
        "up": {"kernel": spec, "bias": None},
        "blocks": {"mix": {"kernel": spec, "bias": None}},
        "lm_head": None,
    }
    optimizer = nnx.Optimizer(model, line(weight_dimension_numbers=tree), wrt=nnx.Param)
    first = float(nnx_step(model, optimizer))
    for _ in range(20):
        last = float(nnx_step(model, optimizer))
    assert last < first


def save_v0(path, tree):
    with ocp_v0.CheckpointManager(path) as manager:
        manager.save(0, args=ocp_v0.args.StandardSave(tree))


def load_v0(path, target):
    with ocp_v0.CheckpointManager(path) as manager:
        return manager.restore(0, args=ocp_v0.args.StandardRestore(target))


def save_v1(path, tree):
    from orbax.checkpoint import v1

    v1.save(path, tree)


def load_v1(path, target):
    from orbax.checkpoint import v1

    return v1.load(path, target)


def adafactor():
    return galore_jax.galore_adafactor(1e-2, **OPTIONS)


def eight_bits():
    return galore_jax.galore_adamw8bit(1e-2, projector_dtype="int8", **OPTIONS)


def here(shapes):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)


def save_and_resume(tmp_path, tx, at, save, load):
    """Train, save at a step, go on; and go on from what was saved."""
    net = LinenNet()

    @jax.jit
    def step(params, state):
        def loss(p):
            return jnp.mean((net.apply({"params": p}, X) - Y) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = net.init(jax.random.key(0), X)["params"]
    carry = (params, tx.init(params))
    for _ in range(at):
        carry = step(*carry)
    save(tmp_path / "checkpoint", {"params": carry[0], "opt_state": carry[1]})
    for _ in range(4):
        carry = step(*carry)

    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), X)["params"])
    target = {"params": shapes, "opt_state": jax.eval_shape(tx.init, shapes)}
    restored = load(tmp_path / "checkpoint", here(target))
    resumed = (restored["params"], restored["opt_state"])
    assert jax.tree.structure(resumed) == jax.tree.structure(carry)
    for _ in range(4):
        resumed = step(*resumed)
    jax.tree.map(np.testing.assert_array_equal, resumed, carry)


V0, V1 = (save_v0, load_v0), (save_v1, load_v1)


@pytest.mark.parametrize(
    ("make", "at", "save", "load"),
    [  # with T = 3, step 4 lies between two refreshes and step 6 is one
        pytest.param(line, 4, *V0, id="adamw-v0"),
        pytest.param(
            lambda: line(moments="rotate", stagger=True),
            *(6, *V1),
            id="rotate-stagger",
            marks=pytest.mark.slow,
        ),
        pytest.param(eight_bits, 4, *V1, id="8 bits, int8"),
    ],
)
def test_resumed_training_equals_uninterrupted_bit_for_bit(tmp_path, make, at, save, load):
    save_and_resume(tmp_path, make(), at, save, load)


def multi_steps():
    return optax.MultiSteps(line(), 2).gradient_transformation()


# One of each type of state and of stored projector. What a step does depends on its arguments
# alone, so a state that comes back bit for bit goes on as it would have.
STATES = {
    "adamw": line,
    "lion": lambda: galore_jax.galore_lion(1e-3, **OPTIONS),
    "sgd": lambda: galore_jax.galore_sgd(1e-2, momentum=0.9, **OPTIONS),
    "bfloat16": lambda: line(projector_dtype="bfloat16", method="subspace"),
    "int4": lambda: line(projector_dtype="int4"),
    "both sides": lambda: line(proj_type="full", projector_dtype="int8"),
    "adafactor": adafactor,
    "8 bits": eight_bits,
    "8 bits in full rank": lambda: galore_jax.lion8bit(1e-3),
    "multi-steps": multi_steps,
    "injected": lambda: optax.inject_hyperparams(
        galore_jax.galore_adamw, static_args=("rank", "weight_dimension_numbers")
    )(learning_rate=optax.linear_schedule(1e-2, 0.0, 20), **OPTIONS),
} | {f"family: {name}": (lambda make=make: make(**OPTIONS)) for name, make in MEMBERS.items()}


@pytest.mark.parametrize(("save", "load"), [V0, V1], ids=["v0", "v1"])
def test_states_of_all_types_come_back_bit_for_bit(tmp_path, save, load):
    params = params_like({"w": (3, 12, 24), "v": (3, 24, 12), "lm_head": (24, 8), "bias": (24,)})
    shapes = here({name: jax.eval_shape(make().init, params) for name, make in STATES.items()})
    rng = np.random.default_rng(0)

    def any_bits(x):
        bits = np.frombuffer(rng.bytes(x.size * x.dtype.itemsize), x.dtype).reshape(x.shape)
        return jnp.asarray(bits if x.dtype != bool else bits.view(np.uint8) > 127)

    states = jax.tree.map(any_bits, shapes)
    assert {str(x.dtype) for x in jax.tree.leaves(states)} >= {
        "float32",
        "bfloat16",
        "uint8",
        "int8",
    }
    save(tmp_path / "checkpoint", states)
    restored = load(tmp_path / "checkpoint", shapes)
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    jax.tree.map(lambda a, b: np.testing.assert_equal(bytes_of(a), bytes_of(b)), restored, states)


def bytes_of(x):
    return np.asarray(x).tobytes()


def test_nnx_optimizer_saves_and_resumes(tmp_path):
    def build(seed):
        model = NNXNet(nnx.Rngs(seed))
        return model, nnx.Optimizer(model, line(), wrt=nnx.Param)

    model, optimizer = build(0)
    for _ in range(4):
        nnx_step(model, optimizer)
    save_v0(tmp_path / "checkpoint", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})
    expected = [float(nnx_step(model, optimizer)) for _ in range(4)]
    model, optimizer = build(1)
    target = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    restored = load_v0(tmp_path / "checkpoint", target)
    nnx.update(model, restored["model"])
    nnx.update(optimizer, restored["optimizer"])
    assert [float(nnx_step(model, optimizer)) for _ in range(4)] == expected


NAMED = {"up": (None, "fsdp"), "down": ("fsdp", None)}
# What the arrays of the state are named after: rank 3 is never cut, and what the weight cuts on the
# projected axis goes on the other one.
NAMES_OF_STATE = {
    "projector": {"up": ("fsdp", None), "down": ("fsdp", None)},
    "mu": {"up": (None, "fsdp"), "down": ("fsdp", None)},
}


def test_nnx_names_of_axes_reach_the_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            def linear(i, o, names):
                init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
                return nnx.Linear(i, o, use_bias=False, kernel_init=init, rngs=rngs)

            self.up, self.down = linear(16, 32, NAMED["up"]), linear(32, 16, NAMED["down"])

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with on_mesh(mesh):
        model = Model(nnx.Rngs(0))
        tx = galore_jax.galore_adamw(1e-2, rank=3)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        specs = jax.tree.leaves(
            nnx.get_partition_spec(state),
            is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
        )
        cut = [spec for spec in specs if "fsdp" in spec]
        assert len(cut) == 6  # a projector and two moments of two kernels
        grads = nnx.grad(lambda m: jnp.mean(m(jnp.ones((4, 16))) ** 2))(model)
        optimizer.update(model, grads)


def test_linen_boxes_with_names_of_axes():
    """The state's are named for its own axes, and random bases are those of arrays in no box."""

    class Model(nn.Module):
        boxed: bool = True

        @nn.compact
        def __call__(self, x):
            def dense(features, name):
                init = nn.initializers.lecun_normal()
                if self.boxed:
                    init = nn.with_partitioning(init, NAMED[name])
                return nn.Dense(features, use_bias=False, kernel_init=init, name=name)

            return dense(256, "down")(jnp.tanh(dense(512, "up")(x)))

    x = jnp.ones((4, 256))
    tx = galore_jax.galore_adamw(1e-2, rank=3, method="random")
    ends = []
    for boxed in (True, False):
        model = Model(boxed)
        state = TrainState.create(
            apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=tx
        )
        if boxed:
            moments = state.opt_state.inner_state[0].mu
            for name, wanted in NAMES_OF_STATE["projector"].items():
                assert state.opt_state.projector[name]["kernel"].names == wanted
            for name, wanted in NAMES_OF_STATE["mu"].items():
                assert moments[name]["kernel"].names == wanted
        for k in range(3):

            def loss_fn(params, x, model=model):
                return jnp.mean(model.apply({"params": params}, x) ** 2)

            gradient = galore_jax.value_and_grad(loss_fn, tx)
            if k < 2:
                grads = jax.grad(loss_fn)(state.params, x)
            else:
                _, grads = gradient(state.params, state.opt_state, x)
            state = state.apply_gradients(grads=grads)
        ends.append(nn.meta.unbox(state.params))
    jax.tree.map(np.testing.assert_array_equal, *ends)
