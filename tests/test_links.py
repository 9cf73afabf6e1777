"""Every link of Optax around galore: as with full gradients, or refused by name.

The links are those that Optax lists, so that a new one comes in by itself. What a link means is
what it does with full gradients; where it refuses those, the lower tiers need not be asked.
"""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax.layers.alike import check_layers_alike
from tests.problems import normal

LAYERS, D, H = 3, 12, 20
OPTIONS = dict(rank=3, update_proj_gap=2, weight_dimension_numbers=galore_jax.last_two_axes)
PARAMS = {
    "blocks": {"up": normal(0, LAYERS, D, H) / 3, "norm": 1 + 0.1 * normal(1, LAYERS, D)},
    "head": normal(2, D, 5) / 3,
}
PATHS = ["blocks/norm", "blocks/up", "head"]
ROWS = jnp.asarray(normal(3, 2, 16, D) * 0.7 ** np.arange(D))
# By parameter name, for what has no default.
ARGUMENTS = dict(
    clipping=0.1,
    decay=0.9,
    eta=0.1,
    f=lambda updates, params=None: jax.tree.map(lambda x: 0.5 * x, updates),
    gamma=0.1,
    l2_norm_clip=1.0,
    learning_rate=1e-2,
    mask=True,
    max_backtracking_steps=2,
    max_consecutive_errors=3,
    max_delta=1e-3,
    max_linesearch_steps=2,
    max_norm=1e-3,
    measure=optax.tree.norm,
    noise_multiplier=0.1,
    param_labels={"blocks": "a", "head": "b"},
    seed=0,
    should_transform_fn=lambda count: count >= 1,
    slow_step_size=0.5,
    step_size=0.5,
    step_size_fn=lambda count: 1.0 / (1 + count),
    sync_period=2,
    threshold=1e-3,
)
WRAPPED = ("inner", "fast_optimizer", "base_optimizer", "optimizer")


def loss_fn(params, x):
    def block(p, x):
        return x + jnp.tanh((x * p["norm"]) @ p["up"])[:, :D]

    x = galore_jax.layerwise(block, params["blocks"], x)
    return 3 * jnp.mean(jnp.square(x @ params["head"] - 1))


def listed():
    """Makers of all transformations that Optax lists, by name."""
    found = {}
    for module in (optax, optax.contrib):
        for name in getattr(module, "__all__", None) or dir(module):
            make = vars(module).get(name)  # not by attribute: some warn that they are deprecated
            if inspect.isfunction(make) and name != "chain":
                returns = str(inspect.signature(make).return_annotation)
                if "GradientTransformation" in returns:
                    found[f"{module.__name__}.{name}"] = make
    return found


MAKERS = listed()


def build(make, place):
    """The optimizer with a transformation at a place; None where it has none there."""
    parameters = inspect.signature(make).parameters.values()
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    given = {name: ARGUMENTS[name] for name in required if name in ARGUMENTS}
    galore = galore_jax.galore_adamw(1e-2, **OPTIONS)
    if "inner_factory" in required:
        names = ("rank", "weight_dimension_numbers")
        return optax.inject_hyperparams(galore_jax.galore_adamw, names)(1e-2, **OPTIONS)
    for name in set(required) - set(given):
        if name == "transforms":
            given[name] = {"a": galore, "b": optax.adam(1e-2)}
        elif name == "adv_optimizer":
            given[name] = optax.sgd(0.1)
        else:
            assert name in WRAPPED, f"what is {name}? Optax has a new argument: add it above"
            given[name] = galore
    if (place == "around") != bool(set(required) & {*WRAPPED, "transforms"}):
        return None
    link = make(**given)
    subspace = galore_jax.galore(optax.scale_by_adam(), **OPTIONS)
    return {
        "around": lambda: link,
        "front": lambda: optax.chain(link, galore),
        "inside": lambda: galore_jax.galore(optax.chain(link, optax.adamw(1e-2)), **OPTIONS),
        "behind": lambda: optax.chain(subspace, link, optax.scale(-1e-2)),
    }[place]()


