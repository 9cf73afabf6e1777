"""What depends on what, against what changes when an input does; uses, against their cotangents."""

import functools

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


# A tap as in galore_jax.subspace.kernel: its slot is not read, and receives one for every use.
@jax.custom_vjp
def tap(w, slot):
    return w


tap.defvjp(lambda w, slot: (w, None), lambda _, ct: (ct, jnp.ones([])))


@jax.custom_vjp
def tapped_matmul(x, w, slot):
    return x @ w


tapped_matmul.defvjp(
    lambda x, w, slot: (x @ w, (x, w)),
    lambda saved, ct: (ct @ saved[1].T, saved[0].T @ ct, 1 + 0 * jnp.sum(ct)),
)

W = jnp.eye(3)


def once(w, slot, x):
    return x @ tap(w, slot)


def twice(w, slot, x):
    return once(w, slot, once(w, slot, x))


def looked_at(w, slot, x):
    tap(w, slot).astype(jnp.bfloat16)  # as Flax looks up a dtype
    return once(w, slot, x)


def in_a_call(w, slot, x):
    return jax.jit(jax.checkpoint(once))(w, slot, x)


def in_two_calls(w, slot, x):
    call = jax.jit(once)
    return call(w, slot, call(w, slot, x))


def in_a_loop(w, slot, x):
    return jax.lax.fori_loop(0, 3, lambda _, x: once(w, slot, x), x)


def in_one_turn(w, slot, x):
    return jax.lax.scan(lambda c, _: (once(w, slot, c), None), x, jnp.zeros(1))[0]


def in_a_scan(w, slot, x):
    return jax.lax.scan(lambda c, row: (c, once(w, slot, row)), 0.0, x)[1]


def in_a_carry(w, slot, x):
    def body(carry, _):
        w, slot, x = carry
        return (w, slot, once(w, slot, x)), None

    return jax.lax.scan(body, (w, slot, x), None, length=2)[0][2]


def carried_along(w, slot, x):
    (w, slot), _ = jax.lax.scan(lambda c, row: (c, row), (w, slot), x)
    return once(w, slot, x)


def in_branches(w, slot, x):
    return jax.lax.cond(
        jnp.sum(x) > 0, lambda x: once(w, slot, x), lambda x: once(w, slot, x) + 1, x
    )


def one_part_twice(w, slot, x):
    slots = jax.lax.concatenate([slot[None], slot[None] * 0], 0)
    return once(w, slots[0], once(w, slots[0], x))


def copied(w, slot, x):
    return jnp.sum(jax.vmap(lambda s: once(w, s, x))(jnp.broadcast_to(slot, (3,))), 0)


def each_example(w, slot, x):
    return jax.vmap(lambda row: tapped_matmul(row[None], w, slot)[0])(x)


def each_example_handed_on(w, slot, x):
    return jax.vmap(lambda row: row @ tap(w, slot))(x)


USES = {
    once: 1,
    twice: 2,
    looked_at: 1,
    in_a_call: 1,
    in_two_calls: 2,
    in_a_loop: 2,
    in_one_turn: 1,
    in_a_scan: 2,
    in_a_carry: 2,
    carried_along: 1,
    in_branches: 1,
    one_part_twice: 2,
    copied: 2,
    each_example: 2,
    each_example_handed_on: 1,
}


@pytest.mark.parametrize("fun", USES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("jit", [False, True])
def test_uses_are_those_that_add_cotangents(fun, jit):
    loss = jax.jit(lambda *args: jnp.sum(fun(*args))) if jit else lambda *a: jnp.sum(fun(*a))
    found = dependence.uses(loss, [1], W, jnp.zeros([]), X)
    assert found == ([USES[fun]], [])
    cotangent = jax.grad(loss, 1)(W, jnp.zeros([]), X)
    assert min(2, int(cotangent)) == USES[fun]


def part_by_part(slots):
    return once(W, slots[1], once(W, slots[0], X))


def layer_by_layer(slots):
    return jax.lax.scan(lambda x, s: (once(W, s, x), None), X, slots)[0]


def split_in_two(slots):
    a, b = jnp.split(slots, 2)
    return once(W, b[0], once(W, a[0], X))


def the_same_part(slots):
    return once(W, slots[1], once(W, slots[1], X))


@pytest.mark.parametrize("fun", [part_by_part, layer_by_layer, split_in_two, the_same_part])
def test_parts_of_a_stack(fun):
    slots = jnp.zeros(2)

    def loss(slots):
        return jnp.sum(fun(slots))

    cotangents = jax.grad(loss)(slots)
    assert dependence.uses(loss, [0], slots).counts == [int(max(cotangents))]


def test_an_unknown_primitive_counts_as_more_than_once_and_is_named():
    def loss(w, slot, x):
        solve = functools.partial(jax.lax.custom_linear_solve, lambda v: v @ W)
        return jnp.sum(solve(x, lambda matvec, b: once(w, slot, b)))

    found = dependence.uses(loss, [1], W, jnp.zeros([]), X)
    assert found == ([2], ["custom_linear_solve"])
    unused = dependence.uses(lambda w, slot, x: (jnp.sum(x), loss(w, slot, x)), [1], W, X[0, 0], X)
    assert unused == ([0], [])
