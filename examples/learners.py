"""What a checkpoint learns, and how it is judged: an encoder to classify, a LLaMA to answer."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import (
    hf,
    hf_files,
    hf_roberta,
    hf_tokenizer,
    instructions,
    llama,
    padding,
    records,
    roberta,
    tasks,
    training,
)
from examples import tokenizer as bpe
from examples.errors import UserError
from examples.finetune_config import FinetuneConfig, classifies
from examples.modules import from_graph, loaded, stored


class Learner(NamedTuple):
    """A checkpoint, its examples, and what is made of them."""

    train: list[padding.Example]
    validation: list[padding.Example]
    collate: padding.Collate
    longest: int  # Tokens.
    shapes: dict  # Of the parameters.
    weights: Callable[[int], dict]  # Reads the parameters; new ones are of this seed.
    model_of: training.ModelOf
    loss_of: training.Loss
    # From `model_of` to what gives the figures of a validation.
    evaluator: Callable[[training.ModelOf], Callable[[dict], dict[str, float]]]
    save: Callable[[pathlib.Path, dict], None]  # As a Hugging Face folder.
    metric: str  # The figure that counts, the larger the better unless it is a loss.
    loss_is: str
    about: str  # What is learned, for people.


def learner(config: FinetuneConfig) -> Learner:
    """Reads the data, and of the checkpoint what is not weights."""
    make = _classification if classifies(config.init_from) else _answers
    made = make(config)
    if len(made.train) < config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size}: there are {len(made.train)} examples to train on."
            " Give less."
        )
    return made


def _classification(config: FinetuneConfig) -> Learner:
    given = {name: getattr(config, name) for name in ("columns", "label")}
    # How many labels there are the rows will say.
    base, _ = hf_roberta.read_config(config.init_from, labels=None)
    longest = min(config.max_length, base.max_length)
    tokenizer = bpe.of_checkpoint(config.tokenizer or config.init_from, base.vocab_size).tokenizer
    rows = tasks.load(
        config.task,
        config.data,
        config.eval_data,
        tasks.encoder(tokenizer, longest),
        **{name: value for name, value in given.items() if value},
    )
    task, regression = rows.task, rows.task.labels == (tasks.REGRESSION,)
    metric = "pearson" if regression else task.metric
    model_config = _in_formats(
        dataclasses.replace(
            base,
            labels=len(task.labels),
            label_names=None if regression else task.labels,
        ),
        config,
    )
    graph, init = roberta.initializer(model_config, 0)
    drops = any((base.dropout, base.attention_dropout, model_config.head_dropout))
    collate = tasks.collate(base.pad_id)

    def row_losses(outputs: Any, targets: Any) -> jax.Array:
        if regression:
            return jnp.square(outputs[:, 0] - targets)
        return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets)

    def loss_of(model: Any, batch: dict, watch: jax.Array | None = None) -> jax.Array:
        key = jax.random.key(batch["seed"][0]) if drops else None
        outputs = model(batch["tokens"], batch["mask"], key, watch)
        return jnp.mean(row_losses(outputs, batch["targets"]))

    def evaluator(model_of: training.ModelOf) -> Callable[[dict], dict[str, float]]:
        predict = jax.jit(lambda params, tokens, mask: model_of(params)(tokens, mask))

        def evaluate(params: dict) -> dict[str, float]:
            held_out = rows.validation
            outputs = np.zeros((len(held_out), len(task.labels)), np.float32)
            for at, batch in padding.validation_batches(
                held_out, config.batch_size, longest, collate
            ):
                outputs[at] = predict(params, batch["tokens"], batch["mask"])[: len(at)]
            wanted = np.array([row.target for row in held_out])
            found = tasks.scores(metric, outputs, wanted)
            found["loss"] = float(np.mean(np.asarray(row_losses(outputs, wanted))))
            return {f"val_{name}": value for name, value in found.items()}

        return evaluate

    def weights(seed: int) -> dict:
        made = hf_roberta.load_hf(
            config.init_from, model_config.param_dtype, labels=len(task.labels), seed=seed
        )
        return loaded(made[1], config.param_dtype)

    def save(folder: pathlib.Path, params: dict) -> None:
        hf_roberta.save_hf(folder, model_config, params)
        hf_tokenizer.copy(pathlib.Path(config.tokenizer or config.init_from), folder)

    return Learner(
        rows.train,
        rows.validation,
        collate,
        longest,
        jax.eval_shape(lambda: stored(init(), config.param_dtype)),
        weights,
        from_graph(graph),
        loss_of,
        evaluator,
        save,
        metric=metric,
        loss_is="squared error" if regression else "loss (nats per text)",
        about=f"{config.task or 'own task'}: " + ", ".join(task.labels),
    )


def _answers(config: FinetuneConfig) -> Learner:
    model_config = _in_formats(hf.read_config(config.init_from), config)
    source = pathlib.Path(config.tokenizer or config.init_from)
    vocabulary = bpe.of_checkpoint(str(source), model_config.vocab_size)
    template = instructions.chat_template(source) if config.chat_template else None
    encode = instructions.encoder(*vocabulary, template, config.max_length)

    def examples(rows: Sequence[records.Record]) -> list[padding.Example]:
        made = [encode(record) for record in rows]
        kept = [example for example in made if example is not None]
        if made and not kept:
            raise UserError(
                f"--max-length {config.max_length}: no row, as of {rows[0].where}, has a response"
                " within it. Give more."
            )
        if lost := len(made) - len(kept):
            which = f"{lost} of {len(made)} rows, as of {rows[0].where},"
            print(f"{which} have no response within --max-length {config.max_length}")
        return kept

    train, validation = map(examples, records.load(config.data, config.eval_data, "validation"))
    if not validation:
        train, validation = padding.held_out(train)
    graph, init = llama.initializer(model_config, 0)

    def loss_of(model: Any, batch: dict, watch: jax.Array | None = None) -> jax.Array:
        tokens = batch["tokens"]
        losses = model.losses(tokens[:, :-1], tokens[:, 1:], watch)
        # Weights are 1 in the whole batch, of which this may be a microbatch.
        return config.accumulate * jnp.sum(losses * batch["weights"])

    def evaluator(model_of: training.ModelOf) -> Callable[[dict], dict[str, float]]:
        eval_step = training.make_eval_step(model_of)

        def evaluate(params: dict) -> dict[str, float]:
            batches = padding.validation_batches(
                validation, config.batch_size, config.max_length, instructions.collate
            )
            pairs = ((batch["tokens"], batch["weights"] > 0) for _, batch in batches)
            return training.evaluate(eval_step, params, pairs)

        return evaluate

    def weights(seed: int) -> dict:
        del seed
        params = hf.load_hf(config.init_from, model_config.param_dtype)[1]
        return loaded(params, config.param_dtype)

    def save(folder: pathlib.Path, params: dict) -> None:
        hf.save_hf(folder, model_config, params)
        hf_tokenizer.copy(pathlib.Path(config.tokenizer or config.init_from), folder)

    return Learner(
        train,
        validation,
        instructions.collate,
        config.max_length,
        jax.eval_shape(lambda: stored(init(), config.param_dtype)),
        weights,
        from_graph(graph),
        loss_of,
        evaluator,
        save,
        metric="loss",
        loss_is="loss (nats per token of a response)",
        about="responses" + ("" if template is None else ", in the tokenizer's chat template"),
    )


def _in_formats(model: Any, config: FinetuneConfig) -> Any:
    """The model's shape, in the formats of the run."""
    in_codes = config.param_dtype == "int8"
    dtype = "bfloat16" if in_codes else config.param_dtype or hf_files.dtype_of(config.init_from)
    # Codes are worth it only where no layer stays decoded for the backward pass.
    remat = config.remat or config.tier == "layerwise" or in_codes
    return dataclasses.replace(model, param_dtype=dtype, dtype=dtype, remat=remat)
