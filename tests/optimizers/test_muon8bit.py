"""Muon with its momentum in 8 bits: against Optax's, bytes, and layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from tests.layers.test_update import train_layerwise
from tests.optimizers.test_eightbit import SHAPES, distance, even_grads, nbytes
from tests.problems import normal, params_like, train


def spec_of_matrices(params):
    spec = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda x: spec if x.ndim > 1 else None, params)


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False, "ns_steps": 3}, {"adaptive": True, "consistent_rms": 0.2}]
)
def test_muon8bit_is_optaxs_muon_in_codes(options):
    shapes = SHAPES | {"small": (16, 24)}
    params, options = params_like(shapes), options | {"weight_decay": 0.1}
    options["muon_weight_dimension_numbers"] = spec_of_matrices
    ours, theirs = galore_jax.muon8bit(1e-2, **options), optax.contrib.muon(1e-2, **options)

    def grads(params, step):
        return even_grads(shapes, step)

    new, state = train(ours, params, 20, grads=grads)
    old, _ = train(theirs, params, 20, grads=grads)
    assert distance(new, old, params) < 0.03
    for name in ("bias", "small"):
        np.testing.assert_allclose(new[name], old[name], rtol=1e-5)
    large = sum(params[k].size for k in ("kernel", "stack", "odd"))
    small = 4 * (params["small"].size + 2 * params["bias"].size + 16)
    assert nbytes(state) <= 1.035 * large + small  # blocks of 131 have a scale more each
    # Its state is walked, spread over a mesh and restored as any.
    found = []
    optax.tree.map_params(ours, lambda x: found.append(x.shape), state)
    assert (3, 64, 256) in found and (3, 64, 1) in found
    with pytest.raises(TypeError, match="muon8bit's state must be a Muon8bitState, got dict"):
        ours.update(grads(params, 0), {}, params)


def test_which_leaves_are_matrices_is_said_as_elsewhere():
    """Stacked layers, and neither embeddings nor norms; bfloat16 weights have float32 states."""
    params = {
        "embed": jnp.ones((32, 96)),
        "blocks": {
            "up": {"kernel": jnp.ones((2, 96, 60))},
            "down": {"kernel": jnp.ones((2, 60, 96))},
            "norm": {"scale": jnp.ones((2, 96))},
        },
    }
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = galore_jax.muon8bit(0.1, weight_dimension_numbers=galore_jax.matrix_axes)
    spec = optax.contrib.MuonDimensionNumbers((1,), (2,))
    specs = {k: {"kernel": spec} for k in ("up", "down")} | {"norm": {"scale": None}}
    specs = {"embed": None, "blocks": specs}
    other = galore_jax.muon8bit(0.1, muon_weight_dimension_numbers=lambda params: specs)
    grads = jax.tree.map(lambda x: jnp.asarray(normal(1, *x.shape), x.dtype), params)
    (got, state), (want, _) = (t.update(grads, t.init(params), params) for t in (tx, other))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)
    muon = state.inner_state.inner_states["muon"].inner_state[0]
    assert [x.dtype for x in jax.tree.leaves(muon.mu)] == 2 * [jnp.uint8]
    adam = state.inner_state.inner_states["adam"]
    assert {x.dtype for x in jax.tree.leaves(adam) if x.ndim} == {jnp.dtype("float32")}
    with pytest.raises(TypeError, match="Give one of them"):
        galore_jax.muon8bit(
            0.1, weight_dimension_numbers=specs, muon_weight_dimension_numbers=specs
        )


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["muon8bit", "trace8bit"])
def test_layer_by_layer_a_large_stack_of_small_layers_keeps_its_codes(moments):
    """Which leaves have codes is settled by the whole stack, of which an update sees a layer."""
    params = params_like({"w": (3, 60, 60)})

    def block(p, x):
        return x + 0.1 * jnp.tanh(x @ p["w"])

    def loss_fn(params, x):
        return jnp.mean(jnp.square(galore_jax.layerwise(block, params, x) - 1))

    tx = {
        "muon8bit": galore_jax.muon8bit(1e-2, muon_weight_dimension_numbers=spec_of_matrices),
        "trace8bit": optax.chain(galore_jax.trace8bit(0.9), optax.scale(-1e-1)),
    }[moments]
    data = [jnp.asarray(normal(i, 8, 60)) for i in range(4)]
    want, _ = train(tx, params, 4, grads=lambda p, i: jax.grad(loss_fn)(p, data[i]))
    got, state, _ = train_layerwise(loss_fn, tx, params, data)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim > 1} >= {jnp.dtype("uint8")}
    assert distance(got, want, params) < 1e-3
