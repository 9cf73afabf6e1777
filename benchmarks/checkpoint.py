"""A real checkpoint goes on training by several optimizers: loss, state and peak.

    python -m benchmarks.checkpoint FOLDER
    python -m benchmarks.checkpoint --quick   # a small one, made here

FOLDER holds a Hugging Face checkpoint with its tokenizer; results/checkpoint.json is of
SmolLM2-135M-Instruct. Each optimizer takes the same few steps on the source of Python's standard
library, from the same weights, at rates a factor of two apart, three or more until the best is
between two others; the row is of the best one. The loss is that of held-out text before and after.

Rows of the same settings that the JSON already has are kept.
"""

import dataclasses
import json
import pathlib
import tempfile

import jax

from benchmarks import quality, report, steps
from examples import command_line, data, hf, llama, pretrain, training
from examples import tokenizer as bpe

# --optimizer, the tier, and the rate that is tried first.
ROWS = {
    "adamw": ("adamw", "full", 5e-5),
    "muon": ("muon", "full", 4e-4),
    "galore_adamw": ("galore_adamw", "full", 2e-4),
    "galore_adamw8bit, layer by layer": ("galore_adamw8bit", "layerwise", 2e-4),
    "galore_muon": ("galore_muon", "full", 4e-4),
    "frugal": ("frugal", "full", 1e-4),
}
FLAGS = {"--batch-size": 4, "--seq-len": 128, "--warmup": 3, "--clip": 1.0}
GALORE = {"--rank": 0.25, "--update-proj-gap": 10}


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eval-batches", type=int, default=16)
    parser.add_argument("--reach", type=int, default=4, help="factors of two from the first rate")
    args = report.parse(parser, argv, rows=["galore_muon"], steps=4, eval_batches=1, reach=1)
    if args.folder is None and not args.quick:
        parser.error("give the FOLDER of a Hugging Face checkpoint with its tokenizer")
    with tempfile.TemporaryDirectory() as cache:
        measure(args, args.folder or small_checkpoint(pathlib.Path(cache) / "small"), cache)


def measure(args, folder: pathlib.Path, cache: str) -> None:
    """Every row, written as soon as it is known."""
    result = {
        "model": folder.name,
        "flags": FLAGS | GALORE | {"--steps": args.steps},
        "reach": args.reach,
    }
    found = known(args.out / "checkpoint.json", result)
    for name in args.rows:
        found[name] = best(name, args, folder, cache)
        whole = {"command": args.command} | result | {"optimizers": found}
        report.write("checkpoint", whole, out=args.out)
    found = {name: found[name] for name in ROWS if name in found}
    columns = [k for k in next(iter(found.values())) if k != "losses"]
    report.table(["optimizer", *columns], [[n, *(r[k] for k in columns)] for n, r in found.items()])


def known(path: pathlib.Path, settings: dict) -> dict:
    """The rows that a JSON has, if they are of these settings."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["optimizers"] if found and settings.items() <= found.items() else {}


def small_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """A new model, and a tokenizer trained on this file."""
    config = dataclasses.replace(llama.CONFIGS["tiny"], vocab_size=300, layers=2)
    hf.save_hf(folder, config, llama.create(config, seed=0)[1])
    made = bpe.train([pathlib.Path(__file__).read_text()], config.vocab_size)
    made.save(str(folder / "tokenizer.json"))
    return folder


def best(name, args, folder, cache):
    """The figures of the best rate, with the losses of all."""
    rows = {}

    def loss_at(rate):
        rows[rate] = run(name, rate, args, folder, cache)
        print(f"{name}, {rate:.3g}: {rows[rate]['loss_after']:.4f}", flush=True)
        return rows[rate]["loss_after"]

    losses = quality.tune(loss_at, ROWS[name][2], args.reach)
    rate = min(losses, key=lambda r: losses[r])
    return {"rate": rate} | rows[rate] | {"losses": {f"{r:.3g}": x for r, x in losses.items()}}


def run(name, rate, args, folder, cache):
    """The figures of one training."""
    optimizer, tier, _ = ROWS[name]
    flags = {"--init-from": folder, "--optimizer": optimizer, "--tier": tier} | FLAGS
    flags |= {} if optimizer in ("adamw", "muon") else GALORE
    flags |= {"--learning-rate": rate, "--steps": args.steps, "--cache-dir": cache}
    config = command_line.parse([str(x) for pair in flags.items() for x in pair])
    model_of, _, tx, schedule, *_ = pretrain.setup(config)
    loaded = data.load(
        [],
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=0,
        vocabulary=bpe.of_checkpoint(folder, config.vocab_size),
    )
    batches = iter(loaded.train)
    held_out = list(data.validation_batches(loaded.validation, config.seq_len, config.batch_size))
    held_out = held_out[:: -(-len(held_out) // args.eval_batches)]
    state = training.new_state(jax.tree.map(jax.numpy.array, hf.load_hf(folder)[1]), tx)
    eval_step = training.make_eval_step(model_of)
    before = training.evaluate(eval_step, state["params"], held_out)["val_loss"]
    step = training.make_train_step(model_of, tx, schedule, tier=config.tier, clip=config.clip)
    compiled = step.lower(state, next(batches)).compile()
    memory = compiled.memory_analysis()
    for _ in range(args.steps):
        state, _ = compiled(state, next(batches))
    return {
        "loss_before": before,
        "loss_after": training.evaluate(eval_step, state["params"], held_out)["val_loss"],
        "state_mb": steps.nbytes(state["opt_state"]) / 1e6,
        "peak_mb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
    }


if __name__ == "__main__":
    main()
