"""The cache against the whole forward pass; text from a run, and from a Hugging Face model."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples import (
    checkpoints,
    export,
    generate,
    hf,
    hf_config,
    llama,
    pretrain,
    rope,
    sampling,
)
from examples import data as data_lib
from examples import tokenizer as bpe
from examples.errors import UserError
from tests.examples.test_hf import STYLES, oracle
from tests.problems import once_but, run_with_devices
from tests.small_run import FLAGS, SMALL

SIZES = dict(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=11,  # The texts of the tests are longer.
)
EVERYWHERE = {"dynamic", "qwen3_window", "smollm3_window"}
# What a cache may get wrong, in each once.
GENERATED = (
    *("llama3", "llama3_tied", "dynamic", "yarn_mscale"),
    *("mistral", "qwen2_window", "qwen3_window", "smollm3_window"),
)


def config_of(name: str, **changes) -> llama.LlamaConfig:
    """The model of a style, small, with weights that make its logits differ."""
    kind, style = STYLES[name]
    fields = SIZES | {"model_type": kind.lower()} | style
    for per_layer in ("layer_types", "no_rope_layers"):
        if per_layer in fields:
            fields[per_layer] = fields[per_layer][:3]
    if fields.get("max_window_layers"):
        fields["max_window_layers"] = 1
    config = hf_config.config_from_hf(fields)
    return dataclasses.replace(config, init_scale=0.3, **changes)


def made(config: llama.LlamaConfig) -> tuple:
    """A model of the config, none of whose weights is 1 or 0, which would hide it."""
    graph, init = llama.initializer(config, 0)
    rng = np.random.default_rng(0)

    def weights(path, x):
        noise = config.init_scale * rng.standard_normal(x.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), x.dtype)

    return llama.from_graph(graph), jax.tree_util.tree_map_with_path(weights, jax.eval_shape(init))


def ids(batch: int = 2, length: int = 23) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 97, (batch, length))


@functools.partial(jax.jit, static_argnums=(0, 3))
def cached_logits(model_of, params, tokens, prompt):
    """Of a prompt of so many tokens, and then of one token after another."""
    model, (batch, time) = model_of(params), tokens.shape
    # Room that stays empty changes nothing, but where the length of the whole text counts.
    dynamic = isinstance(model.config.rope_scaling, rope.Dynamic)

    def extend(cache, part):
        x, cache = model.extend(part, cache)
        return cache, model.logits(x)

    cache, first = extend(
        model.empty_cache(batch, time if dynamic else time + 9), tokens[:, :prompt]
    )
    _, rest = jax.lax.scan(extend, cache, tokens[:, prompt:].T[:, :, None])
    return jnp.concatenate([first, rest[:, :, 0].swapaxes(0, 1)], axis=1)


# --- The cache ---


@pytest.mark.parametrize("name", once_but(EVERYWHERE, GENERATED))
def test_cached_logits_are_those_of_the_whole_text(name):
    model_of, params = made(config_of(name))
    whole = jax.jit(lambda p, x: model_of(p)(x))(params, ids())
    assert np.std(whole) > 0.3  # The comparison is of something.
    np.testing.assert_allclose(cached_logits(model_of, params, ids(), 4), whole, atol=1e-5)


@pytest.mark.slow
def test_cached_logits_in_bfloat16():
    model_of, params = made(config_of("qwen3_window", dtype="bfloat16", param_dtype="bfloat16"))
    cached = cached_logits(model_of, params, ids(), 4)
    assert cached.dtype == jnp.bfloat16
    whole = jax.jit(lambda p, x: model_of(p)(x))(params, ids())
    difference = np.abs(np.asarray(cached, np.float32) - np.asarray(whole, np.float32))
    assert difference.mean() < 0.01 * np.std(np.asarray(whole, np.float32))


@pytest.mark.slow
def test_a_prompt_in_blocks_of_queries():
    model_of, params = made(config_of("smollm3_window"))
    tokens = ids(1, 310)
    whole = jax.jit(lambda p, x: model_of(p)(x))(params, tokens)
    np.testing.assert_allclose(cached_logits(model_of, params, tokens, 300), whole, atol=1e-5)


# --- Drawing ---


def longer(model_of, params, prompt, count, **how):
    out = sampling.sample_ids(
        model_of, params, jnp.array(prompt), jax.random.key(0), count=count, **how
    )
    return out.tolist()


@functools.cache
def small():
    return made(dataclasses.replace(SMALL, vocab_size=97, init_scale=0.3))


def likeliest(model_of, params, prompt, count):
    """Greedy text, from the whole forward pass each time."""
    whole = jax.jit(lambda p, x: jnp.argmax(model_of(p)(x)[0], axis=-1))
    text = list(prompt)
    for _ in range(count):
        padded = jnp.array([text + [0] * (len(prompt) + count - len(text))])
        text.append(int(whole(params, padded)[len(text) - 1]))
    return text


def test_greedy_text_follows_the_model_and_stops():
    wanted = likeliest(*small(), [5, 6, 7], 12)
    assert longer(*small(), [5, 6, 7], 12, temperature=0) == wanted
    end = wanted[8]
    stop = wanted.index(end, 3) + 1
    cut = longer(*small(), [5, 6, 7], 12, temperature=0, ends=(1_000, end))
    assert cut == wanted[:stop] + [-1] * (15 - stop)


def test_drawn_as_often_as_it_is_likely():
    share = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
    keys = jax.random.split(jax.random.key(0), 4_000)

    def shares(*how):
        draw = jax.vmap(lambda key: sampling.drawn(jnp.log(share), key, *how))
        return np.bincount(jax.jit(draw)(keys), minlength=5) / len(keys)

    def among(*kept, power=1.0):
        left = np.where(np.isin(np.arange(5), kept), share**power, 0)
        return left / left.sum()

    for how, wanted in (
        ((0.5,), among(*range(5), power=2)),
        ((1.0, 1), among(1)),
        ((1.0, 9), among(*range(5))),
        ((1.0, None, 0.75), among(1, 2, 3)),
        ((1.0, None, 0.0), among(1)),
        ((1.0, 3, 0.8), among(1, 3)),  # 0.7 of what the three have is 0.82.
    ):
        np.testing.assert_allclose(shares(*how), wanted, atol=0.03, err_msg=str(how))


def test_a_seed_is_a_text():
    texts = [
        sampling.sample_ids(*small(), jnp.array([5]), jax.random.key(seed), count=20).tolist()
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert max(texts[0]) < 97 and min(texts[0]) >= 0


@pytest.mark.slow
def test_weights_on_a_mesh_give_the_same_text():
    run_with_devices(
        4,
        """
        import jax
        from examples import meshes
        from tests.examples.test_generate import longer, small
        model_of, params = small()
        mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        cut = jax.device_put(params, meshes.parameter_shardings(mesh, params))
        one, several = (longer(model_of, tree, [5, 6], 20) for tree in (params, cut))
        assert one == several
        """,
    )


# --- Against transformers ---


@pytest.mark.oracle
@pytest.mark.parametrize("name", once_but({"llama3"}, GENERATED))
def test_greedy_text_equals_transformers(name, tmp_path):
    model = oracle(name)
    import torch

    model.save_pretrained(tmp_path / "theirs")
    config, params = hf.load_hf(tmp_path / "theirs")
    # A dynamic one there turns each key by the length at its time, here by that of the text.
    length, count = (3, 8) if name == "dynamic" else (9, 20)
    tokens = ids(1, length)
    with torch.no_grad():
        theirs = model.generate(
            torch.from_numpy(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
        )
    graph, _ = llama.initializer(config, 0)
    params = jax.tree.map(jnp.asarray, params)
    ours = longer(llama.from_graph(graph), params, tokens[0], count, temperature=0)
    assert ours == theirs[0].tolist()


# --- The program ---


def said(capsys, *args: str) -> str:
    assert generate.main(args) == 0
    return capsys.readouterr().out


def run(*args: str) -> int:
    return pretrain.main(["--data", "texts", *FLAGS, "--optimizer", "adamw", "--steps", "6", *args])


def files(folder: str) -> dict:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


def test_weights_of_a_run_at_work(run_folder):
    """Of the newest checkpoint that is sound, and nothing in the folder changes."""
    whole = pathlib.Path("whole")
    shapes = {"table": jax.ShapeDtypeStruct((300, 300), jnp.float32)}
    with pretrain.runs.locked(pretrain.config_lib.read(whole)):
        before = files("whole")
        last = checkpoints.read_params(whole, shapes)["table"]
        assert files("whole") == before
        largest = max(whole.glob("checkpoints/12/state/**/*"), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
        before = files("whole")
        earlier = checkpoints.read_params(whole, shapes)["table"]
        assert files("whole") == before
    assert 0 < np.abs(last - earlier).max() < 1
    np.testing.assert_array_equal(earlier, bigram_table(whole, 8))
    wrong = {"table": jax.ShapeDtypeStruct((300, 301), jnp.float32)}
    with pytest.raises(UserError, match="8/state' does not load as the model of its run") as error:
        checkpoints.read_params(whole, wrong)
    assert "\n" not in str(error.value)
    for path in whole.glob("checkpoints/*/state/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"^FOLDER: no checkpoint in 'whole' is sound \(step 12: "):
        checkpoints.read_params(whole, shapes)
    shutil.rmtree(whole / "checkpoints")
    shutil.rmtree(whole / "checksums")
    with pytest.raises(UserError, match="'whole' has no checkpoint yet"):
        checkpoints.read_params(whole, shapes)


def bigram_table(run: pathlib.Path, step: int) -> np.ndarray:
    """By orbax alone, with all of the state."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((run / f"checkpoints/{step}/state").resolve())["params"][
            "table"
        ]


