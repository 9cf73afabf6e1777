"""A model of one table, compiled in no time, for tests of what happens around the training."""

from typing import NamedTuple

import jax
import optax

from examples import pretrain

FLAGS = [
    *("--data", "texts", "--optimizer", "adamw", "--vocab-size", "300", "--seq-len", "16"),
    *("--batch-size", "4", "--steps", "12", "--save-every", "4", "--log-every", "3"),
    *("--eval-every", "5", "--eval-batches", "2", "--sample-tokens", "0"),
    *("--cache-dir", "cache"),
]


class Bigram(NamedTuple):
    """The scores of the next token by this one alone."""

    table: jax.Array

    def losses(self, tokens, targets, watch=None):
        scores = self.table[tokens]
        return optax.softmax_cross_entropy_with_integer_labels(scores, targets)


def setup(before_step=None, model=Bigram):
    """For `pretrain.main`: trains the model, with something happening before a step."""

    def made(config):
        schedule = pretrain.learning_rate_schedule(config, 0.1)

        def init():
            return {"table": 0.02 * jax.random.normal(jax.random.key(0), (300, 300))}

        def then(done, state):
            if before_step is not None:
                before_step(done)
            return state

        tx = optax.adam(schedule)
        return pretrain.Setup(lambda p: model(p["table"]), init, tx, schedule, then)

    return made


def run(*flags, before_step=None, model=Bigram):
    """A new run, or one to resume."""
    given = flags if "--resume" in flags else (*FLAGS, *flags)
    return pretrain.main(given, setup(before_step, model))
