"""Text from a model: `python -m examples.generate FOLDER --prompt "Once upon"`.

The folder is that of a run of `examples.pretrain`, also of one that is at work, or of a model of
Hugging Face. A run's prompt is text and nothing else; in that of a Hugging Face model special
tokens may be written out, and those that a text begins with come before it.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
import tyro

import galore_jax
from examples import checkpoints, command_line, hf, llama, pretrain, sampling, training
from examples import config as config_lib
from examples import tokenizer as bpe
from examples.errors import UserError, exit_code
from examples.files import read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to generate, and from what."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder of a run, whose newest checkpoint is taken, or of a Hugging Face model."""
    prompt: str
    """Beginning of the text."""
    count: int = 100
    """Most tokens to add; fewer where the text ends."""
    temperature: float = 0.8
    """Above 1 for more variety, below for less; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens; by default from all."""
    top_p: float | None = None
    """Draw from as few of the likeliest tokens as have this probability together."""
    seed: int = 0
    """Of the drawing."""


class Source(NamedTuple):
    """A model, and how texts become its tokens."""

    model_of: training.ModelOf
    params: dict
    vocab_size: int
    tokenizer: tokenizers.Tokenizer
    ends: tuple[int, ...]  # Of a text.
    beginning: bool  # Whether the tokenizer's own tokens begin a text.


def of_run(folder: pathlib.Path) -> Source:
    """The newest checkpoint of a run, on one device."""
    config = dataclasses.replace(config_lib.read(folder, "FOLDER"), mesh="")
    model_of, init = pretrain.initializer(config)
    tokenizer, end = (
        bpe.of_checkpoint(config.init_from, config.vocab_size)
        if config.init_from
        else bpe.own(bpe.read(folder))
    )
    tokenizer.encode_special_tokens = True  # As in the training.
    params = checkpoints.read_params(folder, jax.eval_shape(init))
    params = galore_jax.dequantize_weights(params)  # Once, not for every token.
    return Source(model_of, params, config.vocab_size, tokenizer, (end,), beginning=False)


def of_hf(folder: pathlib.Path) -> Source:
    """A model of Hugging Face."""
    config, params = hf.load_hf(folder)
    graph, _ = llama.initializer(config, 0)
    tokenizer, ends = bpe.read(folder), []
    for name in ("generation_config.json", "config.json"):
        if not ends and (folder / name).exists():
            ends = bpe.eos_ids(folder / name)
    ends = ends or [tokenizer.token_to_id(bpe.END_OF_TEXT)]
    return Source(
        llama.from_graph(graph),
        jax.tree.map(jnp.asarray, params),
        config.vocab_size,
        tokenizer,
        tuple(end for end in ends if isinstance(end, int)),
        beginning=True,
    )


def load(folder: pathlib.Path) -> Source:
    """The model in a folder of either kind."""
    if not folder.is_dir():
        raise UserError(f"FOLDER: there is no folder {str(folder)!r}. Give that of a run or model.")
    path = folder / "config.json"
    fields = read_json(path) if path.exists() else {}
    if "model_type" in fields:
        return of_hf(folder)
    if "format" in fields:
        return of_run(folder)
    raise UserError(
        f"FOLDER: {str(folder)!r} holds neither a run of examples.pretrain nor a model of Hugging"
        " Face (their config.json has a format, or a model_type). Give the folder of one."
    )


def prompt_ids(source: Source, prompt: str) -> list[int]:
    """The tokens of a prompt, all of which the model knows."""
    ids = source.tokenizer.encode(prompt, add_special_tokens=source.beginning).ids
    if not ids:
        raise UserError(f"--prompt {prompt!r} has no tokens. Give the beginning of a text.")
    if (largest := max(ids)) >= source.vocab_size:
        raise UserError(
            f"--prompt: {source.tokenizer.id_to_token(largest)!r} is token {largest}, and the model"
            f" has {source.vocab_size}. Leave it out."
        )
    return ids


def check(options: Options) -> None:
    """Refuses what cannot work, each by its flag."""
    if not options.prompt:
        raise UserError("--prompt is empty. Give the beginning of a text.")
    for name, smallest, largest in (
        *(("count", 1, math.inf), ("top_k", 1, math.inf), ("seed", 0, 2**32 - 1)),
        *(("temperature", 0, math.inf), ("top_p", 0, 1)),
    ):
        value = getattr(options, name)
        if value is not None and not smallest <= value <= largest:
            most = f", at most {largest}" if largest < math.inf else ""
            raise UserError(
                f"{command_line.flag(name)} is {value}: give at least {smallest}{most}."
            )


def generate(options: Options) -> str:
    """The prompt and what follows."""
    check(options)
    source = load(pathlib.Path(options.folder))
    return sampling.sample_text(
        source.model_of,
        source.params,
        source.tokenizer,
        prompt_ids(source, options.prompt),
        count=options.count,
        ends=source.ends,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )


def main(args: Sequence[str] | None = None) -> int:
    """The command line: 0 for success, 2 for a mistake of the user."""
    options = tyro.cli(
        Options, args=args, prog="python -m examples.generate", description="Text from a model."
    )
    return exit_code(lambda: print(generate(options)))


if __name__ == "__main__":
    sys.exit(main())
