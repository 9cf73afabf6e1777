"""What a leaf becomes: axes, sides, ranks, exclusions, specs and their errors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_jax
from galore_jax.matrix.plan import Unprojected, plan
from galore_jax.matrix.view import MatrixView

Spec = optax.contrib.MuonDimensionNumbers


def only(params, **options):
    options = {"rank": 2, **options}
    return plan(params, **options)


@st.composite
def arrays_with_axes(draw):
    """A shape and a split of its axes into batch, reduction and output."""
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    axes = draw(st.permutations(range(ndim)))
    a = draw(st.integers(1, ndim - 1))
    b = draw(st.integers(a + 1, ndim))
    return shape, tuple(axes[:a]), tuple(axes[a:b])


def test_a_tree_of_dimension_numbers_may_be_callable():
    """As an Equinox module is."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Module:
        w: Any
        b: Any

        def __call__(self, x):
            raise AssertionError("a tree is not called")

    spec = optax.contrib.GaLoreDimensionNumbers(1, 0)
    params = Module(jnp.ones((24, 16)), jnp.ones(24))
    tx = galore_jax.galore_adamw(1e-2, rank=4, weight_dimension_numbers=Module(spec, None))
    assert tx.init(params).projector.w.shape == (16, 4)


@pytest.mark.slow
@given(arrays_with_axes(), st.sampled_from(["in", "out", "both"]))
@settings(max_examples=25, deadline=None)
def test_matrix_view_is_undone_and_slices_agree(case, side):
    shape, reduction, output = case
    batch = tuple(a for a in range(len(shape)) if a not in reduction + output)
    leaf = MatrixView("x", shape, batch, reduction, output, side, 1, jnp.float32)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrix = leaf.to_matrix(jnp.asarray(x))
    assert matrix.shape == (*leaf.batch, leaf.m, leaf.n)
    np.testing.assert_array_equal(leaf.from_matrix(matrix), x)
    flat = matrix.reshape(-1, leaf.m, leaf.n)
    for i in range(flat.shape[0]):
        np.testing.assert_array_equal(leaf.matrix_at(jnp.asarray(x), jnp.int32(i)), flat[i])


@pytest.mark.parametrize(
    ("proj_type", "wide", "tall", "square"),
    [
        ("std", "in", "out", "in"),
        ("reverse_std", "out", "in", "out"),
        ("right", "in", "in", "in"),
        ("left", "out", "out", "out"),
        ("full", "both", "both", "both"),
    ],
)
def test_sides_are_galore_torchs_for_kernels_stored_in_out(proj_type, wide, tall, square):
    shapes = {"a_wide": (8, 16), "b_tall": (16, 8), "c_square": (8, 8)}
    params = {k: jnp.zeros(s) for k, s in shapes.items()}
    assert [leaf.side for leaf in only(params, proj_type=proj_type)] == [wide, tall, square]


def test_ranks_as_int_share_and_callable():
    params = {"a": jnp.zeros((8, 40)), "b": jnp.zeros((20, 16))}
    assert [leaf.rank for leaf in only(params, rank=3)] == [3, 3]
    assert [leaf.rank for leaf in only(params, rank=0.25)] == [2, 4]
    assert [leaf.rank for leaf in only(params, rank=0.01)] == [1, 1]
    seen = {}

    def rank(path, shape):
        seen[path] = shape
        return 2 if path == "a" else 0.5

    assert [leaf.rank for leaf in only(params, rank=rank)] == [2, 8]
    assert seen == {"a": (8, 40), "b": (20, 16)}


def test_a_matrix_with_nothing_to_save_is_left_alone():
    small, kept = only({"a": jnp.zeros((4, 64)), "b": jnp.zeros((5, 64))}, rank=4)
    assert isinstance(small, Unprojected) and "4 <= rank 4" in small.reason
    assert isinstance(kept, MatrixView)


@pytest.mark.parametrize(
    "path",
    [
        "embed/embedding",
        "tok_embeddings/kernel",
        "Embed_0/embedding",
        "lm_head/kernel",
        "head/kernel",
        "wte/w",
        "logits_dense/kernel",
        "decoder/norm/scale",
        "RMSNorm_0/scale",
        "attn/bias",
        "input_layernorm/weight",
        "token_emb/kernel",
        "model/embed_tokens/embedding",
        "embeddings/position_embeddings/embedding",
        "mlm_head/kernel",
        "cls_head/dense/kernel",
        "value_head/w",
        "to_logits/kernel",
        "output/kernel",
        "params/output/w",
        "qa_outputs/kernel",
        "score/kernel",
        "classifier/out_proj/kernel",
        "cls/predictions/transform/kernel",
        "vocab_proj/kernel",
        "output_projection/kernel",
        "embed_out/kernel",
        "unembed/kernel",
        "pos_embs",
        "ln_1/weight",
        "q_bias",
    ],
)
def test_default_exclude_keeps_out(path):
    tree = jnp.zeros((64, 64))
    for key in reversed(path.split("/")):
        tree = {key: tree}
    assert isinstance(only(tree)[0], Unprojected)
    assert isinstance(only(tree, exclude=None)[0], MatrixView)


