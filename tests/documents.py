"""README and guides, run: what their pages take as given, and their shell blocks in short.

    pytest README.md docs --dist loadfile

A page's blocks run from top to bottom in one namespace and one folder. `conftest.py` at the root
collects them. What a page does not say, since every reader has it (`params`, a folder with a
model), it makes in a comment that is not shown.
"""

import glob
import importlib
import json
import os
import pathlib
import re
import shlex
import tempfile
import tomllib

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).parents[1]

_QUICK = ["--log-every", "1", "--batch-size", "4"]
# Flags that make a command short; they come last, so those of the page are read and replaced.
SHORT = {
    "examples.pretrain": [
        *("--model", "tiny", "--data", "texts", "--vocab-size", "300", "--seq-len", "16"),
        *("--steps", "2", "--rank", "4", "--update-proj-gap", "2", "--eval-batches", "1"),
        *("--sample-tokens", "0", "--cache-dir", "cache", *_QUICK),
    ],
    "examples.finetune": [
        *("--data", "rows.jsonl", "--eval-data", "rows.jsonl", "--max-length", "16", *_QUICK),
        *("--epochs", "1"),
    ],
    "examples.generate": ["--count", "4"],
}


def bash(example) -> None:
    """The evaluator of shell blocks: our own programs run in this process, which is quicker.

    Environments are made, and their tests run, by continuous integration.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for command in re.split(r"\n|&&", example.parsed.replace("\\\n", " ")):
        match shlex.split(command, comments=True):
            case []:
                continue
            case ["pip", "install", "-e", what]:
                asked = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
                assert asked, f"pip install of {what}"
                assert set((asked[1] or "test").split(",")) <= extras, what
            case ["pytest", *_] | ["sphinx-build", *_]:
                continue
            case ["python", "-m", module, *args]:
                found = [sorted(glob.glob(x)) or [x] for x in args]
                args = [x for several in found for x in several] + example.namespace.get(
                    "short", SHORT
                ).get(module, [])
                code = importlib.import_module(module).main(args)
                assert not code, f"{command} ended with {code}"
            case words:
                raise AssertionError(f"a shell block has {words}, which is not known here")


def setup(namespace: dict) -> None:
    """A folder of its own for a page, in which the model called tiny is smaller."""
    from examples import llama
    from tests.small_run import SMALL, write_texts

    namespace["_before"] = os.getcwd(), llama.CONFIGS["tiny"]
    namespace["_folder"] = tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)
    llama.CONFIGS["tiny"] = SMALL
    write_texts()


def teardown(namespace: dict) -> None:
    from examples import llama

    folder, tiny = namespace["_before"]
    os.chdir(folder)
    llama.CONFIGS["tiny"] = tiny
    namespace["_folder"].cleanup()


# --- What pages take as given ---


def params() -> dict:
    """Two stacked blocks, an embedding and a head, as the examples name them."""
    return {
        "embed": {"embedding": jnp.ones((32, 16)) / 9},
        "blocks": {
            "attn": {"q": {"kernel": jnp.ones((2, 16, 16)) / 9}},
            "mlp": {"kernel": jnp.ones((2, 16, 16)) / 9, "bias": jnp.zeros((2, 16))},
            "norm": {"scale": jnp.ones((2, 16))},
        },
        "lm_head": {"kernel": jnp.ones((16, 32)) / 9},
    }


def embed(params, tokens) -> jax.Array:
    return params["embed"]["embedding"][tokens]


def block(params, x) -> jax.Array:
    x = x * params["norm"]["scale"] + x @ params["attn"]["q"]["kernel"]
    return x + jnp.tanh(x @ params["mlp"]["kernel"] + params["mlp"]["bias"])


def head_loss(params, x, tokens) -> jax.Array:
    logits = x @ params["lm_head"]["kernel"]
    own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - own)


def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(0), (4, 8), 0, 32)


def write_llama(folder: str) -> None:
    """A small model of Hugging Face, with its tokenizer."""
    from examples import hf, llama
    from examples import tokenizer as bpe
    from examples.llama_config import LlamaConfig

    texts = [path.read_text() for path in sorted(pathlib.Path("texts").iterdir())]
    tokenizer = bpe.train(texts, 300)
    config = LlamaConfig(tokenizer.get_vocab_size(), hidden=24, intermediate=40, heads=2, layers=2)
    hf.save_hf(folder, config, llama.create(config, 0)[1])
    (pathlib.Path(folder) / "tokenizer.json").write_text(tokenizer.to_str())


def write_encoder(folder: str) -> None:
    """A small RoBERTa."""
    from benchmarks.finetune import write_model
    from examples.roberta_config import RobertaConfig

    texts = [path.read_text() for path in sorted(pathlib.Path("texts").iterdir())]
    config = RobertaConfig(
        vocab_size=300, hidden=24, intermediate=40, heads=2, layers=2, max_positions=50
    )
    write_model(pathlib.Path(folder), config, texts)


def write_rows(path: str, **columns: list) -> None:
    """A jsonl file of columns of one length."""
    rows = (
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    )
    pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
