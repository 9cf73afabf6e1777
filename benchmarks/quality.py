"""Which optimizer learns most from the same tokens, and at what memory: the family, measured.

    python -m benchmarks.quality            # CPU: a tiny LLaMA, 1,000 steps, three seeds; hours
    python -m benchmarks.quality --quick    # a minute or two, some rows: whether everything runs
    python -m benchmarks.quality --gpu      # LLaMA-60M, 1,000 steps of 131,072 tokens
    python -m benchmarks.quality --text man # the same rates on a text that none was picked on
    python -m benchmarks.quality --large    # the same rates, 8 times the weights, 200 steps
    python -m benchmarks.quality --batch4   # the same rates, 4 times the batch, 250 steps
    python -m benchmarks.quality --batch16  # the same rates, 16 times the batch, 100 steps

Every method trains the LLaMA of `examples.pretrain` on the source of the Python standard library
with the same first weights and the same batches, seed by seed. The methods differ in what they
do with the kernels of the blocks; embeddings, head and norms are AdamW's in all of them, at one
learning rate that was picked with AdamW. The learning rate of the kernels is picked for each
method by the validation loss of runs of half the length with another seed: from a first guess up
and down by factors of two, until the best has a worse one on either side. Variants of a method, in
fewer bits or with another option, take its own. On another text (`man`: the manual pages of the
machine, or files that are named), with a larger model and with larger batches nothing is picked:
rates are those of the first JSON.

Runs lie in a folder of their own and are not taken twice; one that was cut off goes on from its
last checkpoint. So call it again after an interruption, or with `--methods` for some rows: rows
of the same budget that the JSON already has are kept. `benchmarks.pictures` draws them anew.
"""

import concurrent.futures
import dataclasses
import gzip
import json
import math
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import low_rank, pictures, report
from examples import command_line, pretrain, training
from examples import config as config_lib


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: flags of `examples.pretrain`, and a first guess at its rate."""

    flags: tuple[str, ...]
    rate: float
    rate_of: str | None = None  # the method whose rate it takes, being a variant of it


_MUON, _MUON_INT8 = (
    ("--optimizer", name, "--update-proj-gap", "200") for name in ("galore_muon", "galore_muon8bit")
)


def _variant(*flags: str) -> Method:
    return Method(("--optimizer", "galore_adamw", *flags), 8e-3, "GaLore")


def _muon_variant(*flags: str, of: tuple[str, ...] = _MUON) -> Method:
    return Method((*of, *flags), 0.02, "Muon")


METHODS = {
    "AdamW": Method(("--optimizer", "adamw"), 1e-3),
    "Muon": Method(("--optimizer", "muon"), 0.02),
    "GaLore": Method(("--optimizer", "galore_adamw"), 8e-3),
    "GaLore, T = 200": _variant("--update-proj-gap", "200"),
    "GaLore, rotated moments": _variant("--moments", "rotate"),
    "GaLore, lazy refresh": _variant("--refresh", "lazy"),
    "GoLore": _variant("--random-from", "80%", "--moments", "rotate"),
    "optax.contrib.galore": Method(("--optimizer", "optax_galore"), 8e-3),
    "FRUGAL": Method(("--optimizer", "frugal", "--moments", "reset"), 16e-3),
    "Fira": Method(("--optimizer", "fira"), 8e-3),
    "APOLLO": Method(("--optimizer", "apollo"), 8e-3),
    "APOLLO-Mini": Method(("--optimizer", "apollo_mini"), 8e-3),
    "LDAdam": Method(("--optimizer", "ldadam"), 4e-3),
    "SCALE": Method(("--optimizer", "scale_sgd"), 2e-3),
    "Alice": Method(("--optimizer", "alice", "--update-proj-gap", "200"), 0.02),
    "FOAM-2": Method(("--optimizer", "foam"), 1e-3),
    "RACS": Method(("--optimizer", "racs"), 0.02),
    "8-bit Muon": Method(("--optimizer", "muon8bit"), 0.02, "Muon"),
    "galore_muon": _muon_variant(),
    "galore_muon, int8": _muon_variant(of=_MUON_INT8),
    "galore_muon, int8, rank 0.5": _muon_variant("--rank", "0.5", of=_MUON_INT8),
    "galore_muon, int8, rank 8": _muon_variant("--rank", "8", of=_MUON_INT8),
    "galore_muon, random directions": _muon_variant("--method", "random"),
    "galore_muon, GaLore's subspace": _muon_variant("--method", "randomized"),
    "LoRA": Method(("--weights", "lora"), 2e-3),
    "ReLoRA": Method(("--weights", "relora"), 2e-3),
    "low rank": Method(("--weights", "low_rank"), 2e-3),
    "low rank, refactored": Method(("--weights", "refactored"), 2e-3),
}
NOT_MEASURED = "not measured"  # in the place of the rows, where there was no GPU
# Of other authors, or as they are: what the family is measured against.
BASELINES = ("AdamW", "Muon")


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is trained."""

    flags: tuple[str, ...]
    steps: int
    tuning_steps: int
    tuning_seed: int  # not one of those of the table
    seeds: tuple[int, ...]
    embedding_rate: float
    methods: tuple[str, ...] = tuple(METHODS)
    reach: int = 4  # how many factors of two a rate may be from the first guess
    picks: bool = True  # its own rates; otherwise they are those of "cpu"


