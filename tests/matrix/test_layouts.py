"""Matrices found in the parameters of real models, as `tests/trees/make.py` read them."""

import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import pytest

import galore_jax

TREES = sorted((pathlib.Path(__file__).parents[1] / "trees").glob("*.json"))


def read(path):
    """A model's parameters as shapes, and for their paths axes and kinds as its source has them."""
    tree = json.loads(path.read_text())
    params = {}
    for name, shape in tree["leaves"].items():
        *parts, last = name.split("/")
        node = params
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return params, tree["axes"], tree["kind"]


def by_path(params, tree):
    names = [galore_jax.matrix.trees.path_string(p) for p, _ in jax.tree.leaves_with_path(params)]
    return dict(zip(names, jax.tree.structure(params).flatten_up_to(tree), strict=True))


def sides(shape, axes):
    """Both sides of a matrix, whichever is the input, without two or three put side by side."""
    return {frozenset(a for a in side if shape[a] not in (2, 3)) for side in axes}


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.stem)
def test_matrices_of_real_models(path):
    params, axes, kinds = read(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = by_path(params, galore_jax.matrix_axes(params))
    said = " ".join(str(x.message) for x in caught)
    shapes = {name: x.shape for name, x in by_path(params, params).items()}
    for name, spec in found.items():
        if spec is None:
            large = name in axes and jnp.prod(jnp.array(shapes[name])) >= 2**16
            assert not large or f"'{name}'" in said, name
        elif name in axes:
            got = spec.reduction_axis, spec.output_axis
            assert sides(shapes[name], got) == sides(shapes[name], axes[name]), name
        else:
            assert kinds[name] in ("embedding", "head", "position"), (name, kinds[name])


def test_spelt_out():
    with pytest.warns(UserWarning, match=r"does not know .*'odd/w' \(40, 50, 60\)"):
        galore_jax.matrix_axes({"odd": {"w": jnp.zeros((40, 50, 60))}})
