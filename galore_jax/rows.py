"""Whether a traced function keeps the rows of stacked arrays apart, and who does not."""

from __future__ import annotations

from typing import Any

from galore_jax.dependence import inside, kind_of, opened, shape_of
from galore_jax.multiples import made_by

_ELEMENTWISE = set(
    "abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 "  # noqa: SIM905
    "expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or "
    "pow rem round rsqrt select_n sign sin sqrt square stop_gradient sub tanh xor".split()
)


def apart(closed: Any, rows: int) -> bool:
    """Whether it surely does: arrays with a leading axis of this length are such stacks.

    Args:
        closed: the function's jaxpr.
        rows: the length, which no other axis has.
    """
    return all(_keeps(eqn, rows) for eqn in opened(closed).eqns)


def _keeps(eqn: Any, rows: int) -> bool:
    shapes = [shape_of(v) for v in (*eqn.invars, *eqn.outvars)]
    if not any(rows in shape for shape in shapes):
        return True
    if any(rows in shape[1:] for shape in shapes):
        return False
    within, name = inside(eqn), eqn.primitive.name
    if kind_of(eqn, within) in ("identity", "call", "cond"):
        return all(_keeps(e, rows) for jaxpr in within for e in jaxpr.eqns)
    stacked = [shape[:1] == (rows,) for shape in shapes]
    if name in _ELEMENTWISE:
        *operands, result = shapes
        return all(
            not x
            or (len(x) == len(result) and all(a in (1, b) for a, b in zip(x, result, strict=True)))
            for x in operands
        )
    if name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "pad"):
        return stacked[-1] and (stacked[0] or name == "broadcast_in_dim")
    if name == "transpose":
        return eqn.params["permutation"][0] == 0
    if name.startswith("reduce_"):
        return 0 not in eqn.params.get("axes", (0,))
    if name == "dot_general":
        (batch, _) = eqn.params["dimension_numbers"][1]
        return all(stacked) and 0 in batch
    return name == "iota"


def mixing(closed: Any, rows: int) -> str | None:
    """Who reduces over the leading axis of stacks of so many rows, or draws numbers for them."""

    def names(jaxpr, outer):
        for eqn in jaxpr.eqns:
            who = made_by(eqn) or outer
            reduces = eqn.primitive.name.startswith("reduce_") and 0 in eqn.params.get("axes", ())
            draws = eqn.primitive.name == "random_bits"
            arrays = eqn.outvars if draws else eqn.invars
            if (reduces or draws) and any(shape_of(v)[:1] == (rows,) for v in arrays):
                yield who
            for within in inside(eqn):
                yield from names(within, who)

    return next((name for name in names(opened(closed), None) if name), None)
