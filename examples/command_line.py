"""The command line: what stands where no flag is given, and what cannot work."""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from examples import config as config_lib
from examples import hf, llama, optimizers
from examples.config import Config
from examples.errors import UserError

SMALLEST = {  # Of the numbers, where it is not 1.
    **{"seq_len": 2, "warmup": 0, "clip": 0, "weight_decay": 0, "sample_tokens": 0},
    **{"process_id": 0, "seed": 0, "learning_rate": 0, "scale": 0},
    **{"embedding_learning_rate": 0, "random_from": 0, "skip_nonfinite": 0, "rank": 0},
}


def flag(field: str) -> str:
    """A field's name on the command line."""
    return "--" + field.replace("_", "-")


def check_numbers(config: Any, smallest: Mapping[str, float]) -> None:
    """Refuses numbers that are too small, each by its flag; the least is 1 but for those given."""
    for name, value in config_lib.in_order(config).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not value >= smallest.get(name, 1):
            raise UserError(f"{flag(name)} is {value}: give at least {smallest.get(name, 1)}.")


def check_rank(rank: float) -> None:
    """Refuses what is neither a rank nor a share of a side."""
    if rank <= 0 or (rank >= 1 and rank != int(rank)):
        raise UserError(f"--rank is {rank}: give at least 1, or a share of a side below 1.")


def refuse_changed(before: Any, now: Any) -> None:
    """Refuses a setting that a run to resume has otherwise, and keeps to its end."""
    for name in config_lib.changed(before, now):
        was, given = getattr(before, name), getattr(now, name)
        raise UserError(
            f"{flag(name)}: the run to resume has {was!r}, not {given!r}. Leave {flag(name)} out,"
            " or start a new run."
        )


def check(config: Config) -> None:
    """Refuses settings that cannot work, each by its flag."""
    check_numbers(config, SMALLEST)
    check_rank(config.rank)
    if config.batch_size % config.accumulate:
        raise UserError(
            f"--accumulate {config.accumulate} does not divide --batch-size"
            f" {config.batch_size}. Change one of them."
        )
    if config.warmup >= config.steps:
        raise UserError(
            f"--warmup {config.warmup} leaves none of --steps {config.steps}. Give a smaller"
            " --warmup."
        )
    if config.prompt == "":
        raise UserError("--prompt is empty: give the beginning of a text, or leave it out.")
    _check_taken(config)
    _check_devices(config)
    size = hf.read_config(config.init_from).vocab_size if config.init_from else config.vocab_size
    if size != config.vocab_size:
        raise UserError(
            f"--vocab-size {config.vocab_size}: the checkpoint of --init-from has {size}. Leave it"
            " out."
        )
    if config.optimizer == "optax_galore" and config.rank < 1:
        raise UserError(f"--rank {config.rank}: --optimizer optax_galore takes no share of a side.")
    if config.moments not in (None, "keep") and config.optimizer.endswith("8bit"):
        raise UserError(
            f"--moments {config.moments}: --optimizer {config.optimizer} cannot change its 8-bit"
            " moments at a refresh. Give --moments keep, or another --optimizer."
        )
    if config.tier == "subspace" and config.optimizer not in optimizers.IN_SUBSPACE:
        raise UserError(
            f"--tier subspace: --optimizer {config.optimizer} needs full gradients. Give one of"
            f" {', '.join(optimizers.IN_SUBSPACE)}, or another --tier."
        )
    if config.optimizer == "scale_sgd" and config.embedding_learning_rate is not None:
        raise UserError(
            "--embedding-learning-rate: --optimizer scale_sgd has rules of its own for embeddings"
            " and head. Leave one of them out."
        )
    if config.tier == "layerwise" and config.accumulate > 1:
        raise UserError(
            f"--tier layerwise takes a batch as one, not in --accumulate {config.accumulate}"
            " microbatches: a layer's weights change before the next one would need them. Give"
            " --accumulate 1 and a --batch-size that fits, or --tier subspace."
        )
    if config.tier == "layerwise" and optimizers.OPTIMIZERS[config.optimizer].whole_stacks:
        raise UserError(
            f"--tier layerwise: --optimizer {config.optimizer} needs the gradient of all layers."
            " Give another --optimizer, or --tier full or subspace."
        )
    if config.stochastic_rounding and config.param_dtype == "float32":
        raise UserError(
            "--stochastic-rounding is for bfloat16 and int8 weights, not --param-dtype float32."
            " Give another --param-dtype, or leave it out."
        )
    if config.param_dtype == "int8" and (config.tier == "full" or config.mesh):
        raise UserError(
            f"--param-dtype int8: codes have no gradient, so --tier {config.tier} has to be"
            " subspace or layerwise, on one device. Give one of them, without --mesh, or"
            " --param-dtype bfloat16."
        )


