"""The transformation: equations, spellings, dtypes, wrappers and errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import galore
from galore_jax.call import Call
from tests.problems import (
    enable_x64,
    galore_adamw_in_numpy,
    grads_like,
    low_rank_gradient,
    normal,
    params_like,
    train,
)

SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16), "vector": (16,)}
RANK = 4


def close(a, b, tolerance=1e-6):
    chex.assert_trees_all_close(a, b, atol=tolerance, rtol=tolerance)


def adamw_with_mask():
    return optax.adamw(1e-2, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))


INNERS = {
    "adamw": adamw_with_mask,
    "lion": functools.partial(optax.lion, 1e-3, weight_decay=0.1),
    "sgd": functools.partial(optax.sgd, 1e-2, momentum=0.9, nesterov=True),
    "schedule": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, 20), weight_decay=0.1),
}
ALIASES = {
    "adamw": functools.partial(
        galore_jax.galore_adamw,
        1e-2,
        weight_decay=0.1,
        mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
    ),
    "lion": functools.partial(galore_jax.galore_lion, 1e-3, weight_decay=0.1),
    "sgd": functools.partial(galore_jax.galore_sgd, 1e-2, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", ["tall", "wide"])
@pytest.mark.parametrize("method", ["svd", "eigh"])
def test_the_papers_algorithm_in_numpy(name, method):
    gradients = [low_rank_gradient(t, *SHAPES[name]) for t in range(7)]
    params = {name: jnp.asarray(normal(0, *SHAPES[name]))}
    tx = galore_jax.galore_adamw(
        1e-2, weight_decay=0.1, rank=RANK, update_proj_gap=3, method=method
    )
    state, projectors, w = tx.init(params), [], params
    for g in gradients:
        updates, state = tx.update({name: jnp.asarray(g)}, state, w)
        w = optax.apply_updates(w, updates)
        projectors.append(state.projector[name])
    expected = galore_adamw_in_numpy(
        np.asarray(params[name]),
        gradients,
        rank=RANK,
        gap=3,
        scale=0.25,
        lr=1e-2,
        decay=0.1,
        signs_of=projectors.__getitem__,
    )
    np.testing.assert_allclose(w[name], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ALIASES)
def test_three_spellings_give_equal_updates(name):
    params = params_like(SHAPES)
    inner, options = INNERS[name](), {"rank": RANK, "update_proj_gap": 2}
    clip = optax.clip_by_global_norm(1.0)
    link = optax.chain(clip, galore(**options), inner)
    wrapper = optax.chain(clip, galore(inner, **options))
    alias = optax.chain(clip, ALIASES[name](**options))
    (a, b, c) = (train(tx, params, 5) for tx in (link, wrapper, alias))
    close(a, b)
    close(a, c)
    assert not np.allclose(a[0]["tall"], params["tall"])


@pytest.mark.parametrize("name", INNERS)
def test_unprojected_leaves_see_the_inner_optimizer_alone(name):
    params = params_like(SHAPES)
    inner = INNERS[name]()
    ours, _ = train(galore(inner, rank=RANK, exclude="tall"), params, 4)
    plain, _ = train(inner, params, 4)
    for k in ("tall", "vector"):
        close(ours[k], plain[k])
    assert not np.allclose(ours["wide"], plain["wide"])


def test_decay_acts_on_the_full_weight_and_is_not_scaled():
    params = params_like(SHAPES)
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = galore(adamw_with_mask(), rank=RANK, scale=0.01)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for k in SHAPES:
        close(updates[k], -1e-2 * 0.1 * params[k] if k != "vector" else 0 * params[k])


def test_the_update_lies_in_the_subspace_and_scale_multiplies_it():
    params = params_like({"w": (12, 24)})
    updates = {}
    for scale in (0.25, 1.0):
        tx = galore_jax.galore_adamw(1e-2, weight_decay=0.0, rank=RANK, scale=scale)
        updates[scale], state = tx.update(grads_like(params, 0), tx.init(params), params)
    p, u = state.projector["w"], updates[1.0]["w"]
    close(p @ (p.T @ u), u, 1e-5)
    close(0.25 * u, updates[0.25]["w"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("proj_type", "moments", "stagger"),
    [  # every pair of options
        (proj_type, moments, (i + j) % 2 == 0)
        for i, proj_type in enumerate(("std", "reverse_std", "full"))
        for j, moments in enumerate(("keep", "reset", "rotate"))
    ],
)
def test_a_stacked_leaf_gives_what_separate_leaves_give(proj_type, moments, stagger):
    stacked = {"w": jnp.asarray(normal(0, 3, 12, 20))}
    separate = {str(i): stacked["w"][i] for i in range(3)}
    tx = galore_jax.galore_adamw(
        1e-2,
        weight_decay=0.1,
        rank=RANK,
        update_proj_gap=3,
        proj_type=proj_type,
        moments=moments,
        stagger=stagger,
        weight_dimension_numbers=galore_jax.last_two_axes,
    )

    def stack(params, step):
        return {"w": jnp.asarray(low_rank_gradient(step, 3, 12, 20))}

    def split(params, step):
        return {str(i): stack(params, step)["w"][i] for i in range(3)}

    a, _ = train(tx, stacked, 7, grads=stack)
    b, _ = train(tx, separate, 7, grads=split)
    close(a["w"], jnp.stack([b[str(i)] for i in range(3)]), 1e-5)


def test_a_many_axes_kernel_gives_what_its_matrix_gives():
    kernel = {"q": jnp.asarray(normal(0, 2, 12, 3, 4, 5))}  # layers, in, (heads, _, dim)
    moved = {"q": jnp.moveaxis(kernel["q"], 1, 3)}
    spec = optax.contrib.MuonDimensionNumbers
    options = dict(rank=RANK, update_proj_gap=2, weight_decay=0.1)
    tx = galore_jax.galore_adamw(1e-2, **options, weight_dimension_numbers=spec(1, (2, 3, 4)))
    tx_moved = galore_jax.galore_adamw(1e-2, **options, weight_dimension_numbers=spec(3, (1, 2, 4)))
    tx_matrix = galore_jax.galore_adamw(
        1e-2, **options, weight_dimension_numbers=galore_jax.last_two_axes
    )

    def grads(params, step):
        return {"q": jnp.asarray(low_rank_gradient(step, 2, 12, 60)).reshape(2, 12, 3, 4, 5)}

    a, _ = train(tx, kernel, 5, grads=grads)
    b, _ = train(tx_moved, moved, 5, grads=lambda p, s: {"q": jnp.moveaxis(grads(p, s)["q"], 1, 3)})
    c, _ = train(
        tx_matrix,
        {"q": kernel["q"].reshape(2, 12, 60)},
        5,
        grads=lambda p, s: {"q": grads(p, s)["q"].reshape(2, 12, 60)},
    )
    close(jnp.moveaxis(b["q"], 3, 1), a["q"], 1e-5)
    close(c["q"].reshape(a["q"].shape), a["q"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "jit", "scan"])
def test_svd_and_eigh_train_alike_over_three_refreshes(how):
    params = params_like({"a": (12, 24), "b": (24, 12), "stack": (3, 16, 20)})

    def run(method):
        tx = galore_jax.galore_adamw(
            1e-2,
            rank=RANK,
            update_proj_gap=4,
            method=method,
            weight_dimension_numbers=galore_jax.last_two_axes,
        )
        if how != "scan":
            return train(tx, params, 12, jit=how == "jit")[0]
        steps = [grads_like(params, step) for step in range(12)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps)

        def body(carry, grads):
            p, state = carry
            updates, state = tx.update(grads, state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), stacked)[0][0]

    close(run("svd"), run("eigh"), 1e-4)


def test_refreshes_happen_at_multiples_of_the_gap_from_that_steps_gradient():
    params = params_like({"w": (12, 24)})
    tx = galore_jax.galore_adamw(1e-2, rank=RANK, update_proj_gap=3)
    state, seen = tx.init(params), []
    for step in range(7):
        _, state = tx.update(grads_like(params, step), state, params)
        seen.append(np.asarray(state.projector["w"]))
    assert int(state.count) == 7
    for step in range(7):
        u = np.linalg.svd(np.asarray(grads_like(params, step - step % 3)["w"]))[0][:, :RANK]
        close(u @ u.T, seen[step] @ seen[step].T, 1e-4)


@pytest.mark.parametrize("method", ["svd", "eigh", "randomized", "subspace", "random"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_never_enters_a_projector(method, bad):
    params = params_like({"w": (12, 24), "stack": (2, 12, 24)})
    tx = galore_jax.galore_sgd(
        1e-2,
        rank=RANK,
        update_proj_gap=2,
        method=method,
        weight_dimension_numbers=galore_jax.last_two_axes,
    )

    def poisoned(step):
        grads = grads_like(params, step)
        return {"w": grads["w"].at[3, 5].set(bad), "stack": grads["stack"].at[1, 0, 0].set(bad)}

    state = tx.init(params)
    start = state.projector
    _, state = tx.update(poisoned(0), state, params)
    close(state.projector["w"], start["w"])  # the orthonormal default
    close(state.projector["stack"][1], start["stack"][1])
    assert not np.allclose(state.projector["stack"][0], start["stack"][0])
    for step in (1, 2):
        updates, state = tx.update(grads_like(params, step), state, params)
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    good = state.projector
    assert not np.allclose(good["w"], start["w"])
    _, state = tx.update(grads_like(params, 3), state, params)
    _, state = tx.update(poisoned(4), state, params)
    close(state.projector["w"], good["w"])
    for p in jax.tree.leaves(state.projector):
        close(
            jnp.swapaxes(p, -1, -2) @ p,
            jnp.broadcast_to(jnp.eye(RANK), (*p.shape[:-2], RANK, RANK)),
            1e-5,
        )


def test_bfloat16_parameters_have_float32_moments_that_decay():
    params = params_like({"w": (12, 24), "embed": (24, 12)}, dtype=jnp.bfloat16)
    tx = galore_jax.galore_adamw(1e-3, rank=RANK)
    state = tx.init(params)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads_like(params, 0))
    update = jax.jit(tx.update)
    updates, state = update(grads, state, params)
    before = state.inner_state[0].nu
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((before, state.inner_state[0].mu)))
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    for _ in range(150):
        _, state = update(jax.tree.map(jnp.zeros_like, grads), state, params)
    for k in params:
        ratio = np.mean(np.asarray(state.inner_state[0].nu[k]) / np.asarray(before[k]))
        assert abs(ratio - 0.999**150) < 1e-3  # 0.861


@pytest.mark.slow
@pytest.mark.parametrize("params_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("grads_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("projector_dtype", [None, "bfloat16"])
def test_dtypes_of_updates_and_state_are_stable(params_dtype, grads_dtype, projector_dtype):
    params = params_like({"w": (12, 24), "b": (24,)}, dtype=params_dtype)
    tx = galore_jax.galore_adamw(1e-3, rank=RANK, projector_dtype=projector_dtype)
    state = tx.init(params)
    grads = jax.tree.map(lambda g: g.astype(grads_dtype), grads_like(params, 0))
    updates, new_state = jax.eval_shape(tx.update, grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert state.projector["w"].dtype == (jnp.bfloat16 if projector_dtype else jnp.float32)


def test_x64():
    with enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params_like({"w": (12, 24)}))
        gradients = [low_rank_gradient(t, 12, 24).astype(np.float64) for t in range(5)]
        tx = galore_jax.galore_adamw(1e-2, weight_decay=0.1, rank=RANK, update_proj_gap=2)
        projectors, state, w = [], tx.init(params), params
        assert {x.dtype for x in jax.tree.leaves((state.projector, state.inner_state[0].nu))} == {
            jnp.dtype("float64")
        }
        for g in gradients:
            updates, state = tx.update({"w": jnp.asarray(g)}, state, w)
            w = optax.apply_updates(w, updates)
            projectors.append(state.projector["w"])
        expected = galore_adamw_in_numpy(
            np.asarray(params["w"]),
            gradients,
            rank=RANK,
            gap=2,
            scale=0.25,
            lr=1e-2,
            decay=0.1,
            signs_of=projectors.__getitem__,
        )
        np.testing.assert_allclose(w["w"], expected, rtol=1e-9)


def test_update_without_params_works_where_the_inner_optimizer_needs_none():
    params = params_like(SHAPES)
    tx = galore(optax.adam(1e-2), rank=RANK)
    state, grads = tx.init(params), grads_like(params, 0)
    close(tx.update(grads, state)[0], tx.update(grads, state, params)[0])
    with pytest.raises(ValueError, match="params"):
        tx2 = galore(optax.adamw(1e-2, weight_decay=0.1), rank=RANK)
        tx2.update(grads, tx2.init(params))


def test_extra_args_reach_the_inner_optimizer():
    def scale_by_value():
        def update(updates, state, params=None, *, value, **extra):
            return jax.tree.map(lambda u: u * value, updates), state

        return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)

    params = params_like(SHAPES)
    tx = optax.chain(galore(rank=RANK), scale_by_value(), optax.sgd(1.0))
    grads, state = grads_like(params, 0), tx.init(params)
    one, _ = tx.update(grads, state, params, value=1.0, unknown=3)
    two, _ = tx.update(grads, state, params, value=2.0)
    close(jax.tree.map(lambda u: 2 * u, one), two)


def test_masked_and_partition():
    params = params_like(SHAPES)
    options = dict(rank=RANK, update_proj_gap=2)
    tx = galore(optax.adam(1e-2), **options)
    labels = {"tall": "low", "wide": "low", "square": "full", "vector": "full"}
    partitioned = optax.partition({"low": tx, "full": optax.adam(1e-2)}, labels)
    masked = optax.chain(
        optax.masked(tx, {k: v == "low" for k, v in labels.items()}),
        optax.masked(optax.adam(1e-2), {k: v == "full" for k, v in labels.items()}),
    )
    whole, _ = train(galore(optax.adam(1e-2), **options, exclude="square"), params, 5)
    close(train(partitioned, params, 5)[0], whole)
    close(train(masked, params, 5)[0], whole)
    inside = galore(optax.masked(optax.adam(1e-2), {k: k != "vector" for k in SHAPES}), **options)
    trained, _ = train(inside, params, 5)
    close({k: trained[k] for k in ("tall", "wide")}, {k: whole[k] for k in ("tall", "wide")})
    gradients = sum(grads_like(params, step)["vector"] for step in range(5))
    close(trained["vector"], params["vector"] + gradients, 1e-5)  # masked out: unchanged


def test_inject_hyperparams_needs_only_rank_static():
    params = params_like(SHAPES)
    kwargs = dict(learning_rate=1e-2, rank=RANK, update_proj_gap=2, scale=0.5, weight_decay=0.1)
    injected = optax.inject_hyperparams(galore_jax.galore_adamw, static_args="rank")(**kwargs)
    a, state = train(injected, params, 5)
    b, plain = train(galore_jax.galore_adamw(**kwargs), params, 5)
    close(a, b)
    close(state.inner_state.projector, plain.projector)
    assert {"learning_rate", "update_proj_gap", "scale"} <= set(state.hyperparams)
    with pytest.raises(TypeError, match=r"static_args=\('rank',\)"):
        optax.inject_hyperparams(galore_jax.galore_adamw)(**kwargs).init(params)


def test_injected_hyperparams_can_be_changed_between_steps():
    params = params_like({"w": (12, 24)})
    tx = optax.inject_hyperparams(galore_jax.galore_sgd, static_args="rank")(
        learning_rate=1.0, rank=RANK
    )
    state, grads = tx.init(params), grads_like(params, 0)
    before, _ = tx.update(grads, state, params)
    state.hyperparams["scale"] = jnp.float32(0.5)
    after, _ = tx.update(grads, state, params)
    close(jax.tree.map(lambda u: 2 * u, before), after, 1e-5)


def test_apply_if_finite_skips_a_refresh_step_whole():
    params = params_like({"w": (12, 24)})
    tx = optax.apply_if_finite(galore_jax.galore_adamw(1e-2, rank=RANK, update_proj_gap=2), 5)
    state = tx.init(params)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads_like(params, 0))
    updates, state = tx.update(bad, state, params)
    assert int(state.inner_state.count) == 0 and not np.any(updates["w"])
    close(train(tx, params, 3, state=state)[0], train(tx, params, 3)[0])


def test_scan_over_steps_equals_a_loop():
    params = params_like(SHAPES)
    tx = galore_jax.galore_adamw(1e-2, rank=RANK, update_proj_gap=2, weight_decay=0.1)
    grads = [grads_like(params, step) for step in range(5)]

    def body(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        return (optax.apply_updates(p, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    scanned, _ = jax.lax.scan(body, (params, tx.init(params)), stacked)
    close(scanned, train(tx, params, 5), 1e-5)


def test_map_params_walks_the_state():
    params = params_like(SHAPES)
    tx = galore_jax.galore_adamw(1e-2, rank=RANK)
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda x: x * 2, state)
    close(doubled.projector["tall"], 2 * state.projector["tall"])
    assert doubled.count == state.count
    specs = optax.tree.map_params(
        tx, lambda x: "param", state, transform_non_params=lambda x: "other"
    )
    assert specs.count == "other" and specs.inner_state[0].mu["wide"] == "param"


def test_init_costs_nothing_abstractly_and_takes_empty_trees():
    shapes = {"w": jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16)}
    state = jax.eval_shape(galore_jax.galore_adamw(1e-3, rank=1024).init, shapes)
    assert state.projector["w"].shape == (4096, 1024)
    empty = galore_jax.galore_adamw(1e-3, rank=4)
    updates, _ = empty.update({}, empty.init({}), {})
    assert updates == {}


def test_a_bare_array_is_a_tree():
    w = jnp.asarray(normal(0, 12, 24))
    tx = galore_jax.galore_adamw(1e-2, rank=RANK)
    updates, state = tx.update(jnp.asarray(low_rank_gradient(0, 12, 24)), tx.init(w), w)
    assert updates.shape == w.shape and state.projector.shape == (12, RANK)


def test_integer_leaves_are_left_to_the_inner_optimizer():
    params = {"w": jnp.asarray(normal(0, 12, 24)), "ids": jnp.arange(600).reshape(20, 30)}
    tx = galore(optax.sgd(1.0), rank=RANK)
    assert isinstance(tx.init(params).projector["ids"], optax.MaskedNode)


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("update_proj_gap", 0, ValueError, "update_proj_gap must be an int >= 1, got 0"),
        ("update_proj_gap", 2.5, TypeError, "update_proj_gap must be an int >= 1, got 2.5"),
        ("proj_type", "up", ValueError, "proj_type must be one of std,.*got 'up'"),
        ("method", "qr", ValueError, "method must be one of svd, eigh,.*got 'qr'"),
        (
            "moments",
            "drop",
            ValueError,
            "moments must be one of keep, reset, rotate, got 'drop'",
        ),
        ("projector_dtype", "float16", ValueError, "projector_dtype must be.*got 'float16'"),
        ("projector_dtype", "no", ValueError, "projector_dtype must be.*got 'no'"),
        ("update_proj_gap", 2**31, ValueError, "update_proj_gap must be.*got 2147483648"),
        ("scale", None, TypeError, "scale must be a number, got None"),
        ("scale", "x", TypeError, "scale must be a number, got 'x'"),
        ("exclude", "(", ValueError, r"exclude must be a regular expression.*got '\('"),
        ("exclude", ["embed"], ValueError, "exclude must be a regular expression"),
        ("stagger", "no", ValueError, "stagger must be one of True, False, got 'no'"),
    ],
)
def test_bad_options_name_the_argument_and_the_value(option, value, error, message):
    with pytest.raises(error, match=message):
        galore(optax.adam(1.0), rank=RANK, **{option: value})


def test_an_inner_that_is_no_transformation_is_a_type_error():
    with pytest.raises(TypeError, match=r"inner optimizer.*got 128.*galore\(rank=128\)"):
        galore(128, rank=4)


@pytest.mark.parametrize(
    "other",
    [
        dict(rank=3),
        dict(rank=4, exclude="w"),
        dict(rank=4, proj_type="left"),
        dict(rank=4, projector_dtype="bfloat16"),
        dict(rank=4, projector_dtype="int8"),
    ],
)
def test_a_state_of_another_run_is_refused(other):
    params = params_like({"w": (12, 24)})
    state = galore_jax.galore_adamw(1e-2, rank=4).init(params)
    with pytest.raises(
        ValueError, match=r"does not fit leaf 'w' of shape \(12, 24\).*float32\[12,4\]"
    ):
        galore_jax.galore_adamw(1e-2, **other).update(grads_like(params, 0), state, params)


def test_gradients_that_do_not_match_the_parameters_are_refused():
    params = params_like({"w": (12, 24), "b": (24,)})
    grads = grads_like(params, 0)
    for tx in (galore_jax.galore_adamw(1e-2, rank=4), galore_jax.galore_adafactor(1e-2, rank=4)):
        state = tx.init(params)
        with pytest.raises(ValueError, match=r"leaf 'w'.*\(24, 12\).*\(12, 24\)"):
            tx.update({**grads, "w": grads["w"].T}, state, params)
        with pytest.raises(ValueError, match=r"leaf 'b'.*absent"):
            tx.update({"w": grads["w"]}, state, params)


def test_a_state_restored_without_a_target_is_refused():
    params = params_like({"w": (12, 24)})
    tx = galore_jax.galore_adamw(1e-2, rank=4)
    with pytest.raises(TypeError, match=r"GaLoreState, got dict.*jax.eval_shape"):
        tx.update(grads_like(params, 0), tx.init(params)._asdict(), params)


def test_no_recompilation_on_the_second_call():
    params = params_like(SHAPES)
    tx = galore_jax.galore_adamw(1e-2, rank=RANK, update_proj_gap=2)
    update = jax.jit(tx.update)
    state = tx.init(params)
    for step in range(4):
        _, state = update(grads_like(params, step), state, params)
    assert update._cache_size() == 1


def test_a_residual_of_the_wrong_type_is_refused():
    with pytest.raises(TypeError, match=r"residual must be an optax\.GradientTransformation"):
        galore_jax.galore_adamw(1e-3, rank=2, residual=0.1)


def test_projectors_from_other_matrices_than_the_gradients():
    params = params_like({"w": (8, 12)})
    tx = galore_jax.galore_sgd(1.0, rank=2, scale=1.0, method="svd")
    grads, other = grads_like(params, 0), grads_like(params, 1)
    call = Call(projector_grads=other)
    updates, _ = tx.update(grads, tx.init(params), params, galore=call)
    p = np.linalg.svd(np.asarray(other["w"]))[0][:, :2]
    np.testing.assert_allclose(updates["w"], -p @ p.T @ np.asarray(grads["w"]), atol=1e-4)
