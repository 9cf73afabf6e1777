"""An 8-bit update beside the float32 one and bitsandbytes', and the ways to find the codes.

    python -m benchmarks.eightbit

Updates are for the low-rank moments of LLaMA-60M's blocks under GaLore (rank 128, stacked) and
one plain matrix, 7 M numbers, state donated. Codings are for 1 M numbers of all magnitudes that
the signed map resolves; `wrong` is the share of codes that are not the nearest level's.
All in turns in one process, medians.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import report
from galore_jax import quantize
from galore_jax.optimizers import eightbit
from galore_jax.quantize import BLOCK, DYNAMIC

SHAPES = [*[(8, 128, 512)] * 4, *[(8, 128, 1376)] * 3, (512, 1376)]
PACKAGES = ("bitsandbytes", "torch", "numpy")
OPTIMIZERS = {
    "optax.scale_by_adam": optax.scale_by_adam(),
    "scale_by_adam8bit": eightbit.scale_by_adam8bit(),
    "optax.scale_by_lion": optax.scale_by_lion(),
    "scale_by_lion8bit": eightbit.scale_by_lion8bit(),
}

TABLE = quantize.dynamic_map(True)
MIDDLES = ((TABLE[1:].astype(np.float64) + TABLE[:-1]) / 2).astype(np.float32)
POSITIVE = MIDDLES[DYNAMIC.zero :]


def updates(grads):
    """A compiled, donated update for each optimizer that keeps its state."""

    def make(tx):
        update, state = jax.jit(tx.update, donate_argnums=1), [tx.init(grads)]

        def step():
            out, state[0] = update(grads, state[0])
            return out, state[0]

        return step

    return {name: make(tx) for name, tx in OPTIMIZERS.items()}


def bitsandbytes_steps(grads):
    import bitsandbytes
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def make(kind):
        weights = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads]
        for w, g in zip(weights, grads, strict=True):
            w.grad = torch.tensor(np.asarray(g))
        return getattr(bitsandbytes.optim, kind)(weights, lr=1e-3).step

    return {f"bitsandbytes.{kind}": make(kind) for kind in ("AdamW8bit", "Lion8bit")}


def signed(code):
    """Codes from the distance to zero's code and the sign, for magnitudes."""

    def encode(y):
        distance = jnp.where(y < 0, jnp.maximum(-code(jnp.abs(y)), -127), code(jnp.abs(y)))
        return (distance + DYNAMIC.zero).astype(jnp.uint8)

    return encode


def binary_search(y):
    return jnp.searchsorted(jnp.asarray(MIDDLES), y).astype(jnp.uint8)


def unrolled_search(y):
    table = jnp.asarray(np.append(MIDDLES, np.float32(np.inf)))
    at = jnp.zeros(y.shape, jnp.int32)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        middle = table.at[at + step - 1].get(mode="promise_in_bounds")
        at = jnp.where(y > middle, at + step, at)
    return at.astype(jnp.uint8)


@signed
def table_by_bits(size):
    """The upper half of a float32 picks an entry: a code, and the lower half of its border."""
    lowest = (127 - 23) << 7
    entries = np.arange(lowest, (127 << 7) + 1, dtype=np.int32) << 16
    first = np.searchsorted(POSITIVE, entries.view(np.float32)).astype(np.int32)
    last = np.searchsorted(POSITIVE, (entries | 0xFFFF).view(np.float32))
    border = POSITIVE[np.minimum(first, len(POSITIVE) - 1)].view(np.int32) & 0xFFFF
    packed = first << 16 | np.where(last > first, border, 0xFFFF)
    packed[0] = 0xFFFF
    bits = jax.lax.bitcast_convert_type(size, jnp.int32)
    entry = jnp.maximum((bits >> 16) - lowest, 0)
    found = jnp.asarray(packed).at[entry].get(mode="promise_in_bounds")
    return (found >> 16) + ((bits & 0xFFFF) > (found & 0xFFFF))


@signed
def concave_lines(size):
    """The least of seven lines, then a step back next to the borders of decades."""
    lines = [
        size * np.float32(2**i / 0.9 * 10.0 ** (6 - i)) + np.float32(2**i * (1 - 0.1 / 0.9))
        for i in range(7)
    ]
    d = lines[0]
    for line in lines[1:]:
        d = jnp.where(d < line, d, line)
    exponent = jax.lax.bitcast_convert_type(d, jnp.int32) & 0x7F800000
    border = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    d = jnp.where(d - border < np.float32(0.2), border - np.float32(0.5), d)
    d = jnp.where(size > POSITIVE[0], jnp.maximum(d, 1), 0)
    return jnp.where(size > POSITIVE[-1], 128, d).astype(jnp.int32)


