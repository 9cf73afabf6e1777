"""Low-rank weights, the paper's baselines: other ways to write the kernels of a LLaMA's blocks.

    python -m benchmarks.low_rank --weights lora --rank 32 [flags of examples.pretrain]

A kernel (layers, in, out) becomes a dict of factors, which `examples.lora` multiplies out again
where the model needs it, so the model, the loss and the optimizers stay what they are:

    low_rank    W = A B                      Kamalakara et al., https://arxiv.org/abs/2209.13569
    refactored  as low_rank; every T steps A and B are balanced by an SVD of A B, and the first
                moments reset                Glentis et al., https://arxiv.org/abs/2505.22922
    lora        W = W0 + A B, W0 fixed       Hu et al., https://arxiv.org/abs/2106.09685
    relora      as lora; every T steps A B is added to W0, A and B begin anew, their moments too,
                and the learning rate warms up again. No full-rank phase before, as the GaLore
                paper has it                 Lialin et al., https://arxiv.org/abs/2307.05695
"""

import argparse
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples import llama, lora, pretrain
from examples.config import Config
from examples.errors import UserError
from examples.optimizers import is_kernel

Weights = Literal["lora", "relora", "low_rank", "refactored"]
WEIGHTS: tuple[Weights, ...] = typing.get_args(Weights)
RESTARTING = ("relora", "refactored")
# Steps of the warmup after each restart of ReLoRA, as a share of the steps between two.
REWARM = 0.1


def factorise(weights: Weights, params: dict, rank: int, key: jax.Array) -> dict:
    """Write the blocks' kernels as factors: the same model, or the nearest of that rank.

    Args:
      weights: which factors.
      params: the parameters of a model with full kernels.
      rank: inner size of A (layers, in, rank) and B (layers, rank, out).
      key: of the random A of lora and relora, whose B is zero.
    """
    if weights in ("lora", "relora"):
        return lora.factorise(params, rank, key, is_kernel)
    return jax.tree_util.tree_map_with_path(
        lambda path, w: balanced(w, rank) if is_kernel(path) else w, params
    )


def labels(params: dict) -> dict:
    """A tree of `kernel`, `fixed` (W0) and `other` (embeddings, head, norms)."""

    def label(path, _):
        if not is_kernel(path):
            return "other"
        return "fixed" if getattr(path[-1], "key", None) == "base" else "kernel"

    return jax.tree_util.tree_map_with_path(label, params)


def rewarmed(schedule: optax.Schedule, gap: int) -> optax.Schedule:
    """A learning rate that rises anew after each restart of ReLoRA, at steps T, 2T, ..."""
    rise = max(1, int(REWARM * gap))

    def rate(step):
        since = jnp.where(step < gap, rise, step % gap + 1)
        return schedule(step) * jnp.minimum(1.0, since / rise)

    return rate


def make_restart(weights: Weights, seed: int, gap: int) -> Callable[[int, dict], dict]:
    """What happens before a step when so many are done: every T steps the factors begin anew."""

    def without(which: tuple[str, ...], state: Any) -> Any:
        """Zero the named moments of the kernels' factors."""

        def zeroed(path, x):
            names = [getattr(k, "name", getattr(k, "key", None)) for k in path]
            of_factor = "kernel" in names and names[-1] in ("a", "b")
            return jnp.zeros_like(x) if of_factor and set(which) & set(names) else x

        return jax.tree_util.tree_map_with_path(zeroed, state)

    def restart(state: dict) -> dict:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])

        def factors(path, w):
            if not lora.is_factors(w):
                return w
            rank = w["a"].shape[-1]
            if weights == "refactored":
                return balanced(w["a"] @ w["b"], rank)
            name = jax.tree_util.keystr(path)
            base = w["base"] + w["a"] @ w["b"]
            return {"base": base} | lora.fresh(
                base, rank, jax.random.fold_in(key, lora.hash_of(name))
            )

        params = jax.tree_util.tree_map_with_path(factors, state["params"], is_leaf=lora.is_factors)
        which = ("mu",) if weights == "refactored" else ("mu", "nu")
        opt_state = without(which, state["opt_state"])
        return state | {"params": params, "opt_state": opt_state}

    compiled = jax.jit(restart, donate_argnums=0)

    return lambda done, state: compiled(state) if done and done % gap == 0 else state


def balanced(w: jax.Array, rank: int) -> dict[str, jax.Array]:
    """The nearest product of that rank, each factor with the roots of the singular values."""
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    a, b = u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
    return {"a": a.astype(w.dtype), "b": b.astype(w.dtype)}


def split_flags(args: Sequence[str]) -> tuple[Weights, int | None, int | None, list[str]]:
    """Which weights, their rank, the steps between restarts, and the flags of `pretrain`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--weights", choices=WEIGHTS, required=True)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--update-proj-gap", type=int)
    own, rest = parser.parse_known_args(args)
    return own.weights, own.rank, own.update_proj_gap, ["--optimizer", "adamw", *rest]


def make_setup(
    weights: Weights, rank: int | None = None, gap: int | None = None
) -> Callable[[Config], pretrain.Setup]:
    """`pretrain.setup` with such weights; rank and gap are the recipe's by default."""

    def setup(config: Config) -> pretrain.Setup:
        inner, steps = int(rank or config.rank), gap or config.update_proj_gap
        smallest = llama.CONFIGS[config.model].hidden
        if inner > smallest:
            raise UserError(
                f"--rank {inner} is above the {smallest} of the smallest side of a kernel. Give"
                " less."
            )
        if (config.tier, config.optimizer) != ("full", "adamw"):
            raise UserError(f"--weights {weights} goes with --optimizer adamw and --tier full.")
        schedule = pretrain.learning_rate_schedule(config, config.learning_rate)
        if weights == "relora":
            schedule = rewarmed(schedule, steps)
        graph, whole = llama.initializer(pretrain.model_config(config), config.seed)

        def init() -> dict:
            return factorise(weights, whole(), inner, jax.random.key(config.seed))

        tx = pretrain.make_optimizer(config, schedule, labels(jax.eval_shape(init)))
        restart = make_restart(weights, config.seed, steps) if weights in RESTARTING else None
        return pretrain.Setup(
            lambda p: nnx.merge(graph, lora.assemble(p)), init, tx, schedule, restart
        )

    return setup


def main(args: Sequence[str] | None = None) -> int:
    """The command line of `examples.pretrain`, with --weights."""
    weights, rank, gap, rest = split_flags(sys.argv[1:] if args is None else args)
    return pretrain.main(rest, make_setup(weights, rank, gap))


if __name__ == "__main__":
    sys.exit(main())
