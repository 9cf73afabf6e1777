"""A whole training step of every tier beside AdamW's and optax.contrib.galore's.

    python -m benchmarks.tiers

LLaMA with 8 layers of width 512, vocabulary 4096, 4 x 256 tokens, rank 128, float32. All in turns
in one process with donated state; medians. A step's time is (T - 1) plain steps and one refresh
over T = 200; tiers 2 and 3 run the program without the refresh branch in between.

optax.contrib.galore refuses stacked layers, so its blocks are a list of trees, either stacked by
the loss for the same scan or called one after the other: it is compared by the faster of the two.
`remat` recomputes blocks in the backward pass, as tier 3 has to.

Staggered refreshes are timed at each step of one whole gap, several times over, and a step's time
is the median over the passes: noise does not come back at the same step, a refresh does.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import NamedTuple

# Waiting OpenBLAS threads spin; on a shared machine they slow everybody's decompositions down.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from benchmarks import report, steps
from examples import llama

SETTINGS = (
    *("plain", "refreshes", "passes", "gap", "stagger_gap", "model", "rank", "batch", "length"),
)
MODEL = llama.LlamaConfig(4096, 512, 1376, heads=8, layers=8)
ADAMW, CONTRIB = "optax.adamw", "optax.contrib.galore"
FORMS = {"blocks stacked by the loss": steps.restacked, "blocks in a list": steps.unrolled}
TARGETS = {"tier 2 / adamw": 0.85, "tier 2 / contrib": 0.75, "stagger slowest / median": 1.3}


class Timed(NamedTuple):
    """Programs of one row: every step's, and one without the refresh branch if there is one."""

    run: steps.Running
    plain: steps.Running
    refreshes: bool


def rows(config, rank, tokens) -> dict[str, Timed]:
    """Every row of the table, compiled and initialised."""

    def make(problem, tier, tx, branches=(True,)):
        programs = [steps.train_step(tier, problem.loss, tx, branch) for branch in branches]
        return [steps.Running(program, tx, problem.params, tokens) for program in programs]

    whole = steps.stacked(config)
    remat = steps.stacked(dataclasses.replace(config, remat=True))
    adamw, contrib, galore = steps.adamw(), steps.contrib(rank), steps.galore(rank)
    found = {
        ADAMW: (make(whole, "full", adamw), False),
        f"{ADAMW}, remat": (make(remat, "full", adamw), False),
    }
    for form, problem in FORMS.items():
        found[f"{ADAMW}, {form}"] = make(problem(config), "full", adamw), False
        found[f"{CONTRIB}, {form}"] = make(problem(config), "full", contrib), True
    found["tier 1"] = make(whole, "full", galore), True
    found["tier 2"] = make(whole, "subspace", galore, (True, False)), True
    found["tier 3"] = make(remat, "layerwise", galore, (True, False)), True
    return {name: Timed(runs[0], runs[-1], refreshes) for name, (runs, refreshes) in found.items()}


def times(timed: dict[str, Timed], plain: int, refreshes: int) -> dict[str, dict[str, float]]:
    """Median seconds of plain steps, with and without the branch, and of refresh steps."""

    def refresh(run: steps.Running) -> Callable:
        return lambda: run.at(0)()

    refreshing = {name: refresh(t.run) for name, t in timed.items() if t.refreshes}
    on_refresh = report.in_turns(refreshing, refreshes)
    programs = {(name, "plain"): t.plain for name, t in timed.items()}
    programs |= {(name, "branch"): t.run for name, t in timed.items() if t.run is not t.plain}
    seconds = report.in_turns({k: run.at(1) for k, run in programs.items()}, plain)
    return {
        name: {
            "plain": seconds[name, "plain"],
            "plain, with the refresh branch": seconds.get((name, "branch"), seconds[name, "plain"]),
            "refresh": on_refresh.get(name, seconds[name, "plain"]),
        }
        for name in timed
    }


def amortised(seconds: dict[str, float], gap: int) -> float:
    return ((gap - 1) * seconds["plain"] + seconds["refresh"]) / gap


def staggered(config, rank, tokens, gap, passes) -> dict[str, float]:
    """Median and slowest step of tier 2 over a whole gap with staggered refreshes."""
    problem, tx = steps.stacked(config), steps.galore(rank, stagger=True, update_proj_gap=gap)
    run = steps.Running(steps.train_step("subspace", problem.loss, tx), tx, problem.params, tokens)
    report.seconds(run)  # step 0 refreshes every matrix, staggered or not
    each = []
    for _ in range(passes):
        run.at(gap)
        each.append([report.seconds(run) for _ in range(gap)])
    by_step = [statistics.median(t) for t in zip(*each, strict=True)]
    median, slowest = statistics.median(by_step), max(by_step)
    return {
        "gap": gap,
        "passes": passes,
        "median": median,
        "slowest": slowest,
        "slowest of all passes": max(map(max, each)),
        "slowest / median": slowest / median,
    }


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--plain", type=int, default=15, help="timed plain steps of each")
    parser.add_argument("--refreshes", type=int, default=3, help="timed refreshes of each")
    parser.add_argument("--passes", type=int, default=3, help="over the gap, with stagger")
    parser.add_argument("--gap", type=int, default=200, help="T, between two refreshes")
    parser.add_argument("--stagger-gap", type=int, default=200, help="T of the staggered steps")
    parser.add_argument("--model", help="one of the example's sizes")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    small = dict(model="tiny", rank=8, batch=1, length=16, gap=4, stagger_gap=4)
    args = report.parse(parser, argv, plain=1, refreshes=1, passes=1, **small)

    config = llama.CONFIGS[args.model] if args.model else MODEL
    tokens = steps.tokens(config, args.batch, args.length)
    seconds = times(rows(config, args.rank, tokens), args.plain, args.refreshes)
    step = {name: amortised(t, args.gap) for name, t in seconds.items()}
    table = [
        [name, *t.values(), step[name], step[name] / step[ADAMW]] for name, t in seconds.items()
    ]
    head = ["step", *seconds[ADAMW], f"amortised, T = {args.gap}", "/ adamw"]
    report.table(head, table)

    contrib = min((f"{CONTRIB}, {form}" for form in FORMS), key=step.__getitem__)
    ratios = {
        f"{tier} / {name}": step[tier] / step[other]
        for tier in ("tier 1", "tier 2", "tier 3")
        for name, other in (("adamw", ADAMW), ("contrib", contrib))
    }
    ratios["tier 3 / adamw, remat"] = step["tier 3"] / step[f"{ADAMW}, remat"]
    one_program = seconds["tier 2"] | {"plain": seconds["tier 2"]["plain, with the refresh branch"]}
    ratios["tier 2 in one program / adamw"] = amortised(one_program, args.gap) / step[ADAMW]
    ratios["tier 2 in one program / contrib"] = amortised(one_program, args.gap) / step[contrib]
    stagger = staggered(config, args.rank, tokens, args.stagger_gap, args.passes)
    ratios["stagger slowest / median"] = stagger["slowest / median"]
    none = float("nan")
    report.table(["ratio", "", "target"], [[k, v, TARGETS.get(k, none)] for k, v in ratios.items()])
    report.write(
        "tiers",
        {
            "command": args.command,
            "model": dataclasses.asdict(config),
            "settings": {name: getattr(args, name) for name in SETTINGS},
            "seconds": seconds,
            "amortised_seconds": step,
            "contrib": f"refuses stacked layers; compared by its faster form, {contrib!r}",
            "staggered_seconds": stagger,
            "ratios": ratios,
            "targets": TARGETS,
        },
        out=args.out,
    )


if __name__ == "__main__":
    main()
