"""Checkpoints of Hugging Face against transformers, and what is wrong with them in one line."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import galore_jax
from examples import command_line, hf, hf_files, llama, pretrain, rope, training
from examples import data as data_lib
from examples import tokenizer as bpe
from examples.errors import UserError
from tests.problems import once_but, run_with_devices
from tests.small_run import metrics

safetensors_numpy = pytest.importorskip("safetensors.numpy")

SIZES = dict(
    vocab_size=97,
    hidden_size=60,
    intermediate_size=44,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=11,  # The texts of the tests are longer.
)
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0},
    **{"original_max_position_embeddings": 16},
}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 7}
SLIDING = ["sliding_attention", "full_attention", "full_attention"]
# By the class of transformers' config. Each real model has a line, and each option another.
STYLES = {
    "llama2": ("Llama", {"num_key_value_heads": 6}),
    "llama3": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 14}),
    "llama3_tied": ("Llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-5}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.5}}),
    "yarn": ("Llama", {"rope_scaling": YARN}),
    "yarn_mscale": ("Llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}}),
    "yarn_given": (
        "Llama",
        {"rope_scaling": YARN | {"attention_factor": 0.9, "beta_fast": 5, "truncate": False}},
    ),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 14}),
    "mistral_full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 14, "tie_word_embeddings": True}),
    "qwen3_window": (
        "Qwen3",
        {
            **{"head_dim": 14, "attention_bias": True, "use_sliding_window": True},
            **{"sliding_window": 5, "layer_types": ["full_attention", *SLIDING, SLIDING[0]]},
        },
    ),
    "smollm3": ("SmolLM3", {}),
    "smollm3_window": (
        "SmolLM3",
        {
            **{"use_sliding_window": True, "sliding_window": 5, "mlp_bias": True},
            **{"no_rope_layers": [0, 1, 1, 0, 1], "attention_bias": True},
        },
    ),
}


def ids(length: int = 23) -> np.ndarray:
    return np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, length))


def logits(config: llama.LlamaConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    graph, _ = llama.initializer(config, 0)
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(jax.jit(nnx.merge(graph, params).__call__)(tokens), np.float32)


def oracle(name: str, dtype: str = "float32"):
    """A model of transformers with random weights: none is 1 or 0, which would hide it."""
    torch = pytest.importorskip("torch", reason="needs the oracles extra")
    transformers = pytest.importorskip("transformers", reason="needs the oracles extra")
    kind, changes = STYLES[name]
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = getattr(transformers, f"{kind}Config")(**SIZES | tokens | changes)
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype))


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.float()(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.oracle
@pytest.mark.parametrize("name", once_but({"llama3", "smollm3_window"}, STYLES))
def test_logits_equal_transformers_both_ways(name, tmp_path):
    model = oracle(name)
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf.load_hf(tmp_path / "theirs")
    expected = their_logits(model, ids())
    np.testing.assert_allclose(logits(config, params, ids()), expected, atol=1e-4)
    assert np.std(expected) > 0.3  # The comparison is of something.

    hf.save_hf(tmp_path / "ours", config, params, file_bytes=30_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    again = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_allclose(their_logits(again, ids()), expected, atol=1e-6)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "smollm3"])
def test_bfloat16_in_several_files(name, tmp_path):
    model = oracle(name, "bfloat16")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / hf_files.INDEX).exists()
    config, params = hf.load_hf(tmp_path / "theirs")
    assert config.param_dtype == config.dtype == "bfloat16"
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    hf.save_hf(tmp_path / "ours", config, params)
    again = type(model).from_pretrained(tmp_path / "ours", dtype="bfloat16")
    for key, value in again.state_dict().items():
        assert (value == model.state_dict()[key]).all(), key
    # The weights are rounded, and the same: computed in float32 so are the logits.
    config, params = hf.load_hf(tmp_path / "theirs", "float32")
    wide = type(model).from_pretrained(tmp_path / "ours", dtype="float32")
    expected = their_logits(wide.eval(), ids())
    np.testing.assert_allclose(logits(config, params, ids()), expected, atol=1e-4)


# --- Without transformers ---

PLAIN = llama.LlamaConfig(97, 30, 44, heads=3, layers=3, kv_heads=1)
EVERYTHING = llama.LlamaConfig(
    **{"vocab_size": 97, "hidden": 30, "intermediate": 44, "heads": 3, "layers": 3},
    **{"kv_heads": 1, "head_dim": 14, "tied": True, "rope_theta": 500.0},
    rope_scaling=rope.Yarn(4.0, 32, beta_fast=16),
    max_positions=128,
    rope_layers=(True, False, True),
    sliding_window=5,
    sliding_layers=(False, True, True),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    activation="relu",
    norm_eps=1e-5,
    init_scale=0.1,
)


def weights(config: llama.LlamaConfig) -> dict:
    shapes = jax.eval_shape(llama.initializer(config, 0)[1])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("hf") / "saved"
    hf.save_hf(folder, PLAIN, weights(PLAIN))
    return folder


def copied(saved: pathlib.Path, tmp_path: pathlib.Path, **changes) -> pathlib.Path:
    """The checkpoint with other fields in its config; None takes one away."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {k: v for k, v in fields.items() if k not in changes or v is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("config", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(config, dtype, tmp_path):
    config = dataclasses.replace(config, param_dtype=dtype, dtype=dtype)
    params = weights(config)
    hf.save_hf(tmp_path / "one", config, params)
    hf.save_hf(tmp_path / "several", config, params, file_bytes=9_000)
    assert [p.name for p in tmp_path.glob("*/*.safetensors") if "of" not in p.name] == [
        hf_files.WEIGHTS
    ]
    for name in ("one", "several"):
        read, back = hf.load_hf(tmp_path / name)
        assert dataclasses.replace(read, kv_heads=config.kv_heads, head_dim=None) == (
            dataclasses.replace(config, head_dim=None)
        )
        assert read.head_dim == config.head_size
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_checkpoint_in_another_dtype(saved):
    config, params = hf.load_hf(saved, "bfloat16")
    assert config.param_dtype == config.dtype == "bfloat16"
    exact = hf.load_hf(saved)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), params, exact)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is none of the known ones, llama, mistral"),
        ({"model_type": None}, "model_type is missing"),
        ({"architectures": ["LlamaModel"]}, "architectures is ['LlamaModel']"),
        ({"num_experts": 8}, "num_experts is a field that is not known of 'llama'"),
        ({"sliding_window": 7}, "sliding_window is a field that is not known of 'llama'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, which"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, which the model has no place for"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "30"}, "hidden_size is '30', not of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, less than 1"),
        ({"num_key_value_heads": 2}, "heads=3 must be a multiple of kv_heads=2"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is none of silu, relu"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling: rope_type 'longrope' is none"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}},
            "rope_scaling: beta is a field that is not known of 'linear'",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
            "layer_types has 'sliding_attention', without a sliding_window that is used",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["linear_attention"] * 3},
            "layer_types must have 'sliding_attention' or 'full_attention' for 3 layers",
        ),
        ({"num_hidden_layers": 4}, "tensor model.layers.3.self_attn.k_proj.weight is missing"),
        ({"num_hidden_layers": 2}, "tensor model.layers.2.input_layernorm.weight has no place"),
        ({"vocab_size": 98}, "tensor model.embed_tokens.weight has shape (97, 30)"),
        ({"tie_word_embeddings": True}, "tensor lm_head.weight is not the embedding"),
    ],
)
def test_wrong_config(saved, tmp_path, changes, line):
    if changes.get("model_type"):
        changes = {"architectures": None} | changes
    folder = copied(saved, tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        hf.load_hf(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def damage(folder: pathlib.Path, kind: str) -> None:
    path = folder / hf_files.WEIGHTS
    if kind == "no folder":
        for file in folder.iterdir():
            file.unlink()
    elif kind == "no weights":
        path.unlink()
    elif kind == "config":
        (folder / "config.json").write_text('{"model_type": "lla')
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "header":
        path.write_bytes(b"no safetensors, whatever it is called")
    elif kind == "integers":
        tensors = safetensors_numpy.load_file(path)
        name = "model.norm.weight"
        safetensors_numpy.save_file(tensors | {name: tensors[name].astype(np.int8)}, path)
    else:
        where = dict.fromkeys(safetensors_numpy.load_file(path), "part.safetensors")
        path.rename(folder / "part.safetensors")
        if kind == "index names more":
            where["more"] = "part.safetensors"
        elif kind == "index names less":
            del where["lm_head.weight"]
        elif kind == "index leaves":
            where["lm_head.weight"] = "../part.safetensors"
        else:
            where["lm_head.weight"] = "other.safetensors"
        (folder / hf_files.INDEX).write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("no folder", "config.json: No such file or directory"),
        ("no weights", "model.safetensors: there is no such file"),
        ("config", "config.json: not JSON"),
        ("truncated", "model.safetensors: damaged"),
        ("header", "model.safetensors: damaged"),
        ("integers", "tensor model.norm.weight is in I8, none of F16, BF16, F32"),
        ("index names more", "part.safetensors: more is missing, which the index puts there"),
        ("index names less", "part.safetensors: lm_head.weight is not in model.safetensors.index"),
        ("index leaves", "lm_head.weight is in '../part.safetensors', which is no name of a file"),
        ("index: file", "other.safetensors: there is no such file"),
    ],
)
def test_damaged_files(saved, tmp_path, kind, line):
    folder = copied(saved, tmp_path)
    damage(folder, kind)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        hf.load_hf(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_nothing_half_written(tmp_path, monkeypatch):
    params = weights(PLAIN)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_numpy, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        hf.save_hf(tmp_path / "new", PLAIN, params)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    with pytest.raises(UserError, match="something already"):
        hf.save_hf(tmp_path / "old", PLAIN, params)
    with pytest.raises(UserError, match="params: lm_head/kernel is missing"):
        hf.save_hf(tmp_path / "new", PLAIN, {k: v for k, v in params.items() if k != "lm_head"})
    with pytest.raises(UserError, match="params: more has no place"):
        hf.save_hf(tmp_path / "new", PLAIN, params | {"more": np.ones(3)})


def test_what_no_architecture_has(tmp_path):
    config = dataclasses.replace(PLAIN, qk_norm=True, rope_layers=(True, False, True))
    with pytest.raises(UserError, match="has qk_norm, rope_layers together"):
        hf.save_hf(tmp_path / "new", config, weights(config))


MEMORY = """
import pathlib, re, sys
from examples import hf
def peak():  # Not of getrusage, which begins with the parent's.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])
config, folder = hf.read_config(sys.argv[1]), pathlib.Path(sys.argv[1])
list(hf._leaves(config))  # What JAX itself takes.
before = peak()
params = hf.load_hf(folder)[1]
size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
print((peak() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="Linux says it")
@pytest.mark.parametrize("file_bytes", [2**26])
def test_memory_of_loading(tmp_path, file_bytes):
    config = llama.LlamaConfig(8000, 512, 1376, heads=8, layers=16, param_dtype="bfloat16")
    params = jax.tree.map(
        lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(llama.initializer(config, 0)[1])
    )
    wide = jax.tree.map(lambda x: x.astype(np.float32), params)
    hf.save_hf(tmp_path / "saved", config, wide, file_bytes)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.9 < float(done.stdout) < 1.2


# --- Training ---

VARIED = dataclasses.replace(EVERYTHING, vocab_size=300, max_positions=16, init_scale=0.3)


@pytest.mark.slow
def test_layers_that_differ_layer_by_layer():
    config = dataclasses.replace(VARIED, qk_norm=True, tied=False)
    # Two kernels, for a shorter program: it is the layers that differ.
    tx = galore_jax.galore_adamw(
        0.01,
        rank=4,
        weight_dimension_numbers=galore_jax.last_two_axes,
        method="svd",
        exclude="^(?!.*(attention/q|mlp/up)/kernel)",
    )
    states = {}
    for name in ("full", "layerwise"):
        graph, init = llama.initializer(dataclasses.replace(config, remat=name == "layerwise"), 0)
        step = training.make_train_step(llama.from_graph(graph), tx, lambda _: 0.01, tier=name)
        state = training.new_state(init(), tx)
        for i in range(2):
            rows = np.random.default_rng(i).integers(0, config.vocab_size, (2, 14), np.int32)
            state, figures = step(state, jnp.asarray(rows))
        states[name] = state["params"], figures["loss"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *states.values())


def checkpoint(folder: pathlib.Path) -> None:
    """A model called `model`, with a tokenizer whose end of text is no one else's."""
    texts = [path.read_text() for path in sorted((folder / "texts").iterdir())]
    hf.save_hf(folder / "model", VARIED, jax.tree.map(lambda x: x / 5, weights(VARIED)))
    (folder / "model" / "tokenizer.json").write_text(bpe.train(texts, 290).to_str())
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [295, 3]}))


