"""What orthogonalising costs: a step of galore_muon and of Muon over AdamW's, by tokens a step.

    python -m benchmarks.muon

SmolLM2-135M's layers (576 wide, 1536 inside), four of its thirty, with as much of its vocabulary;
T = 200 and no refresh among the steps. `optimizer` is the update alone. Steps are timed in turns in
one process; figures are medians.
"""

from collections.abc import Collection
from typing import Any

import jax
import optax

import galore_jax
from benchmarks import optimizer_step, report, steps
from examples import llama, optimizers

CONFIG = llama.LlamaConfig(6656, 576, 1536, heads=9, layers=4, kv_heads=3, remat=False)
RATE, RANK = 0.02, 144
ADAMW, MUON = "optax.adamw", "optax.contrib.muon"


def all_optimizers(rows: Collection[str] = ()) -> dict[str, optax.GradientTransformation]:
    """By name; only some, and the two that all are compared with."""
    matrices: Any = {"weight_dimension_numbers": galore_jax.matrix_axes}
    options = {"rank": RANK, **matrices}
    found = {
        ADAMW: optax.adamw(RATE, weight_decay=0.1),
        MUON: optimizers.muon(RATE, weight_decay=0.1),
        "muon8bit": optimizers.muon(RATE, weight_decay=0.1, make=galore_jax.muon8bit),
        "galore_muon": galore_jax.galore_muon(RATE, **options),
        "galore_muon, int8": galore_jax.galore_muon(RATE, accumulator_dtype="int8", **options),
        "alice": galore_jax.alice(RATE, **options),
        "foam": galore_jax.foam(RATE, **matrices),
        "racs": galore_jax.racs(RATE, **matrices),
        "galore_adamw": galore_jax.galore_adamw(RATE, **options),
        "frugal": optimizers.frugal(RATE, weight_decay=0.1, scale=1.0, moments="reset", **options),
    }
    return {n: tx for n, tx in found.items() if not rows or n in {ADAMW, MUON, *rows}}


def ratios(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    return {
        name: {"seconds": s, "over_adamw": s / seconds[ADAMW], "over_muon": s / seconds[MUON]}
        for name, s in seconds.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=all_optimizers(), default=[])
    small = dict(tokens=[64], seq_len=64, rounds=1, rows=["galore_muon"])
    args = report.parse(parser, argv, **small)
    found, problem = {}, steps.stacked(CONFIG)
    params = steps.weights(problem.params)
    grads = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size % 997), x.shape), problem.params
    )
    updates = {
        name: optimizer_step.JaxStep(tx, grads, params).plain
        for name, tx in all_optimizers(args.rows).items()
    }
    found["optimizer"] = ratios(report.in_turns(updates, 2 * args.rounds))
    del updates, grads
    for tokens in args.tokens:
        rows = tokens // args.seq_len
        work = {}
        for name, tx in all_optimizers(args.rows).items():
            step = steps.train_step("full", problem.loss, tx)
            batch = steps.tokens(CONFIG, rows, args.seq_len)
            work[name] = steps.Running(step, tx, problem.params, batch)
        found[f"{tokens} tokens"] = ratios(report.in_turns(work, args.rounds))
        print(f"{tokens} tokens: done", flush=True)
    names = list(found["optimizer"])
    report.table(
        ["over optax.adamw", *found],
        [[name, *(part[name]["over_adamw"] for part in found.values())] for name in names],
    )
    report.table(
        ["over optax.contrib.muon", "optimizer"],
        [[name, found["optimizer"][name]["over_muon"]] for name in names],
    )
    result = {
        "command": args.command,
        "settings": {name: getattr(args, name) for name in ("rows", "tokens", "seq_len", "rounds")},
        "rows": found,
    }
    report.write("muon", result, out=args.out)


if __name__ == "__main__":
    main()