def step_of(tier, tx):
    """One training step, `step(params, state, x) -> params, state`."""

    def by(gradient):
        def step(params, state, x):
            loss, grads = gradient(params, state, x)
            names = inspect.signature(tx.update).parameters
            takes_value = "value" in names or any(p.kind is p.VAR_KEYWORD for p in names.values())
            more = {"value": loss} if takes_value else {}
            updates, state = tx.update(grads, state, params, **more)
            return optax.apply_updates(params, updates), state

        return step

    return {
        "full": lambda: by(lambda params, _, x: jax.value_and_grad(loss_fn)(params, x)),
        "subspace": lambda: by(galore_jax.value_and_grad(loss_fn, tx)),
        "layerwise": lambda: lambda *args: galore_jax.value_and_update(loss_fn, tx)(*args)[1:],
    }[tier]()


@functools.cache
def in_full(name, place):
    """The optimizer and its abstract state; None where it has no such place or is refused."""
    try:
        tx = build(MAKERS[name], place)
        if tx is None:
            return None
        state = jax.eval_shape(tx.init, PARAMS)
        jax.eval_shape(step_of("full", tx), PARAMS, state, ROWS[0])
    except AssertionError:
        raise
    except Exception:
        return None
    return tx, state


def trained(step, tx):
    params, state = PARAMS, tx.init(PARAMS)
    for x in ROWS:
        params, state = step(params, state, x)
    return params


@functools.cache
def trained_in_full(name, place):
    tx, _ = in_full(name, place)
    return trained(step_of("full", tx), tx)


def as_with_full_gradients(name, place, tier):
    """Whether a transformation does there what it does with full gradients.

    Returns:
        "equal"; "refused", by an error that names our function; "warned" of; or None, where full
        gradients are refused too. Inside, where both tiers give it the same arrays, "taken".
    """
    if in_full(name, place) is None:
        return None
    tx, state = in_full(name, place)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            jax.eval_shape(step_of(tier, tx), PARAMS, state, ROWS[0])
    except ValueError as error:
        assert "galore" in str(error) and "value_and_" in str(error)
        return "refused"
    if any("each layer's vector" in str(x.message) for x in caught):
        return "warned"
    if place == "inside":
        return "taken"
    # Compiled where it is a loop that would be compiled anew at each step.
    step = jax.jit(step_of(tier, tx)) if tier == "layerwise" else step_of(tier, tx)
    ends = trained_in_full(name, place), trained(step, tx)
    for a, b, start in zip(*map(jax.tree.leaves, (*ends, PARAMS)), strict=True):
        moved = np.max(np.abs(np.asarray(a) - start))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * moved + 1e-7)
    return "equal"


def is_whole(make):
    """Whether it makes an optimizer, rather than a link of one."""
    return "learning_rate" in inspect.signature(make).parameters


def cases(*places):
    """Whole optimizers consist of links, and belong inside."""
    for name, make in MAKERS.items():
        for place in places:
            if place in ("inside", "around") or not is_whole(make):
                yield name, place


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), list(cases("front", "inside", "behind", "around")))
def test_in_the_subspace(name, place):
    as_with_full_gradients(name, place, "subspace")


# Where a link stands makes no difference there.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), list(cases("front", "around")))
def test_layer_by_layer(name, place):
    as_with_full_gradients(name, place, "layerwise")


@pytest.mark.slow
def test_links_that_scale_are_taken():
    taken = {
        "front": [optax.clip_by_global_norm(1e-3), optax.scale(0.5), optax.identity()],
        "behind": [
            optax.clip_by_global_norm(1e-3),
            optax.normalize_by_update_norm(),
            optax.scale_by_schedule(lambda count: count / 5),
            optax.contrib.reduce_on_plateau(),
            optax.set_to_zero(),
        ],
    }
    galore = galore_jax.galore_adamw(1e-2, **OPTIONS)
    chains = [optax.chain(link, galore) for link in taken["front"]]
    chains += [optax.chain(galore, link) for link in taken["behind"]]
    for tx in chains:
        galore_jax.value_and_grad(loss_fn, tx)(PARAMS, tx.init(PARAMS), ROWS[0])


