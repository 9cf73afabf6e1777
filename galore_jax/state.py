"""The state of `galore`, and how an optimizer is asked what its galores would do."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from galore_jax.call import Call, update_with
from galore_jax.int8 import dequantize_weights, is_int8
from galore_jax.matrix.plan import Plan, sites
from galore_jax.matrix.trees import Sites, bare, shapes
from galore_jax.projector.basis import Methods
from galore_jax.settings import Settings


class GaLoreState(NamedTuple):
    """State of `galore`: a struct of trees of plain arrays.

    Attributes:
        count: int32 (): updates so far.
        projector: bases, batch + (m, r) or (n, r), `MaskedNode` where unprojected. Quantised: one
            tree of codes and one of scales. Indices, batch + (r,), of `method="coordinates"`.
            `EmptyState` where they are drawn anew at each step.
        refreshed: int32, batch: the step of the last refresh, -1 before the first.
        inner_state: of the inner optimizer, over low-rank arrays.
        residual_state: of `residual`, over the matrices outside the subspace.
        turns_between: with `refresh="lazy"`, int32, batch: turns from a refresh to the next.
    """

    count: jax.typing.ArrayLike
    projector: optax.Params
    refreshed: optax.Params
    inner_state: optax.OptState
    residual_state: optax.OptState = optax.EmptyState()
    turns_between: optax.Params = optax.EmptyState()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "gap", "lifted", "arrived"),
    meta_fields=("number", "answers"),
)
@dataclasses.dataclass(frozen=True)
class Asked:
    """A state that asks: its galore answers, by number, and computes nothing.

    The question goes with the state, since every wrapper hands that on, under a `jit` too. Where
    the answers go is part of a jit's cache key, by identity.
    """

    state: GaLoreState
    gap: jax.Array  # int32: on the way back T, which may be a schedule's
    number: int
    answers: Answers
    lifted: Any = None  # by path, what to return for projected leaves; None for what is given
    arrived: Any = None  # on the way back, what was given for them, by path


class Answers(dict[int, "Answer"]):
    """What the galores say, by number; equal to no other."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


class Answer(NamedTuple):
    """What a galore would do with its leaves, as known when it is traced."""

    plan: Plan
    params: optax.Params  # shapes and dtypes of the parameters that reach it
    inner: optax.GradientTransformation
    methods: Methods
    gap: jax.typing.ArrayLike | None  # T; None where it is traced
    stagger: bool
    needs: str | None  # what needs full gradients, if anything does
    called: bool  # whether the argument `galore` of the update reached it

    @property
    def where(self) -> Sites:
        """Its projected leaves."""
        return sites(self.plan, jax.tree.structure(self.params))


class Told(NamedTuple):
    """A galore in an optimizer: what it would do, its state, and T at this state."""

    answer: Answer
    state: GaLoreState
    gap: jax.typing.ArrayLike


def ask(tx: optax.GradientTransformation, params: Any, opt_state: Any) -> list[Told]:
    """What every `galore` in an optimizer would do, in the order of their states.

    Nothing is computed, unless T is (by `optax.inject_hyperparams`).

    Args:
        tx: the optimizer.
        params: the parameters, or their shapes.
        opt_state: its state.

    Returns:
        For each galore a `Told`.

    Raises:
        ValueError: where a state's galore is not reached by an update.
    """
    if any(map(is_int8, jax.tree.leaves(opt_state, is_leaf=is_int8))):
        raise ValueError(
            "the optimizer's state was made like weights in 8-bit codes, which this optimizer does "
            "not decode itself. Make it by jax.jit(lambda p: "
            "tx.init(galore_jax.dequantize_weights(p)))(params)"
        )
    answers = Answers()
    asking, states = _asking(opt_state, answers)
    if not states:
        return []

    def gaps(params, asking):
        params = dequantize_weights(params)
        nothing = jax.tree.map(jnp.zeros_like, params)
        # Links that follow the loss do not run without it.
        _, new = update_with(tx, Call(), nothing, asking, params, value=jnp.zeros([]))
        return {x.number: x.gap for x in _asked(new)}

    found = jax.eval_shape(gaps, params, asking)
    said = dict(answers)
    answers.clear()  # which a compiled update holds on to
    if missing := sorted(set(range(len(states))) - set(said)):
        raise ValueError(
            f"the optimizer has {len(states)} galore states and its update reaches {len(said)} of "
            f"them: number {missing[0]} is not updated by tx.update, or not by a galore. Was "
            "opt_state made by another tx? Start from tx.init(params)"
        )
    if any(x.gap is None for x in said.values()) and not _has_shapes((params, opt_state)):
        found = jax.jit(gaps)(params, asking)
        answers.clear()
    told = ((said[i], states[i], found[i]) for i in range(len(states)))
    return [Told(a, state, gap if a.gap is None else a.gap) for a, state, gap in told]


