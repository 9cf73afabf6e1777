"""Fine-tunes a checkpoint with GaLore: `python -m examples.finetune`.

    python -m examples.finetune --init-from roberta-base --task mrpc
    python -m examples.finetune --init-from SmolLM2-135M --data answers.jsonl

A RoBERTa learns to classify, by the paper's settings; a LLaMA, or a descendant of it, to answer.
`--method` takes what GaLore is compared with. Each training keeps its best weights as a folder
`best` that `transformers` loads too; `examples.finetune_table` sets runs beside each other.
"""

import contextlib
import functools
import hashlib
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_jax
from examples import (
    checkpoints,
    events,
    finetune_config,
    finetune_table,
    interrupts,
    loop,
    lora,
    meshes,
    modules,
    optimizers,
    padding,
    runs,
    training,
)
from examples import config as config_lib
from examples.best import Best
from examples.errors import UserError
from examples.files import write_atomically
from examples.finetune_config import METHODS, FinetuneConfig
from examples.learners import Learner, learner

DATA = "data.sha256"


class Setup(NamedTuple):
    """What is trained, and by what."""

    shapes: dict  # Of the parameters.
    weights: Callable[[], dict]  # Reads or makes them.
    model_of: training.ModelOf
    tx: optax.GradientTransformation
    schedule: optax.Schedule


def learning_rate_schedule(config: FinetuneConfig, steps: int) -> optax.Schedule:
    """Up in a line from 0, down in a line to 0."""
    warmup = int(config.warmup * steps)
    down = optax.linear_schedule(config.learning_rate, 0.0, steps - warmup)
    up = optax.linear_schedule(0.0, config.learning_rate, max(1, warmup))
    return optax.join_schedules([up, down], [warmup]) if warmup else down


def setup(config: FinetuneConfig, made: Learner, seed: int, steps: int) -> Setup:
    """The parameters and the optimizer of a training."""
    method, schedule = METHODS[config.method], learning_rate_schedule(config, steps)
    rank = config_lib.whole_rank(config.rank)
    shapes, labels = made.shapes, None
    model_of: training.ModelOf = made.model_of
    weights: Callable[[], dict] = functools.partial(made.weights, seed)

    def is_target(path: tuple[Any, ...]) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        return re.search(config.target, names) is not None

    whole = jax.eval_shape(galore_jax.dequantize_weights, shapes)
    if not any(is_target(path) for path, _ in jax.tree_util.tree_leaves_with_path(whole)):
        raise UserError(f"--target {config.target!r} fits no weight of the model.")
    if config.method == "lora":
        factorised = functools.partial(
            lora.factorise, rank=rank, key=jax.random.key(seed), chosen=is_target
        )

        def with_factors() -> dict:
            return factorised(jax.tree.map(jnp.asarray, made.weights(seed)))

        def assembled(params: dict) -> Any:
            return made.model_of(lora.assemble(params))

        shapes, weights = jax.eval_shape(factorised, shapes), with_factors
        model_of = assembled
        labels = jax.tree_util.tree_map_with_path(lora.label, shapes)
    given: dict[str, Any] = {}
    if config.projector_dtype is not None:
        given["projector_dtype"] = config.projector_dtype
    if method.adam_rate:
        given["adam_learning_rate"] = lambda step: method.adam_rate * schedule(step)
    try:
        tx = optimizers.create(
            method.optimizer,
            schedule,
            weight_decay=config.weight_decay,
            clip=None if config.tier == "layerwise" else config.clip or None,
            labels=labels,
            target=config.target,
            rank=rank,
            update_proj_gap=config.update_proj_gap,
            scale=config.scale,
            **given,
        )
        jax.eval_shape(tx.init, shapes)
    except (TypeError, ValueError) as error:
        raise UserError(f"--method {config.method}: {error}") from error
    return Setup(shapes, weights, model_of, tx, schedule)