@pytest.mark.parametrize(
    "path",
    [
        "layers/0/attn/q_proj/kernel",
        "MultiHeadDotProductAttention_0/query/kernel",
        "mlp/up/w",
        "encoder/output/dense/kernel",
        "heads_proj/kernel",
        "normalizer/mlp/kernel",
        "enormous/kernel",
        "norm1/linear/kernel",
        "timestep_embedding/linear_1/kernel",
        "embed_mlp/kernel",
        "embedder/input_projection/w",
        "patch_embeddings/projection/kernel",
        "attention/output/kernel",
        "layers/0/attention/output_proj/weight",
        "overhead/kernel",
    ],
)
def test_default_exclude_lets_in(path):
    tree = jnp.zeros((64, 64))
    for key in reversed(path.split("/")):
        tree = {key: tree}
    assert isinstance(only(tree)[0], MatrixView)


def test_axes_not_named_are_stacked():
    (leaf,) = only({"q": jnp.zeros((3, 8, 4, 4))}, weight_dimension_numbers=Spec(1, (2, 3)))
    assert (leaf.batch, leaf.m, leaf.n) == ((3,), 8, 16)
    assert leaf.projector_shape == (3, 8, 2) and leaf.low_rank_shape == (3, 2, 16)


def test_specs_as_object_tree_prefix_and_callable():
    params = {
        "attn": {"q": jnp.zeros((8, 4, 4)), "o": jnp.zeros((4, 4, 8))},
        "mlp": jnp.zeros((8, 16)),
    }
    tree = {"attn": {"q": Spec(0, (1, 2)), "o": Spec((0, 1), 2)}, "mlp": None}
    for given_specs in (tree, lambda p: tree):
        mlp_last = only(params, weight_dimension_numbers=given_specs)
        o, q, mlp = mlp_last
        assert (o.m, o.n, q.m, q.n) == (16, 8, 8, 16)
        assert isinstance(mlp, Unprojected)
    prefix = {"attn": optax.contrib.GaLoreDimensionNumbers(-2, -1), "mlp": None}
    o, q, _ = only(params, weight_dimension_numbers=prefix)
    assert (o.batch, q.batch) == ((4,), (8,))
    (mlp,) = [p for p in only(params, weight_dimension_numbers=Spec(0, 1)) if p.path == "mlp"]
    assert (mlp.m, mlp.n) == (8, 16)


def test_last_two_axes_serves_stacked_and_plain_leaves():
    params = {
        "stack": jnp.zeros((3, 8, 16)),
        "plain": jnp.zeros((8, 16)),
        "vector": jnp.zeros(8),
    }
    plain, stack, vector = only(params, weight_dimension_numbers=galore_jax.last_two_axes)
    assert (plain.batch, stack.batch) == ((), (3,))
    assert isinstance(vector, Unprojected)


def test_masked_leaves_need_no_spec_and_specs_of_masked_leaves_are_no_error():
    params = {"a": optax.MaskedNode(), "b": jnp.zeros((8, 16))}
    assert len(only(params, weight_dimension_numbers={"a": Spec(0, 1), "b": Spec(0, 1)})) == 1


@pytest.mark.parametrize("rank", [0, -3, 1.0, 0.0, 1.5, True])
def test_bad_rank_values(rank):
    with pytest.raises(ValueError, match=r"rank must be a positive int"):
        galore_jax.galore(optax.sgd(1.0), rank=rank)


@pytest.mark.parametrize("rank", ["8", None, (8,)])
def test_bad_rank_types(rank):
    with pytest.raises(TypeError, match=r"rank must be a positive int"):
        galore_jax.galore(optax.sgd(1.0), rank=rank)


