"""Every benchmark, one after the other.

    python -m benchmarks.all --quick        # minutes: whether all of them run
    python -m benchmarks.all                # the real ones: hours
    python -m benchmarks.all --only tiers memory

Quick figures go to runs/quick, the others to benchmarks/results, or all to --out. The real
`checkpoint` wants a Hugging Face folder, which is given by itself: `python -m benchmarks.checkpoint
FOLDER`. A benchmark that fails is told at the end, and the rest is run.
"""

import argparse
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

# The fast ones first.
BENCHMARKS = (
    *("imports", "layouts", "state", "devices", "memory", "optimizer_step", "peers", "eightbit"),
    *("projectors", "muon", "tiers", "checkpoint", "finetune", "precision", "quality", "gpu"),
)
NEED_MORE = ("checkpoint",)  # than can be had here, unless they are quick
ROOT = pathlib.Path(__file__).parents[1]


def run(name: str, flags: Sequence[str]) -> bool:
    """One benchmark in a process of its own; a line on how it went, and its output if it failed."""
    began = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds, failed = time.monotonic() - began, ended.returncode != 0
    print(f"{name:16} {seconds:7.1f} s  {'FAILED' if failed else 'ok'}", flush=True)
    if failed:
        print(ended.stdout[-2000:], ended.stderr[-4000:], sep="", flush=True)
    return not failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small form of each")
    parser.add_argument("--out", type=pathlib.Path, help="folder for all JSON")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME")
    args = parser.parse_args(argv)
    names = args.only or [n for n in BENCHMARKS if args.quick or n not in NEED_MORE]
    flags = ["--quick"] * args.quick
    flags += ["--out", str(args.out.resolve())] if args.out else []
    failed = [name for name in names if not run(name, flags)]
    print(f"failed: {', '.join(failed)}" if failed else f"all {len(names)} are done")
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main())
