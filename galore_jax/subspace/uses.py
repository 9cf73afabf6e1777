"""How often a loss uses the kernels that it is given as nodes, and for what.

Of an equation that is not known the worst is assumed: a kernel that is used inside is used more
than once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal

from galore_jax.dependence import PARTS, Loop, inside, is_ref, kind_of, opened, shape_of

# What lays numbers out in another way, and computes nothing.
_MOVES = {"squeeze", "reshape", "transpose", "broadcast_in_dim", "concatenate", "rev", "copy"}
_MOVES |= {"stack", "unstack", "sharding_constraint", "mesh_cast", "reshard", "device_put"}
_MOVES |= {"pvary", "pcast"}


class Uses(NamedTuple):
    """How often kernels are used."""

    counts: list[int]  # 0, 1, or 2 for more than once
    unknown: list[str]  # primitives with a use inside that could not be looked into
    computed: list[bool]  # whether anything but taps computes with it


def uses(fun: Callable[..., Any], which: Sequence[int], *args: Any) -> Uses:
    """Count the taps of each kernel that `fun`'s first result depends on.

    Args:
        fun: a function of trees of arrays.
        which: positions among the leaves of `args`: the slots for low-rank gradients, which
            nothing but taps (functions with a custom VJP) reads.
        args: arguments to trace it with; shapes do.

    Returns:
        For each, how many taps read it, or what was made of it, in all turns of all loops; of a
        conditional's branches and of different parts of a stack the largest count, and 2 for a
        loop of unknown length, for a copy along a new axis, and for a low-rank product under a
        `vmap` over examples. And whether the result is computed with it beside that.
    """
    closed = jax.make_jaxpr(fun)(*args)
    unknown: list[str] = []
    reached = [_Reached(i == 0, 0, i == 0) for i in range(len(closed.out_avals))]
    found = _backward(opened(closed), reached, unknown)
    computed = [found[i].computed for i in which]
    return Uses([found[i].taps for i in which], list(dict.fromkeys(unknown)), computed)


class _Reached(NamedTuple):
    """What a value leads to."""

    live: bool  # the result depends on it
    taps: int  # how many taps read it or what was made of it; 2 for more than one
    computed: bool = False  # whether anything else than a tap reads it, or moves it around

    def __add__(self, other: Any) -> _Reached:
        taps = min(2, self.taps + other.taps)
        return _Reached(self.live or other.live, taps, self.computed or other.computed)

    def or_else(self, other: _Reached) -> _Reached:
        """Where one of two happens."""
        return (self + other)._replace(taps=max(self.taps, other.taps))


_NOTHING = _Reached(False, 0)


def _backward(jaxpr: Any, outputs: Sequence[_Reached], unknown: list[str]) -> list[_Reached]:
    """What the inputs of a jaxpr lead to, given what its outputs do."""
    whole: dict[Any, _Reached] = {}
    parts: dict[Any, dict[Any, _Reached]] = {}

    def at(var):
        return _largest(parts.get(var, {}).values()) + whole.get(var, _NOTHING)

    def add(var, found, part=None):
        if not isinstance(var, Literal):
            where, key = (whole, var) if part is None else (parts.setdefault(var, {}), part)
            where[key] = where.get(key, _NOTHING) + found

    for var, found in zip(jaxpr.outvars, outputs, strict=True):
        add(var, found)
    for eqn in reversed(jaxpr.eqns):
        # What is written into a mutable array leads to what is read from it.
        results = [at(v) for v in (*eqn.outvars, *filter(is_ref, eqn.invars))]
        if any(found.live for found in results):
            for var, found in zip(eqn.invars, _operands(eqn, results, unknown), strict=True):
                add(var, found, _part(eqn))
    return [at(v) for v in jaxpr.invars]


def _operands(eqn: JaxprEqn, results: list[_Reached], unknown: list[str]) -> list[_Reached]:
    """What each operand of an equation leads to, given what its results do."""
    inner = inside(eqn)
    match kind_of(eqn, inner):
        case "tap":
            # A tap that hands the weight on sees its cotangent summed over examples; one that
            # multiplies with it is under their vmap.
            multiplies = not inner or inner[0].eqns
            rank = len(shape_of(eqn.outvars[0])) if multiplies else 0
            return [_Reached(True, 2 if rank > len(shape_of(v)) else 1) for v in eqn.invars]
        case "identity":
            return results
        case "call":
            return _backward(inner[0], results, unknown)
        case "cond":
            branches = [_backward(branch, results, unknown) for branch in inner]
            return [_Reached(True, 0), *map(_largest, zip(*branches, strict=True))]
        case Loop(consts, carry, length):
            state = results  # of any turn: the loop's, or what the next turn makes of them
            while True:
                inputs = _backward(inner[0], state, unknown)
                turned = list(state)
                for i, k in enumerate(carry):
                    turned[i] = state[i].or_else(inputs[k])
                if turned == state or length == 1:
                    break
                state = turned
            return [
                found + found if k in consts and length != 1 else found
                for k, found in enumerate(inputs)
            ]
        case "part":
            return [_largest(results)] * len(eqn.invars)
        case kind:
            made = sum(results, _NOTHING)
            if any(map(_taps_within, inner)):
                if kind == "other":
                    unknown.append(eqn.primitive.name)
                return [_Reached(True, 2)] * len(eqn.invars)
            if eqn.primitive.name not in _MOVES and not any(map(is_ref, eqn.invars)):
                made = made._replace(computed=True)
            if len(eqn.invars) == 1 and math.prod(shape_of(eqn.outvars[0])) > math.prod(
                shape_of(eqn.invars[0])
            ):
                made += made  # copies, as by a broadcast
            return [made] * len(eqn.invars)


def _part(eqn: JaxprEqn) -> Any:
    """Which part of its operand an equation takes, alike for equal parts; None for all of it."""
    if eqn.primitive.name not in PARTS:
        return None
    indices = (v.val if isinstance(v, Literal) else id(v) for v in eqn.invars[1:])
    return (eqn.primitive.name, str(eqn.params), *map(str, indices))


def _taps_within(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name.startswith("custom_vjp") or any(map(_taps_within, inside(eqn)))
        for eqn in jaxpr.eqns
    )


def _largest(found: Any) -> _Reached:
    return functools.reduce(_Reached.or_else, found, _NOTHING)