def test_a_callable_rank_is_checked_and_the_leaf_named():
    with pytest.raises(ValueError, match=r"rank for leaf 'mlp/up' \(8, 16\).*got -1"):
        only({"mlp": {"up": jnp.zeros((8, 16))}}, rank=lambda path, shape: -1)
    with pytest.raises(TypeError, match=r"leaf 'mlp/up'.*got 'x'"):
        only({"mlp": {"up": jnp.zeros((8, 16))}}, rank=lambda path, shape: "x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec(0, 0), r"disjoint.*leaf 'q' of shape \(8, 4, 4\)"),
        (Spec((0, 1), (1, 2)), r"disjoint.*leaf 'q'"),
        (Spec(0, -3), r"disjoint.*leaf 'q'"),
        (Spec(0, 3), r"output_axis 3 is out of range for leaf 'q' of shape \(8, 4, 4\)"),
        (Spec((), 1), r"not empty.*leaf 'q'"),
    ],
)
def test_bad_axes_name_the_leaf(spec, message):
    with pytest.raises(ValueError, match=message):
        only({"q": jnp.zeros((8, 4, 4))}, weight_dimension_numbers={"q": spec})


def test_a_spec_tree_that_does_not_match_says_where():
    params = {"a": jnp.zeros((8, 16)), "b": {"c": jnp.zeros((8, 16))}}
    with pytest.raises(ValueError, match=r"no entry for leaf 'b/c' \(8, 16\)"):
        only(params, weight_dimension_numbers={"a": Spec(0, 1)})
    with pytest.raises(ValueError, match=r"match no parameter: 'd'"):
        only(params, weight_dimension_numbers={"a": None, "b": None, "d": Spec(0, 1)})
    with pytest.raises(TypeError, match=r"got 3 at 'a'"):
        only(params, weight_dimension_numbers={"a": 3, "b": None})


def test_nothing_to_project_is_a_warning_with_the_reason():
    tx = galore_jax.galore_adamw(1e-3, rank=8)
    with pytest.warns(
        UserWarning, match=r"projects no leaf.*smaller side 4 <= rank 8 \(1, e.g. 'w'\)"
    ):
        tx.init({"w": jnp.zeros((4, 16))})


@pytest.mark.parametrize("make", [galore_jax.galore_adamw, galore_jax.galore_muon])
def test_a_large_leaf_without_a_spec_is_a_warning(make):
    tx = make(1e-3, rank=8)
    params = {"stack": jnp.zeros((4, 128, 256)), "w": jnp.zeros((16, 16))}
    with pytest.warns(UserWarning, match=r"'stack' \(4, 128, 256\): not a matrix; .*matrix_axes"):
        tx.init(params)


def test_a_large_leaf_with_a_side_below_the_rank_is_a_warning():
    tx = galore_jax.galore_adamw(1e-3, rank=128)
    params = {
        "kv": jnp.zeros((1024, 128)),
        "q": jnp.zeros((1024, 256)),
        "router": jnp.zeros((99, 8)),
    }
    params |= {"embed": {"embedding": jnp.zeros((4096, 64))}}
    match = r"'kv' \(1024, 128\): smaller side 128 <= rank 128; a share"
    with pytest.warns(UserWarning, match=match) as found:
        tx.init(params)
    (message,) = [str(x.message) for x in found]
    assert "rank=0.25" in message and "router" not in message and "embed" not in message


def test_no_warning_where_all_is_well(recwarn):
    tx = galore_jax.galore_adamw(1e-3, rank=8)
    tx.init({"w": jnp.zeros((16, 16)), "bias": jnp.zeros(16), "conv": jnp.zeros((3, 3, 4, 4))})
    jax.eval_shape(tx.init, {})
    assert not recwarn


def test_numpy_ranks_are_numbers_too():
    params = {"a": jnp.zeros((8, 40))}
    assert only(params, rank=np.int64(3))[0].rank == 3
    assert only(params, rank=np.float32(0.25))[0].rank == 2
    assert only(params, rank=lambda path, shape: np.minimum(*shape) // 4)[0].rank == 2


def test_empty_and_absent_leaves():
    params = {"e": jnp.zeros((0, 8, 12)), "none": None, "w": jnp.zeros((8, 12))}
    specs = {"e": Spec(-2, -1), "none": None, "w": Spec(0, 1)}
    empty, w = only(params, weight_dimension_numbers=specs)
    assert isinstance(empty, Unprojected) and isinstance(w, MatrixView)


def test_a_callable_spec_under_inject_hyperparams_says_to_make_it_static():
    tx = optax.inject_hyperparams(galore_jax.galore_adamw, static_args="rank")(
        1e-2, rank=4, weight_dimension_numbers=galore_jax.last_two_axes
    )
    with pytest.raises(TypeError, match="static_args"):
        tx.init({"w": jnp.zeros((3, 12, 24))})


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.identity(), tx)])
def test_a_warning_points_at_the_users_line(wrap):
    tx = wrap(galore_jax.galore_adamw(1e-3, rank=2))
    with pytest.warns(UserWarning, match="projects no leaf") as caught:
        tx.init({"bias": jnp.ones(3)})
    assert caught[0].filename == __file__
