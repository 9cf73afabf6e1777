"""What the models share: layers in their number formats, stacks of blocks, trees of parameters.

A model is its static part, a `nnx.GraphDef`, and a pure tree of parameters: nested dicts of arrays,
what `jax.grad`, optax and orbax like best, with clean paths (`blocks/attention/q/kernel`).
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

import galore_jax
from examples.llama_config import LlamaConfig
from examples.roberta_config import RobertaConfig
from examples.watching import watched

Config = LlamaConfig | RobertaConfig
Block = TypeVar("Block", bound=nnx.Module)


def linear(
    config: Config, inputs: int, outputs: int, rngs: nnx.Rngs, bias: bool = False
) -> nnx.Linear:
    """A kernel (inputs, outputs), whose gradient can stay in the subspace."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nnx.initializers.normal(config.init_scale),
        dot_general=galore_jax.dot_general,
        promote_dtype=galore_jax.promote_dtype,
        rngs=rngs,
    )


def embedding(config: Config, words: int, rngs: nnx.Rngs) -> nnx.Embed:
    """A table (words, D)."""
    return nnx.Embed(
        words,
        config.hidden,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        embedding_init=nnx.initializers.normal(config.init_scale),
        rngs=rngs,
    )


def stacked(layers: int, make: Callable[[nnx.Rngs], Block], rngs: nnx.Rngs) -> Block:
    """Blocks as one, each of whose leaves has a leading layer axis."""
    return nnx.split_rngs(splits=layers)(nnx.vmap(make))(rngs)


def through(
    blocks: Block,
    run: Callable[[Block, Any], Any],
    state: Any,
    *,
    remat: bool,
    watch: jax.Array | None = None,
) -> Any:
    """The state after all blocks of a stack, one after the other.

    Args:
      blocks: as by `stacked`.
      run: `run(block, state)`, the state after one of them.
      state: before the first.
      remat: recompute each block's activations in the backward pass.
      watch: (layers,), with which each layer's weights are `watched`.
    """
    block_def, weights = nnx.split(blocks)

    def block(layer, state):
        return run(nnx.merge(block_def, layer), state)

    def watched_block(both, state):
        layer, number = both
        return block(watched(galore_jax.dequantize_weights(layer), number), state)

    if watch is not None:
        return galore_jax.layerwise(watched_block, (weights, watch), state)
    if remat:
        return galore_jax.layerwise(block, weights, state)
    return jax.lax.scan(lambda x, p: (block(p, x), None), state, weights)[0]


def from_graph(graph: nnx.GraphDef) -> Callable[[dict], Any]:
    """From parameters to the model that they belong to."""
    return functools.partial(nnx.merge, graph)


def initializer_of(
    make: Callable[[nnx.Rngs], nnx.Module], seed: int
) -> tuple[nnx.GraphDef, Callable[[], dict]]:
    """The static part of a model, and what makes its parameters.

    Under one `jit`, so that a stack is born stacked, on the device; or cut, inside another one.
    """

    @jax.jit
    def init():
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(seed)), nnx.Param))

    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(seed)))), init


def stored(params: dict, param_dtype: str | None) -> dict:
    """Parameters in the number format that a run keeps them in: `int8` is for kernels in codes."""
    if param_dtype != "int8":
        return params
    return galore_jax.quantize_weights(params, weight_dimension_numbers=galore_jax.matrix_axes)


def is_coded(x: Any) -> bool:
    """Whether a node of a tree of parameters is a weight in codes."""
    return isinstance(x, galore_jax.Int8Weight)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=is_coded)


def loaded(params: dict, param_dtype: str | None) -> dict:
    """The same of parameters in the host's memory, leaf by leaf.

    What is whole on the device, before it is in codes, is one leaf then.
    """
    wanted, treedef = _flat(jax.eval_shape(lambda: stored(params, param_dtype)))
    return treedef.unflatten(
        jax.block_until_ready(galore_jax.Int8Weight.of(x)) if is_coded(shape) else x
        for shape, x in zip(wanted, jax.tree.leaves(params), strict=True)
    )


def size(params: dict) -> int:
    """Numbers in a tree of parameters, or of their shapes, in codes or not."""
    whole = jax.eval_shape(galore_jax.dequantize_weights, params)
    return sum(x.size for x in jax.tree.leaves(whole))


def leaf_by_leaf(make: Callable[[], Any]) -> Callable[[], Any]:
    """The tree that `make` gives, each of its weights made when the one before it is done.

    What making one takes, such as a weight before it is in codes, exists once then.
    """

    def init():
        shapes, treedef = _flat(jax.eval_shape(make))
        return treedef.unflatten(
            jax.block_until_ready(jax.jit(lambda i=i: _flat(make())[0][i])())
            for i in range(len(shapes))
        )

    return init
