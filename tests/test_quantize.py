"""Blockwise quantisation: the codes of bitsandbytes, errors, layouts, packing, odd inputs."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from galore_jax.quantize import (
    BLOCK,
    DYNAMIC,
    DYNAMIC_UNSIGNED,
    FORMATS,
    INT4,
    INT8,
    decode,
    dynamic_map,
    encode,
    spec,
    zeros,
)
from tests.problems import normal

FMTS = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
DYNAMICS = pytest.mark.parametrize("fmt", [DYNAMIC, DYNAMIC_UNSIGNED], ids=["signed", "unsigned"])


def there_and_back(x, fmt):
    return decode(*encode(x, fmt), fmt, x.shape)


def nearest(y, fmt):
    """The reference: the nearest level of the map, in float64; unsigned not zero but for zero."""
    table = dynamic_map(fmt.signed).astype(np.float64)
    middles = (table[1:] + table[:-1]) / 2
    found = np.searchsorted(middles, np.asarray(y, np.float64))
    return (found if fmt.signed else np.maximum(found, np.asarray(y) > 0)), middles


@pytest.mark.oracle
def test_map_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs the oracles extra")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed, 7, 8).numpy()
        np.testing.assert_array_equal(dynamic_map(signed), theirs)


@DYNAMICS
def test_every_level_is_its_own_code(fmt):
    table = dynamic_map(fmt.signed)
    codes, scales = encode(jnp.asarray(table), fmt)
    np.testing.assert_array_equal(codes, np.arange(256))
    np.testing.assert_array_equal(decode(codes, scales, fmt, (256,)), table)


@DYNAMICS
def test_codes_are_the_nearest_levels(fmt):
    """All magnitudes; differences only within ten roundings of a middle of levels."""
    rng = np.random.default_rng(0)
    shape = (4096, 1, BLOCK)  # each row a block
    x = rng.uniform(-1, 1, shape) * 10.0 ** rng.uniform(-8, 0, shape)
    x = x.astype(np.float32) if fmt.signed else np.abs(x).astype(np.float32)
    x[..., 0] = 1  # the scale, so that nothing is rounded before the comparison
    codes = np.asarray(jax.jit(lambda x: encode(x, fmt).codes)(x)).astype(int)
    best, _ = nearest(x, fmt)
    assert np.mean(codes != best) < 1e-5

    # Around every middle, the 8 floats on either side.
    _, middles = nearest(0.0, fmt)
    around = np.repeat(middles.astype(np.float32)[:, None], 17, 1)
    around = (around.view(np.int32) + np.arange(-8, 9, dtype=np.int32)).view(np.float32)
    x = np.concatenate([around, np.ones_like(around[:, :1])], 1).reshape(-1)
    x = np.concatenate([np.ones(1, np.float32), x])[: len(x) // 255 * 255]
    x = np.concatenate([np.ones((len(x) // 255, 1), np.float32), x.reshape(-1, 255)], 1)
    codes = np.asarray(encode(jnp.asarray(x), fmt).codes).astype(int)
    best, middles = nearest(x, fmt)
    wrong = codes != best
    assert np.max(np.abs(codes - best)) <= 1
    gap = np.min(np.abs(x[wrong][:, None] - middles), 1)
    assert np.all(gap <= 10 * np.spacing(np.abs(x[wrong])))


@pytest.mark.oracle
@DYNAMICS
def test_codes_of_bitsandbytes_itself(fmt):
    """Its CPU kernel is never nearer than ours, and agrees nearly always above 1e-3.

    The kernel (0.50.2) finds codes on a coarse grid, which lumps small magnitudes together.
    """
    torch = pytest.importorskip("torch", reason="needs the oracles extra")
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs the oracles extra")
    x = normal(0, 64, 1024) * 10.0 ** np.random.default_rng(1).uniform(-6, 0, (64, 1024))
    x = x.astype(np.float32) if fmt.signed else np.abs(x).astype(np.float32)
    table = dynamic_map(fmt.signed)
    ours = encode(jnp.asarray(x), fmt)
    codes = np.asarray(ours.codes).astype(int)
    y = x * np.repeat(1 / np.asarray(ours.scales), BLOCK).reshape(x.shape)

    theirs, state = functional.quantize_blockwise(
        torch.tensor(x), torch.tensor(np.array(table)), blocksize=BLOCK
    )
    np.testing.assert_array_equal(ours.scales.ravel(), state.absmax.numpy())
    kernel = theirs.numpy().astype(int)
    further = np.abs(table[codes] - y) - np.abs(table[kernel] - y)
    smallest = 0 if fmt.signed else table[1]  # where ours is not zero although zero is nearer
    assert np.max(further[np.abs(y) > smallest / 2]) < 2e-7
    large = np.abs(y) > 1e-3
    assert np.max(np.abs(codes - kernel)[large]) <= 1
    assert np.mean((codes != kernel)[large]) < 0.02


@pytest.mark.slow
@hypothesis.given(
    st.sampled_from(list(FORMATS.values())),
    st.lists(st.sampled_from([1, 2, 5, 40, 300]), max_size=4),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
@hypothesis.settings(deadline=None, max_examples=15)
def test_any_shape(fmt, shape, dtype):
    shape = tuple(shape)
    hypothesis.assume(np.prod(shape) < 1e6)
    x = jnp.asarray(normal(0, *shape) ** (1 if fmt.signed else 2), dtype)
    stored = encode(x, fmt)
    described = spec(shape, fmt)
    for array, form in zip(stored, described, strict=True):
        assert (array.shape, array.dtype) == (form.shape, form.dtype)
    traced = jax.eval_shape(functools.partial(encode, fmt=fmt), x)
    assert jax.tree.leaves(traced) == jax.tree.leaves(described)
    if fmt.bits == 8:
        assert stored.codes.shape == shape

    y = decode(*stored, fmt, shape, dtype)
    assert (y.shape, y.dtype) == (shape, dtype)
    x = np.asarray(x, np.float64)
    step = {"dynamic": 0.9 / 64, "dynamic_unsigned": 0.9 / 128, "int8": 1 / 100, "int4": 1 / 6}
    tolerance = (step[fmt.name] + 0.01 * (dtype != jnp.float32)) * np.max(np.abs(x))
    np.testing.assert_allclose(np.asarray(y, np.float64), x, rtol=0, atol=tolerance)

    for i in {0, shape[0] - 1} if len(shape) > 2 else ():
        y_i = decode(stored.codes[i], stored.scales[i], fmt, shape[1:], dtype)
        np.testing.assert_array_equal(y_i, y[i])
        codes, scales = encode(jnp.asarray(x[i], dtype), fmt)
        np.testing.assert_array_equal(codes, stored.codes[i])
        np.testing.assert_allclose(scales, stored.scales[i], rtol=1e-6)


@FMTS
@pytest.mark.parametrize("shape", [(300, 7), (7, 300), (2, 300, 7)])
def test_a_block_holds_numbers_of_one_direction(fmt, shape):
    """Directions lie along the longer axis: none is coarser for a strong one beside it."""
    strong = np.abs(normal(0, *shape))
    spectrum = 10.0 ** -np.arange(7)
    x = strong * (spectrum[:, None] if shape[-1] == 300 else spectrum)
    y = there_and_back(jnp.asarray(x, jnp.float32), fmt)
    axis = -1 if shape[-1] == 300 else -2
    error = np.linalg.norm(y - x, axis=axis) / np.linalg.norm(x, axis=axis)
    assert np.max(error) < (0.2 if fmt is INT4 else 0.02)


def test_second_moments_above_zero_are_never_stored_as_zero():
    x = np.abs(normal(0, 8, BLOCK)) * 10.0 ** np.random.default_rng(1).uniform(-20, 0, (8, BLOCK))
    x[:, 5] = 0
    y = np.asarray(there_and_back(jnp.asarray(x, jnp.float32), DYNAMIC_UNSIGNED))
    np.testing.assert_array_equal(y > 0, x > 0)
    assert np.all(y[x < 1e-8] < 1e-6 * np.max(x))


@FMTS
def test_zeros(fmt):
    stored, encoded = zeros((3, 5, 77), fmt), encode(jnp.zeros((3, 5, 77)), fmt)
    jax.tree.map(np.testing.assert_array_equal, stored, encoded)
    assert stored.codes.dtype == encoded.codes.dtype == fmt.dtype
    assert not np.any(decode(*stored, fmt, (3, 5, 77)))


@FMTS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_zero_and_alone(fmt, bad):
    x = np.abs(normal(0, 2, BLOCK))
    with_bad, with_zero = x.copy(), x.copy()
    with_bad[0, 7], with_zero[0, 7] = bad, 0
    y = there_and_back(jnp.asarray(with_bad), fmt)
    np.testing.assert_array_equal(y, there_and_back(jnp.asarray(with_zero), fmt))
    assert y[0, 7] == 0


@FMTS
@pytest.mark.parametrize("size", [1e-40, 1e-35, 1e-20, 1e30, 1e37])
def test_any_magnitude(fmt, size):
    x = np.abs(normal(0, BLOCK))
    x = jnp.asarray(x / x.max() * size, jnp.float32)
    y = there_and_back(x, fmt)
    assert np.all(np.isfinite(y))
    if size > 1e-40:
        assert np.max(np.abs(y - x)) <= 0.13 * size


@FMTS
def test_signs_survive(fmt):
    x = normal(0, 64, BLOCK) * 10.0 ** np.random.default_rng(1).uniform(-9, 0, (64, BLOCK))
    x = x.astype(np.float32)
    y = np.asarray(there_and_back(jnp.asarray(x), fmt))
    assert np.all(y * x >= 0)
    if not fmt.signed:
        assert np.all(y[x < 0] == 0)


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=["int8", "int4"])
def test_codes_of_decoded_numbers_stay(fmt):
    x = jnp.asarray(normal(0, 32, BLOCK))
    codes, scales = encode(x, fmt)
    again = encode(decode(codes, scales, fmt, x.shape), fmt)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_allclose(again.scales, scales, rtol=1e-6)


@FMTS
def test_under_jit_vmap_scan(fmt):
    x = jnp.asarray(normal(0, 3, 4, 130))
    stored = encode(x, fmt)

    def same(a, b):
        """Codes apart by one only where the compiler rounds a product otherwise."""
        a, b = (np.asarray(decode(*s, fmt, x.shape)) for s in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    same(jax.jit(functools.partial(encode, fmt=fmt))(x), stored)
    same(jax.vmap(functools.partial(encode, fmt=fmt))(x), stored)
    same(jax.lax.map(functools.partial(encode, fmt=fmt), x), stored)
    unstacked = jax.vmap(lambda c, s: decode(c, s, fmt, (4, 130)))(*stored)
    np.testing.assert_array_equal(unstacked, decode(*stored, fmt, x.shape))


def test_int4_holds_two_codes_a_byte():
    x = jnp.arange(-8.0, 8.0)
    codes, scales = encode(x, INT4)
    assert codes.nbytes == 8
    np.testing.assert_array_equal(decode(codes, scales, INT4, (16,)), x)


@pytest.mark.parametrize(("fmt", "error", "energy"), [(INT8, 0.01, 0.9999), (INT4, 0.12, 0.985)])
def test_orthonormal_bases(fmt, error, energy):
    p = np.linalg.qr(normal(0, 512, 128))[0]
    q = np.asarray(there_and_back(jnp.asarray(p), fmt))
    assert np.linalg.norm(p - q) / np.linalg.norm(p) < error
    kept = np.linalg.svd(np.linalg.qr(q)[0].T @ p, compute_uv=False)
    assert np.mean(kept**2) > energy
    start = jnp.eye(512, 128)  # galore's default projector
    np.testing.assert_allclose(there_and_back(start, fmt), start, atol=1e-6)
