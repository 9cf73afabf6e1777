"""Bytes of the optimizer's state for the paper's models and ranks, counted from shapes.

    python -m benchmarks.state

Everything is float32, but for the last column's projectors. Embeddings, head and norms keep all of
AdamW's state, as in the paper.
"""

import jax

import galore_jax
from benchmarks import report, steps
from examples import llama

MODELS = ("60m", "130m", "350m", "1b", "7b")
GIB = 2**30


def figures(name: str) -> dict[str, float]:
    """Of one model, in GiB."""
    params, rank = steps.stacked(llama.CONFIGS[name]).params, int(llama.RECIPES[name].rank)

    def state(tx) -> float:
        return galore_jax.summary(tx, params).total.state / GIB

    return {
        "rank": rank,
        "weights": steps.nbytes(params) / GIB,
        "adamw": steps.nbytes(jax.eval_shape(steps.adamw().init, params)) / GIB,
        "galore": state(steps.galore(rank)),
        "galore, bfloat16 projectors": state(steps.galore(rank, projector_dtype="bfloat16")),
    }


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    args = report.parse(parser, argv, models=MODELS[:1])
    found = {name: figures(name) for name in args.models}
    report.table(["GiB", *found[args.models[0]]], [[n, *row.values()] for n, row in found.items()])
    report.write("state", {"command": args.command, "unit": "GiB", "models": found}, out=args.out)


if __name__ == "__main__":
    main()
