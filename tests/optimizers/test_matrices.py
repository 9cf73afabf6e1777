"""AdamW beside a rule for matrices."""

import functools

import numpy as np
import optax
import pytest

import galore_jax
from tests.optimizers.equations import DECAY, RATE
from tests.problems import params_like, train


@pytest.mark.parametrize(
    "make", [functools.partial(galore_jax.alice, rank=2), galore_jax.foam, galore_jax.racs]
)
def test_what_is_no_matrix_takes_adamws_steps(make):
    params = params_like({"w": (8, 14), "bias": (14,), "head": (6, 10)})
    got, _ = train(make(RATE, weight_decay=DECAY, adam_learning_rate=0.005), params, 5)
    want, _ = train(optax.adamw(0.005, weight_decay=DECAY), params, 5)
    for name in ("bias", "head"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-6)
