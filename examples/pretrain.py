"""Pre-trains a LLaMA with GaLore: `python -m examples.pretrain`.

Without flags it trains a tiny model on the source of the Python standard library, in minutes
on two CPU cores, with no network. `--help` lists every flag; `--model 60m` to `7b` are the
sizes and recipes of the paper.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import galore_jax
from examples import (
    checkpoints,
    command_line,
    events,
    hf,
    interrupts,
    llama,
    loop,
    meshes,
    modules,
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
        param_dtype=config.dtype if config.param_dtype == "int8" else config.param_dtype,
        dtype=config.dtype,
        # Codes are worth it only where no layer stays decoded for the backward pass.
        remat=config.remat or config.tier == "layerwise" or config.param_dtype == "int8",
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


def initializer(config: Config) -> tuple[training.ModelOf, Callable[[], dict]]:
    """From parameters to the model of a run, and what makes the first ones."""
    graph, init = llama.initializer(model_config(config), config.seed)
    if config.param_dtype != "int8":
        return llama.from_graph(graph), init
    return llama.from_graph(graph), modules.leaf_by_leaf(
        lambda: modules.stored(init(), config.param_dtype)
    )


def setup(config: Config) -> Setup:
    """The model and the optimizer of a run."""
    schedule = learning_rate_schedule(config, config.learning_rate)
    model_of, init = initializer(config)
    apart = config.embedding_learning_rate is not None
    shapes = jax.eval_shape(lambda: galore_jax.dequantize_weights(init()))
    tx = make_optimizer(config, schedule, optimizers.labels(shapes) if apart else None)
    given, dtype = config.init_from, model_config(config).param_dtype

    def weights() -> dict:
        return modules.loaded(hf.load_hf(str(given), dtype)[1], config.param_dtype)

    return Setup(model_of, init, tx, schedule, weights=weights if given else None)


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
        print(f"model: {config_lib.model_name(config)}, {modules.size(params):,} parameters")
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
        tell = stack.enter_context(events.opened(folder, config.tensorboard))
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
            look = config.diagnostics and training.looks(
                done, config.log_every, config.update_proj_gap
            )
            return train_step(state, meshes.place(mesh, next(batches)), look=look)

        eval_step = training.make_eval_step(model_of)

        def evaluate(params: dict, last: bool) -> dict[str, float]:
            """On the whole validation split, or some batches spread evenly over it."""
            limit = config.last_eval_batches if last else config.eval_batches
            held_out = list(
                data_lib.validation_batches(data.validation, config.seq_len, config.batch_size)
            )
            stride = -(-len(held_out) // (limit or len(held_out)))
            place = functools.partial(meshes.place_whole, mesh)
            return training.evaluate(eval_step, params, held_out[::stride], place)

        stop = min(config.steps, config.stop_at or config.steps)
        plan = loop.Plan(
            config.steps,
            stop,
            ("tokens", config.batch_size * config.seq_len),
            config.log_every,
            config.eval_every,
            config.save_every,
            config.skip_nonfinite,
            title=f"{config_lib.model_name(config)}, {config.optimizer}",
            loss="loss (nats per token)",
            speed=config.diagnostics,
        )
        state, done = loop.take_steps(plan, state, one_step, evaluate, saver, stop_asked, tell)
        saver.wait()
        if done < config.steps:
            print(f"stopped after step {done} of {config.steps}; continue with --resume {folder}")
        if done < stop:  # Somebody waits for the end.
            return {}
        last = processes.from_first(lambda: runs.read_metrics(folder)[-1])
        figures = {name: value for name, value in last.items() if "/" not in name}  # Not by leaf.
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