def by_the_largest(updates, params=None):
    largest = optax.tree.max(jax.tree.map(jnp.abs, updates))
    return jax.tree.map(lambda x: x / largest, updates)


@pytest.mark.parametrize(
    ("link", "name"),
    [
        (optax.clip(1e-3), "clip"),
        (optax.clip_by_block_rms(1e-3), "clip_by_block_rms"),
        (optax.add_decayed_weights(0.1), "add_decayed_weights"),
        (optax.centralize(), "centralize"),
        (optax.ema(0.9), "ema"),
        (optax.zero_nans(), "zero_nans"),
        (optax.stateless(by_the_largest), "stateless"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("behind", [False, True])
def test_links_that_do_more_are_refused_by_name(link, name, behind):
    galore = galore_jax.galore_adamw(1e-2, **OPTIONS)
    tx = optax.chain(galore, link) if behind else optax.chain(link, galore)
    with pytest.raises(ValueError, match=f"value_and_grad: '{name}' around galore"):
        galore_jax.value_and_grad(loss_fn, tx)(PARAMS, tx.init(PARAMS), ROWS[0])


MIXING = {
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "add_noise": lambda: optax.add_noise(0.1, 0.1, 0),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(1e-3),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXING)
def test_links_that_mix_layers_are_refused_by_name(name):
    tx = optax.chain(MIXING[name](), galore_jax.galore_adamw(1e-2, **OPTIONS))
    with pytest.raises(ValueError, match=f"{name} looks at all layers of leaf 'blocks/up' at once"):
        check_layers_alike(tx, PARAMS, [0, 1], PATHS)
    check_layers_alike(tx, PARAMS, [], PATHS)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip(1e-3), galore_jax.galore_adamw(1e-2, **OPTIONS)),
        galore_jax.galore_muon(1e-2, **OPTIONS),
        galore_jax.galore_adamw8bit(1e-2, **OPTIONS),
        optax.chain(optax.centralize(), optax.scale_by_rms(), optax.ema(0.9)),
    ],
    ids=["clip", "muon", "8-bit", "elementwise"],
)
def test_links_that_keep_layers_apart_are_taken(tx):
    check_layers_alike(tx, PARAMS, [0, 1], PATHS)


def test_stacked_vectors_are_no_matrix_of_the_twin_either():
    """They would be one in a twin of more layers than the rank."""
    options = OPTIONS | dict(rank=5, exclude=None)
    check_layers_alike(galore_jax.galore_adamw8bit(1e-2, **options), PARAMS, [0, 1], PATHS)


def test_an_optimizer_that_takes_no_small_model_is_a_warning():
    def update(updates, state, params=None):
        assert updates["blocks"]["up"].shape[-1] == H, "wants the real width"
        norm = optax.tree.norm(updates["blocks"])
        return jax.tree.map(lambda x: x / norm, updates), state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    with pytest.warns(UserWarning, match="could not try .* small sizes .wants the real width"):
        check_layers_alike(tx, PARAMS, [0, 1], PATHS)


def test_means_over_stacked_vectors_are_a_warning():
    tx = galore_jax.galore_adafactor(1e-2, **OPTIONS)
    with pytest.warns(UserWarning, match="galore_adafactor looks at all layers of leaf 'blocks/no"):
        check_layers_alike(tx, PARAMS, [0, 1], PATHS)
    with pytest.raises(ValueError, match="'flatten' takes no part of the parameters alone"):
        galore_jax.value_and_update(loss_fn, optax.flatten(optax.adam(1e-2)))(
            PARAMS, optax.flatten(optax.adam(1e-2)).init(PARAMS), ROWS[0]
        )
