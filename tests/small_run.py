"""A run of the example that is over in seconds: the model, the flags, what it tells."""

import pathlib

import numpy as np

from examples import llama, runs

SMALL = llama.LlamaConfig(300, 32, 48, heads=2, layers=2, kv_heads=1)
FLAGS = [
    *("--vocab-size", "300", "--seq-len", "16", "--batch-size", "4"),
    *("--lr", "0.03", "--log-every", "3", "--eval-batches", "2"),
]
GALORE = ["--rank", "4", "--update-proj-gap", "5"]


def metrics(name: str) -> list[dict]:
    return runs.read_metrics(pathlib.Path(name))


def write_texts() -> None:
    """A folder called texts, with something to learn in it."""
    folder = pathlib.Path("texts")
    folder.mkdir()
    words = ["alpha", "beta", "gamma", "delta", "while", "return"]
    for i in range(12):
        order = np.random.default_rng(i).integers(0, len(words), 300)
        (folder / f"{i}.txt").write_text(" ".join(words[j] for j in order))
