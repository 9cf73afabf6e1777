"""Which results of a traced function are multiples of its inputs, and by which factors.

A gradient in the subspace is several arrays, and so is an update that is not multiplied out. A link
of a chain may scale them, all by one number, which may follow from the norm of all. Whether it does
no more is read off its jaxpr: values get numbers, equal ones for equal values, and what is not
known here is no multiple.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from galore_jax.dependence import inside, kind_of, opened, shape_of


class Group(NamedTuple):
    """Arrays that stand for one thing, by position among the inputs."""

    arrays: tuple[int, ...]
    heavy: frozenset[int]  # whose squares add up to the square of its norm


class Multiple(NamedTuple):
    """What a value is."""

    number: int  # of equal values
    of: int | None = None  # the input that it is a multiple of, element by element
    factor: int = 0  # number of the factor
    uniform: bool = False  # whether all its elements are equal
    power: int = 1  # 2 for the square of a multiple
    # A sum of squares: by input, the factor of the multiple that was squared.
    squares: tuple[tuple[int, int], ...] = ()
    taint: frozenset[int] = frozenset()  # groups on which it, or the factor, depends otherwise
    blame: str | None = None  # who made it depend so


class Found(NamedTuple):
    """Results of `multiples`, by position among the function's."""

    results: list[Multiple]

    def scaled(self, results: Sequence[int], group: Group) -> str | None:
        """None if these results are one multiple of a group's arrays; else who is to blame."""
        found = [self.results[i] for i in results]
        nothing = all(x.uniform and x.number == _ZERO for x in found)
        same = [x.of for x in found] == list(group.arrays) and len({x.factor for x in found}) == 1
        linear = all(x.power == 1 and not x.taint for x in found)
        if nothing or (same and linear):
            return None
        return next((x.blame for x in found if x.blame), "a link")

    def spoilt(self, results: Sequence[int]) -> str | None:
        """Who made any of these results depend on a group otherwise than by its norm."""
        for x in (self.results[i] for i in results):
            if x.taint or x.of is not None:
                return x.blame or "a link"
        return None


_ZERO, _ONE = 0, 1


def multiples(closed: Any, groups: Sequence[Group]) -> Found:
    """See which results of a traced function are multiples of its inputs.

    Args:
        closed: its jaxpr.
        groups: inputs of which only multiples and the norm are right.
    """
    reader = _Reader(groups)
    inputs = [
        Multiple(reader.number("input", i), i if i in reader.group_of else None, _ONE)
        for i in range(len(closed.in_avals))
    ]
    inputs = [
        x._replace(uniform=x.of is None and not aval.shape)
        for x, aval in zip(inputs, closed.in_avals, strict=True)
    ]
    return Found(reader.read(opened(closed), inputs))