def test_vocabulary_of_a_checkpoint(folder):
    checkpoint(folder)
    vocabulary = bpe.of_checkpoint("model", 300)
    assert vocabulary.end == 295
    assert bpe.encode(vocabulary.tokenizer, "alpha")[-1] != 295
    assert bpe.encode(vocabulary.tokenizer, "alpha", vocabulary.end)[-1] == 295
    with pytest.raises(UserError, match=r"tokenizer.json: it has \d+ tokens, and the model 50"):
        bpe.of_checkpoint("model", 50)
    (folder / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"--init-from: model/tokenizer.json: not a tokenizer's"):
        bpe.of_checkpoint("model", 300)


FLAGS = [
    *("--init-from", "model", "--data", "texts", "--seq-len", "16", "--batch-size", "8"),
    *(
        "--lr",
        "0",
        "--steps",
        "4",
        "--optimizer",
        "adamw",
        "--sample-tokens",
        "3",
        "--run-dir",
        "run",
    ),
]


def test_a_checkpoint_has_a_recipe_of_its_own(folder, capsys):
    checkpoint(folder)
    given = ["--init-from", "model"]
    config = command_line.parse(given)
    command_line.check(config)
    assert (config.model, config.learning_rate, config.rank) == ("checkpoint", 2e-4, 0.25)
    config = command_line.parse([*given, "--recipe", "16gb", "--steps", "50"])
    command_line.check(config)
    assert (config.optimizer, config.rank, config.warmup) == ("galore_muon8bit", 1 / 16, 5)
    assert (config.learning_rate, config.param_dtype, config.tier) == (
        4e-4,
        "bfloat16",
        "layerwise",
    )
    assert command_line.parse([*given, "--model", "60m"]).learning_rate == 0.01
    assert pretrain.main(["--model", "checkpoint"]) == 2
    assert "--init-from FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_pretrain_continues_a_checkpoint(folder, capsys):
    checkpoint(folder)
    assert pretrain.main([*FLAGS, "--vocab-size", "301"]) == 2
    assert "the checkpoint of --init-from has 300" in capsys.readouterr().err
    assert pretrain.main([*FLAGS, "--stop-at", "2"]) == 0
    assert pretrain.main(["--resume", "run"]) == 0
    assert "model: model, " in capsys.readouterr().out
    # At a learning rate of 0 the last loss is the checkpoint's own.
    config, params = hf.load_hf("model")
    graph, _ = llama.initializer(config, 0)
    data = data_lib.load(
        **{"paths": ["texts"], "vocab_size": 300, "seq_len": 16, "batch_size": 8, "seed": 0},
        vocabulary=bpe.of_checkpoint("model", 300),
    )
    expected = training.evaluate(
        training.make_eval_step(llama.from_graph(graph)),
        params,
        data_lib.validation_batches(data.validation, 16, 8),
    )
    last = metrics("run")[-1]
    assert last["step"] == 4
    np.testing.assert_allclose(last["val_loss"], expected["val_loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_goes_onto_a_mesh(folder):
    checkpoint(folder)
    run_with_devices(
        4,
        """
        import jax, numpy as np, optax
        from examples import hf, llama, meshes
        config, params = hf.load_hf("model")
        graph, init = llama.initializer(config, 0)
        tx, ids = optax.sgd(0.1, momentum=0.9), np.arange(40).reshape(4, 10)
        types = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=types)
        wanted = meshes.abstract_state(mesh, jax.eval_shape(init), tx)
        where = jax.tree.map(lambda x: x.sharding, wanted)
        state = meshes.new_state(init, tx, where, lambda: params)
        assert jax.tree.map(lambda x: x.sharding, state) == where
        jax.tree.map(np.testing.assert_array_equal, state["params"], params)
        losses = jax.jit(lambda p, x: llama.from_graph(graph)(p).losses(x[:, :-1], x[:, 1:]))
        cut = losses(state["params"], meshes.place(mesh, ids))
        np.testing.assert_allclose(cut, losses(params, ids), rtol=1e-5)
        """,
    )
