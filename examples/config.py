"""The settings of a run as one frozen dataclass of several groups, and its file."""

import dataclasses
import json
import pathlib
import time
from typing import Annotated, Any, Literal

import tyro

from examples import llama, optimizers, training
from examples.errors import UserError
from examples.files import write_atomically

# What makes 7B weights fit on a card of so many GB, with one sequence at a time: layer by layer,
# without the second backward pass of --clip. Measured by benchmarks/memory.py.
CARDS: dict[str, dict[str, Any]] = {
    "24gb": {"optimizer": "galore_adamw8bit", "projector_dtype": "int8", "param_dtype": "bfloat16"},
    "16gb": {"optimizer": "galore_muon8bit", "rank": 1 / 16, "param_dtype": "bfloat16"},
    "12gb": {"optimizer": "galore_muon8bit", "rank": 1 / 8, "param_dtype": "int8"},
}
_ON_A_CARD = {
    **{"tier": "layerwise", "dtype": "bfloat16"},
    **{"batch_size": 1, "accumulate": 1, "clip": 0.0},
}


def settings_on(card: str | None) -> dict[str, Any]:
    """What a run on such a card has for settings of its own; none without one."""
    if card is None:
        return {}
    return {**_ON_A_CARD, **CARDS[card], "recipe": card}


