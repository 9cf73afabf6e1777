"""What depends on what, against what changes when an input does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_jax import dependence

X = jnp.arange(1.0, 7).reshape(2, 3)


@jax.custom_vjp
def opaque(x, y):
    """Its value does not tell what its cotangents are."""
    return x + 0 * y


opaque.defvjp(lambda x, y: (x, y), lambda y, ct: (ct * y, ct))


@jax.custom_jvp
def bent(x):
    return jnp.abs(x)


bent.defjvp(lambda primals, tangents: (bent(*primals), jnp.sign(primals[0]) * tangents[0]))


def scan_carry(x, y, z):
    """The carry goes round: what comes in at the third place has reached the first."""

    def body(carry, row):
        a, b, c = carry
        return (b, c, c + row), a

    (a, b, c), seen = jax.lax.scan(body, (x[0], x[0], x[0]), y)
    return a, b, c, seen, z


def scan_of_nothing_stacked(x, y, z):
    return jax.lax.fori_loop(0, 3, lambda _, c: (c[1], c[2] * z, c[2]), (x, y, z))


def scan_backwards(x, y, z):
    total, parts = jax.lax.scan(lambda c, a: (c + a[0], a[1] * 2), x[0], (y, z), reverse=True)
    return total, parts, x


def while_counts(x, y, z):
    """How often it turns depends on z, and so does all that changes."""
    return jax.lax.while_loop(
        lambda c: jnp.sum(c[1]) < jnp.sum(z), lambda c: (c[0] + x, c[1] + 1), (y, X)
    )


def cond_picks(x, y, z):
    return jax.lax.cond(jnp.sum(z) > 0, lambda: (x, X), lambda: (2 * x, y))


def switch_picks(x, y, z):
    branches = [lambda a: a, lambda a: y, lambda a: z]
    return jax.lax.switch(jnp.int32(jnp.sum(x) > 0), branches, X), x


def calls_in_calls(x, y, z):
    inner = jax.jit(lambda a, b: (a, jax.jit(jnp.sin)(b), X))
    return *inner(x, y), jax.checkpoint(lambda a: bent(a) * 2)(z)


def mapped(x, y, z):
    return jax.vmap(lambda a, b: (a * 2, jax.lax.cumsum(b)), out_axes=1)(x, y), z


def vmapped_loops(x, y, z):
    def one(a, b):
        return jax.lax.scan(lambda c, _: (c * 2, c), a, b), b

    return jax.vmap(one)(x, y), jax.vmap(lambda a: jax.lax.fori_loop(0, 2, lambda i, c: c + 1, a))(
        z
    )


def custom_vjp(x, y, z):
    return opaque(x, y), bent(z)


def dropped(x, y, z):
    _ = x @ y.T  # dead code
    return z, jax.lax.stop_gradient(x), jnp.sign(y)


def barrier(x, y, z):
    return jax.lax.optimization_barrier((x, y, z))


def mutable(x, y, z):
    ref = jax.new_ref(x) if hasattr(jax, "new_ref") else jax.experimental.mutable_array(x)
    before = ref[...]
    ref[0] = y[1]
    return before, ref[...], z


def linear_solve(x, y, z):
    a = jnp.eye(2) + 0.1 * x[:, :2]
    return jnp.linalg.solve(a, y[:, :2]), z


def printing(x, y, z):
    def show(a, b):
        jax.debug.print("{a}", a=a[0, 0] + b[0, 0])
        return a, b

    return jax.jit(show)(x, y), z


# By function: which of x, y, z each result depends on.
CASES = {
    scan_carry: ["xy", "xy", "xy", "xy", "z"],
    scan_of_nothing_stacked: ["xyz", "yz", "z"],
    scan_backwards: ["xy", "z", "x"],
    while_counts: ["xyz", "z"],
    cond_picks: ["xz", "yz"],
    switch_picks: ["xyz", "x"],
    calls_in_calls: ["x", "y", "", "z"],
    mapped: ["x", "y", "z"],
    vmapped_loops: ["x", "x", "y", "z"],
    custom_vjp: ["xy", "z"],
    dropped: ["z", "x", "y"],
    barrier: ["x", "y", "z"],
    mutable: ["x", "xy", "z"],
    linear_solve: ["xy", "z"],
    printing: ["x", "y", "z"],
}


@pytest.mark.parametrize("fun", CASES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("jit", [False, True])
def test_what_results_depend_on(fun, jit):
    traced = dependence.trace(jax.jit(fun) if jit else fun, X, X, X)
    found = ["".join("xyz"[i] for i in sorted(d)) for d in jax.tree.leaves(traced.depends)]
    assert found == CASES[fun]
    jax.tree.map(np.testing.assert_array_equal, traced.call(X, X, X), fun(X, X, X))


def test_trees_go_in_and_come_out():
    def fun(tree, y):
        return {"sum": tree["a"] + tree["b"], "rest": [y, tree["b"]]}

    found = dependence.trace(fun, {"b": X, "a": X}, X).depends
    assert found == {"sum": {0, 1}, "rest": [{2}, {1}]}


# Random programs over four registers; each step is (operation, two sources, a target).
STEPS = {
    "add": lambda a, b: a + b,
    "sign": lambda a, b: jnp.sign(a),
    "zero": lambda a, b: jnp.zeros_like(a),
    "cond": lambda a, b: jax.lax.cond(jnp.sum(b) > 0, lambda: a, lambda: a + 1),
    "call": lambda a, b: jax.jit(lambda a, b: (a, b))(a, b)[1],
    "remat": jax.checkpoint(lambda a, b: a * b),
    "solve": lambda a, b: jax.lax.custom_linear_solve(
        lambda v: 2 * v, a + b, lambda matvec, v: v / 2
    ),
    "scan": lambda a, b: jax.lax.scan(lambda c, r: (c + r, c * 2), a[0], b)[1],
    "while": lambda a, b: jax.lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c + 1 + abs(a), b),
    "vmap": lambda a, b: jax.vmap(jnp.dot, in_axes=(0, None))(a, b[0])[:, None] + 0 * a,
    "custom": opaque,
}
REGISTERS = st.integers(0, 3)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), REGISTERS, REGISTERS, REGISTERS), max_size=5)
)
def test_what_changes_is_among_what_is_found(program):
    def fun(*registers):
        registers = list(registers)
        for name, a, b, to in program:
            registers[to] = STEPS[name](registers[a], registers[b])
        return registers

    inputs = [X * (k + 1) for k in range(4)]
    found = dependence.trace(fun, *inputs).depends
    before = fun(*inputs)
    for k in range(4):
        after = fun(*(x * -3 + 1 if i == k else x for i, x in enumerate(inputs)))
        changed = [bool(jnp.any(a != b)) for a, b in zip(before, after, strict=True)]
        assert all(k in found[i] for i, c in enumerate(changed) if c)