def chosen(y):
    return quantize.nearest_level(y, DYNAMIC).astype(jnp.uint8)


ENCODERS = {
    "decades (chosen)": chosen,
    "decades by concave lines": concave_lines,
    "table by upper bits": table_by_bits,
    "unrolled binary search": unrolled_search,
    "jnp.searchsorted": binary_search,
}


def gather(codes):
    table = jnp.asarray(TABLE)
    return table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def decade_lines(codes):
    distance = codes.astype(jnp.int32) - DYNAMIC.zero
    size = jnp.abs(distance).astype(jnp.float32)
    slope = offset = jnp.zeros_like(size)
    for i in range(7):
        above = size >= 2.0**i
        slope = jnp.where(above, np.float32(0.9 * 10.0 ** (i - 6) / 2**i), slope)
        offset = jnp.where(above, np.float32(10.0 ** (i - 6) * (0.45 / 2**i - 0.8)), offset)
    value = jnp.where(size > 127, 1, slope * size + offset)
    return jnp.where(distance < 0, -value, value)


DECODERS = {"gather from the map (chosen)": gather, "lines of the decades": decade_lines}


def bytes_a_number(tx):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in SHAPES]
    arrays = [x for x in jax.tree.leaves(jax.eval_shape(tx.init, shapes)) if x.ndim]
    return sum(x.size * x.dtype.itemsize for x in arrays) / sum(x.size for x in shapes)


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=41, help="timed calls of each")
    args = report.parse(parser, argv, repeats=1)

    rng = np.random.default_rng(0)
    grads = [jnp.asarray(1e-2 * rng.standard_normal(s), jnp.float32) for s in SHAPES]
    steps = updates(grads)
    try:
        steps |= bitsandbytes_steps(grads)
    except ImportError as error:
        print(f"bitsandbytes: not measured, for want of {error.name}")
    seconds = report.in_turns(steps, args.repeats, warmup=3)
    stored = {name: bytes_a_number(tx) for name, tx in OPTIMIZERS.items()}
    rows = [[name, t, stored.get(name, float("nan"))] for name, t in seconds.items()]
    report.table(["update", "seconds", "bytes a number"], rows)
    ratios = {
        "adam8bit / optax adam": seconds["scale_by_adam8bit"] / seconds["optax.scale_by_adam"],
        "lion8bit / optax lion": seconds["scale_by_lion8bit"] / seconds["optax.scale_by_lion"],
    }
    if other := seconds.get("bitsandbytes.AdamW8bit"):
        ratios["adam8bit / bitsandbytes"] = seconds["scale_by_adam8bit"] / other
    report.table(["8-bit against", "ratio"], [[k, v] for k, v in ratios.items()])

    x = rng.uniform(-1, 1, (4096, BLOCK)) * 10.0 ** rng.uniform(-7, 0, (4096, BLOCK))
    x[:, 0] = 1  # the scale of every block
    x = jnp.asarray(x, jnp.float32)
    best = np.searchsorted(MIDDLES, np.asarray(x))
    encoders = {name: jax.jit(f) for name, f in ENCODERS.items()}
    wrong = {name: float(np.mean(np.asarray(f(x)) != best)) for name, f in encoders.items()}
    encoding = report.in_turns(
        {name: lambda f=f: f(x) for name, f in encoders.items()}, args.repeats
    )
    codes = jnp.asarray(best, jnp.uint8)
    decoders = {name: jax.jit(f) for name, f in DECODERS.items()}
    inexact = {
        name: float(np.mean(np.asarray(f(codes)) != TABLE[best])) for name, f in decoders.items()
    }
    decoding = report.in_turns(
        {name: lambda f=f: f(codes) for name, f in decoders.items()}, args.repeats
    )
    ns = {name: 1e9 * t / x.size for name, t in (encoding | decoding).items()}
    off = wrong | inexact
    report.table(["coding", "ns a number", "wrong"], [[k, t, off[k]] for k, t in ns.items()])

    report.write(
        "eightbit",
        {
            "command": args.command,
            "update_seconds": seconds,
            "state_bytes_a_number": stored,
            "ratios": ratios,
            "coding_nanoseconds_a_number": ns,
            "coding_share_wrong": off,
        },
        PACKAGES,
        args.out,
    )


if __name__ == "__main__":
    main()
