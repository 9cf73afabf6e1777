"""Memory of a training step, compiled and never allocated: every tier, for the paper's models.

    python -m benchmarks.memory
    JAX_PLATFORMS=cpu python -m benchmarks.memory --target-config rtx4090.txtpb

Stacked LLaMA with blocks recomputed in the backward pass, r = d/4, 1 x 256 tokens, donated
params and state. The first command counts float32 steps for this machine's CPU, in units of the
weights' bytes; `estimate` is `galore_jax.summary`'s of the same step, without the compiler's
scratch. `growth` is what 2048 tokens cost more, over the bytes of the block inputs kept for them.

The second compiles the step of `examples.pretrain --model 7b --recipe 24gb`, 16gb and 12gb, the
refresh in the program, for the GPU that an XLA target config describes, with `jax-cuda13-plugin`
installed and no GPU present; and that of `--init-from` with checkpoints that people have, by their
config.json. Counted is what the compiler plans: no CUDA context, fragmentation or solver workspace.
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import galore_jax
from benchmarks import report, steps
from examples import command_line, llama, meshes, pretrain, training

GIB = 2**30
LENGTH, LONG = 256, 2048


class Recipe(NamedTuple):
    tier: str
    optimizer: Callable[..., optax.GradientTransformation]
    programs: tuple[bool, ...] = (False, True)  # with and without the refresh branch


def small(rank: int, **options) -> optax.GradientTransformation:
    """GaLore in the least memory: 8-bit moments, int8 projectors."""
    return steps.galore(rank, bits=8, projector_dtype="int8", **options)


RECIPES = {
    "adamw": Recipe("full", lambda rank: steps.adamw(), (False,)),
    "tier 1": Recipe("full", steps.galore, (True,)),
    "tier 2": Recipe("subspace", steps.galore),
    "tier 3": Recipe("layerwise", steps.galore),
    "tier 3, 8-bit, int8": Recipe("layerwise", small),
}
SMALLEST = "tier 3, 8-bit, int8"

# Arguments and temporaries over weights, of the plain step.
TARGETS = {
    ("1b", "tier 2"): 2.15,
    ("1b", SMALLEST): 1.6,
    ("7b", "tier 2"): 2.0,
    ("7b", SMALLEST): 1.42,
}


# GiB of an RTX 4090 for a step of `--model 7b --recipe ...` with one sequence of 256 tokens, and of
# 2048: the refresh of the projectors is in the program.
CARD_TARGETS = {"24gb": (19.0, 20.5), "16gb": (14.75, 15.45), "12gb": (9.9, 10.6)}


def _sizes(
    kind: str,
    vocabulary: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool = False,
) -> dict[str, Any]:
    """What config.json says of a model whose heads are 128 wide."""
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }


CHECKPOINTS = {
    "Qwen3-4B": _sizes("qwen3", 151936, 2560, 9728, 36, 32, 8, tied=True),
    "Mistral-7B": _sizes("mistral", 32768, 4096, 14336, 32, 32, 8),
    "Qwen2.5-7B": _sizes("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Llama-3.1-8B": _sizes("llama", 128256, 4096, 14336, 32, 32, 8),
    "Qwen3-8B": _sizes("qwen3", 151936, 4096, 12288, 36, 32, 8),
}


def program(problem, tier, tx, length, refresh=False):
    """The compiled step for one row of tokens."""
    state = jax.eval_shape(tx.init, problem.params)
    tokens = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
    step = steps.train_step(tier, problem.loss, tx, refresh)
    return steps.compiled(step, problem.params, state, tokens)


def units(parts: dict[str, int], weights: int) -> dict[str, float]:
    return {name: size / weights for name, size in parts.items()}


def estimate(problem, tier, tx) -> int:
    """Bytes of a step by `galore_jax.summary`."""
    tokens = jax.ShapeDtypeStruct((1, LENGTH + 1), jnp.int32)
    found = galore_jax.summary(tx, problem.params, problem.loss, tokens)
    return next(step.total for step in found.steps if step.tier == tier)


def model_figures(name: str, config: llama.LlamaConfig, recipes: Iterable[str]) -> dict[str, Any]:
    """What the compiler says of each recipe for one model."""
    config = dataclasses.replace(config, remat=True)
    problem, rank = steps.stacked(config), config.hidden // 4
    weights = steps.nbytes(problem.params)
    compiled, estimates, long = {}, {}, {}
    for recipe in recipes:
        tier, optimizer, programs = RECIPES[recipe]
        tx = optimizer(rank)
        estimates[recipe] = estimate(problem, tier, tx) / weights
        for refresh in programs:
            parts = steps.memory(program(problem, tier, tx, LENGTH, refresh))
            branch = "with refresh" if refresh else "plain"
            compiled.setdefault(recipe, {})[branch] = units(parts, weights)
            if tier == "layerwise" and not refresh:
                long[recipe] = growth(problem, tier, tx, parts["total"])
    return {
        "weights_bytes": weights,
        "rank": rank,
        "steps": compiled,
        "estimates": estimates,
        "targets": {r: t for (model, r), t in TARGETS.items() if model == name},
        "optax.contrib.galore": steps.contrib_on_stack(problem.params, rank),
        "2048_tokens": long,
    }


def growth(problem, tier, tx, short: int) -> dict[str, float]:
    """Bytes more for long rows, beside those of the block inputs that are kept."""
    more = steps.memory(program(problem, tier, tx, LONG))["total"] - short
    inputs = steps.saved_inputs(problem.config, 1, LONG - LENGTH)
    return {"more_bytes": more, "saved_inputs_bytes": inputs, "growth": more / inputs}


def print_model(name: str, figures: dict[str, Any]) -> None:
    print(f"\n{name}: weights {figures['weights_bytes'] / GIB:.2f} GiB, rank {figures['rank']}")
    none = float("nan")
    rows = []
    for recipe, programs in figures["steps"].items():
        estimated = figures["estimates"].get(recipe, none)
        for branch, parts in programs.items():
            target = figures["targets"].get(recipe, none) if branch == "plain" else none
            rows.append([recipe, branch, *parts.values(), estimated, target])
    head = ["step", "program", "arguments", "temporaries", "total", "estimate", "target"]
    report.table(head, rows)
    print("optax.contrib.galore, stacked layers", figures["optax.contrib.galore"])
    for recipe, long in figures["2048_tokens"].items():
        print(f"{recipe}, {LONG} tokens: {long['growth']:.2f} of the saved inputs more")


def gpu_sharding(config: pathlib.Path) -> NamedSharding:
    """One device of the kind that the target config describes."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=config.read_text(), topology="1x1x1"
    )
    return NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec())


