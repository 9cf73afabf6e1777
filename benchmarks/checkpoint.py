"""A real checkpoint goes on training by several optimizers: loss, state, peak and time of a step.

    python -m benchmarks.checkpoint FOLDER

FOLDER holds a Hugging Face checkpoint with its tokenizer; results/checkpoint.json is of
SmolLM2-135M-Instruct. Each optimizer takes the same few steps on the source of Python's standard
library, from the same weights; the loss is that of held-out text before and after.
"""

import pathlib
import statistics
import tempfile
import time

import jax

from benchmarks import report, steps
from examples import command_line, data, hf, pretrain, training
from examples import tokenizer as bpe

# --optimizer, its learning rate (a tenth of what it would begin with), and the tier.
ROWS = {
    "adamw": ("adamw", 2.5e-5, "full"),
    "galore_adamw": ("galore_adamw", 1e-4, "full"),
    "galore_adamw8bit, layer by layer": ("galore_adamw8bit", 1e-4, "layerwise"),
    "galore_muon": ("galore_muon", 2e-4, "full"),
    "frugal": ("frugal", 1e-4, "full"),
}
FLAGS = {"--batch-size": 4, "--seq-len": 128, "--warmup": 3, "--clip": 1.0}
GALORE = {"--rank": 0.25, "--update-proj-gap": 10}


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eval-batches", type=int, default=16)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as cache:
        found = {name: run(name, args, cache) for name in ROWS}
    first = next(iter(found.values()))
    for row in found.values():
        row["step_ratio"] = row["step_seconds"] / first["step_seconds"]
    rows = [[name, *row.values()] for name, row in found.items()]
    report.table(["optimizer", *first], rows)
    result = {
        "command": "python -m benchmarks.checkpoint FOLDER",
        "model": args.folder.name,
        "flags": FLAGS | GALORE | {"--steps": args.steps},
        "optimizers": found,
    }
    report.write("checkpoint", result, ("jax", "optax", "flax"), args.out)


def run(name, args, cache):
    """One optimizer's figures."""
    optimizer, rate, tier = ROWS[name]
    flags = {"--init-from": args.folder, "--optimizer": optimizer, "--tier": tier} | FLAGS
    flags |= {} if optimizer == "adamw" else GALORE
    flags |= {"--learning-rate": rate, "--steps": args.steps, "--cache-dir": cache}
    config = command_line.parse([str(x) for pair in flags.items() for x in pair])
    model_of, _, tx, schedule, *_ = pretrain.setup(config)
    loaded = data.load(
        [],
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=0,
        vocabulary=bpe.of_checkpoint(args.folder, config.vocab_size),
    )
    batches = iter(loaded.train)
    held_out = list(data.validation_batches(loaded.validation, config.seq_len, config.batch_size))
    held_out = held_out[:: -(-len(held_out) // args.eval_batches)]
    state = training.new_state(jax.tree.map(jax.numpy.array, hf.load_hf(args.folder)[1]), tx)
    eval_step = training.make_eval_step(model_of)
    before = training.evaluate(eval_step, state["params"], held_out)["val_loss"]
    step = training.make_train_step(model_of, tx, schedule, tier=config.tier, clip=config.clip)
    compiled = step.lower(state, next(batches)).compile()
    memory = compiled.memory_analysis()
    seconds = []
    for _ in range(args.steps):
        batch, began = next(batches), time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - began)
    return {
        "loss_before": before,
        "loss_after": training.evaluate(eval_step, state["params"], held_out)["val_loss"],
        "state_mb": steps.nbytes(state["opt_state"]) / 1e6,
        "peak_mb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
        "step_seconds": statistics.median(seconds),
    }


if __name__ == "__main__":
    main()