def _check_devices(config: Config) -> None:
    processes, process_id = numbers = config.processes, config.process_id
    by_hand = config.coordinator not in (None, "auto")
    if by_hand != (None not in numbers) or (not by_hand and numbers != (None, None)):
        raise UserError(
            "--coordinator HOST:PORT, --processes and --process-id go together; with --coordinator"
            f" {config.coordinator} --processes is {processes} and --process-id {process_id}."
        )
    if processes is not None and process_id is not None and process_id >= processes:
        raise UserError(
            f"--process-id {process_id}: with --processes {processes} they go from 0 to"
            f" {processes - 1}."
        )
    if config.grad_norm == "subspace" and config.tier != "subspace":
        raise UserError(
            f"--grad-norm subspace: --tier {config.tier} has whole gradients. Leave it out, or give"
            " --tier subspace."
        )


def _check_taken(config: Config) -> None:
    """Refuses a setting that the optimizer does not take, where it is not the recipe's."""

    def taken(name: str, optimizer: optimizers.Optimizer) -> bool:
        if name == "weight_decay":
            return optimizer.decays
        return ("method" if name == "random_from" else name) in optimizer.options

    recipe = config_lib.from_recipe(
        config.model,
        config.optimizer,
        config.steps,
        config.batch_size,
        config.recipe,
        vocab_size=config.vocab_size,
    )
    for name in (*optimizers.GALORE, "random_from", "weight_decay"):
        value = getattr(config, name)
        given = value != getattr(recipe, name)
        if given and not taken(name, optimizers.OPTIMIZERS[config.optimizer]):
            other = next(k for k, o in optimizers.OPTIMIZERS.items() if taken(name, o))
            raise UserError(
                f"{flag(name)} {value}: --optimizer {config.optimizer} has no use for it. Leave it"
                f" out, or give another --optimizer, such as {other}."
            )


def defaults(args: Sequence[str]) -> Config:
    """What the flags not given stand at: the run's to resume, or the model's recipe.

    So `--help` shows them as they are: `--model 60m --help` prints the recipe of 60m.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--resume", "--model", "--recipe", "--optimizer", "--steps"):
        first.add_argument(name, nargs="?")
    first.add_argument("--batch-size", "--batch_size", nargs="?")
    first.add_argument("--init-from", "--init_from", nargs="?")
    first.add_argument("--param-dtype", "--param_dtype", nargs="?")
    known, _ = first.parse_known_args(args)
    if known.resume:
        saved = config_lib.read(pathlib.Path(known.resume))
        alone = {"coordinator": None, "processes": None, "process_id": None}
        return dataclasses.replace(saved, stop_at=None, run_dir=known.resume, **alone)

    def number(text: str | None) -> int | None:
        return int(text) if text and text.isdigit() else None

    size = hf.read_config(known.init_from).vocab_size if known.init_from else None
    usual = "checkpoint" if known.init_from else "tiny"
    if known.model == "checkpoint" and size is None:
        raise UserError("--model checkpoint: give the checkpoint's folder, --init-from FOLDER.")
    # What is no model, or no number, tyro explains when it reads the whole line.
    return config_lib.from_recipe(
        known.model if known.model in llama.RECIPES else usual,
        known.optimizer if known.optimizer in optimizers.OPTIMIZERS else None,
        number(known.steps),
        number(known.batch_size),
        known.recipe if known.recipe in config_lib.CARDS else None,
        **({} if size is None else {"vocab_size": size}),
        **({} if known.param_dtype is None else {"param_dtype": known.param_dtype}),
    )


def cli(default: Any, args: Sequence[str], prog: str, description: str) -> Any:
    """The settings of a command line, whose `--help` shows them by the groups they are in.

    Args:
      default: what the flags not given stand at, of a dataclass whose bases are the groups.
      args: the command line.
      prog: the command.
      description: what it does.
    """
    groups = type(default).__bases__

    def part(group: type) -> Any:
        return group(**{f.name: getattr(default, f.name) for f in dataclasses.fields(group)})

    options = dataclasses.make_dataclass("Options", [(g.__name__, g) for g in groups])
    given = tyro.cli(
        options,
        args=args,
        default=options(*map(part, groups)),
        config=[tyro.conf.OmitArgPrefixes],
        prog=prog,
        description=description,
    )
    parts = [getattr(given, g.__name__) for g in groups]
    return type(default)(**{k: v for x in parts for k, v in vars(x).items()})


def parse(args: Sequence[str]) -> Config:
    """The settings of a command line; with --resume, those of the run it names."""
    default = defaults(args)
    config = cli(
        default,
        args,
        prog="python -m examples.pretrain",
        description="Pre-trains a LLaMA with GaLore. Without flags: a tiny one, in minutes.",
    )
    if config.resume is not None:
        config = dataclasses.replace(config, run_dir=config.resume)
        refuse_changed(default, config)
    check(config)
    return config
