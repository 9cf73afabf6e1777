"""Tunix's PeftTrainer, as it is: full fine-tuning, with its gradient accumulation too."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.trainers.training import STEPS, X, check_near, full_gradients, mean_square, optimizer

pytest.importorskip("tunix")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.lm_head = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        return self.lm_head(nnx.tanh(self.up(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own
@pytest.mark.parametrize("accumulated", [None, 2])
def test_peft_trainer(accumulated):
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    tx, model = optimizer(), Net(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(np.asarray, params)
    want = full_gradients(lambda p: mean_square(nnx.merge(graph, p)(X)), tx, params)

    config = TrainingConfig(
        eval_every_n_steps=10**6, max_steps=STEPS - 1, gradient_accumulation_steps=accumulated
    )
    trainer = PeftTrainer(model, tx, config).with_loss_fn(lambda model, x: mean_square(model(x)))
    trainer.train([{"x": X}] * (STEPS - 1) * (accumulated or 1))
    check_near([want[0], float(mean_square(model(X)))], [want[0], want[-1]])
