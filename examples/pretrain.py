"""Pre-trains a LLaMA with GaLore: `python -m examples.pretrain`.

Without flags it trains a tiny model on the source of the Python standard library, in minutes
on two CPU cores, with no network. `--help` lists every flag; `--model 60m` to `7b` are the
sizes and recipes of the paper.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
import tqdm

import galore_jax
from examples import config as config_lib
from examples import data as data_lib
from examples import llama, optimizers, runs, sampling, training
from examples.config import Config
from examples.errors import UserError


def open_run(config: Config, tokenizer: str) -> pathlib.Path:
    """Creates the run's folder with its config and tokenizer, or checks a resumed one."""
    folder = pathlib.Path(config.run_dir)
    if config.resume is None:
        if (folder / "config.json").exists():
            raise UserError(
                f"--run-dir: {config.run_dir!r} already holds a run. Continue it with --resume"
                f" {config.run_dir}, or give another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        config_lib.save(config, folder)
        (folder / "tokenizer.json").write_text(tokenizer)
    elif (folder / "tokenizer.json").read_text() != tokenizer:
        raise UserError(
            "--resume: the training text has changed since the run began (another Python, or"
            " edited --data files). Restore it, or start a new run."
        )
    return folder


def learning_rate_schedule(config: Config, peak: float) -> optax.Schedule:
    """Up in a line from 0, down in a cosine to 10 %."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup else peak, peak, config.warmup, config.steps, end_value=0.1 * peak
    )


def model_config(config: Config) -> llama.LlamaConfig:
    """The model's size, in the formats of the run."""
    return dataclasses.replace(
        llama.CONFIGS[config.model],
        vocab_size=config.vocab_size,
        param_dtype=config.param_dtype,
        dtype=config.dtype,
        remat=config.remat or config.tier == "layerwise",
        loss_chunk=config.loss_chunk,
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
    params: dict
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    # What happens to the training state before a step, given how many are done.
    before_step: Callable[[int, training.State], training.State] | None = None


def setup(config: Config) -> Setup:
    """The model and the optimizer of a run."""
    schedule = learning_rate_schedule(config, config.learning_rate)
    graph, params = llama.create(model_config(config), config.seed)
    apart = config.embedding_learning_rate is not None
    tx = make_optimizer(config, schedule, optimizers.labels(params) if apart else None)
    return Setup(llama.from_graph(graph), params, tx, schedule)


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
    """Runs the training a config describes and returns the figures of its end."""
    began = time.perf_counter()
    data = data_lib.load(
        config.data,
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        cache_dir=config.cache_dir,
    )
    folder = open_run(config, data.tokenizer.to_str())
    describe_data(config, data)
    model_of, params, tx, schedule, before_step = setup(config)
    print(f"model: {config.model}, {sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    if config.optimizer in optimizers.STACKED:
        print(galore_jax.summary(tx, params))
    batches = iter(data.train)
    manager = runs.checkpoint_manager(folder, config.keep)
    if config.resume is None:
        state = training.new_state(params, tx)
    else:
        abstract_state = jax.eval_shape(lambda p: training.new_state(p, tx), params)
        del params
        state = runs.restore(manager, folder, abstract_state, batches)
        runs.truncate_metrics(folder, int(state["step"]))
    print(f"run folder: {folder}")
    train_step = training.make_train_step(
        model_of,
        tx,
        schedule,
        config.accumulate,
        tier=config.tier,
        clip=config.clip or None,
        rounding_key=jax.random.key(config.seed) if config.stochastic_rounding else None,
    )
    eval_step = training.make_eval_step(model_of)

    def evaluate(params: dict, limit: int | None) -> dict[str, float]:
        """On the whole validation split, or `limit` batches spread evenly over it."""
        held_out = list(
            data_lib.validation_batches(data.validation, config.seq_len, config.batch_size)
        )
        stride = -(-len(held_out) // (limit or len(held_out)))
        return training.evaluate(eval_step, params, held_out[::stride])

    start = int(state["step"])
    stop = max(start, min(config.steps, config.stop_at or config.steps))
    step_tokens = config.batch_size * config.seq_len
    pending, logged = [], time.perf_counter()
    bar = tqdm.tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True)
    for step in range(start + 1, stop + 1):
        if before_step is not None:
            state = before_step(step - 1, state)
        state, metrics = train_step(state, next(batches))
        # The metrics stay on the device until they are needed: reading them waits for the step.
        pending.append({"step": step, "tokens": step * step_tokens} | metrics)
        last, eval_due = step == config.steps, step % config.eval_every == 0
        save_due = step % config.save_every == 0 or step == stop
        if not (last or eval_due or save_due or step % config.log_every == 0):
            continue
        rows = [{k: v if isinstance(v, int) else float(v) for k, v in r.items()} for r in pending]
        speed = len(rows) * step_tokens / (time.perf_counter() - logged)
        if not math.isfinite(rows[-1]["loss"]):
            raise UserError(
                f"The loss is {rows[-1]['loss']} at step {step}. Lower --learning-rate."
            )
        if last or eval_due:
            rows[-1] |= evaluate(
                state["params"], config.last_eval_batches if last else config.eval_batches
            )
        runs.append_metrics(folder, rows)
        if save_due:
            runs.save(manager, step, state, batches)
            runs.plot_loss(folder, f"{config.model}, {config.optimizer}")
        bar.update(len(rows))
        shown = {"loss": f"{rows[-1]['loss']:.3f}", "tok/s": f"{speed:,.0f}"}
        if "val_perplexity" in rows[-1]:
            shown["val ppl"] = f"{rows[-1]['val_perplexity']:.2f}"
        bar.set_postfix(shown)
        pending, logged = [], time.perf_counter()
    bar.close()
    manager.wait_until_finished()
    manager.close()
    if stop < config.steps:
        print(f"stopped after step {stop} of {config.steps}; continue with --resume {folder}")
    figures = runs.read_metrics(folder)[-1] | {"seconds": round(time.perf_counter() - began, 1)}
    (folder / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(", ".join(f"{key} {value:.6g}" for key, value in figures.items()))
    if config.sample_tokens:
        text = sampling.sample_text(
            model_of,
            state["params"],
            data.tokenizer,
            config.prompt,
            count=config.sample_tokens,
            window=config.seq_len,
            seed=config.seed,
        )
        print(f"sample:\n{text}")
    return figures


def main(args: Sequence[str] | None = None, setup: Callable[[Config], Setup] = setup) -> int:
    """The command line: 0 for success, 2 for a mistake of the user."""
    run_dir = ""
    try:
        config = config_lib.parse(sys.argv[1:] if args is None else args)
        run_dir = config.run_dir
        train(config, setup)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with --resume {run_dir}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
