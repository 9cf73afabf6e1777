"""Pre-trains a LLaMA with GaLore: `python -m examples.pretrain`.

Without flags it trains a tiny model on the source of the Python standard library, in minutes
on two CPU cores, with no network. `--help` lists every flag; `--model 60m` to `7b` are the
sizes and recipes of the paper.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tqdm

import galore_jax
from examples import (
    checkpoints,
    command_line,
    hf,
    interrupts,
    llama,
    meshes,
    optimizers,
    processes,
    runs,
    sampling,
    training,
)
from examples import config as config_lib
from examples import data as data_lib
from examples import tokenizer as bpe
from examples.config import Config
from examples.errors import UserError


def learning_rate_schedule(config: Config, peak: float) -> optax.Schedule:
    """Up in a line from 0, down in a cosine to 10 %."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup else peak, peak, config.warmup, config.steps, end_value=0.1 * peak
    )


def model_config(config: Config) -> llama.LlamaConfig:
    """The model's size, in the formats of the run."""
    given = config.init_from
    return dataclasses.replace(
        hf.read_config(given) if given else llama.CONFIGS[config.model],
        vocab_size=config.vocab_size,
        param_dtype=config.param_dtype,
        dtype=config.dtype,
        remat=config.remat or config.tier == "layerwise",
        loss_chunk=config.loss_chunk,
        batch_sharding=meshes.batch_sharding(meshes.create(config)),
    )


