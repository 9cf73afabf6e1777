"""The training steps that benchmarks compare: models, optimizers, and a step of every tier."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import GaLoreDimensionNumbers

import galore_jax
from examples import llama, rope
from galore_jax import adamw8bit

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
Step = Callable[[Any, Any, jax.Array], tuple[Any, Any, jax.Array]]


class Problem(NamedTuple):
    """What is trained."""

    config: llama.LlamaConfig
    loss: Callable[[Any, jax.Array], jax.Array]  # of params and tokens (batch, time + 1)
    params: Any  # their shapes


def stacked(config: llama.LlamaConfig) -> Problem:
    """The example's model: blocks with a leading layer axis, under a scan."""
    graph, params = _shapes(config)

    def loss(params, tokens):
        return jnp.mean(nnx.merge(graph, params).losses(tokens[:, :-1], tokens[:, 1:]))

    return Problem(config, loss, params)


def restacked(config: llama.LlamaConfig) -> Problem:
    """The same model from a list of blocks, which the loss stacks for its scan."""
    whole = stacked(config)

    def loss(params, tokens):
        return whole.loss(params | {"blocks": _stack(params["blocks"])}, tokens)

    return Problem(config, loss, _listed(whole.params, config.layers))


def unrolled(config: llama.LlamaConfig) -> Problem:
    """The same model from a list of blocks, called one after the other."""
    graph, params = _shapes(config)

    def loss(params, tokens):
        # Of the stack only the structure is used: nothing of it is computed.
        model = nnx.merge(graph, params | {"blocks": _stack(params["blocks"])})
        block = nnx.graphdef(model.blocks)
        x = model.embed(tokens[:, :-1])
        turns = rope.rotary(jnp.arange(x.shape[1]), config.head_size, config.rope_theta)
        for layer in params["blocks"]:
            x = nnx.merge(block, layer)(x, *turns)
        logits = model.logits(model.final_norm(x))
        return jnp.mean(llama.token_losses(logits, tokens[:, 1:]))

    return Problem(config, loss, _listed(params, config.layers))


def _shapes(config):
    def init():
        return nnx.to_pure_dict(nnx.state(llama.Llama(config, nnx.Rngs(0)), nnx.Param))

    graph = nnx.graphdef(nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0))))
    return graph, jax.eval_shape(init)


def _stack(blocks):
    return jax.tree.map(lambda *x: jnp.stack(x), *blocks)


def _listed(params, layers):
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params["blocks"])
    return params | {"blocks": [one] * layers}


def weights(shapes: Any) -> Any:
    """Weights of the usual sizes, made in place: a random generator's scratch would be the peak."""

    def make(path, x):
        if path[-1].key == "scale":
            return jnp.ones(x.shape, x.dtype)
        number = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        for odd in (0x7FEB352D, 0x846CA68B):  # an integer hash: Wellons, "hash prospector"
            number = (number ^ (number >> 16)) * jnp.uint32(odd)
        uniform = (number >> 8).astype(jnp.float32) * (2 / 2**24) - 1
        return (0.02 * 3**0.5 * uniform).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(lambda p, x: jax.jit(lambda: make(p, x))(), shapes)


def tokens(config: llama.LlamaConfig, batch: int, length: int) -> jax.Array:
    """Random token ids, one more in a row than the loss has targets."""
    return jax.random.randint(jax.random.key(0), (batch, length + 1), 0, config.vocab_size)


def adamw() -> optax.GradientTransformation:
    return optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def galore(rank: int, bits: int = 32, **options) -> optax.GradientTransformation:
    """GaLore AdamW on stacked blocks, with moments of this many bits."""
    inner = {32: optax.adamw, 8: adamw8bit}[bits](LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    options |= {"weight_dimension_numbers": galore_jax.last_two_axes}
    return galore_jax.galore(inner, rank=rank, **options)


def contrib(rank: int, axes: tuple[int, int] = (0, 1)) -> optax.GradientTransformation:
    """`optax.contrib.galore` on the same leaves as ours: the kernels of the blocks."""

    def numbers(params):
        def of(path, x):
            inside = getattr(path[0], "key", None) == "blocks"
            return GaLoreDimensionNumbers(*axes) if inside and x.ndim > max(axes) else None

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.galore(
        LEARNING_RATE, rank=rank, weight_decay=WEIGHT_DECAY, weight_dimension_numbers=numbers
    )


def contrib_on_stack(params: Any, rank: int) -> str:
    """What `optax.contrib.galore` answers when it is given stacked layers."""
    try:
        jax.eval_shape(contrib(rank, axes=(1, 2)).init, params)
    except ValueError as error:
        return f"refused: {error}"
    return "taken"


def train_step(tier: str, loss_fn: Callable, tx, refresh: bool = True) -> Step:
    """`step(params, opt_state, tokens) -> (params, opt_state, loss)`, to be jitted and donated.

    `tier` is "full", "subspace" or "layerwise", as in the example. Without `refresh` it is the
    program for the steps in between, where the tier has one.
    """

    def step(params, state, tokens):
        if tier == "layerwise":
            update = galore_jax.value_and_update(loss_fn, tx, refresh=refresh)
            loss, params, state = update(params, state, tokens)
            return params, state, loss
        if tier == "subspace":
            value_and_grad = galore_jax.value_and_grad(loss_fn, tx, refresh=refresh)
            loss, grads = value_and_grad(params, state, tokens)
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


class Running:
    """A compiled, donated training step that keeps its state; call it for one step."""

    def __init__(self, step: Step, tx, shapes: Any, tokens: jax.Array):
        self.params = weights(shapes)
        self.state = jax.jit(tx.init)(self.params)
        self.tokens = tokens
        self.step = compiled(step, self.params, self.state, tokens)

    def __call__(self):
        self.params, self.state, loss = self.step(self.params, self.state, self.tokens)
        return loss, self.params

    def recompile(self, step: Step):
        """Go on from the same state with another program."""
        self.step = compiled(step, self.params, self.state, self.tokens)

    def at(self, count: int) -> "Running":
        """Set every counter: 0 or a multiple of T is a refresh, the steps after it are plain."""
        self.state = at(self.state, count)
        return self


def at(state: Any, count: int) -> Any:
    """An optimizer's state with every counter set, all matrices refreshed at the step before."""

    def is_galore(x):
        return isinstance(x, galore_jax.GaLoreState)

    def refreshed_before(x):
        if not is_galore(x):
            return x
        return x._replace(refreshed=jax.tree.map(lambda step: step - 1, x.refreshed))

    counted = jax.tree.map(lambda x: jnp.full_like(x, count) if x.dtype == jnp.int32 else x, state)
    return jax.tree.map(refreshed_before, counted, is_leaf=is_galore)


def compiled(step: Step, params: Any, state: Any, tokens: Any) -> Any:
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()


def memory(program: Any) -> dict[str, int]:
    """Bytes of a compiled step; the total counts what is returned in a buffer of its own too."""
    found = program.memory_analysis()
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    parts = {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}
    return parts | {"total": sum(parts.values()) + kept}


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def saved_inputs(config: llama.LlamaConfig, batch: int, length: int) -> int:
    """Bytes of the blocks' inputs, which the forward pass keeps."""
    return config.layers * batch * length * config.hidden * jnp.dtype(config.dtype).itemsize


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes of arrays, on devices that need not exist; one sharding may stand for a tree."""

    def one(s, part):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), part)

    return jax.tree.map(one, shardings, shapes)