def _asking(opt_state: Any, answers: Answers, lifted: Any = None) -> tuple[Any, list[GaLoreState]]:
    """An optimizer's state whose galores are asked, and their states."""
    states: list[GaLoreState] = []

    def number(x):
        if not is_state(x):
            return x
        states.append(x)
        return Asked(x, jnp.zeros([], jnp.int32), len(states) - 1, answers, lifted)

    return jax.tree.map(number, bare(opt_state), is_leaf=is_state), states


def is_asking(opt_state: Any) -> bool:
    """Whether an optimizer's state holds one that asks, and nothing is to be computed."""
    return bool(_asked(opt_state))


def _asked(tree: Any) -> list[Asked]:
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_asked) if _is_asked(x)]


def around(
    tx: optax.GradientTransformation, updates: Any, opt_state: Any, params: Any, lifted: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """What an optimizer does around its galores.

    Args:
        tx: the optimizer.
        updates: what it is given.
        opt_state: its state.
        params: the parameters.
        lifted: by path, what its galores make of the leaves that they project.

    Returns:
        What it makes of that, the state without that of its galores, and by path what reached
        them.
    """
    asking, _ = _asking(opt_state, Answers(), lifted)
    out, new = update_with(tx, Call(), updates, asking, params, value=jnp.zeros([]))
    arrived = {path: x for asked in _asked(new) for path, x in asked.arrived.items()}
    rest = jax.tree.map(lambda x: None if _is_asked(x) else x, new, is_leaf=_is_asked)
    return out, rest, arrived


def answer(
    updates: Any,
    asked: Asked,
    settings: Settings,
    params: Any,
    inner: optax.GradientTransformation,
    call: Call | None,
    needs: str | None = None,
) -> tuple[Any, Asked]:
    """Note what a galore would do; it hands updates and the asking state back."""
    gap = settings.update_proj_gap
    asked.answers[asked.number] = Answer(
        plan=settings.plan(params),
        params=shapes(params),
        inner=inner,
        methods=settings.methods,
        gap=None if isinstance(gap, jax.core.Tracer) else gap,
        stagger=settings.stagger,
        needs=needs or settings.needs,
        called=call is not None,
    )
    asked = dataclasses.replace(asked, gap=jnp.asarray(gap, jnp.int32))
    if asked.lifted is None:
        return updates, asked
    where = asked.answers[asked.number].where
    arrived = dict(zip((x.path for x in where.views), where.pick(updates), strict=True))
    updates = where.put([asked.lifted.get(path, x) for path, x in arrived.items()], updates)
    return updates, dataclasses.replace(asked, arrived=arrived)


def _has_shapes(tree: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def is_state(x: Any) -> bool:
    """Whether a node of an optimizer's state is a galore's."""
    return isinstance(x, GaLoreState)


def holds_galore(opt_state: Any) -> bool:
    """Whether a galore's state, which may be asking, is part of an optimizer's."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: is_state(x) or _is_asked(x))
    return any(is_state(x) or _is_asked(x) for x in leaves)


def in_multi_steps(opt_state: Any) -> bool:
    """Whether an `optax.MultiSteps` is around a galore."""

    def accumulates(x):
        return isinstance(x, optax.MultiStepsState)

    nodes = jax.tree.leaves(bare(opt_state), is_leaf=accumulates)
    return any(accumulates(x) and holds_galore(x.inner_opt_state) for x in nodes)


def _is_asked(x: Any) -> bool:
    return isinstance(x, Asked)
