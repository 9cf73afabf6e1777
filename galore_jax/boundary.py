"""What is handed to a transformation of ours, and back: arrays on any mesh, boxed or not.

On a mesh with Explicit axes a sharding is part of an array's type, and every product whose result
could lie in two ways has to say in which. What happens between a gradient and its update concerns
nobody's types: within, axes are Auto, and XLA shards it. Updates come back as the parameters are,
and state as it was. Boxes with names of axes are taken off, and put on the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from galore_jax.matrix.trees import bare
from galore_jax.meshes import as_auto, everywhere, explicit_mesh, sharding_of
from galore_jax.metadata import named
from galore_jax.precision import compiled_if_narrow
from galore_jax.projector.gradient import is_projected
from galore_jax.projector.update import FactoredUpdate
from galore_jax.sharding import factor_specs, state_sharding
from galore_jax.state import is_asking


def transformation(
    init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """A transformation of bare arrays, made fit for what users have.

    Args:
        init: from parameters to a state.
        update: as of an `optax.GradientTransformationExtraArgs`.
    """
    plain = optax.GradientTransformationExtraArgs(
        compiled_if_narrow(init), compiled_if_narrow(update)
    )

    def init_fn(params):
        given, params = params, bare(params)
        if (mesh := explicit_mesh(params)) is None:
            state = plain.init(params)
        else:
            where = state_sharding(plain, params, jax.tree.map(sharding_of, params))
            state = as_auto(mesh, plain.init, params, like=lambda _: where)
        return named(plain, state, given)

    def within(updates, state, params, extra_args):
        return plain.update(updates, state, params, **extra_args)

    def update_fn(updates, state, params=None, **extra_args):
        args: Any = *map(bare, (updates, state, params)), extra_args
        mesh = None if is_asking(args[1]) else explicit_mesh(args)
        weights = args[0] if params is None else args[2]

        def like(result):
            treedef = jax.tree.structure(weights)
            specs = map(_as_weight, jax.tree.leaves(weights), treedef.flatten_up_to(result[0]))
            return treedef.unflatten(specs), jax.tree.map(sharding_of, args[1])

        out, new = within(*args) if mesh is None else as_auto(mesh, within, *args, like=like)
        return _boxed_as(updates, args[0], out), _boxed_as(state, args[1], new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _boxed_as(given: Any, plain: Any, new: Any) -> Any:
    """A tree like `plain` in the boxes of the one that it was taken from."""
    # A gradient in the subspace becomes an update that is another node.
    bare_def, boxed_def = (jax.tree.structure(x, is_leaf=is_projected) for x in (plain, given))
    return new if boxed_def == bare_def else boxed_def.unflatten(bare_def.flatten_up_to(new))


def _as_weight(w: jax.Array, update: Any) -> Any:
    """How the update of a weight is to lie, a tree like it."""
    sharding = sharding_of(w)
    if not isinstance(update, FactoredUpdate):
        return sharding
    p, low_rank = factor_specs(update.view, sharding.spec)
    return dataclasses.replace(
        everywhere(sharding.mesh)(update),
        projector=NamedSharding(sharding.mesh, p),
        low_rank=NamedSharding(sharding.mesh, low_rank),
    )
