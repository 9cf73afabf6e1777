"""The RoBERTa of the examples against transformers both ways; dropout, padding, the tiers."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import galore_jax
from examples import attention, hf_files, hf_roberta, roberta
from examples.attention import masked_attention
from examples.dropout import dropped
from examples.errors import UserError
from examples.optimizers import is_kernel
from examples.roberta_config import RobertaConfig
from tests.problems import once_but

SMALL = RobertaConfig(
    **{"vocab_size": 61, "hidden": 24, "intermediate": 35, "heads": 3, "layers": 3},
    **{"max_positions": 19, "labels": 3, "init_scale": 0.3},
)
EVERYTHING = dataclasses.replace(
    SMALL,
    **{"type_vocab": 3, "pad_id": 4, "norm_eps": 1e-6, "activation": "gelu_pytorch_tanh"},
    **{"labels": 2, "label_names": ("no", "yes"), "dropout": 0.2, "attention_dropout": 0.0},
    **{"classifier_dropout": 0.3, "model_type": "xlm-roberta"},
)


def texts(config: RobertaConfig, length: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (4, length) and their mask, with padding behind and, in the last row, before."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(config.pad_id + 1, config.vocab_size, (4, length)).astype(np.int32)
    tokens[1, 5:] = tokens[2, 1:] = tokens[3, :4] = config.pad_id
    return tokens, tokens != config.pad_id


def weights(config: RobertaConfig, seed: int = 0) -> dict:
    """Random biases and scales too: zeros and ones would hide them."""
    shapes = jax.eval_shape(roberta.initializer(config, 0)[1])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.4 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)


def logits(config: RobertaConfig, params: dict, *args) -> np.ndarray:
    model_of = roberta.from_graph(roberta.initializer(config, 0)[0])
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(jax.jit(lambda p, *args: model_of(p)(*args))(params, *args))


# --- Against transformers ---

SIZES = {
    **{"vocab_size": 67, "hidden_size": 30, "intermediate_size": 41, "num_hidden_layers": 3},
    **{"num_attention_heads": 5, "max_position_embeddings": 21, "type_vocab_size": 1},
}
# By the class of transformers' config: head, and what is not as in roberta-base.
STYLES = {
    "two labels": ("Roberta", {"num_labels": 2}),
    "regression": ("Roberta", {"num_labels": 1, "problem_type": "regression"}),
    "seven": ("XLMRoberta", {"num_labels": 7, "type_vocab_size": 2, "pad_token_id": 5}),
    "names": ("Roberta", {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "layer_norm_eps": 0.1}),
    "relu": ("Roberta", {"num_labels": 3, "hidden_act": "relu", "classifier_dropout": 0.4}),
}


def oracle(name: str, head: str = "SequenceClassification", dtype: str = "float32"):
    """A model of transformers with random weights: none is 1 or 0, which would hide it."""
    torch = pytest.importorskip("torch", reason="needs the oracles extra")
    transformers = pytest.importorskip("transformers", reason="needs the oracles extra")
    kind, changes = STYLES[name]
    settings = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}For{head}")(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def their_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        tokens, mask = (torch.from_numpy(x.astype(np.int64)) for x in (tokens, mask))
        return model.float()(tokens, attention_mask=mask).logits.numpy()


@pytest.mark.oracle
@pytest.mark.parametrize("name", once_but({"seven"}, STYLES))
def test_logits_equal_transformers_both_ways(name, tmp_path):
    model = oracle(name)
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf_roberta.load_hf(tmp_path / "theirs")
    given = texts(config)
    expected = their_logits(model, *given)
    assert config.labels == expected.shape[-1]
    np.testing.assert_allclose(logits(config, params, *given), expected, atol=1e-4)
    assert np.std(expected) > 0.3  # The comparison is of something.

    hf_roberta.save_hf(tmp_path / "ours", config, params, file_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(again, *given), expected, atol=1e-6)
    assert again.config.id2label == model.config.id2label
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.oracle
@pytest.mark.slow
def test_bfloat16_in_several_files(tmp_path):
    model = oracle("seven", dtype="bfloat16")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / hf_files.INDEX).exists()
    config, params = hf_roberta.load_hf(tmp_path / "theirs")
    assert config.param_dtype == config.dtype == "bfloat16"
    hf_roberta.save_hf(tmp_path / "ours", config, params)
    again = type(model).from_pretrained(tmp_path / "ours", dtype="bfloat16")
    for key, value in again.state_dict().items():
        assert (value == model.state_dict()[key]).all(), key
    # The weights are rounded, and the same: computed in float32 so are the logits.
    config, params = hf_roberta.load_hf(tmp_path / "theirs", "float32")
    wide, given = type(model).from_pretrained(tmp_path / "ours", dtype="float32"), texts(config)
    expected = their_logits(wide.eval(), *given)
    np.testing.assert_allclose(logits(config, params, *given), expected, atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("name", once_but({"two labels"}, ["two labels", "seven"]))
def test_a_language_model_gets_a_new_head(name, tmp_path, capsys):
    model = oracle(name, "MaskedLM")
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf_roberta.load_hf(tmp_path / "theirs", labels=4, seed=3)
    assert "its classifier is new, for 4 labels, from seed 3" in capsys.readouterr().out
    assert jax.tree.map(np.shape, params) == jax.tree.map(jnp.shape, weights(config))
    again = hf_roberta.load_hf(tmp_path / "theirs", labels=4, seed=3)[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)
    # With that head, theirs is the same model.
    hf_roberta.save_hf(tmp_path / "ours", config, params)
    import transformers

    kind = getattr(transformers, type(model).__name__.replace("MaskedLM", "SequenceClassification"))
    given, theirs = texts(config), kind.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(
        logits(config, params, *given), their_logits(theirs, *given), atol=1e-4
    )
    for key, value in model.roberta.state_dict().items():
        assert (theirs.roberta.state_dict()[key] == value).all(), key


@pytest.mark.oracle
@pytest.mark.slow
def test_unmasked_text_as_long_as_the_table(tmp_path):
    model = oracle("two labels")
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf_roberta.load_hf(tmp_path / "theirs")
    tokens = texts(config, config.max_length)[0][:1]
    given = tokens, np.ones_like(tokens, bool)
    np.testing.assert_allclose(
        logits(config, params, *given), their_logits(model, *given), atol=1e-4
    )
    with pytest.raises(ValueError, match="20 tokens, and the model has positions for 19"):
        logits(config, params, *texts(config, 20))


# --- The model alone ---


def test_padding_changes_nothing():
    tokens, mask = texts(SMALL)
    params = weights(SMALL)
    padded = logits(SMALL, params, tokens, mask)
    for row, length in ((1, 5), (2, 1)):
        cut = tokens[row : row + 1, :length]
        alone = logits(SMALL, params, cut, np.ones_like(cut, bool))
        np.testing.assert_allclose(padded[row : row + 1], alone, atol=1e-5)
    # Before the text, too, but for the head: that is at the first position, as in transformers.
    model_of = roberta.from_graph(roberta.initializer(SMALL, 0)[0])
    hidden = jax.jit(lambda p, *args: model_of(p).hidden(*args))
    cut = tokens[3:, 4:]
    expected = hidden(params, cut, np.ones_like(cut, bool))
    np.testing.assert_allclose(hidden(params, tokens, mask)[3:, 4:], expected, atol=1e-5)


def test_a_row_of_padding_alone_is_finite():
    tokens, mask = texts(SMALL)
    tokens[2], mask[2] = SMALL.pad_id, False
    params = jax.tree.map(jnp.asarray, weights(SMALL))
    assert np.isfinite(logits(SMALL, params, tokens, mask)).all()
    # Where weights are dropped the softmax is ours.
    model_of = roberta.from_graph(roberta.initializer(SMALL, 0)[0])
    gradient = jax.grad(lambda p, key: jnp.sum(model_of(p)(tokens, mask, key) ** 2))
    gradient = jax.jit(gradient)(params, jax.random.key(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_long_texts_go_by_blocks_of_queries():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 261, 2, 3)).astype(np.float32) for _ in range(3))
    mask = np.arange(261) < np.array([[261], [97]])
    attend = jax.jit(masked_attention, static_argnums=4)
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=1e-5)
    few = attend(q, k, v, mask, 1e-6, jax.random.key(0))  # Which drops nothing.
    np.testing.assert_allclose(few, expected, atol=1e-5)
    # No two blocks drop the same: their queries here are the same.
    same = np.broadcast_to(q[:, :1], q.shape)
    out = np.asarray(attend(same, k, v, mask, 0.5, jax.random.key(0)))
    assert np.abs(out[:, :130] - out[:, 131:]).max(axis=(0, 2, 3)).min() > 0.01


def test_dropout_keeps_the_mean():
    x = jnp.full((100, 100), 3.0, jnp.bfloat16)
    y = dropped(x, 0.25, jax.random.key(0))
    assert y.dtype == x.dtype and set(np.unique(y.astype(np.float32))) == {0.0, 4.0}
    assert abs(np.mean(y == 0) - 0.25) < 0.02
    assert dropped(x, 0.25, None) is x and dropped(x, 0.0, jax.random.key(0)) is x


def test_dropout_goes_by_the_key():
    given, key = texts(SMALL), jax.random.key(0)
    params = weights(SMALL)
    off, on, other = (logits(SMALL, params, *given, k) for k in (None, key, jax.random.key(1)))
    np.testing.assert_array_equal(on, logits(SMALL, params, *given, key))
    assert np.abs(off - on).max() > 0.1 and np.abs(on - other).max() > 0.1
    none = dataclasses.replace(SMALL, dropout=0.0, attention_dropout=0.0)
    np.testing.assert_allclose(logits(none, params, *given, key), off, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_each_layer_and_place_drops_its_own(remat, monkeypatch):
    seen = []

    def recorded(x, rate, key):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return dropped(x, rate, key)

    for module in (roberta, attention):
        monkeypatch.setattr(module, "dropped", recorded)
    config = dataclasses.replace(SMALL, remat=remat)
    logits(config, weights(config), *texts(config), jax.random.key(0))
    jax.effects_barrier()
    # Embeddings; attention's weights and both sums of each layer; twice in the head.
    assert len(seen) == len(set(seen)) == 1 + 3 * config.layers + 2


@pytest.mark.slow
def test_bfloat16_is_near():
    params, given = weights(SMALL), texts(SMALL)
    half = dataclasses.replace(SMALL, param_dtype="bfloat16", dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = logits(half, rounded, *given)
    assert out.dtype == np.float32
    exact = logits(SMALL, jax.tree.map(lambda x: x.astype(np.float32), rounded), *given)
    np.testing.assert_allclose(out, exact, atol=0.1)
    # Dropout, too, stays in the activations' dtype.
    assert np.isfinite(logits(half, rounded, *given, jax.random.key(0))).all()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"heads": 5}, "hidden=24 must be a multiple of heads=5"),
        ({"labels": 0}, "labels=0 must be 1, for regression, or more"),
        ({"label_names": ("one",)}, "label_names has 1 entries for labels=3"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1"),
        ({"pad_id": 18}, "pad_id=18 must be a token"),
        ({"activation": "mish"}, "activation='mish' must be one of"),
    ],
)
def test_config_that_cannot_work(changes, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        dataclasses.replace(SMALL, **changes)


# --- Training ---

# Of a gradient that is zero, as of the biases of keys, which no score depends on, Adam would make
# the rounding large.
OPTIONS = {"rank": 4, "weight_dimension_numbers": galore_jax.matrix_axes, "method": "svd"}
TX = galore_jax.galore_adamw(0.01, eps=1e-3, **OPTIONS)


def test_only_kernels_of_the_blocks_are_projected():
    shapes = jax.eval_shape(roberta.initializer(SMALL, 0)[1])
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        if is_kernel(path)
    }
    rows = galore_jax.summary(TX, shapes).rows
    assert {row.path for row in rows if row.projector} == kernels and len(kernels) == 6


@pytest.mark.slow
def test_tiers_are_one():
    """With dropout, whose masks the backward pass of each tier has to make again."""
    tokens, mask = texts(SMALL)
    params = jax.tree.map(jnp.asarray, weights(SMALL))
    # Each projected kernel makes a program longer.
    tx = galore_jax.galore_adamw(0.01, eps=1e-3, exclude="^(?!.*attention/(q|v)/kernel)", **OPTIONS)
    begun, ends = (params, jax.jit(tx.init)(params)), {}
    for tier in ("full", "subspace", "layerwise"):
        config = dataclasses.replace(SMALL, remat=tier == "layerwise")
        model_of = roberta.from_graph(roberta.initializer(config, 0)[0])

        def loss_fn(params, key, model_of=model_of):
            out = model_of(params)(tokens, mask, key)
            classes = jnp.arange(4) % SMALL.labels
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, classes))

        def step(params, state, key, tier=tier, loss_fn=loss_fn):
            if tier == "layerwise":
                return galore_jax.value_and_update(loss_fn, tx)(params, state, key)
            if tier == "subspace":
                loss, grads = galore_jax.value_and_grad(loss_fn, tx)(params, state, key)
            else:
                loss, grads = jax.value_and_grad(loss_fn)(params, key)
            updates, state = tx.update(grads, state, params)
            return loss, galore_jax.apply_updates(params, updates), state

        (params, state), losses, step = begun, [], jax.jit(step)
        for i in range(2):
            loss, params, state = step(params, state, jax.random.key(i))
            losses.append(loss)
        ends[tier] = params, losses
    for tier in ("subspace", "layerwise"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ends["full"], ends[tier]
        )


@pytest.mark.slow
def test_the_norm_is_seen_layer_by_layer():
    given = texts(SMALL)
    model_of = roberta.from_graph(roberta.initializer(SMALL, 0)[0])
    params = jax.tree.map(jnp.asarray, weights(SMALL))

    def loss_fn(params, watch=None):
        return jnp.mean(jnp.square(model_of(params)(*given, None, watch)))

    squares = jax.jit(jax.grad(loss_fn, argnums=1))(params, jnp.zeros(SMALL.layers))
    blocks = jax.jit(jax.grad(loss_fn))(params)["blocks"]
    by_layer = [
        jnp.sum(jnp.square(x).reshape(SMALL.layers, -1), 1) for x in jax.tree.leaves(blocks)
    ]
    np.testing.assert_allclose(squares, sum(by_layer), rtol=1e-4)


# --- Checkpoints without transformers ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("roberta") / "saved"
    hf_roberta.save_hf(folder, SMALL, weights(SMALL))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype, tmp_path):
    config = dataclasses.replace(EVERYTHING, param_dtype=dtype, dtype=dtype)
    params = weights(config)
    hf_roberta.save_hf(tmp_path / "one", config, params)
    hf_roberta.save_hf(tmp_path / "several", config, params, file_bytes=9_000)
    for name in ("one", "several"):
        read, back = hf_roberta.load_hf(tmp_path / name, labels=2)
        assert read == config
        jax.tree.map(np.testing.assert_array_equal, back, params)


def changed(saved: pathlib.Path, folder: pathlib.Path, fields: dict, tensors: dict) -> None:
    """A copy with other fields and tensors; None takes one away."""

    def merged(old, new):
        return {k: v for k, v in (old | new).items() if v is not None}

    read = json.loads((saved / hf_files.CONFIG).read_text())
    (folder / hf_files.CONFIG).write_text(json.dumps(merged(read, fields)))
    save_file(merged(load_file(saved / hf_files.WEIGHTS), tensors), folder / hf_files.WEIGHTS)


HEAD = {f"classifier.{x}.{y}": None for x in ("dense", "out_proj") for y in ("weight", "bias")}
MASKED_LM = {"architectures": ["RobertaForMaskedLM"], "id2label": None, "problem_type": None}


def test_what_is_left_behind(saved, tmp_path):
    """As roberta-base is on the hub: of pre-training, and of older versions."""
    lm = {"lm_head.bias": np.ones(61), "lm_head.decoder.weight": np.ones((61, 24))}
    others = {
        "roberta.pooler.dense.bias": np.ones(24, np.float32),
        "roberta.embeddings.position_ids": np.arange(19)[None],
    }
    changed(saved, tmp_path, MASKED_LM | {"output_past": True}, HEAD | lm | others)
    config, params = hf_roberta.load_hf(tmp_path, labels=1)
    assert config.labels == 1 and params["classifier"]["out"]["kernel"].shape == (24, 1)
    expected = weights(SMALL)
    del expected["classifier"], params["classifier"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
    ("fields", "tensors", "line"),
    [
        ({"model_type": "bert"}, {}, "model_type 'bert' is none of the known ones, roberta, xlm"),
        ({"architectures": None}, {}, "architectures is missing"),
        ({"architectures": ["RobertaModel"]}, {}, "architectures is ['RobertaModel'], neither"),
        ({"adapters": 1}, {}, "adapters is a field that is not known of 'roberta'"),
        ({"is_decoder": True}, {}, "is_decoder is True, which the model has no place for"),
        ({"position_embedding_type": "relative_key"}, {}, "'relative_key', which the model has no"),
        ({"hidden_size": None}, {}, "hidden_size is missing"),
        ({"num_attention_heads": 7}, {}, "hidden=24 must be a multiple of heads=7"),
        ({"hidden_dropout_prob": 1.5}, {}, "dropout=1.5 must be at least 0"),
        ({"id2label": {"0": "a", "2": "b"}}, {}, "id2label is {'0': 'a', '2': 'b'}, not of the la"),
        ({"id2label": {"0": "a", "1": "a"}}, {}, "id2label is {'0': 'a', '1': 'a'}, not of the la"),
        ({"id2label": None}, {}, "classifier has 2 labels, not 3"),
        (
            {"problem_type": "multi_label_classification"},
            {},
            "is 'multi_label_classification', and",
        ),
        (MASKED_LM, {}, "tensor classifier.dense.bias has no place"),
        ({}, HEAD, "tensor classifier.dense.bias is missing"),
        ({}, {"roberta.more": np.ones(3)}, "tensor roberta.more has no place"),
        (
            {},
            {"roberta.encoder.layer.1.output.dense.weight": np.ones((24, 34), np.float32)},
            "roberta.encoder.layer.1.output.dense.weight has shape (24, 34), and config.json asks",
        ),
        ({"vocab_size": 60}, {}, "roberta.embeddings.word_embeddings.weight has shape (61, 24)"),
        (
            {"num_hidden_layers": 4},
            {},
            "tensor roberta.encoder.layer.3.attention.self.key.bias is missing",
        ),
    ],
)
def test_what_is_wrong_is_named(saved, tmp_path, fields, tensors, line):
    changed(saved, tmp_path, fields, tensors)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        hf_roberta.load_hf(tmp_path, labels=3)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_other_labels_than_there_are(saved, tmp_path):
    assert hf_roberta.load_hf(saved)[0] == SMALL
    with pytest.raises(UserError, match=r"config.json: its classifier has 3 labels, not 5"):
        hf_roberta.load_hf(saved, labels=5)
    changed(saved, tmp_path, MASKED_LM, HEAD)
    with pytest.raises(UserError, match="without a classifier"):
        hf_roberta.load_hf(tmp_path)