def make_optimizer(
    config: Config, schedule: optax.Schedule, labels: dict | None = None
) -> optax.GradientTransformation:
    """The optimizer of the run; what it refuses is a mistake in the flags.

    Layer by layer no link of it sees all gradients, so there the training step clips.

    Args:
        config: the settings.
        schedule: the learning rate.
        labels: see `optimizers.create`.
    """
    apart: dict[str, Any] = {"labels": labels}
    if config.embedding_learning_rate is not None:
        rate = learning_rate_schedule(config, config.embedding_learning_rate)
        apart["embedding_learning_rate"] = rate
    try:
        return optimizers.create(
            config.optimizer,
            schedule,
            weight_decay=config.weight_decay,
            clip=None if config.tier == "layerwise" else config.clip or None,
            **apart,
            **config_lib.galore_options(config),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {config.optimizer}: {error}") from error


class Setup(NamedTuple):
    """What is trained; a benchmark puts something else in the place of a model's own weights."""

    model_of: training.ModelOf
    init: Callable[[], dict]  # Makes the parameters.
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    # What happens to the training state before a step, given how many are done.
    before_step: Callable[[int, training.State], training.State] | None = None
    weights: Callable[[], dict] | None = None  # Reads the first parameters, in place of `init`.


def setup(config: Config) -> Setup:
    """The model and the optimizer of a run."""
    schedule = learning_rate_schedule(config, config.learning_rate)
    graph, init = llama.initializer(model_config(config), config.seed)
    apart = config.embedding_learning_rate is not None
    labels = optimizers.labels(jax.eval_shape(init)) if apart else None
    tx = make_optimizer(config, schedule, labels)
    given, dtype = config.init_from, config.param_dtype
    weights = (lambda: hf.load_hf(given, dtype)[1]) if given else None
    return Setup(llama.from_graph(graph), init, tx, schedule, weights=weights)


def describe_data(config: Config, data: data_lib.Data) -> None:
    """Prints what the run will see."""
    planned = config.steps * config.batch_size
    epochs = f"{planned / data.sequences:.2f} epochs of " if data.sequences else ""
    source = ", ".join(config.data) or "the Python standard library"
    print(
        f"data: {source}; {planned * config.seq_len:,} tokens in {config.steps:,} steps,"
        f" {epochs}sequences of {config.seq_len};"
        f" {len(data.validation) - 1:,} validation tokens"
    )


def train(config: Config, setup: Callable[[Config], Setup] = setup) -> dict[str, float]:
    """Runs the training a config describes; returns the figures of its end, if it gets there."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.quiet())
        mesh = meshes.create(config)
        config = dataclasses.replace(config, run_dir=processes.from_first(lambda: config.run_dir))
        folder = pathlib.Path(config.run_dir)

        def take_folder() -> None:
            stack.enter_context(runs.locked(config))
            runs.refuse_another(config)

        processes.from_first(take_folder)
        given = config.init_from
        data = data_lib.load(
            config.data,
            vocab_size=config.vocab_size,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            cache_dir=config.cache_dir,
            share=(jax.process_index(), jax.process_count()),
            vocabulary=bpe.of_checkpoint(given, config.vocab_size) if given else None,
        )
        describe_data(config, data)
        model_of, init, tx, schedule, before_step, weights = setup(config)
        params = jax.eval_shape(init)
        size = sum(x.size for x in jax.tree.leaves(params))
        print(f"model: {config_lib.model_name(config)}, {size:,} parameters")
        if config.optimizer in optimizers.STACKED:
            print(galore_jax.summary(tx, params))
        tokenizer = data.tokenizer.to_str()
        processes.from_first(lambda: runs.open_run(config, tokenizer))
        stop_asked = processes.any_of(stack.enter_context(interrupts.stop_requests()))
        batches, start = iter(data.train), processes.from_first(lambda: checkpoints.choose(folder))
        saver = stack.enter_context(checkpoints.opened(folder, config.keep, batches))
        wanted = meshes.abstract_state(mesh, params, tx)
        shardings = mesh and jax.tree.map(lambda x: x.sharding, wanted)
        if start is None:
            state = meshes.new_state(init, tx, shardings, weights)
        else:
            state = saver.restore(start, wanted)
        runs.truncate_metrics(folder, start or 0)
        print(f"run folder: {folder}; {start or 0} of {config.steps} steps are done")
        train_step = training.make_train_step(
            model_of,
            tx,
            schedule,
            config.accumulate,
            tier=config.tier,
            clip=config.clip or None,
            rounding_key=jax.random.key(config.seed) if config.stochastic_rounding else None,
            skip_nonfinite=config.skip_nonfinite > 0,
            grad_norm=config.grad_norm or ("subspace" if mesh and not config.clip else "exact"),
            shardings=shardings,
        )

        def one_step(done: int, state: training.State) -> tuple[training.State, dict]:
            if before_step is not None:
                state = before_step(done, state)
            return train_step(state, meshes.place(mesh, next(batches)))

        eval_step = training.make_eval_step(model_of)

        def evaluate(params: dict, limit: int | None) -> dict[str, float]:
            """On the whole validation split, or `limit` batches spread evenly over it."""
            held_out = list(
                data_lib.validation_batches(data.validation, config.seq_len, config.batch_size)
            )
            stride = -(-len(held_out) // (limit or len(held_out)))
            place = functools.partial(meshes.place_whole, mesh)
            return training.evaluate(eval_step, params, held_out[::stride], place)

        state, done = take_steps(config, state, one_step, evaluate, saver, stop_asked)
        saver.wait()
        if done < config.steps:
            print(f"stopped after step {done} of {config.steps}; continue with --resume {folder}")
        if done < last_step(config):  # Somebody waits for the end.
            return {}
        figures = processes.from_first(lambda: runs.read_metrics(folder)[-1])
        figures |= {"seconds": round(time.perf_counter() - began, 1)}
        runs.save_summary(folder, figures)
        print(", ".join(f"{key} {value:.6g}" for key, value in figures.items()))
        if config.sample_tokens:
            given = config.prompt
            text = sampling.sample_text(
                model_of,
                state["params"],
                data.tokenizer,
                bpe.encode(data.tokenizer, given)[:-1] if given else data.opening(),
                count=config.sample_tokens,
                ends=(data.end,),
                seed=config.seed,
            )
            print(f"sample:\n{text}")
        return figures


def last_step(config: Config) -> int:
    """The step that a run stops after."""
    return min(config.steps, config.stop_at or config.steps)


def take_steps(
    config: Config,
    state: training.State,
    one_step: Callable[[int, training.State], tuple[training.State, dict]],
    evaluate: Callable[[dict, int | None], dict[str, float]],
    saver: checkpoints.Checkpoints,
    stop_asked: Callable[[], bool],
) -> tuple[training.State, int]:
    """Takes the steps that are left, or those until somebody asks to stop.

    Each step that is taken is in the metrics, and those of a checkpoint before it is saved.

    Args:
      config: the settings.
      state: the training state.
      one_step: from the number of steps done and the state to the next state and its metrics.
      evaluate: from parameters and the most batches to the figures of a validation.
      saver: of the run's checkpoints.
      stop_asked: whether to stop after the step.

    Returns:
      The state and the number of steps done; there is a checkpoint of them.
    """
    folder, step_tokens = saver.folder, config.batch_size * config.seq_len
    done, asked = int(state["step"]), stop_asked()
    stop = max(done, last_step(config))
    pending, logged = [], time.perf_counter()
    with tqdm.tqdm(
        total=config.steps,
        initial=done,
        unit="step",
        dynamic_ncols=True,
        disable=not processes.is_first(),
    ) as bar:
        while done < stop and not asked:
            state, metrics = one_step(done, state)
            done, asked = done + 1, stop_asked()
            # The metrics stay on the device until they are needed: reading them waits for the step.
            pending.append({"step": done, "tokens": done * step_tokens} | metrics)
            last, eval_due = done == config.steps, done % config.eval_every == 0
            save_due = done % config.save_every == 0 or done == stop or asked
            if not (last or eval_due or save_due or done % config.log_every == 0):
                continue
            rows = [{k: np.asarray(v).item() for k, v in row.items()} for row in pending]
            speed = len(rows) * step_tokens / (time.perf_counter() - logged)
            check_finite(config, rows)
            if last or eval_due:
                limit = config.last_eval_batches if last else config.eval_batches
                rows[-1] |= evaluate(state["params"], limit)
            runs.append_metrics(folder, rows)
            saver.seal_finished()
            if save_due:
                saver.save(done, state)
                runs.plot_loss(folder, f"{config_lib.model_name(config)}, {config.optimizer}")
            bar.update(len(rows))
            bar.set_postfix(shown(rows[-1]) | {"tok/s": f"{speed:,.0f}"})
            pending, logged = [], time.perf_counter()
    return state, done


def check_finite(config: Config, rows: list[dict[str, Any]]) -> None:
    """Stops a run whose loss is not finite, or has not been in too many steps in a row."""
    loss, step = rows[-1]["loss"], rows[-1]["step"]
    if not config.skip_nonfinite:
        if not math.isfinite(loss):
            raise UserError(f"The loss is {loss} at step {step}. Lower --learning-rate.")
        return
    for row in rows:
        if row["skipped_in_a_row"] >= config.skip_nonfinite:
            raise UserError(
                f"--skip-nonfinite {config.skip_nonfinite}: {row['skipped_in_a_row']} steps in a"
                f" row had no finite loss and gradient, to step {row['step']} with its loss of"
                f" {row['loss']}. Lower --learning-rate, or look at the data."
            )


def shown(row: dict[str, Any]) -> dict[str, str]:
    """What the progress bar says of a step."""
    parts = {"loss": f"{row['loss']:.3f}"}
    if "val_perplexity" in row:
        parts["val ppl"] = f"{row['val_perplexity']:.2f}"
    if row.get("skipped"):
        parts["skipped"] = str(row["skipped"])
    return parts


def main(args: Sequence[str] | None = None, setup: Callable[[Config], Setup] = setup) -> int:
    """The command line: 0 for success, 2 for a mistake of the user."""
    run_dir, code = "", 0
    try:
        config = command_line.parse(sys.argv[1:] if args is None else args)
        run_dir = config.run_dir
        processes.join(config)
        train(config, setup)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with --resume {run_dir}", file=sys.stderr)
        code = 130
    except Exception:  # whatever it is, the other processes must not wait for this one
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    return processes.leave(code) if code else 0


if __name__ == "__main__":
    sys.exit(main())
