"""Float32 at least, without a float32 copy of the weights."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax
from galore_jax.precision import compiled_if_narrow, wide, wide_dtype

# One bfloat16 leaf of 64 MiB, projected or not; prints how much the process grows, in MiB, beyond
# what the state takes.
PROGRAM = """
import json, resource, sys
import jax, jax.numpy as jnp, galore_jax

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 2**20

make = getattr(galore_jax, sys.argv[1])
tx = make(1e-3, **json.loads(sys.argv[3]))
small = {sys.argv[2]: jnp.ones((64, 64), jnp.bfloat16)}
state = tx.init(small)  # what is allocated once
tx.update(small, state, small)
params = {sys.argv[2]: jnp.ones((8192, 4096), jnp.bfloat16)}
jax.block_until_ready(params)
before = peak()
state = jax.block_until_ready(tx.init(params))
print(json.dumps(peak() - before - nbytes(state)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "leaf", "options"),
    [
        ("galore_sgd", "embed", {"rank": 4}),
        ("galore_adamw8bit", "kernel", {"rank": 4}),
        ("galore_muon", "kernel", {"rank": 4}),
        ("apollo_mini", "kernel", {}),
    ],
)
def test_an_eager_init_copies_no_weights(name, leaf, options):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    args = [sys.executable, "-c", PROGRAM, name, leaf, json.dumps(options)]
    grown = json.loads(subprocess.run(args, env=env, capture_output=True, check=True).stdout)
    assert grown < 32, f"{grown} MiB"  # half of the leaf; a float32 copy is twice the leaf


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_eager_update_is_the_compiled_one(dtype):
    params = {"embed": jnp.linspace(-1, 1, 64, dtype=dtype), "kernel": jnp.ones((8, 16), dtype)}
    tx = galore_jax.galore_adamw(1e-2, rank=2, weight_decay=0.1)
    grads = jax.tree.map(lambda w: jnp.sin(3 * w + 0.1).astype(w.dtype), params)
    eager, compiled = tx.update, jax.jit(tx.update)
    state = tx.init(params)
    got, want = (update(grads, state, params)[0] for update in (eager, compiled))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_dtypes():
    assert wide_dtype(jnp.float16(1)) == wide_dtype(jnp.bfloat16(1)) == jnp.float32
    assert wide(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    assert wide(jnp.ones(2, jnp.int8)).dtype == jnp.int8


def test_only_what_would_copy_is_compiled():
    traced = []

    def function(x):
        traced.append(isinstance(x, jax.core.Tracer))
        return x

    call = compiled_if_narrow(function)
    call(jnp.ones(2))
    call(jnp.ones(2, jnp.bfloat16))
    call(jnp.ones(2, jnp.bfloat16))  # compiled before
    assert traced == [False, True]
