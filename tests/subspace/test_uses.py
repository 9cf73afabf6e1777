"""Uses of a kernel, against the cotangents that they add up."""

import functools

import jax
import jax.numpy as jnp
import pytest

from galore_jax.subspace.uses import uses

X = jnp.arange(1.0, 7).reshape(2, 3)


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
    found = uses(loss, [1], W, jnp.zeros([]), X)
    assert found[:2] == ([USES[fun]], [])
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
    assert uses(loss, [0], slots).counts == [int(max(cotangents))]


def test_an_unknown_primitive_counts_as_more_than_once_and_is_named():
    def loss(w, slot, x):
        solve = functools.partial(jax.lax.custom_linear_solve, lambda v: v @ W)
        return jnp.sum(solve(x, lambda matvec, b: once(w, slot, b)))

    found = uses(loss, [1], W, jnp.zeros([]), X)
    assert found[:2] == ([2], ["custom_linear_solve"])
    unused = uses(lambda w, slot, x: (jnp.sum(x), loss(w, slot, x)), [1], W, X[0, 0], X)
    assert unused[:2] == ([0], [])


def moved_around(w, slot, x):
    slots = jnp.stack([slot, slot[None].T[0]])
    return once(w, jax.lax.optimization_barrier(slots)[1], x)


def squared(w, slot, x):
    return once(w, slot, x) + slot**2


def cast_on_its_way(w, slot, x):
    return once(w, slot.astype(jnp.bfloat16).astype(slot.dtype), x)


def halved_in_a_scan(w, slot, x):
    return jax.lax.scan(lambda x, s: (once(w, s / 2, x), None), x, slot[None])[0]


@pytest.mark.parametrize(
    ("fun", "computes"),
    [
        *((fun, False) for fun in USES if fun is not one_part_twice),
        (moved_around, False),
        (squared, True),
        (cast_on_its_way, True),
        (halved_in_a_scan, True),
    ],
)
def test_what_computes_with_a_slot(fun, computes):
    def loss(*args):
        return jnp.sum(fun(*args))

    assert uses(loss, [1], W, jnp.zeros([]), X).computed == [computes]
    # What only the auxiliary output shows does not count.
    assert uses(lambda *a: (jnp.sum(a[2]), loss(*a)), [1], W, jnp.zeros([]), X).computed == [False]