class _Reader:
    """Reads jaxprs with one numbering of values."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups
        self.group_of = {i: k for k, group in enumerate(groups) for i in group.arrays}
        self.numbers: dict[Any, int] = {}
        self.number("zero")
        self.number("one")

    def number(self, *what: Any) -> int:
        return self.numbers.setdefault(what, len(self.numbers))

    def read(self, jaxpr: Any, inputs: Sequence[Multiple]) -> list[Multiple]:
        """What the outputs of a jaxpr are, given its inputs."""
        known: dict[Any, Multiple] = dict(zip(jaxpr.invars, inputs, strict=True))

        def of(var):
            if isinstance(var, Literal):
                return self.constant(var.val)
            if var not in known:  # one of the jaxpr's constants
                known[var] = Multiple(self.number("constant", id(var)), uniform=not shape_of(var))
            return known[var]

        for eqn in jaxpr.eqns:
            results = self.results(eqn, [of(v) for v in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [of(v) for v in jaxpr.outvars]

    def constant(self, value: Any) -> Multiple:
        array = np.asarray(value)
        if array.ndim:
            return Multiple(self.number("constant", id(value)))
        number = self.number(str(array.dtype), array.item()) if array else _ZERO
        return Multiple(number, uniform=True)

    def results(self, eqn: JaxprEqn, operands: list[Multiple]) -> list[Multiple]:
        """What the results of an equation are, given its operands."""
        within = inside(eqn)
        match kind_of(eqn, within):
            case "identity":
                return operands
            case "call":
                return [self.blamed(eqn, operands, x) for x in self.read(within[0], operands)]
            case "cond":
                branches = [self.read(branch, operands[1:]) for branch in within]
                rows = zip(*branches, strict=True)
                return [
                    self.chosen(operands[0], row) or self.other(eqn, [operands[0], *row], i)
                    for i, row in enumerate(rows)
                ]
        made = self.elementwise(eqn, operands) if len(eqn.outvars) == 1 else None
        if made is not None:
            return [made]
        return [self.other(eqn, operands, i) for i in range(len(eqn.outvars))]

    def elementwise(self, eqn: JaxprEqn, operands: list[Multiple]) -> Multiple | None:
        """The result of an equation that may keep a multiple one; None where it does not."""
        name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])
        nothing = Multiple(-1)
        first, second = (*operands, nothing, nothing)[:2]
        squared = (name == "integer_pow" and eqn.params["y"] == 2) or name == "square"
        if name == "mul" and first == second:
            squared = True
        if squared and _is_multiple(first):
            return self.summed(first._replace(power=2), shape)
        if squared and first.number == _ZERO:
            return first
        match name:
            case "mul" if _is_multiple(second) and first.uniform:
                return self.scaled(name, second, first)
            case "mul" | "div" if _is_multiple(first) and second.uniform:
                return self.scaled(name, first, second)
            case "neg" if _is_multiple(first):
                return first._replace(factor=self.number(name, first.factor))
            case "add" | "sub" | "add_any":
                return self.sum(name, first, second)
            case "copy" | "copy_p":
                return first
            case "convert_element_type" if _dtype(eqn.invars[0]) == _dtype(eqn.outvars[0]):
                return first
            case "broadcast_in_dim" | "reshape" | "squeeze":
                same = shape_of(eqn.invars[0]) == shape
                return first if same or (first.uniform and not first.squares) else None
            case "reduce_sum" if first.power == 2 and not shape:
                return self.summed(first, shape)
            case "reduce_sum" if first.squares:
                return first
            case "select_n":
                return self.chosen(first, operands[1:])
        return None

    def summed(self, square: Multiple, shape: tuple[int, ...]) -> Multiple:
        """A square; as a sum of squares once it is a scalar."""
        number = self.number("square", square.of, square.factor)
        if shape:
            return square._replace(number=number)
        return Multiple(
            number,
            uniform=True,
            squares=((square.of, square.factor),),  # type: ignore[arg-type]
            taint=square.taint,
            blame=square.blame,
        )

    def scaled(self, name: str, x: Multiple, by: Multiple) -> Multiple:
        factor = self.number(name, x.factor, by.number)
        taint, blame = x.taint | self.taint(by), x.blame or by.blame
        return x._replace(factor=factor, taint=taint, blame=blame)

    def sum(self, name: str, a: Multiple, b: Multiple) -> Multiple | None:
        for x, y in ((a, b), (b, a)):
            if y.uniform and y.number == _ZERO and (x is a or name != "sub"):
                return x
        taint, blame = a.taint | b.taint, a.blame or b.blame
        if _is_multiple(a) and _is_multiple(b) and a.of == b.of:
            factor = self.number(name, a.factor, b.factor)
            return a._replace(factor=factor, taint=taint, blame=blame)
        if a.uniform and b.uniform and name != "sub" and (a.squares or b.squares):
            number = self.number(name, a.number, b.number)
            squares = tuple(sorted(a.squares + b.squares))
            return Multiple(number, uniform=True, squares=squares, taint=taint, blame=blame)
        return None

    def chosen(self, which: Multiple, cases: Sequence[Multiple]) -> Multiple | None:
        """One of several multiples of one input, of which zero is one too."""
        of = {x.of for x in cases if _is_multiple(x)}
        zeros = [x for x in cases if x.uniform and x.number == _ZERO]
        multiples = [x for x in cases if _is_multiple(x)]
        if not which.uniform or len(of) != 1 or len(zeros) + len(multiples) != len(cases):
            return None
        factors = (x.factor if _is_multiple(x) else _ZERO for x in cases)
        factor = self.number("select", which.number, *factors)
        taint = self.taint(which).union(*(x.taint for x in multiples))
        blame = next((x.blame for x in (which, *multiples) if x.blame), None)
        return multiples[0]._replace(factor=factor, taint=taint, blame=blame)

    def other(self, eqn: JaxprEqn, operands: list[Multiple], result: int) -> Multiple:
        """What is known of any result: equal to that of an equal equation."""
        what = id(eqn) if inside(eqn) else (eqn.primitive.name, str(eqn.params))
        number = self.number(what, result, *(x.number for x in operands))
        uniform = not shape_of(eqn.outvars[result]) or (
            eqn.primitive.name in _UNIFORM and bool(operands) and all(x.uniform for x in operands)
        )
        taint = frozenset().union(*map(self.taint, operands))
        blame = next((x.blame for x in operands if x.blame), None)
        return Multiple(
            number, uniform=uniform, taint=taint, blame=blame or (made_by(eqn) if taint else None)
        )

    def blamed(self, eqn: JaxprEqn, operands: list[Multiple], result: Multiple) -> Multiple:
        """A call's result; what JAX traced once may have been for another."""
        new = result.taint and result.blame not in {x.blame for x in operands if x.blame}
        return result._replace(blame=made_by(eqn) or result.blame) if new else result

    def taint(self, x: Multiple) -> frozenset[int]:
        """The groups on which a value depends otherwise than by their norm."""
        taint = x.taint
        if x.of is not None:
            taint |= {self.group_of[x.of]}
        for k in {self.group_of[i] for i, _ in x.squares}:
            factors = dict(x.squares)
            heavy = self.groups[k].heavy
            once = sum(i in heavy for i, _ in x.squares) == len(heavy)
            if not once or len({factors.get(i) for i in heavy}) > 1:
                taint |= {k}
        return taint


_UNIFORM = {"mul", "div", "add", "sub", "neg", "max", "min", "convert_element_type", "select_n"}


def _dtype(var: Any) -> Any:
    return getattr(var.aval, "dtype", None)


def _is_multiple(x: Multiple) -> bool:
    return x.of is not None and x.power == 1


def made_by(eqn: JaxprEqn) -> str | None:
    """The transformation in whose update an equation was traced, if that is known."""
    where = getattr(getattr(eqn, "source_info", None), "traceback", None)
    names = [frame.function_name for frame in getattr(where, "frames", ())]
    return _transformation(names)


def raised_in(error: Exception) -> str | None:
    """The transformation in whose update or init an error was raised; None for galore's own."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    if next((package for package in packages if package != "jax"), None) == "galore_jax":
        return None
    return _transformation([frame.f_code.co_qualname for frame in frames])


_WRAPS = ("chain", "named_chain", "transformation")


def _transformation(names: Sequence[str]) -> str | None:
    """Who made the innermost of these that is some `maker.<locals>....update...`, or init."""
    for name in names:
        maker, _, function = name.partition(".<locals>.")
        if ("update" in function or "init" in function) and maker not in _WRAPS:
            return maker
    return None