@pytest.mark.slow
def test_from_a_run_and_from_its_model(folder, capsys):
    assert run("--run-dir", "one", "--save-every", "3", "--sample-tokens", "9") == 0
    sample = capsys.readouterr().out.split("sample:\n")[1][:-1]
    data = data_lib.load(("texts",), vocab_size=300, seq_len=16, batch_size=4, seed=0)
    beginning = data.tokenizer.decode(data.opening())
    assert sample.startswith(beginning) and len(data.opening()) == 8
    flags = ["one", "--prompt", beginning, "--count", "9"]
    assert said(capsys, *flags) == sample + "\n"
    assert said(capsys, *flags, "--seed", "1") != sample + "\n"

    # The same weights as a model of Hugging Face.
    assert export.main(["one", "model"]) == 0
    assert "wrote model" in capsys.readouterr().out
    assert said(capsys, "model", *flags[1:]) == sample + "\n"
    assert pretrain.main(["--init-from", "model", "--steps", "0"]) == 2  # It is read that far.
    assert "--steps is 0" in capsys.readouterr().err
    assert export.main(["one", "model"]) == 2
    assert "there is something already" in capsys.readouterr().err
    assert export.main(["model", "other"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["config.json", "generation_config.json"])
def test_the_end_of_a_model_of_hugging_face(folder, capsys, ends):
    hf_model()
    flags = ["model", "--prompt", "a", "--count", "12", "--temperature", "0"]
    source = generate.load(pathlib.Path("model"))
    text = longer(
        source.model_of, source.params, generate.prompt_ids(source, "a"), 12, temperature=0
    )
    path = pathlib.Path("model") / ends
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(fields | {"eos_token_id": [1, text[-6]]}))
    stop = text.index(text[-6], len(text) - 12)
    assert said(capsys, *flags) == source.tokenizer.decode(text[:stop]) + "\n"


