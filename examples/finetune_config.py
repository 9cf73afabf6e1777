"""The settings of a fine-tuning as one frozen dataclass, and its command line."""

import argparse
import dataclasses
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import tyro

from examples import command_line, hf_files, hf_roberta, optimizers, tasks, training
from examples import config as config_lib
from examples.command_line import flag
from examples.errors import UserError
from examples.files import read_json


class Method(NamedTuple):
    """One name `--method` knows."""

    optimizer: str  # Of optimizers.OPTIMIZERS.
    rate: float = 1.0  # Learning rate in units of that of full fine-tuning.
    shortens: bool = False  # Whether an update in a subspace is shorter than a full one.
    adam_rate: float = 0.0  # Of all else, in units of the rate, where that is not Adam's.


METHODS = {
    "galore": Method("galore_adamw", shortens=True),
    "galore8bit": Method("galore_adamw8bit", shortens=True),
    "galore_muon": Method("galore_muon", rate=8.0, adam_rate=1 / 8),
    "galore_muon8bit": Method("galore_muon8bit", rate=8.0, adam_rate=1 / 8),
    "frugal": Method("frugal"),
    "fira": Method("fira"),
    "apollo": Method("apollo"),
    "lora": Method("adamw", rate=10.0),
    "full": Method("adamw"),
}
# Those whose --rank and --scale count.
RANKED = [name for name in METHODS if name != "full"]
SCALED = ["galore", "galore8bit", "frugal", "fira"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is fine-tuned."""

    init_from: str
    """Folder of a Hugging Face checkpoint: a RoBERTa learns to classify, a LLaMA or one of its
    descendants to answer. A run resumes while it is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is learned."""

    task: Literal[tuple(tasks.TASKS)] | None = None  # type: ignore[valid-type]
    """Task of GLUE, with its columns, labels, metric and the paper's learning rate. Without --data
    it is fetched from Hugging Face."""
    data: tuple[str, ...] = ()
    """Files to train on (jsonl, json, csv, tsv, parquet) or one Hugging Face dataset (owner/name,
    owner/name:config). To classify, rows have texts and a label; to answer, prompt and response,
    messages, or text."""
    eval_data: tuple[str, ...] = ()
    """Files to validate on; by default a dataset's split, or a tenth of the rows at random."""
    columns: tuple[str, ...] = ()
    """The columns that are texts, one or two; by default the task's, or the usual names."""
    label: str = "label"
    """The column of the label: a class, or a number with a fraction to regress on."""
    tokenizer: str | None = None
    """Folder with another tokenizer.json; by default the checkpoint's."""
    chat_template: bool = True
    """Write prompts and responses with the tokenizer's chat template, where it has one."""
    max_length: int
    """Tokens that a text is cut off after."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """What trains, and how."""

    method: Literal[tuple(METHODS)] = "galore"  # type: ignore[valid-type]
    """What trains: AdamW in the gradient's subspace (galore), others of its family, LoRA's factors,
    or AdamW on all weights (full)."""
    target: str = "^blocks/.*kernel"
    """Regular expression for the paths of the weights that --method is for, such as
    blocks/attention/(q|v)/kernel. All others train as in full; with lora, the new head alone."""
    rank: int | float
    """Rank of the gradient's subspace or of LoRA's factors; a share of a matrix's smaller side
    where it is below 1."""
    update_proj_gap: int
    """Steps from one refresh of the projectors to the next."""
    scale: float
    """Multiplies the lifted updates."""
    projector_dtype: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """Number format that projectors are kept in; by default float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, in which portions, how fast."""

    epochs: float
    """Times that the data is seen."""
    batch_size: int
    """Examples a step."""
    accumulate: int = 1
    """Microbatches a step is computed in; must divide --batch-size."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])]
    """Peak learning rate; it falls to 0 in a line."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 for no clipping."""
    patience: int = 0
    """Stop after so many validations without a better one; 0 for never."""
    evals_per_epoch: int = 1
    """Validations an epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What fits on a card, number formats and seeds."""

    recipe: Literal[tuple(config_lib.CARDS)] | None = None  # type: ignore[valid-type]
    """What a LLaMA of 7B takes to fit on a card of so much memory, one row at a time: method,
    number formats, tier and batch, each of which another flag may change. See examples.pretrain."""
    tier: training.Tier = "full"
    """How much of the gradient exists at once: see examples.pretrain."""
    remat: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time."""
    param_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Number format of weights and activations; by default the checkpoint's. States are float32, or
    in 8 bits, whatever it is; bfloat16 weights are rounded up or down at random after a step.
    `int8` keeps the blocks' kernels in 8-bit codes, all else in bfloat16, and wants --tier subspace
    or layerwise."""
    seeds: tuple[int, ...] = (0,)
    """One training for each: of a new head, of dropout and of the order of the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Its folder, and when it stops."""

    run_dir: str
    """Folder of the run; by default a new one under runs/."""
    resume: str | None = None
    """Folder of a run to continue, with its settings."""
    stop_at: int | None = None
    """Stop each training after this step, with a checkpoint to resume from."""
    log_every: int = 10
    """Steps between two looks at the loss."""
    diagnostics: bool = False
    """Put more into the metrics then, and at refreshes: see examples.pretrain."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the folder tensorboard of each seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Model, Data, Learner, Schedule, Memory, Run):
    """Settings. Those without a default come from the task, the kind of model and --method.

    In groups, as `--help` shows them.
    """


def defaults(args: Sequence[str]) -> FinetuneConfig:
    """What the flags not given stand at: the run's to resume, or the paper's.

    To classify they are those of its RoBERTa on GLUE, with rank 4. Answering has no such table:
    there they are a rank of a quarter and what full fine-tuning usually takes.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--resume", "--task", "--method", "--recipe"):
        first.add_argument(name, nargs="?")
    first.add_argument("--init-from", "--init_from", nargs="?")
    known, _ = first.parse_known_args(args)
    if known.resume:
        saved = config_lib.read(pathlib.Path(known.resume), of=FinetuneConfig)
        return dataclasses.replace(saved, stop_at=None, run_dir=known.resume)
    given, task = known.init_from, tasks.TASKS.get(known.task, tasks.Task())
    on_card = config_lib.settings_on(known.recipe if known.recipe in config_lib.CARDS else None)
    usual = next(
        (n for n, m in METHODS.items() if m.optimizer == on_card.get("optimizer")), "galore"
    )
    name = known.method if known.method in METHODS else usual
    method = METHODS[name]
    answers = given is not None and not classifies(given)
    settings = dict(
        **{"rank": 4, "update_proj_gap": 500, "scale": 4.0, "epochs": 30.0, "max_length": 512},
        **{"learning_rate": task.learning_rate, "batch_size": task.batch_size},
    )
    if answers:
        settings = dict(
            **{"rank": 0.25, "update_proj_gap": 200, "scale": 2.0, "epochs": 3.0},
            **{"max_length": 1024, "learning_rate": 2e-5, "batch_size": 16},
        )
    if on_card:
        settings["max_length"] = 512  # what the memory of a recipe is told for
    settings["learning_rate"] *= method.rate
    settings["scale"] = settings["scale"] if method.shortens else 1.0
    fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
    if not keeps_projectors(name):
        fields.remove("projector_dtype")
    settings |= {k: v for k, v in on_card.items() if k in fields}
    parts = [pathlib.Path(given or "").name, known.task, known.method or known.recipe]
    folder = "-".join(filter(None, [*parts, time.strftime("%Y%m%d-%H%M%S")]))
    return FinetuneConfig(
        init_from=given if given is not None else tyro.MISSING,
        run_dir=str(pathlib.Path("runs") / folder),
        method=name,
        **settings,  # type: ignore[arg-type]
    )


def keeps_projectors(method: str) -> bool:
    """Whether `--projector-dtype` says something to a method."""
    return "projector_dtype" in optimizers.OPTIMIZERS[METHODS[method].optimizer].options


def classifies(folder: str) -> bool:
    """Whether the checkpoint is of an encoder."""
    fields = read_json(pathlib.Path(folder) / hf_files.CONFIG)
    return fields.get("model_type") in hf_roberta.CLASSES


def parse(args: Sequence[str]) -> FinetuneConfig:
    """The settings of a command line; with --resume, those of the run it names."""
    default = defaults(args)
    config = command_line.cli(
        default,
        args,
        prog="python -m examples.finetune",
        description="Fine-tunes a checkpoint with GaLore, or with what it is compared with.",
    )
    if config.resume is not None:
        config = dataclasses.replace(config, run_dir=config.resume)
        command_line.refuse_changed(default, config)
    check(config)
    return config


SMALLEST = {  # Of the numbers, where it is not 1.
    **{"warmup": 0, "clip": 0, "weight_decay": 0, "learning_rate": 0, "scale": 0, "patience": 0},
    **{"rank": 0, "epochs": 0, "max_length": 2},
}


def check(config: FinetuneConfig) -> None:
    """Refuses settings that cannot work, each by its flag."""
    command_line.check_numbers(config, SMALLEST)
    method = METHODS[config.method]
    if config.batch_size % config.accumulate:
        raise UserError(
            f"--accumulate {config.accumulate} does not divide --batch-size"
            f" {config.batch_size}. Change one of them."
        )
    if config.warmup >= 1:
        raise UserError(f"--warmup {config.warmup} is a share of the steps: give less than 1.")
    command_line.check_rank(config.rank)
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds {' '.join(map(str, config.seeds))}: give each seed once.")
    if config.recipe and classifies(config.init_from):
        raise UserError(
            f"--recipe {config.recipe}: {config.init_from} is a RoBERTa, which is small. Leave it"
            " out, or give a model that answers."
        )
    if config.recipe and config.method == "lora":
        raise UserError(
            f"--recipe {config.recipe}: --method lora trains factors beside whole weights, in no"
            " lower tier. Leave one of them out."
        )
    if config.scale != 1 and config.method not in SCALED:
        raise UserError(
            f"--scale {config.scale}: --method {config.method} has no use for it. Leave it out, or"
            f" give one of {', '.join(SCALED)}."
        )
    if config.projector_dtype and not keeps_projectors(config.method):
        raise UserError(
            f"--projector-dtype {config.projector_dtype}: --method {config.method} keeps no"
            " projectors. Leave it out, or give another --method, such as galore8bit."
        )
    if len(config.columns) > 2:
        raise UserError(f"--columns {' '.join(config.columns)}: give one or two.")
    try:
        re.compile(config.target)
    except re.error as error:
        raise UserError(f"--target {config.target!r} is no regular expression: {error}.") from error
    if config.tier == "subspace" and method.optimizer not in optimizers.IN_SUBSPACE:
        fit = [n for n, m in METHODS.items() if m.optimizer in optimizers.IN_SUBSPACE]
        raise UserError(
            f"--tier subspace: --method {config.method} needs full gradients. Give one of"
            f" {', '.join(fit)}, or another --tier."
        )
    if config.tier == "layerwise" and config.accumulate > 1:
        raise UserError(
            f"--tier layerwise takes a batch as one, not in --accumulate {config.accumulate}"
            " microbatches. Give --accumulate 1 and a --batch-size that fits, or --tier subspace."
        )
    if config.param_dtype == "int8" and config.tier == "full":
        raise UserError(
            "--param-dtype int8: codes have no gradient, so --tier full has to be subspace or"
            " layerwise. Give one of them, or --param-dtype bfloat16."
        )
    if config.method == "lora" and config.tier != "full":
        raise UserError(f"--tier {config.tier}: --method lora trains factors. Leave it out.")
    if not classifies(config.init_from):
        for name in ("task", "columns"):
            if getattr(config, name):
                raise UserError(
                    f"{flag(name)}: {config.init_from} is a model that answers. Leave it out, or"
                    " give a RoBERTa."
                )
        if not config.data:
            raise UserError("--data: give rows with prompt and response, messages, or text.")
    elif not (config.task or config.data):
        raise UserError(f"--task: give one of {', '.join(tasks.TASKS)}, or your rows as --data.")
