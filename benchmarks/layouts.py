"""What is projected of real models' parameters, by rule: shapes alone.

    python -m benchmarks.layouts

For the parameter trees in `tests/trees`: the share of the weights of linear maps (as the models'
sources have them) that is projected in the right matrices, and the state of `galore_adamw` over
AdamW's, for `weight_dimension_numbers` by default, by `last_two_axes` and by `matrix_axes`; r = 1/4
of each matrix's smaller side.
"""

import json
import math
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax
from benchmarks import report, steps
from galore_jax.matrix.plan import plan
from galore_jax.matrix.view import MatrixView

TREES = pathlib.Path(__file__).parents[1] / "tests" / "trees"
RULES = {
    "default": None,
    "last_two_axes": galore_jax.last_two_axes,
    "matrix_axes": galore_jax.matrix_axes,
}


def nest(leaves):
    """A tree of shapes from paths."""
    params = {}
    for name, shape in leaves.items():
        *parts, last = name.split("/")
        node = params
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return params


def sides(shape, axes):
    """Both sides of a matrix, whichever is the input, without two or three put side by side."""
    return {frozenset(a for a in side if shape[a] not in (2, 3)) for side in axes}


def right(view, axes):
    """Whether a view's matrix is the linear map's."""
    found = view.reduction_axes, view.output_axes
    return sides(view.shape, found) == sides(view.shape, axes)


def figures(path):
    tree = json.loads(path.read_text())
    params = nest(tree["leaves"])
    kernels = {k: v for k, v in tree["axes"].items() if tree["kind"].get(k) in (None, "conv")}
    total = sum(math.prod(tree["leaves"][k]) for k in kernels)
    full = steps.nbytes(jax.eval_shape(optax.adamw(1e-3).init, params))
    found: dict[str, Any] = {"weights": sum(map(math.prod, tree["leaves"].values()))}
    for name, rule in RULES.items():
        options = {"rank": 0.25, "weight_dimension_numbers": rule}
        views = [x for x in plan(params, **options) if isinstance(x, MatrixView)]
        good = sum(
            math.prod(x.shape) for x in views if x.path in kernels and right(x, kernels[x.path])
        )
        state = steps.nbytes(jax.eval_shape(galore_jax.galore_adamw(1e-3, **options).init, params))
        found[name] = {"right": good / total, "state": state / full}
    return found


def main(argv=None):
    args = report.parse(report.parser(__doc__), argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {path.stem: figures(path) for path in sorted(TREES.glob("*.json"))}
    rows = [
        [name, x["weights"], *(x[rule][k] for rule in RULES for k in ("right", "state"))]
        for name, x in found.items()
    ]
    head = [f"{rule}: {k}" for rule in RULES for k in ("right", "state")]
    report.table(["model", "weights", *head], rows)
    result = {"command": args.command, "rank": 0.25, "models": found}
    report.write("layouts", result, out=args.out)


if __name__ == "__main__":
    main()
