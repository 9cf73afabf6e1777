"""Haiku: its stacks of layers."""

import re

import jax
import jax.numpy as jnp
import pytest

import galore_jax
from tests.trainers.training import (
    X,
    check_near,
    full_gradients,
    in_the_subspace,
    mean_square,
    optimizer,
)

hk = pytest.importorskip("haiku")


class Block(hk.Module):
    def __call__(self, x):
        return x + jnp.tanh(hk.Linear(16, name="lin")(x))


class Names:
    """Layers of a stack as `l0`, `l1`, ... among the parameters."""

    def stacked_to_flat(self, name, layer):
        return name.replace("l/", f"l{layer}/")

    def flat_to_stacked(self, name):
        found = re.match(r"l(\d+)/(.*)", name)
        return (f"l/{found[2]}", int(found[1])) if found else None


@pytest.mark.parametrize("transparent", [False, True])
def test_layer_stack(transparent):
    options = dict(transparent=True, transparency_map=Names()) if transparent else {}

    def net(x):
        stack = hk.experimental.layer_stack(3, **options)
        x = stack(lambda x: Block(name="l")(x))(x)
        return hk.Linear(8, name="lm_head")(x)

    net = hk.without_apply_rng(hk.transform(net))
    params = net.init(jax.random.key(0), X)
    tx = optimizer(weight_dimension_numbers=galore_jax.last_two_axes)

    def loss_fn(params):
        return mean_square(net.apply(params, X))

    check_near(in_the_subspace(loss_fn, tx, params), full_gradients(loss_fn, tx, params))