_TINY = ("--model", "tiny", "--vocab-size", "257")
_SHORT_TESTS = ("--eval-batches", "16", "--last-eval-batches")
# At another scale: one seed.
_FEW: Any = dict(
    tuning_steps=0, tuning_seed=100, seeds=(0,), embedding_rate=32e-3, picks=False,
    methods=("AdamW", "Muon", "8-bit Muon", "galore_muon, int8", "galore_muon, int8, rank 0.5",
             "FRUGAL"),
)  # fmt: skip
BUDGETS = {
    "quick": Budget(
        (*_TINY, "--seq-len", "32", "--batch-size", "2", *_SHORT_TESTS, "2"),
        steps=8, tuning_steps=4, tuning_seed=100, seeds=(0,), embedding_rate=32e-3, reach=0,
        methods=("AdamW", "LoRA"),
    ),
    "cpu": Budget(
        (*_TINY, "--seq-len", "128", "--batch-size", "8", *_SHORT_TESTS, "128"),
        steps=1000, tuning_steps=500, tuning_seed=100, seeds=(0, 1, 2), embedding_rate=32e-3,
    ),
    "large": Budget(
        ("--model", "small", *_TINY[2:], "--seq-len", "128", "--batch-size", "8", *_SHORT_TESTS,
         "128"), steps=200, **_FEW,
    ),
    "batch4": Budget(
        (*_TINY, "--seq-len", "128", "--batch-size", "32", *_SHORT_TESTS, "32"), steps=250, **_FEW,
    ),
    # Longer steps are right for batches that tell more.
    "batch16": Budget(
        (*_TINY, "--seq-len", "128", "--batch-size", "128", *_SHORT_TESTS, "8"), steps=100,
        **{**_FEW, "tuning_steps": 100, "tuning_seed": 0, "picks": True},
    ),
    "gpu": Budget(
        ("--model", "60m", "--dtype", "bfloat16", "--accumulate", "1", *_SHORT_TESTS, "16"),
        steps=1000, tuning_steps=250, tuning_seed=100, seeds=(0,), embedding_rate=4e-3,
        methods=("AdamW", "GaLore", "Muon", "galore_muon", "Fira"), reach=2,
    ),
}  # fmt: skip


STDLIB, MAN = "stdlib", "man"  # texts that have a name
_MAN_BYTES = 8_000_000  # more than any run reads


