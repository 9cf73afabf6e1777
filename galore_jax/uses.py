"""How often a traced loss uses each of its tapped kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

# Parts of a stack: different ones are different kernels.
_PARTS = {"slice", "dynamic_slice", "gather", "split"}


def most_uses(jaxpr: Any, which: Sequence[int]) -> list[int]:
    """Count the taps that read some of a jaxpr's inputs, in all turns of all loops.

    Each adds its cotangent to the input's.

    Args:
        jaxpr: an open jaxpr without dead code.
        which: positions of inputs: the slots for low-rank gradients.

    Returns:
        For each, how many taps read it, or what was made of it; of a conditional's branches and
        of a stack's parts the largest count, and 2 for a loop of unknown length and for a
        low-rank product under a `vmap` over examples.
    """
    readers: dict[Any, list[tuple[Any, int]]] = {}
    for eqn in jaxpr.eqns:
        for k, var in enumerate(eqn.invars):
            if not isinstance(var, Literal):
                readers.setdefault(var, []).append((eqn, k))

    def uses(var) -> int:
        whole, part = 0, 0
        for eqn, k in readers.get(var, ()):
            count = _uses_by(eqn, k)
            if count is None:  # an operation on the tree of parameters, such as a cast
                count = sum(map(uses, eqn.outvars))
            if eqn.primitive.name in _PARTS:
                part = max(part, count)
            else:
                whole += count
        return whole + part

    return [uses(jaxpr.invars[i]) for i in which]


def _uses_by(eqn: Any, k: int) -> int | None:
    """How many taps an equation applies to its operand number k; None if it hands it on."""
    name, params = eqn.primitive.name, eqn.params
    if name.startswith("custom_vjp"):
        # A tap that hands the weight on sees its cotangent summed over examples; one that
        # multiplies with it is under their vmap.
        multiplies = bool(_open(params["call_jaxpr"]).eqns)
        return 2 if multiplies and eqn.outvars[0].aval.ndim > eqn.invars[k].aval.ndim else 1
    if name == "scan":
        (inner,) = most_uses(params["jaxpr"].jaxpr, [k])
        constant = k < params["num_consts"]
        return inner * (params["length"] if constant else 1)
    if name == "while":
        return 2
    if name == "cond":
        return max((most_uses(b.jaxpr, [k - 1])[0] for b in params["branches"]), default=0)
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if inner is not None:
        inner = _open(inner)
        if len(inner.invars) == len(eqn.invars):
            return most_uses(inner, [k])[0]
    return None


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)