FORMAT = 1  # Of config.json and of what else lies in a run's folder.
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained."""

    model: Literal[tuple(llama.RECIPES)]  # type: ignore[valid-type]
    """Size of the LLaMA, and how it is trained. All but `tiny` and `small` are the paper's and want
    an accelerator; `checkpoint` is how that of --init-from is."""
    init_from: str | None = None
    """Folder of a Hugging Face checkpoint to continue: shape, weights and tokenizer are its own,
    and --model is `checkpoint` if it is not given. A run resumes while it is there."""
    recipe: Literal[tuple(CARDS)] | None = None  # type: ignore[valid-type]
    """What --model 7b, or an --init-from, takes to fit on a card of so much memory: optimizer,
    number formats, tier and batch, each of which another flag may change."""
    optimizer: Literal[tuple(optimizers.OPTIMIZERS)]  # type: ignore[valid-type]
    """Optimizer: GaLore's, its family (fira, frugal, apollo, apollo_mini, ldadam, alice, scale_sgd,
    foam, racs), or a full-rank counterpart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What the model reads."""

    data: tuple[str, ...] = ()
    """Files or folders of text, or one Hugging Face dataset (owner/name, owner/name:config,
    or hf:PATH for one on disk). By default the source of the Python standard library."""
    vocab_size: int
    """Vocabulary the tokenizer is trained for, and of the model."""
    seq_len: int
    """Tokens a sequence is trained on."""
    cache_dir: str | None = None
    """Folder for trained tokenizers; by default galore_jax in the user's cache folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, in which portions, how fast."""

    steps: int
    """Optimizer steps. The schedule's warmup keeps its share of them."""
    batch_size: int
    """Sequences a step."""
    accumulate: int
    """Microbatches a step is computed in; must divide --batch-size."""
    warmup: int
    """Steps in which the learning rate rises; then it falls to 10 % along a cosine."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])]
    """Peak learning rate."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of embeddings, head and norms, which AdamW then trains; by default
    --optimizer trains them, at --learning-rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float
    """Largest global norm of the gradient; 0 for no clipping."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLore:
    """The subspace that the optimizer lives in."""

    rank: int | float
    """Rank of the projected gradients; below 1 a share of a matrix's smaller side."""
    update_proj_gap: int
    """Steps from one refresh of the projectors to the next."""
    scale: float
    """Multiplies the lifted updates."""
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """Which side of a matrix is projected."""
    method: Literal["svd", "eigh", "randomized", "subspace", "random", "coordinates"] | None = None
    """How a projector is computed; by default the library's choice."""
    random_from: int | None = None
    """Step from which projectors are random (GoLore); by default none are."""
    refresh: Literal["fixed", "lazy"] = "fixed"
    """`lazy`: a subspace that barely moves is refreshed less often."""
    moments: Literal["keep", "reset", "rotate"] | None = None
    """What becomes of the moments at a refresh; by default the library's choice."""
    stagger: bool = False
    """Spread the refreshes over the steps between two of them."""
    projector_dtype: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """Number format the projectors are kept in; by default float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What fits on a card."""

    tier: training.Tier = "full"
    """How much of the gradient exists at once: `full`, all of it; `subspace`, its projection
    (for the galore_ optimizers but galore_muon's); `layerwise`, that of one layer, whose weights
    change in the backward pass (turns --remat on; one microbatch; --clip takes a second one)."""
    remat: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time."""
    loss_chunk: int = llama.LlamaConfig.loss_chunk
    """Most logits (tokens times words of the vocabulary) that exist at once in the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Where it trains."""

    mesh: str = ""
    """Train on all devices, as data=2,fsdp=4 (their product; -1 for the rest): both cut the batch
    and the optimizer's state, fsdp the weights too. By default on one device."""
    grad_norm: Literal["exact", "subspace"] | None = None
    """The norm that --clip and the metrics go by in --tier subspace: `exact`, for which a --mesh
    sends whole gradients, or `subspace`, of their projection. By default exact, but on a --mesh
    without --clip."""
    coordinator: str | None = None
    """HOST:PORT where the processes of a run meet, the first one's; `auto` on a cluster that tells
    JAX of them (Slurm, Open MPI, TPUs). Each gets the same flags, and sees the same folders."""
    processes: int | None = None
    """Number of processes, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """This one's number, from 0, with --coordinator HOST:PORT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """Seeds and number formats."""

    seed: int = 0
    """Of the weights, the order of the data and the sample."""
    param_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of the weights. `int8` keeps the blocks' kernels in 8-bit codes, all else in
    --dtype, and wants --tier subspace or layerwise."""
    dtype: Dtype = "float32"
    """Number format of the activations."""
    stochastic_rounding: bool
    """Round bfloat16 and int8 weights up or down at random after a step, so that small steps
    count; by default for int8 weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Its folder, what it writes, and when."""

    run_dir: str
    """Folder of the run; by default a new one under runs/."""
    resume: str | None = None
    """Folder of a run to continue, from its last checkpoint and with its settings."""
    stop_at: int | None = None
    """Stop after this step, with a checkpoint to resume from; the schedule stays."""
    log_every: int = 10
    """Steps between two looks at the loss."""
    diagnostics: bool = False
    """Put more into the metrics then, and at refreshes: the speed, and how well the subspace fits
    the gradient (galore_jax.metrics). Such steps are a program of their own, compiled once more;
    the others take what they took."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the folder tensorboard of the run."""
    eval_every: int
    """Steps between two validations."""
    eval_batches: int = 16
    """Batches, spread over the split, of a validation during training."""
    last_eval_batches: int | None = None
    """The same for the last validation, by default the whole split."""
    save_every: int
    """Steps between two checkpoints."""
    keep: int = 2
    """Checkpoints to keep."""
    skip_nonfinite: int = 0
    """Skip steps whose loss or gradient is not finite, and stop at this many in a row; 0 stops at
    a loss that is not finite. Keeps nothing twice; layerwise takes --clip's second backward pass"""
    prompt: str | None = None
    """Beginning of the sample text; by default that of a validation document."""
    sample_tokens: int = 120
    """Most tokens of the sample text; 0 for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Model, Data, Schedule, GaLore, Memory, Devices, Numbers, Run):
    """Settings of a run. Those without a default come from the recipe of the model.

    In groups, as `--help` shows them.
    """


# What a resumed run may do differently: nothing that would change a step already planned, but
# where its memory goes, and what becomes of a step that cannot be taken.
MAY_CHANGE = {
    *("tier", "remat", "loss_chunk", "mesh", "coordinator", "processes", "process_id"),
    *(
        "resume",
        "stop_at",
        "log_every",
        "diagnostics",
        "tensorboard",
        "eval_every",
        "eval_batches",
        "last_eval_batches",
    ),
    *("save_every", "keep", "skip_nonfinite", "prompt", "sample_tokens", "cache_dir", "run_dir"),
}


def from_recipe(
    model: str = "tiny",
    optimizer: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    card: str | None = None,
    **changes: Any,
) -> Config:
    """The recipe of a model, with what depends on the number of steps scaled to it.

    Args:
        model: a key of `llama.RECIPES`.
        optimizer: a key of `optimizers.OPTIMIZERS`, by default the card's, or galore_adamw; it sets
            the learning rate.
        steps: optimizer steps, the recipe's by default.
        batch_size: sequences a step, the recipe's by default.
        card: a key of `CARDS`, whose settings come before the model's.
        **changes: any other field; `vocab_size` where the model is a checkpoint.
    """
    recipe = llama.RECIPES[model]
    on_card = settings_on(card)
    chosen: str = optimizer or on_card.get("optimizer", "galore_adamw")
    if batch_size is not None:
        on_card["batch_size"] = batch_size
    steps = recipe.steps if steps is None else steps
    name = f"{model}-{chosen}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = {
        "seq_len": recipe.seq_len,
        "batch_size": recipe.batch_size if batch_size is None else batch_size,
        "accumulate": recipe.accumulate if batch_size is None else 1,
        "warmup": recipe.warmup * steps // recipe.steps,
        "learning_rate": recipe.learning_rate * optimizers.OPTIMIZERS[chosen].rate,
        "clip": recipe.clip or 0.0,
        "rank": recipe.rank,
        "update_proj_gap": recipe.update_proj_gap,
        "scale": recipe.scale,
        "run_dir": str(pathlib.Path("runs") / name),
        "eval_every": min(1000, -(-steps // 8)),
        "save_every": min(1000, -(-steps // 4)),
    }
    if model in llama.CONFIGS:
        settings["vocab_size"] = llama.CONFIGS[model].vocab_size
    settings |= on_card | changes | {"model": model, "optimizer": chosen, "steps": steps}
    few_bits = ("int8",) if card is None else ("int8", "bfloat16")
    settings.setdefault("stochastic_rounding", settings.get("param_dtype") in few_bits)
    return Config(**settings)


def model_name(config: Config) -> str:
    """What is trained, for people."""
    return pathlib.Path(config.init_from).name if config.init_from else config.model


def whole_rank(rank: int | float) -> int | float:
    """A rank as the library takes it: whole numbers as such, shares as they are."""
    return rank if rank < 1 else int(rank)


def galore_options(config: Config) -> dict:
    """The settings `galore_jax.galore` takes."""
    names = ["rank", "update_proj_gap", "scale", "proj_type", "refresh", "stagger"]
    optional = ("method", "moments", "projector_dtype")
    names += [name for name in optional if getattr(config, name) is not None]
    options = {name: getattr(config, name) for name in names}
    options["rank"] = whole_rank(config.rank)
    if config.random_from is not None:
        options["method"] = {0: config.method or "randomized", config.random_from: "random"}
    return options


def in_order(config: Any) -> dict[str, Any]:
    """The settings by name, group after group as they stand."""
    names = (field.name for group in type(config).__bases__ for field in dataclasses.fields(group))
    return {name: getattr(config, name) for name in names}


def save(config: Any, folder: pathlib.Path) -> None:
    """Writes the settings of a run as config.json."""
    settings = {"format": FORMAT} | in_order(config)
    write_atomically(folder / "config.json", json.dumps(settings, indent=2) + "\n")


def read(folder: pathlib.Path, given_as: str = "--resume", of: Any = Config) -> Any:
    """The settings in a run's folder, which a flag has named; `of` is their dataclass."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(
            f"{given_as}: {str(folder)!r} is not the folder of a run (no config.json there)."
            " Give the folder a run printed when it began."
        )
    try:
        saved: dict[str, Any] = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(
            f"{given_as}: {str(path)!r} is damaged (not a whole JSON object). Bring it back from a"
            " copy, or start a new run."
        ) from None
    found = saved.pop("format", None)
    missing = (dataclasses.MISSING,) * 2
    fields = dataclasses.fields(of)
    needed = {f.name for f in fields if (f.default, f.default_factory) == missing}
    # Settings that came later stand at their defaults.
    if found != FORMAT or not needed <= set(saved) <= {f.name for f in fields}:
        raise UserError(
            f"{given_as}: {str(path)!r} is of another version of this program (format {found}, here"
            f" {FORMAT}). Continue it with that version, or start a new run."
        )
    return of(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def changed(before: Any, now: Any) -> list[str]:
    """The settings that differ, of those that a run keeps to its end."""
    kept = (name for name in in_order(now) if name not in MAY_CHANGE)
    return [name for name in kept if getattr(before, name) != getattr(now, name)]