def write_manual_pages(folder: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """A folder with manual pages of this machine as they are written, in troff: no Python."""
    if folder.exists():
        return folder
    texts: dict[str, str] = {}
    size = 0
    for path in (p for section in "7581" for p in sorted((root / f"man{section}").glob("*.gz"))):
        try:
            text = gzip.decompress(path.read_bytes()).decode()
        except (OSError, EOFError, zlib.error, UnicodeDecodeError):
            continue
        if len(text) < 2000 or text in texts:  # mostly references to another page
            continue
        texts[text] = f"{path.stem}.txt"
        if (size := size + len(text)) > _MAN_BYTES:
            break
    else:
        raise SystemExit(f"{root} has {size} bytes of manual pages, too few: give --text FILES")
    folder.mkdir(parents=True)
    for text, name in texts.items():
        (folder / name).write_text(text)
    return folder


def on_text(budget: Budget, text: str, runs: pathlib.Path) -> Budget:
    """The budget on a text: a name, or a file or folder."""
    if text == STDLIB:
        return budget
    path = pathlib.Path(text)
    if text == MAN:
        path = write_manual_pages(runs / MAN, pathlib.Path("/usr/share/man"))
    return dataclasses.replace(budget, flags=(*budget.flags, "--data", str(path)))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    method: str
    rate: float
    steps: int
    seed: int

    def flags(self, budget: Budget) -> list[str]:
        """Its command line, without the folder."""
        own = [_share(f, self.steps) for f in METHODS[self.method].flags]
        flags = {
            "--steps": self.steps,
            "--seed": self.seed,
            "--learning-rate": self.rate,
            "--embedding-learning-rate": budget.embedding_rate,
        }
        if self.method == "SCALE":  # has rules of its own for embeddings and head
            del flags["--embedding-learning-rate"]
        return [*budget.flags, *own, *(str(x) for item in flags.items() for x in item)]

    @property
    def program(self) -> str:
        """The module that takes these flags."""
        factored = "--weights" in METHODS[self.method].flags
        return "benchmarks.low_rank" if factored else "examples.pretrain"

    def config(self, budget: Budget) -> tuple[config_lib.Config, Callable[..., pretrain.Setup]]:
        """Its settings, and what makes of them the model and optimizer that it trains."""
        flags, make = self.flags(budget), pretrain.setup
        if self.program == "benchmarks.low_rank":
            weights, rank, gap, flags = low_rank.split_flags(flags)
            make = low_rank.make_setup(weights, rank, gap)
        return command_line.parse(flags), make

    def folder(self, budget: Budget, root: pathlib.Path) -> pathlib.Path:
        """Where it lies; another setting is another folder."""
        digest = zlib.crc32(" ".join(self.flags(budget)).encode())
        name = "".join(c if c.isalnum() else "_" for c in self.method)
        return root / f"{name}-{self.rate:.3g}-{self.steps}-{self.seed}-{digest:08x}"


def _share(flag: str, steps: int) -> str:
    """A flag; a share of the steps as their number."""
    return str(max(1, steps * int(flag[:-1]) // 100)) if flag.endswith("%") else flag


def rows(folder: pathlib.Path) -> list[dict]:
    """The metrics of a run that is done; nothing for others."""
    if not (folder / "summary.json").exists():
        return []
    if json.loads((folder / "summary.json").read_text()).get("diverged"):
        return [{"step": 0, "val_loss": math.inf}]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "val_loss" in row]


def train(run: Run, budget: Budget, root: pathlib.Path, cores: set[int] | None) -> float:
    """Do the run, or what is left of it; its final validation loss, infinite if it diverged."""
    folder = run.folder(budget, root)
    if not rows(folder):
        command = [sys.executable, "-m", run.program]
        if (folder / "checkpoints").exists() and any((folder / "checkpoints").glob("[0-9]*")):
            command += [*METHODS[run.method].flags[: 2 * (run.program != "examples.pretrain")]]
            command += ["--resume", str(folder)]
        else:
            (folder / "config.json").unlink(missing_ok=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            command += [*run.flags(budget), "--sample-tokens", "0", "--run-dir", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            if cores is not None:
                os.sched_setaffinity(child.pid, cores)
            failed = child.wait()
        if failed and "The loss is " in (folder / "log.txt").read_text():
            (folder / "summary.json").write_text(json.dumps({"diverged": True}))
        elif failed:
            raise RuntimeError(f"{' '.join(command)} failed: see {folder / 'log.txt'}")
    return rows(folder)[-1]["val_loss"]


def tune(train_at, first: float, reach: int) -> dict[float, float]:
    """Losses by learning rate, up and down from the first until the best is inside."""
    found = {0: train_at(first)}
    while True:
        best = min(found, key=lambda k: found[k])
        missing = [k for k in (best - 1, best + 1) if k not in found and abs(k) <= reach]
        if not missing:
            return {first * 2.0**k: loss for k, loss in sorted(found.items())}
        found[missing[0]] = train_at(first * 2.0 ** missing[0])


def _state(setup: pretrain.Setup) -> training.State:
    return training.new_state(setup.init(), setup.tx)


def state_bytes(run: Run, budget: Budget) -> dict[str, int]:
    """Bytes of weights and optimizer state, and of the part that belongs to the kernels."""
    config, make = run.config(budget)
    state = jax.eval_shape(lambda: _state(make(config)))
    params, state = state["params"], state["opt_state"]

    def of_kernels(path, x) -> bool:
        return bool(x.ndim) and "['blocks']" in path and "['kernel']" in path

    def size(tree, wanted=lambda path, x: True):
        return sum(
            x.size * x.dtype.itemsize
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
            if wanted(jax.tree_util.keystr(path), x)
        )

    return {
        "weights": size(params),
        "state": size(state),
        "state_of_kernels": size(state, of_kernels),
    }


def measure_speed(runs: dict[str, Run], budget: Budget, rounds: int, steps: int) -> dict:
    """Tokens a second: blocks of steps of all methods in turns.

    A refresh is among them where T is not above their number.
    """
    work = {}
    for name, run in runs.items():
        config, make = run.config(budget)
        setup = make(config)
        step = training.make_train_step(setup.model_of, setup.tx, setup.schedule, config.accumulate)
        tokens = jax.random.randint(
            jax.random.key(0), (config.batch_size, config.seq_len + 1), 0, config.vocab_size
        )
        state, _ = step(_state(setup), tokens)  # compiles, and refreshes
        work[name] = [step, jax.block_until_ready(state), tokens]
    seconds = dict.fromkeys(work, 0.0)
    for _ in range(rounds):
        for name, item in work.items():
            step, state, tokens = item
            start = time.perf_counter()
            for _ in range(steps):
                state, _ = step(state, tokens)
            jax.block_until_ready(state)
            seconds[name] += time.perf_counter() - start
            item[1] = state
    tokens = {name: item[2][:, 1:].size for name, item in work.items()}
    return {name: rounds * steps * tokens[name] / s for name, s in seconds.items()}


def collect(budget: Budget, root: pathlib.Path, rates: dict[str, dict[float, float]]) -> dict:
    """The table's rows, of the methods whose runs are all there."""
    table = {}
    for name, losses_by_rate in rates.items():
        rate = min(losses_by_rate, key=lambda r: losses_by_rate[r])
        runs = [Run(name, rate, budget.steps, seed) for seed in budget.seeds]
        found = [rows(run.folder(budget, root)) for run in runs]
        if not all(found):
            continue
        losses = [x[-1]["val_loss"] for x in found]
        perplexities = [math.exp(x) for x in losses]
        table[name] = {
            "learning_rate": rate,
            "tuning_losses": {f"{r:.4g}": x for r, x in losses_by_rate.items()},
            "losses": losses,
            "loss": statistics.mean(losses),
            "perplexity": statistics.mean(perplexities),
            "perplexity_spread": max(perplexities) - min(perplexities),
            **state_bytes(runs[0], budget),
            "validation": [[(x["step"], x["val_loss"]) for x in curve] for curve in found],
            "flags": " ".join(runs[0].flags(budget)),
        }
    return table


def known(path: pathlib.Path, budget: Budget) -> dict:
    """The rows that a JSON has, if they are of this budget."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    wanted = json.loads(json.dumps(dataclasses.asdict(budget)))
    same = all(found["budget"][k] == v for k, v in wanted.items() if k != "methods")
    return found["methods"] if same and found["methods"] != NOT_MEASURED else {}


def verdicts(table: dict) -> dict:
    """What the table says about the family, in shares of the way from AdamW to Muon."""
    if not set(BASELINES) <= table.keys():
        return {}
    adamw, muon = (table[name] for name in BASELINES)
    way = adamw["loss"] - muon["loss"]
    return {
        name: {
            "way_from_adamw_to_muon": (adamw["loss"] - row["loss"]) / way,
            "below_adamw_in_every_seed": all(
                a > b for a, b in zip(adamw["losses"], row["losses"], strict=True)
            ),
            "state_over_adamw": row["state_of_kernels"] / adamw["state_of_kernels"],
        }
        for name, row in table.items()
    }


def show(table: dict) -> None:
    """Print the rows, the best first."""
    judged = verdicts(table)
    head = ["method", "rate", "tried", "loss", "perplexity", "spread", "state MB", "of kernels"]
    lines = []
    for name, row in sorted(table.items(), key=lambda item: item[1]["loss"]):
        way = judged.get(name, {}).get("way_from_adamw_to_muon", math.nan)
        lines.append(
            [
                *(name, row["learning_rate"], len(row["tuning_losses"]), row["loss"]),
                *(row["perplexity"], row["perplexity_spread"]),
                *(row["state"] / 1e6, row["state_of_kernels"] / 1e6),
                *(f"{way:.0%}", row.get("speed", "")),
            ]
        )
    report.table([*head, "way", "tokens/s"], lines)


def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    budgets = parser.add_mutually_exclusive_group()
    for scale in ("large", "batch4", "batch16", "gpu"):
        budgets.add_argument(f"--{scale}", action="store_const", const=scale, dest="budget")
    parser.set_defaults(budget="cpu")
    parser.add_argument("--text", default=STDLIB, help=f"{STDLIB}, {MAN}, or a file or folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these rows")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/quality"))
    parser.add_argument("--speed-rounds", type=int, default=5, help="of 10 steps; 0: not measured")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    args = report.parse(parser, argv, budget="quick", speed_rounds=0)
    first = "quality" if args.budget == "cpu" else f"quality_{args.budget}"
    name = first if args.text == STDLIB else f"{first}_{pathlib.Path(args.text).stem}"
    budget, root = BUDGETS[args.budget], args.runs / args.budget
    picks = budget.picks and args.text == STDLIB
    whence = (first, budget) if budget.picks else ("quality", BUDGETS["cpu"])
    picked = known(args.out / f"{whence[0]}.json", whence[1])
    budget = on_text(budget, args.text, args.runs)
    if args.budget == "gpu" and jax.default_backend() == "cpu":
        print("no GPU: not measured")
        if not known(args.out / "quality_gpu.json", budget):
            result = {"budget": dataclasses.asdict(budget), "methods": NOT_MEASURED}
            report.write("quality_gpu", {"command": args.command} | result, out=args.out)
        return

    # Each training at a time has its share of the cores.
    shares: queue.Queue[set[int] | None] = queue.Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for i in range(args.jobs):
        shares.put(set(cores[i :: args.jobs]) or None if args.jobs > 1 else None)
    printing = threading.Lock()

    def do(run: Run) -> float:
        if args.report_only and not rows(run.folder(budget, root)):
            return math.inf
        share = shares.get()
        try:
            loss = train(run, budget, root, share)
        finally:
            shares.put(share)
        with printing:
            print(f"{run.method}, {run.rate:.4g}, {run.steps} steps, seed {run.seed}: {loss:.4f}",
                  flush=True)  # fmt: skip
        return loss

    def rates_of(name: str) -> dict[float, float]:
        base = METHODS[name].rate_of or name
        row = picked.get(base) or picked.get(name)  # a variant's row has those of its base
        if row and (not picks or base != name):
            return {float(rate): loss for rate, loss in row["tuning_losses"].items()}

        def at(rate):
            return do(Run(base, rate, budget.tuning_steps, budget.tuning_seed))

        return tune(at, METHODS[base].rate, budget.reach)

    def whole_row(name: str) -> dict[float, float]:
        rates = rates_of(name)
        best = min(rates, key=lambda r: rates[r])
        for seed in budget.seeds:
            do(Run(name, best, budget.steps, seed))
        return rates

    wanted = args.methods or budget.methods
    missing = {METHODS[n].rate_of or n for n in wanted if not {n, METHODS[n].rate_of} & {*picked}}
    if not picks and missing:
        parser.error(f"measure {', '.join(sorted(missing))} on {STDLIB} first")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        rates = dict(zip(wanted, pool.map(whole_row, wanted), strict=True))
    table = collect(budget, root, rates)
    args.out.mkdir(parents=True, exist_ok=True)
    table = known(args.out / f"{name}.json", budget) | table
    if args.speed_rounds and table:  # of all rows, in one process
        runs = {n: Run(n, row["learning_rate"], budget.steps, 0) for n, row in table.items()}
        for method, speed in measure_speed(runs, budget, args.speed_rounds, 10).items():
            table[method]["speed"] = speed
    show(table)
    pictures.draw(table, args.out, name)
    result = {"command": args.command, "budget": dataclasses.asdict(budget)}
    result |= {"methods": table, "verdicts": verdicts(table)}
    report.write(name, result, out=args.out)


if __name__ == "__main__":
    main()