def train_once(
    config: FinetuneConfig,
    made: Learner,
    seed: int,
    folder: pathlib.Path,
    stop_asked: Callable[[], bool],
) -> dict[str, Any] | None:
    """One training; its figures, or None where it was stopped before its end."""
    began = time.perf_counter()
    folder.mkdir(exist_ok=True)
    each_epoch = len(made.train) // config.batch_size
    steps = max(1, math.ceil(config.epochs * each_epoch))
    shapes, weights, model_of, tx, schedule = setup(config, made, seed, steps)
    train_step = training.make_train_step(
        model_of,
        tx,
        schedule,
        config.accumulate,
        tier=config.tier,
        clip=config.clip or None,
        rounding_key=jax.random.key(seed) if loses_small_steps(shapes) else None,
        loss_of=made.loss_of,
    )
    evaluate_params = made.evaluator(model_of)
    data = iter(
        padding.training_batches(
            padding.Batches(made.train, config.batch_size, steps, seed, made.longest, made.collate)
        )
    )
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(checkpoints.opened(folder, 1, data))
        start = checkpoints.choose(folder)
        if start is None:
            state = meshes.new_state(dict, tx, None, weights)
        else:
            state = saver.restore(start, meshes.abstract_state(None, shapes, tx))
        runs.truncate_metrics(folder, start or 0)
        tell = stack.enter_context(events.opened(folder, config.tensorboard))
        best = Best(folder, made.metric, lambda path, p: made.save(path, lora.assemble(p)))

        def evaluate(params: dict, last: bool) -> dict[str, float]:
            figures = evaluate_params(params)
            best.look(figures, params)
            return figures

        def stop() -> bool:
            return stop_asked() or best.is_old(config.patience)

        eval_every = max(1, each_epoch // config.evals_per_epoch)
        plan = loop.Plan(
            steps,
            min(steps, config.stop_at or steps),
            ("examples", config.batch_size),
            config.log_every,
            eval_every,
            save_every=eval_every,
            skip_nonfinite=0,
            title=f"{pathlib.Path(config.init_from).name}, {config.method}, seed {seed}",
            loss=made.loss_is,
            speed=config.diagnostics,
        )

        def one_step(done: int, state: training.State) -> tuple[training.State, dict]:
            look = config.diagnostics and training.looks(
                done, config.log_every, config.update_proj_gap
            )
            return train_step(state, next(data), look=look)

        state, done = loop.take_steps(plan, state, one_step, evaluate, saver, stop, tell)
        saver.wait()
    if done < steps and not best.is_old(config.patience):
        return None
    figures = best.figures | {
        "metric": made.metric,
        "steps": done,
        "parameters": modules.size(made.shapes),
        "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(state["params"])),
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state["opt_state"])),
        "seconds": round(time.perf_counter() - began, 1),
    }
    runs.save_summary(folder, figures)
    return figures


def loses_small_steps(shapes: dict) -> bool:
    """Whether the format of some weights does: bfloat16, or 8-bit codes."""
    return any(x.dtype in (jnp.bfloat16, jnp.int8) for x in jax.tree.leaves(shapes))


def digest(made: Learner) -> str:
    """Of all examples, to know them again."""
    found = hashlib.sha256()
    for example in (*made.train, *made.validation):
        found.update(example.ids.tobytes())
        found.update(example.target.tobytes())
    return found.hexdigest()


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Runs the trainings that a config describes; their figures by seed, of those that ended."""
    folder, figures = pathlib.Path(config.run_dir), dict[str, Any]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.locked(config))
        runs.refuse_another(config)
        made = learner(config)
        setup(config, made, config.seeds[0], steps=1)  # Refuses flags before anything is written.
        print(
            f"{pathlib.Path(config.init_from).name}: {made.about}; {len(made.train):,} examples,"
            f" {len(made.validation):,} to validate on"
        )
        data = digest(made)
        if config.resume is None:
            write_atomically(folder / DATA, data)
            config_lib.save(config, folder)
        elif (folder / DATA).read_text() != data:
            raise UserError(
                "--resume: the data have changed since the run began. Restore them, or start a"
                " new run."
            )
        stop_asked = stack.enter_context(interrupts.stop_requests())
        for seed in config.seeds:
            own = folder / f"seed-{seed}"
            if (own / runs.SUMMARY).exists():
                figures[str(seed)] = json.loads((own / runs.SUMMARY).read_text())
                continue
            print(f"seed {seed}: {own}")
            found = train_once(config, made, seed, own, stop_asked)
            if found is not None:
                figures[str(seed)] = found
            if stop_asked():
                break
    if len(figures) < len(config.seeds):
        print(f"stopped; continue with --resume {folder}")
        return figures
    print(finetune_table.table([folder]))
    return figures


def main(args: Sequence[str] | None = None) -> int:
    """The command line: 0 for success, 2 for a mistake of the user."""
    run_dir = ""
    try:
        config = finetune_config.parse(sys.argv[1:] if args is None else args)
        run_dir = config.run_dir
        finetune(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with --resume {run_dir}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
