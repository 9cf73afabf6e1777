"""MaxText: the axes that it names for Muon say what its kernels are to `galore`."""

import jax
import jax.numpy as jnp
import pytest

from tests.trainers.training import (
    X,
    check_near,
    full_gradients,
    in_the_subspace,
    mean_square,
    optimizer,
)

muon_utils = pytest.importorskip("maxtext.utils.muon_utils")


def test_specs_of_muon():
    """Attention with heads, and a stack whose layers lie second."""
    shapes = {
        "self_attention": {"query": (16, 2, 3, 8), "out": (3, 2, 8, 16)},
        "mlp": {"wi_0": (16, 2, 24), "wo": (24, 2, 16)},
        "pre_norm": {"scale": (16, 2)},
    }
    keys = iter(jax.random.split(jax.random.key(0), 6))
    layers = jax.tree.map(
        lambda s: {"kernel": jax.random.normal(next(keys), s) / 5},
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    layers["pre_norm"] = {"scale": jnp.ones((16, 2))}
    params = {"decoder": {"layers": layers}}
    tx = optimizer(weight_dimension_numbers=muon_utils.get_transform_tree)

    def loss_fn(params):
        p, x = params["decoder"]["layers"], X
        for i in range(2):
            q = jnp.einsum("bd,dhc->bhc", x, p["self_attention"]["query"]["kernel"][:, i])
            x += jnp.einsum("bhc,hcd->bd", jnp.tanh(q), p["self_attention"]["out"]["kernel"][:, i])
            h = jnp.tanh(x @ p["mlp"]["wi_0"]["kernel"][:, i])
            x = x * p["pre_norm"]["scale"][:, i] + h @ p["mlp"]["wo"]["kernel"][:, i]
        return mean_square(x[:, :8])

    state = tx.init(params)[1]
    projectors = state.projector["decoder"]["layers"]
    assert projectors["self_attention"]["query"]["kernel"].shape == (2, 16, 4)
    assert projectors["self_attention"]["out"]["kernel"].shape == (2, 16, 4)
    assert projectors["mlp"]["wo"]["kernel"].shape == (2, 16, 4)
    check_near(in_the_subspace(loss_fn, tx, params), full_gradients(loss_fn, tx, params))
