"""The LLaMA of the examples against transformers' and against its own definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples import llama

SMALL = llama.LlamaConfig(97, 32, 48, heads=4, layers=3, kv_heads=2, init_scale=0.2)
CONFIGS = {
    "untied": dataclasses.replace(SMALL, kv_heads=None),
    "grouped_tied": dataclasses.replace(SMALL, tied=True, rope_theta=500.0, norm_eps=1e-5),
}


def tokens(config: llama.LlamaConfig, batch: int = 2, length: int = 17) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (batch, length))


def logits(config: llama.LlamaConfig, ids: np.ndarray) -> jax.Array:
    graph, params = llama.create(config, seed=0)
    return nnx.merge(graph, params)(ids)


def loss(graph: nnx.GraphDef, params: dict, ids: np.ndarray) -> jax.Array:
    return jnp.mean(nnx.merge(graph, params).losses(ids[:, :-1], ids[:, 1:]))


def from_transformers(oracle, config: llama.LlamaConfig) -> dict:
    """The oracle's weights in our layout: kernels (in, out), the blocks' stacked."""
    weights = {name: value.detach().numpy() for name, value in oracle.named_parameters()}

    def stack(name: str) -> np.ndarray:
        layers = [weights[f"model.layers.{i}.{name}.weight"] for i in range(config.layers)]
        return np.stack([w.T for w in layers])

    attention = {ours: {"kernel": stack(f"self_attn.{ours}_proj")} for ours in "qkvo"}
    mlp = {ours: {"kernel": stack(f"mlp.{ours}_proj")} for ours in ("gate", "up", "down")}
    params = {
        "embed": {"embedding": weights["model.embed_tokens.weight"]},
        "blocks": {
            "attention_norm": {"scale": stack("input_layernorm")},
            "attention": attention,
            "mlp_norm": {"scale": stack("post_attention_layernorm")},
            "mlp": mlp,
        },
        "final_norm": {"scale": weights["model.norm.weight"]},
    }
    if not config.tied:
        params["lm_head"] = {"kernel": weights["lm_head.weight"].T}
    return params


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name):
    torch = pytest.importorskip("torch", reason="needs the oracles extra")
    transformers = pytest.importorskip("transformers", reason="needs the oracles extra")
    config = CONFIGS[name]
    torch.manual_seed(0)
    oracle = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied,
            initializer_range=0.2,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():  # Norm scales too: ones would hide them.
            parameter.add_(0.1 * torch.randn_like(parameter))
        ids = tokens(config)
        expected = oracle(torch.from_numpy(ids)).logits.numpy()
    graph, params = llama.create(config, seed=0)
    theirs = from_transformers(oracle, config)
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, params)
    actual = nnx.merge(graph, jax.tree.map(jnp.asarray, theirs))(ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert np.std(expected) > 0.5  # The comparison is of something.


def test_parameters_are_stacked_and_named():
    _, params = llama.create(SMALL, seed=0)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == {
        "embed/embedding": (97, 32),
        "blocks/attention_norm/scale": (3, 32),
        "blocks/attention/q/kernel": (3, 32, 32),
        "blocks/attention/k/kernel": (3, 32, 16),
        "blocks/attention/v/kernel": (3, 32, 16),
        "blocks/attention/o/kernel": (3, 32, 32),
        "blocks/mlp_norm/scale": (3, 32),
        "blocks/mlp/gate/kernel": (3, 32, 48),
        "blocks/mlp/up/kernel": (3, 32, 48),
        "blocks/mlp/down/kernel": (3, 48, 32),
        "final_norm/scale": (32,),
        "lm_head/kernel": (32, 97),
    }
    layers = params["blocks"]["mlp"]["up"]["kernel"]
    assert not np.allclose(layers[0], layers[1])  # Each layer draws its own weights.


def test_tied_head_is_the_embedding():
    graph, params = llama.create(CONFIGS["grouped_tied"], seed=0)
    assert "lm_head" not in params
    untied_graph, untied = llama.create(dataclasses.replace(CONFIGS["grouped_tied"], tied=False), 0)
    untied = params | {"lm_head": {"kernel": params["embed"]["embedding"].T}}
    ids = tokens(SMALL)
    np.testing.assert_allclose(
        nnx.merge(graph, params)(ids), nnx.merge(untied_graph, untied)(ids), atol=1e-5
    )


def test_logits_see_only_the_past():
    ids = tokens(SMALL)
    changed = ids.copy()
    changed[:, 9] = (ids[:, 9] + 1) % SMALL.vocab_size
    before, after = logits(SMALL, ids), logits(SMALL, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (np.abs(before - after)[:, 9:].max(axis=-1) > 1e-4).all()


@pytest.mark.slow
def test_remat_changes_no_gradient():
    ids = tokens(SMALL)
    graph, params = llama.create(SMALL, seed=0)
    remat_graph, _ = llama.create(dataclasses.replace(SMALL, remat=True), seed=0)
    plain = jax.jit(jax.grad(lambda p: loss(graph, p, ids)))(params)
    remat = jax.jit(jax.grad(lambda p: loss(remat_graph, p, ids)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, remat)
    # And it does what it is for: what a block saves for its backward pass shrinks.
    text = str(jax.make_jaxpr(jax.grad(lambda p: loss(remat_graph, p, ids)))(params))
    assert "remat" in text or "checkpoint" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("param_dtype", "dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_dtypes(param_dtype, dtype):
    config = dataclasses.replace(SMALL, param_dtype=param_dtype, dtype=dtype, init_scale=0.05)
    graph, params = llama.create(config, seed=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    ids = tokens(config)
    out = nnx.merge(graph, params)(ids)
    assert out.dtype == jnp.dtype(dtype)
    losses = nnx.merge(graph, params).losses(ids, jnp.asarray(ids))
    assert losses.dtype == jnp.float32
    full = dataclasses.replace(config, param_dtype="float32", dtype="float32")
    exact_graph, _ = llama.create(full, seed=0)
    exact = nnx.merge(exact_graph, jax.tree.map(lambda p: p.astype(jnp.float32), params))(ids)
    tolerance = 1e-6 if dtype == "float32" else 0.03
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("60m", 58), ("130m", 134), ("350m", 368), ("1b", 1339), ("7b", 6738)],
)
def test_paper_sizes(name, millions):
    config = llama.CONFIGS[name]
    model = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    assert round(count / 1e6) == millions
    recipe = llama.RECIPES[name]
    assert recipe.rank * 2 <= config.hidden or name == "60m"
    assert recipe.batch_size % recipe.accumulate == 0


def test_config_that_cannot_work():
    with pytest.raises(ValueError, match="heads"):
        llama.LlamaConfig(97, 30, 48, heads=4, layers=1)
    with pytest.raises(ValueError, match="kv_heads"):
        llama.LlamaConfig(97, 32, 48, heads=4, layers=1, kv_heads=3)
