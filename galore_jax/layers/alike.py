"""Whether an optimizer treats the layers of a stacked leaf as if each were alone.

Tier 3 gives it one layer at a time. Links that measure a leaf, or draw numbers for it, then do
something else than with the stack. Where the update of a small twin of the parameters does not
show that it keeps layers apart, the twin is updated both ways.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax.call import Call, update_with
from galore_jax.matrix.trees import owners
from galore_jax.rows import apart, mixing
from galore_jax.warn import warn

# Of a twin at most; all its other sizes are larger.
_LAYERS, _STEPS = 7, 2
# Relative to the largest change of a layer; rounding is far below.
_TOLERANCE = 1e-3


def check_layers_alike(
    tx: optax.GradientTransformation, params: Any, stacked: list[int], paths: list[str]
) -> None:
    """Raise where the update of a layer depends on the others of its stack; warn for vectors.

    And where the optimizer takes no model as small as the twin.

    Args:
        tx: the optimizer.
        params: the parameters, a tree of arrays.
        stacked: positions of its stacked leaves.
        paths: of all leaves.
    """
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    try:
        name, mixed = _unlike(tx, treedef, shapes, tuple(stacked))
    except _UnfitError as unfit:
        warn(
            "value_and_update: could not try whether the optimizer treats layers separately, since "
            f"it takes no model of small sizes ({unfit}). Compare its first steps with those of "
            "galore_jax.value_and_grad"
        )
        return
    if not mixed:
        return
    # Vectors last: whether a matrix is a stack of vectors nobody can know but the model, so of
    # those the layers alone are what was meant.
    leaf = max(mixed, key=lambda i: len(shapes[i][0]))
    message = (
        f"value_and_update: {name or 'the optimizer'} looks at all layers of leaf '{paths[leaf]}' "
        "at once (its norm or root mean square, or random numbers for it)"
    )
    if len(shapes[leaf][0]) == 2:
        warn(f"{message}. Here it sees each layer's vector as a leaf of its own")
        return
    raise ValueError(
        f"{message}, so one layer at a time is not the same. Use a link that treats matrices or "
        "elements separately, clip_norm= for clipping, or galore_jax.value_and_grad"
    )


class _UnfitError(Exception):
    """What an optimizer raises for a twin."""


def _fit(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except Exception as error:  # whatever an optimizer may raise
        raise _UnfitError(error) from error


@functools.lru_cache(maxsize=16)
def _unlike(tx, treedef, shapes, stacked: tuple[int, ...]) -> tuple[str | None, frozenset[int]]:
    """Who mixes layers, and of which leaves."""
    # No more than there are: whether a stack of vectors is a matrix may follow from their number.
    layers = min([_LAYERS, *(shapes[i][0][0] for i in stacked)])
    if layers < 2:
        return None, frozenset()
    sizes = sorted({n for i, (shape, _) in enumerate(shapes) for n in shape[i in stacked :]})
    small = {n: 8 + 3 * k for k, n in enumerate(sizes)}
    rng = np.random.default_rng(0)

    def twin(i):
        shape, dtype = shapes[i]
        stack = (layers,) * (i in stacked)
        x = rng.standard_normal((*stack, *(small[n] for n in shape[len(stack) :])))
        # Layers of different sizes, so that what clips does so in some.
        by_layer = 10.0 ** np.linspace(-3, 2, layers) if stack else 1.0
        return jnp.asarray(x * np.reshape(by_layer, (-1, *[1] * (x.ndim - 1))), dtype)

    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = [twin(i) + 1 for i in range(len(shapes))]
        grads = [[twin(i) for i in stacked] for _ in range(_STEPS)]
        return _compare(tx, treedef, weights, grads, stacked, layers)


def _compare(tx, treedef, weights, grads, stacked, layers):
    params = treedef.unflatten(weights)
    state, state_def = jax.tree.flatten(_fit(jax.eval_shape, tx.init, params))
    owner = owners(tx.init, state_def.unflatten(state), params)

    def update(grads, weights, state, layer):
        """One update of the stacked leaves alone, of any number of layers."""
        absent = optax.MaskedNode()

        def tree(values):
            given = dict(zip(stacked, values, strict=True))
            return treedef.unflatten([given.get(i, absent) for i in range(treedef.num_leaves)])

        kept = [
            x if i is None or i in stacked else absent for x, i in zip(state, owner, strict=True)
        ]
        call = Call(refresh=False, layer=layer)
        given = tree(grads), state_def.unflatten(kept), tree(weights)
        updates, new = _fit(update_with, tx, call, *given, value=jnp.zeros([]))
        picked = treedef.flatten_up_to(updates)
        new = state_def.flatten_up_to(new)
        kept = [
            a if isinstance(n, optax.MaskedNode) else n for n, a in zip(new, state, strict=True)
        ]
        return [picked[i] for i in stacked], kept

    def one(values, k, rows):
        return [x[k : k + 1] if row else x for x, row in zip(values, rows, strict=True)]

    w, mixed = [weights[i] for i in stacked], set()
    traced = jax.make_jaxpr(update)(grads[0], w, state, jnp.int32(0))
    if apart(traced, layers):
        return None, frozenset()
    step, flat = jax.jit(update), jax.tree.leaves(tx.init(params))
    rows = [i in stacked for i in owner]
    whole, alone = flat, [one(flat, k, rows) for k in range(layers)]
    for g in grads:
        wanted, whole = step(g, w, whole, jnp.int32(0))
        found = []
        for k in range(layers):
            slices = one(g, k, [True] * len(g)), one(w, k, [True] * len(g))
            out, alone[k] = step(*slices, alone[k], jnp.int32(k))
            found.append(out)
        for i, a, b in zip(stacked, wanted, zip(*found, strict=True), strict=True):
            axes = tuple(range(1, a.ndim))
            error = np.max(np.abs(a - np.concatenate(b)), axis=axes)
            if np.any(error > _TOLERANCE * np.max(np.abs(a), axis=axes) + 1e-30):
                mixed.add(i)
    return mixing(traced, layers) if mixed else None, frozenset(mixed)