def hf_model() -> int:
    """A folder called model, with a tokenizer of a token more than the model has; how many."""
    tokenizer = bpe.train([path.read_text() for path in pathlib.Path("texts").iterdir()], 290)
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.get_vocab_size() - 1, init_scale=0.3)
    hf.save_hf("model", config, made(config)[1])
    pathlib.Path("model/tokenizer.json").write_text(tokenizer.to_str())
    return config.vocab_size


def test_special_tokens_of_a_model_of_hugging_face(folder):
    hf_model()
    source = generate.load(pathlib.Path("model"))
    end = source.tokenizer.token_to_id(bpe.END_OF_TEXT)
    assert generate.prompt_ids(source, f"a{bpe.END_OF_TEXT}")[-1] == end
    assert source.ends == (end,)


def test_mistakes_end_without_a_traceback(folder, capsys):
    size = hf_model()
    pathlib.Path("empty").mkdir()
    pathlib.Path("other").mkdir()
    pathlib.Path("other/config.json").write_text('{"model": 3}')

    def message(*args: str) -> str:
        try:
            code = generate.main(args)
        except SystemExit as stop:  # How tyro ends.
            code = stop.code
        assert code == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in err and not out
        return err

    for args, words in (
        (["missing", "--prompt", "a"], "error: FOLDER: there is no folder 'missing'"),
        (["empty", "--prompt", "a"], "error: FOLDER: 'empty' holds neither"),
        (["other", "--prompt", "a"], "error: FOLDER: 'other' holds neither"),
        (["model", "--prompt", ""], "error: --prompt is empty"),
        (["model", "--prompt", "a", "--count", "0"], "error: --count is 0: give at least 1."),
        (["model", "--prompt", "a", "--temperature", "-1"], "error: --temperature is -1.0: give"),
        (["model", "--prompt", "a", "--temperature", "nan"], "error: --temperature is nan: give"),
        (["model", "--prompt", "a", "--top-k", "0"], "error: --top-k is 0: give at least 1."),
        (["model", "--prompt", "a", "--top-p", "90"], "error: --top-p is 90.0: give at least 0, a"),
        (["model"], "--prompt"),
        (["--prompt", "a"], "FOLDER"),
    ):
        text = message(*args)
        assert words in text and (text.count("\n") == 1 or "error:" not in words), text

    unknown = generate.load(pathlib.Path("model")).tokenizer.decode([size])
    assert f"and the model has {size}" in message("model", "--prompt", unknown)
    pathlib.Path("model/tokenizer.json").unlink()
    assert "tokenizer.json: not a tokenizer's file" in message("model", "--prompt", "a")


def test_a_prompt_that_is_empty_is_refused_before_the_training(folder, capsys):
    assert run("--prompt", "") == 2
    assert capsys.readouterr().err.startswith("error: --prompt is empty")


@pytest.mark.parametrize(
    ("stream", "opening"),
    [
        ([0, 0, 5, 6, 0, 7, 8, 9, 0], [5, 6]),
        ([5, 6, 7, 8, 9, 1, 2, 3, 4, 0], [5, 6, 7, 8, 9, 1, 2, 3]),
        ([0, 0, 0], [0]),
    ],
)
def test_a_sample_begins_as_a_validation_document(stream, opening):
    data = data_lib.Data(None, 0, None, np.array(stream, np.uint32), None)
    assert data.opening() == opening
