"""Models that the tests of gradients in the subspace and of layerwise training share.

Each is a pair: parameters, and a loss of them and a batch of rows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import galore_jax

WIDTH, HIDDEN, LAYERS = 16, 24, 3
OPTIONS = dict(rank=4, update_proj_gap=4, weight_dimension_numbers=galore_jax.last_two_axes)


def batches(steps, rows=8, time=5, dtype=jnp.float32):
    # Columns of decreasing size: gradients with a clear spectrum, whose singular vectors
    # rounding does not turn.
    scale = 0.7 ** jnp.arange(WIDTH)
    return jax.random.normal(jax.random.key(7), (steps, rows, time, WIDTH), dtype) * scale


def plain(dtype=jnp.float32, hooked=False):
    """A stack of plain kernels, scanned, under remat; ends with a head."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embed": jax.random.normal(keys[0], (WIDTH, WIDTH), dtype) / 4,
        "blocks": {
            "up": jax.random.normal(keys[1], (LAYERS, WIDTH, HIDDEN), dtype) / 4,
            "down": jax.random.normal(keys[2], (LAYERS, HIDDEN, WIDTH), dtype) / 5,
            "norm": jnp.ones((LAYERS, WIDTH), dtype),
        },
        "head": jax.random.normal(keys[3], (WIDTH, WIDTH), dtype) / 4,
    }

    def matmul(x, w):
        if not hooked:
            return x @ w
        return galore_jax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))

    def block(p, x):
        return x + matmul(jnp.tanh(matmul(x * p["norm"], p["up"])), p["down"])

    def loss_fn(params, x):
        y = x @ params["embed"]
        y = galore_jax.layerwise(block, params["blocks"], y)
        return jnp.mean(jnp.square(y @ params["head"] - jnp.flip(x, -1)))

    return params, loss_fn


class LinenBlock(nn.Module):
    """A block of plain layers."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(HIDDEN, name="up")(nn.RMSNorm(name="norm")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.silu(h)), None


class LinenNet(nn.Module):
    """Blocks under nn.scan and nn.remat, then a layer of its own."""

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock, prevent_cse=False)
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = scanned(name="blocks")(x, None)
        return nn.Dense(WIDTH, name="out")(x)


def linen():
    """Linen, its layers stacked by nn.scan."""
    model = LinenNet()
    params = model.init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]

    def loss_fn(params, x):
        return jnp.mean(jnp.square(model.apply({"params": params}, x) - jnp.flip(x, -1)))

    return params, loss_fn


def nnx_stack(make, layers, rngs):
    """Stacked NNX modules; `rngs.split` is younger than the oldest Flax."""
    return nnx.split_rngs(splits=layers)(nnx.vmap(make))(rngs)


class NnxNet(nnx.Module):
    """A list of NNX layers, not stacked; the first two use the low-rank rule."""

    def __init__(self, rngs):
        hooks = dict(dot_general=galore_jax.dot_general, promote_dtype=galore_jax.promote_dtype)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs, **hooks)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs, **hooks)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.down(nnx.silu(self.up(x))))


def nnx_net():
    """NNX, its parameters an nnx.State of variables."""
    graph, params = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params, x):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(x) - jnp.flip(x, -1)))

    return params, loss_fn


MODELS = {
    "plain": plain,
    "hooked": lambda: plain(hooked=True),
    "linen": linen,
    "nnx": nnx_net,
}
