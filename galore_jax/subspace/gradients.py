"""Gradients that arrive in the subspace: `value_and_grad`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import checks
from galore_jax.call import Call
from galore_jax.control import each_its_own, mean_over, names_of
from galore_jax.int8 import is_int8
from galore_jax.matrix.trees import bare, path_string
from galore_jax.projector.gradient import ProjectedGradient, pack
from galore_jax.projector.schedule import layer_numbers, made_at, per_view, schedule
from galore_jax.projector.storage import Stored, from_tree
from galore_jax.state import Told, ask, in_multi_steps
from galore_jax.subspace.kernel import Kernel, Rule, Slots, Tapped, Turn
from galore_jax.subspace.links import check_links
from galore_jax.subspace.microbatches import accumulate, cut, is_key
from galore_jax.subspace.uses import uses
from galore_jax.warn import warn


def value_and_grad(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    microbatches: int = 1,
    refresh: bool = True,
    axis_name: str | Sequence[str] | None = None,
    norm: str = "exact",
) -> Callable[..., tuple[Any, Any]]:
    r"""Like `jax.value_and_grad`, with the gradients already projected by `tx`.

    `galore` needs no more of a gradient G than :math:`R = P^T G`. Here the backward pass
    projects each layer's gradient as soon as it has it, so the full gradient of a stack of
    layers never exists, and on a step that refreshes computes the new projector there too.
    With `galore_jax.dot_general` in the layers the gradient of a single layer is not formed
    either. `tx.update` takes the result as it is, and the rest of a training loop stays::

        loss, grads = galore_jax.value_and_grad(loss_fn, tx)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

    The weights change as they would with `jax.value_and_grad`, to rounding. `optax.tree.norm`
    of the gradients is the norm of the full gradient, so clipping by the global norm in front
    of `galore` is exact. `updates` hold `P N` not multiplied out for projected leaves, which
    `optax.apply_updates` (or `galore_jax.apply_updates`) adds layer by layer, in place where
    `params` is donated.

    A projected kernel reaches the model as an object that acts as an array
    (`__jax_array__`): `jnp` functions, `@`, Linen and NNX layers and scans over stacked layers
    take it. A loss that does not (it maps over its parameters and another tree, casts or stacks
    them, or hands them to `jax.lax`) gets arrays, and the full gradient of each exists until it
    is projected; for stacks that is a warning. Its limits:

    - A kernel that is used twice (tied weights, a recurrence, `dot_general` under a `vmap` over
      examples) would get two projectors at a refresh, and is refused. Under a `vmap` over stacked
      kernels a refresh's conditional becomes a select that pays for it at every step: use batched
      products.
    - Kernels whose stacked axes are not the leading ones get full gradients, as under
      `jax.value_and_grad`, and are refreshed by `tx.update`.
    - Links in front of `galore`, and behind, may scale, by a number that follows from the norm of
      the whole tree too (`clip_by_global_norm`). One that does more, element by element or with
      parameters, would treat factors, and is refused by name; so are `optax.MultiSteps` and
      `optax.apply_if_finite` around it, which have to be inside. Labels and masks around it are
      trees, not callables.
    - Gradients that are averaged by hand are projected alike only between refreshes; on one,
      where bases differ, the update is NaN. Under `shard_map` there is `axis_name`.

    Args:
        loss_fn: `loss_fn(params, *args, **kwargs) -> loss`, or (loss, aux) with `has_aux`. Weights
            of `params` may be in codes, see `galore_jax.quantize_weights`.
        tx: the optimizer, with a `galore` somewhere in it.
        has_aux: whether `loss_fn` returns something beside the loss.
        microbatches: k, into how many parts to cut the arrays in `args` along their first
            axis (each k-th row, so that a sharded batch stays sharded); arguments by keyword go
            whole to each part, but random keys (of `jax.random.key`), by position or by keyword,
            are folded with its number. Loss and gradients are
            means over the parts, taken in the subspace in float32. On a refresh the first part
            alone decides the projectors. `aux` comes stacked. What lies outside the subspace is
            not summed, so `optax.tree.norm` is an upper bound of the mean gradient's norm: where
            noise prevails up to the square root of k too large, and clipping as much stronger.
        refresh: whether matrices that are due may refresh. False compiles a plain step, smaller
            and in less memory, for the steps between 0, T, 2T, ...; a turn that comes in one
            (with `stagger` at any step) is made up for at the next step that may refresh.
        axis_name: under a `shard_map` the mapped axis, or axes, over which devices share a batch:
            loss and gradients are averaged over it, those of projected kernels in the subspace.
            `aux` is each device's own. () where each device trains a model of its own.
        norm: `exact`, the norm of the full gradient, or `subspace`, of what is left of it. On one
            device the exact one costs nothing where nobody asks for it, and little where
            `clip_by_global_norm` does. Over several it takes the sum of the full gradients, as
            much to send as data parallelism without projection; `subspace` takes none of that,
            and clips later: what it measures is below the norm of the gradient.

    Returns:
        `f(params, opt_state, *args, **kwargs) -> (loss, grads)`, ((loss, aux), grads) with
        `has_aux`.

    Raises:
        ValueError: when called, where `tx` holds no `galore`, one inside an
            `optax.MultiSteps`, or a link around it that does more than scale; for a kernel that
            is used twice where a refresh may happen; for rows that `microbatches` does not divide.

    Example:
        >>> import jax, jax.numpy as jnp, optax, galore_jax
        >>> params = {"kernel": jnp.eye(8, 16), "bias": jnp.zeros(16)}
        >>> x = jax.random.normal(jax.random.key(0), (32, 8))
        >>> loss_fn = lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"] - 1) ** 2)
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), galore_jax.galore_adamw(0.1, rank=2))
        >>> opt_state = tx.init(params)
        >>> for _ in range(3):
        ...     loss, grads = galore_jax.value_and_grad(loss_fn, tx)(params, opt_state, x)
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"{loss:.2f}")
        1.42
        1.20
        1.01
        >>> grads["kernel"].low_rank.shape
        (2, 16)

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, sections 4.2 and 4.4
    """
    if not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"microbatches must be an int >= 1, got {microbatches!r}")
    if norm not in ("exact", "subspace"):
        raise ValueError(f"norm must be 'exact' or 'subspace', got {norm!r}")

    @functools.wraps(loss_fn)
    def value_and_projected_grad(params, opt_state, *args, **kwargs):
        names = names_of(axis_name, "galore_jax.value_and_grad", needed=refresh)
        leaves, treedef = jax.tree.flatten(each_its_own(params, names), is_leaf=is_int8)
        taps = _taps(tx, params, opt_state, refresh, names, norm == "exact")
        # What is not projected has a full gradient, which codes have none of.
        leaves = [x.decoded() if is_int8(x) and i not in taps else x for i, x in enumerate(leaves)]
        gradients = {tap.rule.view.path: _gradient_shape(tap) for tap in taps.values()}
        check_links(tx, bare(params), opt_state, gradients)
        named, kwargs_def = jax.tree.flatten(kwargs)
        keys = {i: x for i, x in enumerate(named) if is_key(x)}

        def tapped_loss(hand_over, differentiable, projectors, turns, given):
            flat = list(differentiable)
            for i, tap in taps.items():
                kernel = Kernel(leaves[i], projectors[i], differentiable[i], turns[i])
                flat[i] = hand_over(Tapped(kernel, tap.rule))  # type: ignore[assignment]
            args, keys = given
            by_name = kwargs
            if microbatches > 1:
                by_name = kwargs_def.unflatten([keys.get(i, x) for i, x in enumerate(named)])
            try:
                return loss_fn(treedef.unflatten(flat), *args, **by_name)
            except Exception as error:  # whatever a model raises for nodes that it does not expect
                raise _LossError(error) from error

        def part(projectors, turns, given):
            at = [_slots(taps[i]) if i in taps else x for i, x in enumerate(leaves)]

            def run(hand_over):
                loss = functools.partial(tapped_loss, hand_over)
                _check_uses(taps, loss, refresh, at, projectors, turns, given)
                return jax.value_and_grad(loss, has_aux=has_aux)(at, projectors, turns, given)

            value, grads = _as_nodes_or_arrays(run, taps)
            value = (mean_over(value[0], names), value[1]) if has_aux else mean_over(value, names)
            return value, [
                _projected(g, taps[i]) if i in taps else mean_over(g, names)
                for i, g in enumerate(grads)
            ]

        if microbatches > 1:
            value, grads = accumulate(part, taps, cut((args, keys), microbatches), has_aux)
        else:
            projectors = {i: tap.projector for i, tap in taps.items()}
            turns = {i: tap.turn for i, tap in taps.items()}
            value, grads = part(projectors, turns, (args, keys))
        return value, treedef.unflatten(grads)

    return value_and_projected_grad


class _LossError(Exception):
    """What a loss raised, to be told from errors about it; its argument is the error."""


def _as_nodes_or_arrays(run: Callable[..., Any], taps: dict[int, _Tap]) -> Any:
    """What `run` makes of a loss given kernels as nodes, or as arrays where it takes no nodes.

    A node with leaves of its own is what scans slice, with the tap inside. But it does not fit
    beside another tree (`eqx.combine(params, static)`), nor in a stack of kernels or a call of
    `jax.lax`. An array does; it is tapped as a whole, once, however its parts are used.
    """
    first: Exception | None = None
    for hand_over in (lambda tapped: tapped, jnp.asarray):
        try:
            result = run(hand_over)
        except _LossError as error:
            first = first or error.args[0]
            continue
        if first is not None:
            _warn_of_whole_stacks(taps, first)
        return result
    assert first is not None
    raise first


def _warn_of_whole_stacks(taps: dict[int, _Tap], error: Exception) -> None:
    """Warn where kernels given as arrays take more memory: those of a stack."""
    stacks = [tap.rule.view.path for tap in taps.values() if tap.rule.view.batch]
    if stacks:
        warn(
            "galore_jax.value_and_grad: the loss takes no kernels that are nodes of its tree "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}), so they reach "
            f"it as arrays, and the gradient of the whole stack '{stacks[0]}' exists before it is "
            "projected. To have it projected layer by layer, map over the other tree first, as "
            "in eqx.combine(static, params), and cast kernels where they are used"
        )


class _Tap(NamedTuple):
    """A leaf to tap."""

    rule: Rule
    projector: Stored
    turn: Turn | None


def _taps(
    tx, params, opt_state, refresh: bool, axis_name: tuple[str, ...], exact_norm: bool
) -> dict[int, _Tap]:
    """What `tx` would do at this step with each leaf that it projects, by position."""
    positions = {
        path_string(path): i
        for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(bare(params)))
    }
    taps = {}
    for answer, state, gap in galores(tx, params, opt_state):
        where, count = answer.where, jnp.asarray(state.count)
        lazy = not isinstance(state.turns_between, optax.EmptyState)
        turns = where.pick(state.turns_between) if lazy else None
        last = where.pick(state.refreshed)
        when = schedule(where.views, count, last, turns, gap, answer.stagger, Call())
        rows = zip(
            where.views,
            from_tree(where, state.projector),
            per_view(where.views, when.due),
            per_view(where.views, layer_numbers(where.views)),
            [made_at(count, x) for x in last],
            strict=True,
        )
        for view, p, due, layer, step in rows:
            if view.batch_leads:
                turn = Turn(due, layer, step) if refresh else None
                rule = Rule(view, answer.methods, axis_name, exact_norm)
                taps[positions[view.path]] = _Tap(rule, p, turn)
    return taps


def galores(tx, params, opt_state) -> list[Told]:
    """What every `galore` in an optimizer would do; raise where projections cannot serve it."""
    told = ask(tx, params, opt_state)
    if not told:
        raise ValueError(
            "tx holds no galore, so there is no subspace for the gradients to arrive in. Use "
            "jax.value_and_grad with it, or an optimizer such as galore_jax.galore_adamw"
        )
    for answer, *_ in told:
        if answer.needs is not None and answer.where.views:
            raise ValueError(checks.needs_full(answer.needs, answer.where.views[0].path))
    if in_multi_steps(opt_state):
        raise ValueError(
            "an optax.MultiSteps around galore averages full gradients. Put it inside, "
            "galore(optax.MultiSteps(inner, k).gradient_transformation(), rank=...), or pass "
            "microbatches=k"
        )
    return told


def _slots(tap: _Tap) -> Slots:
    """Zeros, for the cotangents to come back to."""
    view = tap.rule.view

    def like():
        basis = None
        if tap.turn is not None:
            basis = pack(view, tap.projector, jnp.zeros(view.batch, bool))
        return Slots(
            jnp.zeros(view.low_rank_shape, view.dtype), jnp.zeros(view.batch, view.dtype), basis
        )

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(like))


def _gradient_shape(tap: _Tap) -> tuple[ProjectedGradient, Stored]:
    """Shapes of the gradient that a tap hands back, and of its projector."""
    like = jax.eval_shape(lambda: _projected(_slots(tap), tap))
    return like, jax.eval_shape(lambda: tap.projector)


def _projected(slots: Slots, tap: _Tap) -> ProjectedGradient:
    # |G - P P^T G|^2 = |G|^2 - |R|^2, which rounding may put below zero.
    inside = jnp.sum(jnp.square(slots.low_rank), axis=(-2, -1))
    rest = jnp.sqrt(jnp.maximum(slots.square - inside, 0))
    return ProjectedGradient(slots.low_rank, rest, slots.basis, tap.rule.view)


def _check_uses(taps: dict[int, _Tap], loss: Any, refresh: bool, at: list[Any], *args: Any) -> None:
    """Raise where a loss computes with a kernel's node, or would refresh a projector twice."""
    first = np.cumsum([0, *(len(jax.tree.leaves(x)) for x in at)])
    found = uses(loss, [int(first[i]) for i in taps], at, *args)
    if any(found.computed):
        raise _LossError(TypeError("it computes with all leaves of its tree of parameters"))
    unknown = "".join(f"; what '{x}' does with it is not known" for x in found.unknown)
    for tap, count in zip(taps.values(), found.counts, strict=True):
        if refresh and count > 1:  # two gradients, each on a basis of its own
            raise ValueError(
                f"galore_jax.value_and_grad: the loss uses the kernel '{tap.rule.view.path}' more "
                f"than once (tied weights, a recurrence, or a vmap over examples{unknown}), and "
                "each use would refresh its projector. Keep it out with galore's exclude=, "
                "replace the vmap by batched operations, move what only looks at weights out of "
                "the loss, or take full gradients with jax.value_and_grad on the steps that "
                "refresh and pass refresh=False on the others"
            )
