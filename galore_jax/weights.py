"""Which weights go into 8 bits: `quantize_weights`."""

from __future__ import annotations

from typing import Any

import jax

from galore_jax.int8 import Int8Weight, is_int8
from galore_jax.matrix.plan import DEFAULT_EXCLUDE
from galore_jax.matrix.trees import bare, shapes
from galore_jax.matrix.view import MatrixView
from galore_jax.settings import Settings


def quantize_weights(
    params: Any,
    *,
    exclude: str | None = DEFAULT_EXCLUDE,
    weight_dimension_numbers: Any = None,
) -> Any:
    r"""Weights that `galore` would project, in blockwise int8: one byte a number.

    Each block of up to 256 numbers x along the longer of the last two axes becomes codes c and one
    scale s,

    .. math::
        x \approx s c, \quad c \in \{-128, \dots, 127\}

    Norms, biases, embeddings and whatever else galore does not project stay as they are. In the
    place of such a weight stands a node that Flax layers take as an array: it is decoded where it
    is used. `galore_jax.value_and_grad`, `galore_jax.value_and_update` and
    `galore_jax.apply_updates` (`optax.apply_updates` does not know it) train it; without a key for
    stochastic rounding updates below half a level are lost. Have layers recomputed in the backward
    pass (`galore_jax.layerwise`, `jax.checkpoint`), or it keeps each of them decoded. `jax.grad`
    refuses codes ("grad requires real- or complex-valued inputs").

    Optimizers see the weights decoded. What holds nothing but transformations of galore_jax decodes
    them itself; others are given `dequantize_weights(params)`, which under `jit` costs no memory:
    `jax.jit(lambda p: tx.init(galore_jax.dequantize_weights(p)))(params)`, for `tx.update` too.

    For one device: on a mesh, axes would have to be cut along blocks.

    Args:
        params: tree of parameters, floating.
        exclude: as of `galore`: which paths stay.
        weight_dimension_numbers: as of `galore`: which leaves are matrices; give it what the
            optimizer is given.

    Returns:
        The tree, with an `Int8Weight` in the place of each such leaf. Its leaves, codes and scales,
        are saved and restored as others are.

    Raises:
        TypeError, ValueError: as `galore` for `exclude` and `weight_dimension_numbers`.

    Example:
        >>> import jax, jax.numpy as jnp, galore_jax
        >>> params = {"kernel": jnp.linspace(-1, 1, 128).reshape(8, 16), "bias": jnp.ones(16)}
        >>> params = galore_jax.quantize_weights(params)
        >>> params["kernel"]
        Int8Weight(shape=(8, 16), dtype=float32)
        >>> float(jnp.abs(params["kernel"] - jnp.linspace(-1, 1, 128).reshape(8, 16)).max()) < 0.01
        True
        >>> loss = lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2)
        >>> tx = galore_jax.galore_adamw(0.01, rank=2)
        >>> state, x = jax.jit(tx.init)(params), jax.random.normal(jax.random.key(0), (32, 8))
        >>> for i in range(3):
        ...     value, grads = galore_jax.value_and_grad(loss, tx)(params, state, x)
        ...     updates, state = tx.update(grads, state, params)
        ...     params = galore_jax.apply_updates(params, updates, jax.random.key(i))
        ...     print(f"{value:.2f}")
        2.38
        2.37
        2.35

    References:
        Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024; Dettmers et al., `8-bit
        Optimizers via Block-wise Quantization <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    settings = Settings(rank=1, exclude=exclude, weight_dimension_numbers=weight_dimension_numbers)
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_int8)
    plain = bare(shapes(treedef.unflatten(leaves)))
    chosen = [isinstance(found, MatrixView) for found in settings.plan(plain)]
    return treedef.unflatten(
        Int8Weight.of(x) if yes and not is_int8(x) else x
        for x, yes in zip(leaves, chosen, strict=True)
    )
