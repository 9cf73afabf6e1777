"""SCALE: gradients normalised by column, and momentum on the output layer alone.

Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining",
https://arxiv.org/abs/2506.16659. Written from the paper's equations.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrix.trees import path_string
from galore_jax.optimizers.wrap import in_float32, with_rate
from galore_jax.precision import wide

# By path: leaves with no columns, and the layer that gives the logits.
_NO_MATRIX = r"(?i)(^|/)([^/]*norm(_?\d+)?|bias|scale)(/|$)"
_OUTPUT_LAYER = r"(?i)(^|/)((lm_?)?head|logits?(_?dense)?|score|classifier)(/|$)"


def scale_by_column_norm(eps: jax.typing.ArrayLike = 1e-8) -> optax.GradientTransformation:
    r"""Divide each column of a matrix by its root mean square.

    .. math:: C(G)_{ij} = G_{ij} / \sqrt{\mathrm{mean}_i\, G_{ij}^2}

    The last two axes are the matrix, (inputs, outputs) as Flax stores kernels and embeddings:
    a column is what leads to one output. This is the paper's normalisation times the root of the
    number of inputs, as in its authors' experiments, so that learning rates are of Adam's size.

    Args:
        eps: smallest root mean square to divide by.

    Returns:
        An `optax.GradientTransformation` without state.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.scale_by_column_norm()
        >>> tx.update(jnp.array([[3.0, 0.1], [3.0, -0.1]]), tx.init(None))[0].tolist()
        [[1.0, 1.0], [1.0, -1.0]]

    References:
        Glentis et al., `SCALE <https://arxiv.org/abs/2506.16659>`_, 2025
    """

    def normalise(g, _=None):
        mean = jnp.mean(jnp.square(wide(g)), axis=-2, keepdims=True)
        return (wide(g) / jnp.maximum(jnp.sqrt(mean), eps)).astype(g.dtype)

    return optax.stateless_with_tree_map(normalise)


def scale_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    output_layer: str = _OUTPUT_LAYER,
    exclude: str | None = _NO_MATRIX,
) -> optax.GradientTransformationExtraArgs:
    r"""SCALE: column-normalised SGD with momentum on the output layer alone.

    With C the normalisation of `scale_by_column_norm` and :math:`\lambda` the decay,

    .. math::
        M_t &= \beta M_{t-1} + (1 - \beta) G_t \;\text{ for the output layer, }\;
               G_t \;\text{ for other matrices} \\
        W &\leftarrow W - \eta\,(C(M_t) + \lambda W)

    Vectors (norms, biases) take AdamW steps. Embeddings are matrices here. The state is one
    number for each weight of the output layer, and next to nothing else.

    Args:
        learning_rate: eta, a number or a schedule.
        momentum: beta.
        weight_decay: lambda, decoupled.
        mask: tree of bools, or callable giving one: which leaves decay.
        adam_learning_rate: of the vectors, by default `learning_rate`.
        b1: decay rate of their first moment.
        b2: decay rate of their second moment.
        eps: added to the root of their second moment.
        output_layer: regular expression, searched in a leaf's path, for the layer with momentum.
            A model with tied weights names its embedding here.
        exclude: regular expression for leaves that are vectors, though stacked layers make them
            2-D. None: by the number of axes alone.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: at `init`, where no leaf matches `output_layer`.

    Example:
        >>> import jax.numpy as jnp, galore_jax
        >>> tx = galore_jax.scale_sgd(1e-3)
        >>> params = {"mlp": jnp.ones((3, 8, 16)), "lm_head": jnp.ones((8, 32))}
        >>> [x.shape for x in jax.tree.leaves(tx.init(params)) if x.ndim]
        [(8, 32)]

    References:
        Glentis et al., `SCALE <https://arxiv.org/abs/2506.16659>`_, 2025
    """
    last, vector = re.compile(output_layer), None if exclude is None else re.compile(exclude)

    def label(path, x) -> str:
        name = path_string(path)
        if jnp.ndim(x) < 2 or (vector is not None and vector.search(name)):
            return "vector"
        return "output" if last.search(name) else "matrix"

    def labels(params):
        return jax.tree_util.tree_map_with_path(label, params)

    vectors = learning_rate if adam_learning_rate is None else adam_learning_rate
    tx = optax.partition(
        {
            "matrix": with_rate(scale_by_column_norm(), learning_rate, weight_decay, mask),
            "output": with_rate(
                optax.chain(
                    optax.ema(momentum, debias=False, accumulator_dtype=jnp.float32),
                    scale_by_column_norm(),
                ),
                learning_rate,
                weight_decay,
                mask,
            ),
            "vector": with_rate(optax.scale_by_adam(b1, b2, eps), vectors, weight_decay, mask),
        },
        labels,
    )
    tx = in_float32(tx)

    def init_fn(params):
        found = jax.tree_util.tree_leaves_with_path(labels(params))
        if found and "output" not in [name for _, name in found]:
            raise ValueError(
                f"scale_sgd: no matrix's path matches output_layer={output_layer!r}. Name the "
                "layer that gives the logits, the embedding where weights are tied; the paths are "
                + ", ".join(path_string(path) for path, _ in found)
            )
        return tx.init(params)

    # An update may see some of the leaves only, layer by layer.
    return optax.GradientTransformationExtraArgs(init_fn, tx.update)
