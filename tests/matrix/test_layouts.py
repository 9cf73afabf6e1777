"""Matrices found in the parameters of real models, as `tests/trees/make.py` read them."""

import functools
import json
import pathlib
import re
import warnings

import hypothesis
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import strategies as st

import galore_jax
from benchmarks.layouts import nest, sides
from galore_jax.matrix.layouts import LARGE
from galore_jax.matrix.plan import Unprojected, plan
from galore_jax.matrix.trees import path_string
from galore_jax.matrix.view import MatrixView

Spec = optax.contrib.GaLoreDimensionNumbers

TREES = sorted((pathlib.Path(__file__).parents[1] / "trees").glob("*.json"))


def read(path):
    """A model's parameters as shapes, and for their paths axes and kinds as its source has them."""
    tree = json.loads(path.read_text())
    return nest(tree["leaves"]), tree["axes"], tree["kind"]


def by_path(params, tree):
    names = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return dict(zip(names, jax.tree.structure(params).flatten_up_to(tree), strict=True))


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.stem)
def test_matrices_of_real_models(path):
    params, axes, kinds = read(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = by_path(params, galore_jax.matrix_axes(params))
    said = " ".join(str(x.message) for x in caught)
    for name, x in by_path(params, params).items():
        spec = found[name]
        if spec is None:
            assert name not in axes or x.size < LARGE or f"'{name}'" in said, name
        elif name in axes and "transpose" not in name:  # Haiku's has (h, w, out, in)
            got = spec.reduction_axis, spec.output_axis
            assert sides(x.shape, got) == sides(x.shape, axes[name]), name
        elif name not in axes:
            assert kinds[name] in ("embedding", "position", "depthwise"), (name, kinds[name])


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.stem)
def test_what_is_left_out_of_real_models(path):
    """By default tables, heads, norms and biases are, kernels are not."""
    params, axes, kinds = read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planned = plan(params, rank=1, weight_dimension_numbers=galore_jax.matrix_axes)
    for leaf in planned:
        kind = kinds.get(leaf.path)
        if leaf.path.split("/")[-2:] in (["Dense_0", "kernel"], ["embedding", "kernel"]):
            continue  # a head without a name; a convolution with that of a table
        if kind in ("embedding", "head", "position", "norm", "bias", "vector"):
            assert isinstance(leaf, Unprojected), (leaf.path, kind)
        elif leaf.path in axes and not leaf.path.startswith("cls/predictions"):
            reason = getattr(leaf, "reason", "")
            assert reason != "path matches exclude", leaf.path


def test_what_is_not_known_is_named_and_can_be_said():
    params = {"odd": {"w": jnp.zeros((40, 50, 60))}, "small": {"w": jnp.zeros((4, 5, 6))}}
    with pytest.warns(UserWarning, match=r"does not know .*'odd/w' \(40, 50, 60\) form"):
        assert galore_jax.matrix_axes(params)["odd"]["w"] is None
    spec = Spec((0, 1), 2)
    said = galore_jax.matrix_axes(params, overrides={"odd": spec, ".": None})
    assert said == {"odd": {"w": spec}, "small": {"w": None}}
    said = galore_jax.matrix_axes(params, stacked="w$")
    assert {(x["w"].reduction_axis, x["w"].output_axis) for x in said.values()} == {((1,), (2,))}
    rule = functools.partial(galore_jax.matrix_axes, stacked="odd")
    with pytest.warns(UserWarning, match="projects no leaf"):
        galore_jax.galore_adamw(1e-2, rank=64, weight_dimension_numbers=rule).init(params)
    for wrong in ({"stacked": "layers"}, {"overrides": {"layers": None}}):
        with pytest.raises(ValueError, match="'layers' matches no path; there are odd/w, small/w"):
            galore_jax.matrix_axes(params, **wrong)


@pytest.mark.parametrize("rule", [None, galore_jax.last_two_axes, galore_jax.matrix_axes])
def test_vectors_of_stacked_layers_stay_vectors(rule):
    """Whatever their names, with more layers than the rank."""
    layers, d = 24, 48
    block = {"attn": {"q": (d, d), "q_bias": (d,)}, "mixer": {"A_log": (d,), "w": (d, 2 * d)}}
    block |= {"ln_1": {"weight": (d,)}, "gamma": (d,), "mlp": {"up": (d, 3 * d), "b": (3 * d,)}}
    params = jax.tree.map(
        lambda s: jnp.zeros((layers, *s)), {"h": block}, is_leaf=lambda x: isinstance(x, tuple)
    )
    planned = plan(params, rank=4, exclude=None, weight_dimension_numbers=rule)
    kernels = {"h/attn/q", "h/mixer/w", "h/mlp/up"}
    found = {x.path for x in planned if isinstance(x, MatrixView)}
    assert found == (set() if rule is None else kernels)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(2, 12), st.integers(2, 9), st.integers(2, 9), st.integers(1, 9))
def test_an_embedding_beside_the_blocks_is_no_stack(vocabulary, layers, width, inner):
    """Under a name of its own and without a head, where the widths of all agree."""
    hypothesis.assume(vocabulary != layers)
    blocks = {"mix": {"kernel": (layers, width, inner)}, "norm": {"scale": (layers, width)}}
    params = jax.tree.map(
        jnp.zeros,
        {"embed": (vocabulary, width), "blocks": blocks},
        is_leaf=lambda x: isinstance(x, tuple),
    )
    axes = galore_jax.matrix_axes(params)
    assert axes["blocks"]["mix"]["kernel"][:] == ((1,), (2,))
    assert axes["embed"][:] == ((0,), (1,))


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.stem)
def test_parts_of_a_tree_get_what_they_get_in_it(path):
    """Where a mask or a partition hides norms, or all that is not attention; or a warning."""
    params, *_ = read(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = by_path(params, galore_jax.matrix_axes(params))
        for hidden in (r"norm|bias|scale|embed|ln", r"^((?!att).)*$"):
            part = jax.tree_util.tree_map_with_path(
                lambda p, x, hidden=hidden: (
                    optax.MaskedNode() if re.search(hidden, path_string(p)) else x
                ),
                params,
            )
            caught.clear()
            for name, spec in by_path(part, galore_jax.matrix_axes(part)).items():
                small = by_path(params, params)[name].size < LARGE
                said = spec is None and "does not know" in " ".join(str(x.message) for x in caught)
                assert small or said or spec == found[name], name


@hypothesis.given(
    st.integers(1, 30), st.integers(1, 9), st.integers(2, 40), st.integers(1, 40), st.booleans()
)
@hypothesis.settings(deadline=None, max_examples=100)
def test_attention_of_any_size(layers, heads, channels, more, scanned):
    """With layers or without the same matrices, as long as the model is wider than its heads."""
    width = max(heads, channels) + more
    block = {
        "query": {"kernel": (width, heads, channels), "bias": (heads, channels)},
        "out": {"kernel": (heads, channels, width), "bias": (width,)},
        "norm": {"scale": (width,)},
    }
    stack = (layers,) if scanned else ()
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(stack + s, jnp.float32),
        block,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    planned = plan(params, rank=1, exclude=None, weight_dimension_numbers=galore_jax.matrix_axes)
    found = {x.path: (x.batch, {x.m, x.n}) for x in planned if isinstance(x, MatrixView)}
    if heads * channels > 1 and width > 1:
        both = stack, {width, heads * channels}
        assert found == {"query/kernel": both, "out/kernel": both}


def test_a_scalar_is_no_tree_of_parameters():
    with pytest.raises(TypeError, match="matrix_axes takes parameters and got a scalar"):
        galore_jax.matrix_axes(jnp.float32(1))
