"""What `import galore_jax` takes over `import optax`, which it needs: time of a new process.

    python -m benchmarks.imports

Each statement runs in turn with the other; figures are medians.
"""

import resource
import statistics
import subprocess
import sys

from benchmarks import report

STATEMENTS = ("import optax", "import galore_jax")


def seconds(statement: str) -> float:
    """Processor time of a Python that runs a statement, its start included."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    began = used()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return used() - began


def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = report.parse(parser, argv, rounds=1)
    for statement in STATEMENTS:  # its files are read and compiled
        seconds(statement)
    found: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for _ in range(args.rounds):
        for statement, times in found.items():
            times.append(seconds(statement))
    medians = {statement: statistics.median(times) for statement, times in found.items()}
    ratio = medians["import galore_jax"] / medians["import optax"]
    report.table(["", "seconds"], [*medians.items(), ("ratio", ratio)])
    result = {"rounds": args.rounds, "processor_seconds": medians, "over_optax": ratio}
    report.write("imports", {"command": args.command} | result, out=args.out)


if __name__ == "__main__":
    main()