def card_figures(name: str, sharding: NamedSharding) -> dict[str, Any]:
    """GiB of the command's own step by recipe and length, compiled for a GPU, and their parts."""
    found: dict[str, Any] = {}
    for card, targets in CARD_TARGETS.items():
        for length, target in zip((LENGTH, LONG), targets, strict=True):
            row = card_step(["--model", name, "--recipe", card, "--seq-len", str(length)], sharding)
            found[f"{card}, 1x{length}"] = row | ({"target": target} if name == "7b" else {})
            print_card(name, f"{card}, 1x{length}", row)
    return found


def checkpoint_figures(name: str, sharding: NamedSharding) -> dict[str, Any]:
    """The same of a checkpoint, at the length that the command has for it."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(CHECKPOINTS[name]))
        for card in CARD_TARGETS:
            found[card] = card_step(["--init-from", folder, "--recipe", card], sharding)
            print_card(name, card, found[card])
    return found


def card_step(flags: list[str], sharding: NamedSharding) -> dict[str, float]:
    """GiB of the command's step, compiled, and their parts."""
    state, step, tokens = command_step([*flags, "--run-dir", "none"])
    parts = steps.memory(step.lower(*steps.placed((state, tokens), sharding)).compile())
    parts |= {k: steps.nbytes(v) for k, v in state.items() if k in ("params", "opt_state")}
    return {k: v / GIB for k, v in parts.items()}


def print_card(name: str, what: str, row: dict[str, float]) -> None:
    sizes = ", ".join(f"{k} {v:.2f}" for k, v in row.items())
    print(f"{name}, {what}: GiB {sizes}", flush=True)


def command_step(flags: list[str]) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """What `examples.pretrain` with these flags trains, its step, and a batch: shapes alone."""
    config = command_line.parse(flags)
    model_of, init, tx, schedule, *_ = pretrain.setup(config)
    key = jax.random.key(config.seed) if config.stochastic_rounding else None
    step = training.make_train_step(
        model_of, tx, schedule, tier=config.tier, clip=config.clip or None, rounding_key=key
    )
    state = meshes.abstract_state(None, jax.eval_shape(init), tx)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32)
    return state, step, tokens


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", help="default: all; for a GPU, 7b and checkpoints")
    parser.add_argument(
        "--target-config", type=pathlib.Path, help="XLA's description of a GPU, as protobuf text"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    args = report.parse(parser, argv, models=["tiny"], recipes=["adamw", "tier 2"])
    figures = {}
    if args.target_config is None:
        for name in args.models or ["60m", "130m", "350m", "1b", "7b"]:
            figures[name] = model_figures(name, llama.CONFIGS[name], args.recipes)
            print_model(name, figures[name])
        result = {"command": args.command, "unit": "weights' bytes"}
        report.write("memory", result | {"models": figures}, out=args.out)
    else:
        sharding = gpu_sharding(args.target_config)
        target = args.target_config
        for name in args.models or ["7b", *CHECKPOINTS]:
            of = checkpoint_figures if name in CHECKPOINTS else card_figures
            figures[name] = of(name, sharding)
        result = {
            "command": args.command,
            "device": target.stem,
            "unit": "GiB",
        }
        result |= {"models": figures}
        report.write(f"memory_{target.stem}", result, ("jax-cuda13-plugin",), args.out)


if __name__ == "__main__":
    main()
