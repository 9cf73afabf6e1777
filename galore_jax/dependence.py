"""Which output of a traced function depends on which input.

This module opens jaxprs, for `multiples`, `rows` and `subspace.uses` too. What a loop or a call
does with its operands it tells from the shapes outside and inside, since the parameters of JAX's
primitives change from one version to the next. Of an equation that it does not know it assumes
the worst: each result depends on every operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

# Calls, which hand their operands to the inputs of one jaxpr, in order and once. (A custom JVP is
# one too; a custom VJP is not, since its cotangents need not follow from its value.)
_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "remat2", "checkpoint"}
_CALLS |= {"shard_map", "xla_pmap"}

_IDENTITIES = {"optimization_barrier"}  # each result is the operand at its place

# Parts of a stack: different ones are different kernels.
PARTS = {"slice", "dynamic_slice", "gather", "split"}


class Trace(NamedTuple):
    """A function, traced once."""

    call: Callable[..., Any]  # evaluates it, at arguments of the shapes that it was traced with
    depends: Any  # like its result: per array the positions of the flattened inputs it depends on
    closed: Any  # its jaxpr


def trace(fun: Callable[..., Any], *args: Any) -> Trace:
    """Trace a function and see what each of its results depends on.

    Args:
        fun: a function of trees of arrays.
        args: arguments to trace it with; shapes do.

    Returns:
        The traced function, and a tree like its result that has in each array's place the
        frozenset of the inputs, by position among the leaves of `args`, that its value may
        depend on, by way of branches taken and lengths of loops too.

    Example:
        >>> import jax.numpy as jnp
        >>> trace(lambda x, y: {"a": x * y, "b": jnp.sum(y)}, 1.0, jnp.ones(2)).depends
        {'a': frozenset({0, 1}), 'b': frozenset({1})}
    """
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    treedef = jax.tree.structure(shapes)

    def call(*args):
        return treedef.unflatten(jaxpr_as_fun(closed)(*jax.tree.leaves(args)))

    return Trace(call, treedef.unflatten(_dependence(opened(closed), {})), closed)


def used(results: Any) -> frozenset[int]:
    """The inputs that any result in a part of `Trace.depends` depends on."""
    return _union(jax.tree.leaves(results))


_Inputs = frozenset[int]
_Known = dict[int, tuple[Any, list[_Inputs]]]  # by the id of a jaxpr, which it keeps alive


def _dependence(jaxpr: Any, known: _Known) -> list[_Inputs]:
    """Of each output of a jaxpr, the inputs that it depends on; `known` remembers inner ones."""
    if id(jaxpr) not in known:
        sources: dict[Any, _Inputs] = {v: frozenset([i]) for i, v in enumerate(jaxpr.invars)}

        def of(var):
            return frozenset() if isinstance(var, Literal) else sources.get(var, frozenset())

        for eqn in jaxpr.eqns:
            operands = [of(v) for v in eqn.invars]
            results = _results(eqn, operands, known)
            sources.update(zip(eqn.outvars, results, strict=True))
            # What is written into a mutable array is read through the same variable.
            refs = [v for v in eqn.invars if is_ref(v)]
            sources.update(dict.fromkeys(refs, frozenset().union(*operands)))
        known[id(jaxpr)] = jaxpr, [of(v) for v in jaxpr.outvars]
    return known[id(jaxpr)][1]


def _results(eqn: JaxprEqn, operands: list[_Inputs], known: _Known) -> list[_Inputs]:
    """What each result of an equation depends on, given what its operands do."""
    inner = inside(eqn)

    def through(jaxpr, inputs):
        return [_union(inputs[i] for i in found) for found in _dependence(jaxpr, known)]

    match kind_of(eqn, inner):
        case "identity":
            return operands
        case "call":
            return through(inner[0], operands)
        case "cond":
            branches = [through(branch, operands[1:]) for branch in inner]
            return [operands[0].union(*results) for results in zip(*branches, strict=True)]
        case Loop(carry=carry):
            inputs = list(operands)
            while True:
                results = through(inner[0], inputs)
                turned = list(inputs)
                for k, carried in zip(carry, results, strict=False):
                    turned[k] |= carried
                if turned == inputs:
                    return [inputs[k] for k in carry] + results[len(carry) :]
                inputs = turned
        case "while":
            condition, body = inner
            state = operands[-len(eqn.outvars) :]
            consts = len(condition.invars) - len(state)
            while True:
                (goes_on,) = through(condition, [*operands[:consts], *state])
                results = through(body, [*operands[consts : -len(state)], *state])
                turned = [s | r | goes_on for s, r in zip(state, results, strict=True)]
                if turned == state:
                    return state
                state = turned
    return [_union(operands)] * len(eqn.outvars)


class Loop(NamedTuple):
    """What the operands of a scan are, by position."""

    consts: list[int]
    carry: list[int]  # of results 0, 1, ...
    length: int | None  # where a stacked operand or result tells


def kind_of(eqn: JaxprEqn, inner: list[Any]) -> str | Loop:
    """What an equation does; "other" for all that is not known, or is not as expected."""
    name, inputs = eqn.primitive.name, len(eqn.invars)
    if name.startswith("custom_vjp"):
        return "tap"
    if any(map(is_ref, eqn.invars)):
        return "other"
    if name in PARTS:
        return "part"
    if name in _IDENTITIES and inputs == len(eqn.outvars):
        return "identity"
    sizes = [(len(jaxpr.invars), len(jaxpr.outvars)) for jaxpr in inner]
    if name in _CALLS and sizes == [(inputs, len(eqn.outvars))]:
        return "call"
    if name == "cond" and sizes and set(sizes) == {(inputs - 1, len(eqn.outvars))}:
        return "cond"
    if name == "scan" and sizes == [(inputs, len(eqn.outvars))]:
        return _scan(eqn, inner[0]) or "other"
    if name == "while" and len(sizes) == 2 and eqn.outvars:
        (conditions, one), (body, carry) = sizes
        if one == 1 and carry == len(eqn.outvars) and conditions + body - carry == inputs:
            return "while"
    return "other"


def _scan(eqn: JaxprEqn, body: Any) -> Loop | None:
    """Tell a scan's operands apart; None where they are not as expected.

    What is stacked has a leading axis more outside than inside. The carry comes first among the
    results and behind the constants among the operands.
    """
    pairs = [
        [(shape_of(v), shape_of(w)) for v, w in zip(outside, inside, strict=True)]
        for outside, inside in zip(
            (eqn.invars, eqn.outvars), (body.invars, body.outvars), strict=True
        )
    ]
    lengths = {out[0] for pair in pairs for out, within in pair if len(out) == len(within) + 1}
    whole, carried = ([k for k, (out, within) in enumerate(p) if out == within] for p in pairs)
    consts, carry = whole[: len(whole) - len(carried)], whole[len(whole) - len(carried) :]
    fits = (
        all(out in (within, (*lengths, *within)) for pair in pairs for out, within in pair)
        and carried == list(range(len(carry)))
        and [pairs[0][k][0] for k in carry] == [out for out, _ in pairs[1][: len(carry)]]
    )
    return Loop(consts, carry, *(lengths or {None})) if fits else None


def inside(eqn: JaxprEqn) -> list[Any]:
    """The jaxprs that an equation holds."""

    def jaxprs(value) -> Iterator[Any]:
        if isinstance(opened(value), Jaxpr):
            yield opened(value)
        elif isinstance(value, list | tuple):
            for x in value:
                yield from jaxprs(x)

    return list(jaxprs(list(eqn.params.values())))


def opened(jaxpr: Any) -> Any:
    """A jaxpr without its constants, which depend on no input; closed ones had a type of theirs."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_ref(var: Any) -> bool:
    """Whether a variable is a mutable array."""
    return hasattr(var.aval, "inner_aval")


def shape_of(var: Any) -> tuple[int, ...]:
    """Shape of a variable."""
    return getattr(var.aval, "shape", ())


def _union(sets: Any) -> _Inputs:
    return frozenset().union(*sets)
