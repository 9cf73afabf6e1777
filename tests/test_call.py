"""What a step does is decided by its arguments, under any jit, wrapper and order of calls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax.state import ask
from tests.models import OPTIONS, batches, plain
from tests.problems import grads_like, params_like

SHAPES = {"a": (12, 24), "b": (24, 12)}


def close(got, want, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), got, want)


@pytest.mark.parametrize("look", ["value_and_grad", "value_and_update", "summary"])
def test_an_update_compiled_before_is_not_spoilt_by_a_question(look):
    params, loss_fn = plain()
    plain_tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    tx = optax.GradientTransformation(plain_tx.init, jax.jit(plain_tx.update))
    state, x = tx.init(params), batches(1)[0]
    if look == "value_and_grad":
        galore_jax.value_and_grad(loss_fn, tx)(params, state, x)
    elif look == "value_and_update":
        galore_jax.value_and_update(loss_fn, tx)(params, state, x)
    else:
        galore_jax.summary(tx, params)
    grads = jax.grad(loss_fn)(params, x)
    close(tx.update(grads, state, params)[0], plain_tx.update(grads, state, params)[0])


def test_an_update_compiled_inside_of_multi_steps_emits_when_it_should():
    params = params_like({"a": (12, 24)})
    tx = galore_jax.galore_adamw(1e-2, rank=4, update_proj_gap=1)
    compiled = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    got, want = (optax.MultiSteps(t, 2) for t in (compiled, tx))
    states = got.init(params), want.init(params)
    for step in range(4):
        grads = grads_like(params, step)
        (u, s), (v, t) = (
            m.update(grads, x, params) for m, x in zip((got, want), states, strict=True)
        )
        close(u, v)
        states = s, t
    # And by itself afterwards.
    close(
        compiled.update(grads, tx.init(params), params), tx.update(grads, tx.init(params), params)
    )


def test_a_gap_that_is_a_schedule_reaches_the_tiers():
    params, loss_fn = plain()
    make = optax.inject_hyperparams(
        galore_jax.galore_adamw, static_args=("rank", "weight_dimension_numbers")
    )
    options = OPTIONS | {"update_proj_gap": lambda step: jnp.where(step < 4, 2, 3)}
    tx = make(1e-2, method="svd", **options)
    paths = {}
    for name in ("full", "subspace", "layerwise"):
        p, state = params, tx.init(params)

        @jax.jit
        def step(p, state, x, name=name):
            if name == "layerwise":
                _, p, state = galore_jax.value_and_update(loss_fn, tx)(p, state, x)
                return p, state
            if name == "subspace":
                _, grads = galore_jax.value_and_grad(loss_fn, tx)(p, state, x)
            else:
                grads = jax.grad(loss_fn)(p, x)
            updates, state = tx.update(grads, state, p)
            return optax.apply_updates(p, updates), state

        for x in batches(7):
            p, state = step(p, state, x)
        paths[name] = p
    close(paths["subspace"], paths["full"], 1e-4)
    close(paths["layerwise"], paths["full"], 1e-4)


WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(1.0)),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False}),
    "partition": lambda tx: optax.partition({"x": tx, "y": optax.sgd(1.0)}, {"a": "x", "b": "y"}),
    "two of them": lambda tx: optax.partition({"y": tx, "x": tx}, {"a": "x", "b": "y"}),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    "multi steps": lambda tx: optax.MultiSteps(tx, 3),
    "multi steps as a link": lambda tx: optax.chain(
        optax.identity(), optax.MultiSteps(tx, 3).gradient_transformation()
    ),
    "jitted": lambda tx: optax.GradientTransformation(tx.init, jax.jit(tx.update)),
    "jitted link": lambda tx: optax.chain(
        optax.GradientTransformation(tx.init, jax.jit(tx.update)), optax.identity()
    ),
    "conditional": lambda tx: optax.conditionally_transform(tx, lambda step: step < 10),
    "plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    "injected": lambda tx: optax.inject_hyperparams(galore_jax.galore_adamw, static_args=("rank",))(
        learning_rate=1e-2, rank=4
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_hands_the_question_on(name):
    params = params_like(SHAPES)
    tx = WRAPPERS[name](galore_jax.galore_adamw(1e-2, rank=4))
    state = tx.init(params)
    told = ask(tx, params, state)
    assert [v.path for t in told for v in t.answer.where.views] in (["a"], ["a", "b"], ["b", "a"])
    for (_, seen, gap), galore_state in zip(told, states(state), strict=True):
        same = zip(jax.tree.leaves(seen), jax.tree.leaves(galore_state), strict=True)
        assert all(a is b for a, b in same) and gap == 200
    assert galore_jax.summary(tx, params).total.state > 0


def states(tree):
    is_state = lambda x: isinstance(x, galore_jax.GaLoreState)  # noqa: E731
    return [x for x in jax.tree.leaves(tree, is_leaf=is_state) if is_state(x)]


def test_a_wrapper_that_drops_extra_arguments_is_named():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)

    def update(updates, state, params=None):
        return tx.update(updates, state, params)

    deaf = optax.chain(optax.GradientTransformation(tx.init, update))
    state, x = deaf.init(params), batches(1)[0]
    assert not ask(deaf, params, state)[0].answer.called
    with pytest.raises(ValueError, match=r"drops Optax's extra arguments.*'blocks/down'"):
        galore_jax.value_and_update(loss_fn, deaf)(params, state, x)
    # What needs no argument goes on.
    assert galore_jax.summary(deaf, params).total.state > 0
    galore_jax.value_and_grad(loss_fn, deaf)(params, state, x)


def test_a_state_without_its_galore_is_noticed():
    params, loss_fn = plain()
    tx = galore_jax.galore_adamw(1e-2, **OPTIONS)
    state = (tx.init(params), tx.init(params))

    def update(updates, state, params=None):
        updates, new = tx.update(updates, state[0], params)
        return updates, (new, state[1])

    half = optax.GradientTransformation(lambda p: (tx.init(p), tx.init(p)), update)
    with pytest.raises(ValueError, match="2 galore states and its update reaches 1"):
        galore_jax.value_and_grad(loss_fn, half)(params, state, batches(1)[0])


def test_a_question_computes_nothing_and_is_not_remembered():
    params, _ = plain()
    ran = []
    watch = optax.stateless(lambda u, p: (jax.debug.callback(lambda: ran.append(1)), u)[1])
    tx = optax.chain(watch, galore_jax.galore_adamw(1e-2, **OPTIONS))
    state = tx.init(params)
    for _ in range(3):
        assert [t.gap for t in ask(tx, params, state)] == [OPTIONS["update_proj_gap"]]
    jax.effects_barrier()
    assert not ran
