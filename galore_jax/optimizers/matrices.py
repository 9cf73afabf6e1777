"""Optimizers that have a rule for matrices, and AdamW for all other leaves."""

from __future__ import annotations

from typing import Any

import jax
import optax

from galore_jax.boundary import transformation
from galore_jax.matrix.plan import sites, warn_about
from galore_jax.matrix.trees import Sites
from galore_jax.matrix.view import MatrixView
from galore_jax.optimizers.wrap import with_rate
from galore_jax.settings import Settings


def over_matrices(
    tx: optax.GradientTransformation, settings: Settings
) -> optax.GradientTransformation:
    """Apply a transformation of matrices `batch + (m, n)` to the leaves that settings project.

    Its arithmetic is float32 at least; the other leaves must be masked.
    """
    tx = optax.with_extra_args_support(tx)

    def matrices(where: Sites, tree: Any) -> Any:
        pairs = zip(where.views, where.pick(tree), strict=True)
        return where.only(view.to_matrix(x).astype(view.dtype) for view, x in pairs)

    def found(like: Any) -> Sites:
        return sites(settings.plan(like), jax.tree.structure(like))

    def init_fn(params):
        return tx.init(matrices(found(params), params))

    def update_fn(updates, state, params=None, **extra_args):
        like = updates if params is None else params
        where = found(like)
        weights = None if params is None else matrices(where, params)
        new, state = tx.update(matrices(where, updates), state, weights, **extra_args)
        leaves = zip(where.views, where.pick(new), where.pick(like), strict=True)
        out = [view.from_matrix(u).astype(x.dtype) for view, u, x in leaves]
        return where.put(out, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def beside_adam(
    matrices: optax.GradientTransformation,
    settings: Settings,
    learning_rate: optax.ScalarOrSchedule,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    adam: optax.GradientTransformation,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
    label: str,
) -> optax.GradientTransformationExtraArgs:
    """One transformation for the leaves that settings project, and another for the rest.

    Args:
        matrices: without learning rate and decay.
        settings: say which leaves are matrices.
        learning_rate: of the matrices.
        adam_learning_rate: of the rest, by default the same.
        adam: for the rest, without learning rate and decay, in float32 whatever the weights are.
        weight_decay: of all, decoupled.
        mask: which leaves decay.
        label: of the matrices, in the state.
    """

    def labels(params):
        names = [label if isinstance(x, MatrixView) else "adam" for x in settings.plan(params)]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    tx = optax.partition(
        {
            label: with_rate(matrices, learning_rate, weight_decay, mask),
            "adam": with_rate(adam, adam_rate, weight_decay, mask),
        },
        labels,
    )

    def init_fn(params):
        # No part sees the leaves that it should miss.
        warn_about(settings.plan(params))
        return tx.init(params)

    return transformation(init_fn, tx.update)
