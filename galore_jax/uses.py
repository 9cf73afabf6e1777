"""How often a traced loss uses each of its tapped kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal


def most_uses(jaxpr: Any, which: Sequence[int]) -> list[int]:
    """Count the taps that read some of a jaxpr's inputs, in all turns of all loops.

    Each adds its cotangent to the input's.

    Args:
        jaxpr: an open jaxpr.
        which: positions of inputs: the slots for low-rank gradients.

    Returns:
        For each, how many taps read it; of a conditional's branches the largest count, and 2 for
        a loop of unknown length and for a tap under a `vmap` over examples.
    """
    counts = {jaxpr.invars[i]: 0 for i in which}
    for eqn in jaxpr.eqns:
        for k, var in enumerate(eqn.invars):
            if not isinstance(var, Literal) and var in counts:
                counts[var] += _uses_by(eqn, k)
    return [counts[jaxpr.invars[i]] for i in which]


def _uses_by(eqn: Any, k: int) -> int:
    """How often an equation reads its operand number k."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        (inner,) = most_uses(params["jaxpr"].jaxpr, [k])
        constant = k < params["num_consts"]
        return inner * (params["length"] if constant else 1)
    if name == "while":
        return 2
    if name == "cond":
        return max((most_uses(b.jaxpr, [k - 1])[0] for b in params["branches"]), default=0)
    if name.startswith("custom_vjp"):
        # A tap, whose output has as many axes as the input where both are under a vmap or none.
        return 2 if eqn.outvars[0].aval.ndim > eqn.invars[k].aval.ndim else 1
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if inner is not None:
        inner = getattr(inner, "jaxpr", inner)
        if len(inner.invars) == len(eqn.invars):
            return most_uses(inner, [k])[0]
    return 1
