"""Any gradient: bases stay bases, steps stay within Adam's, and nothing finite turns into NaN.

A program is compiled for each of some settings, which between them hold every value, and run on
whatever sequences of gradients hypothesis finds.
"""

import functools
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import galore_jax
from galore_jax.matrix.plan import plan
from galore_jax.projector.project import bases, lift, project
from galore_jax.quantize import Encoded

GAP, RATE = 2, 1e-2
# Adam's largest step over its rate: all of the first moment is this step's, none of the second.
LARGEST = 0.1 / 0.001**0.5


class Setting(NamedTuple):
    shape: tuple[int, ...]
    rank: int
    dtype: str
    proj_type: str
    method: str
    projector_dtype: str | None
    moments: str
    inner: str

    @property
    def where(self):
        return {
            "rank": self.rank,
            "proj_type": self.proj_type,
            "weight_dimension_numbers": galore_jax.last_two_axes,
        }


INNERS = {
    "adamw": lambda: optax.adamw(RATE, weight_decay=0.0),
    "adamw8bit": lambda: galore_jax.adamw8bit(RATE, weight_decay=0.0),
    "lion": lambda: optax.lion(RATE, weight_decay=0.0),
}
CHOICES = {
    "shape": [(7, 11), (11, 7), (3, 5, 9), (40, 300), (300, 40), (2, 24, 130), (9, 9)],
    "rank": [1, 3, 6, 8, 50],
    "dtype": ["float32", "bfloat16"],
    "proj_type": ["std", "left", "right", "full"],
    "method": ["svd", "eigh", "randomized", "subspace", "random", "coordinates"],
    "projector_dtype": [None, "bfloat16", "int8", "int4"],
    "moments": ["keep", "reset", "rotate"],
    "inner": list(INNERS),
}
GRADIENTS = {
    "normal": lambda rng, s: rng.standard_normal(s),
    "zero": lambda rng, s: np.zeros(s),
    "constant": lambda rng, s: np.full(s, rng.standard_normal()),
    "of rank 1": lambda rng, s: rng.standard_normal((*s[:-1], 1)) * rng.standard_normal(s[-1]),
    "one entry": lambda rng, s: np.eye(1, int(np.prod(s)), rng.integers(np.prod(s))).reshape(s),
    "a layer of zeros": lambda rng, s: (
        rng.standard_normal(s) * (np.arange(s[0]) > 0).reshape(-1, *[1] * (len(s) - 1))
    ),
    "huge": lambda rng, s: 1e30 * rng.standard_normal(s),
    "tiny": lambda rng, s: 1e-30 * rng.standard_normal(s),
    "of all sizes": lambda rng, s: rng.standard_normal(s) * 10.0 ** rng.integers(-20, 20, s),
    "a NaN": lambda rng, s: np.where(np.arange(s[-1]) == 1, np.nan, rng.standard_normal(s)),
    "an infinity": lambda rng, s: np.where(np.arange(s[-1]) == 1, np.inf, rng.standard_normal(s)),
}
NOT_FINITE = ("a NaN", "an infinity")


def settings(count=18):
    """Settings that are taken, each value in as many as any other."""
    rng = np.random.default_rng(0)
    columns = []
    for values in CHOICES.values():
        order = [i % len(values) for i in range(count)]
        columns.append([values[i] for i in rng.permutation(order)])
    for row in zip(*columns, strict=True):
        setting = Setting(*row)
        if setting.method == "coordinates":
            kind = "std" if setting.proj_type == "full" else setting.proj_type
            setting = setting._replace(projector_dtype=None, proj_type=kind)
        if setting.inner == "adamw8bit":
            setting = setting._replace(moments="keep")
        yield setting


@functools.cache
def compiled(setting: Setting) -> Any:
    """Initial state, the update, and what a projector does to a low-rank array."""
    tx = galore_jax.galore(
        INNERS[setting.inner](),
        scale=1.0,
        update_proj_gap=GAP,
        method=setting.method,
        moments=setting.moments,
        projector_dtype=setting.projector_dtype,
        **setting.where,
    )
    params = {"w": jnp.zeros(setting.shape, setting.dtype)}
    (view,) = plan(params, **setting.where)

    def back(state, g):
        projector = state.projector
        if isinstance(projector, Encoded):
            projector = Encoded(*(tree["w"] for tree in projector))
        else:
            projector = projector["w"]
        r = project(view, projector, g)
        found = [p for p in bases(view, projector) if p is not None]
        return found, r, project(view, projector, lift(view, projector, r))

    return params, tx.init(params), jax.jit(tx.update), view, jax.jit(back)


def assert_a_basis(setting, p):
    """Columns orthonormal, or zero."""
    gram = np.swapaxes(p, -1, -2) @ p
    there = (np.abs(p) > 0).any(axis=-2)
    wanted = np.eye(p.shape[-1]) * there[..., None, :]
    # Entries are off by half a step, of at most the largest entry over so many; a column by as
    # much in each row.
    steps = {None: 1e6, "bfloat16": 256, "int8": 127, "int4": 7}[setting.projector_dtype]
    atol = 2e-6 + p.shape[-2] ** 0.5 / steps
    np.testing.assert_allclose(gram, wanted, atol=atol)


@pytest.mark.slow
@hypothesis.given(
    st.sampled_from(list(settings())),
    st.lists(st.sampled_from(list(GRADIENTS)), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
@hypothesis.settings(deadline=None, max_examples=1500)
def test_any_gradient(setting, kinds, seed):
    rng = np.random.default_rng(seed)
    params, state, update, view, back = compiled(setting)
    projected = hasattr(view, "projector_shape")
    finite = True
    for step, kind in enumerate(kinds):
        finite = finite and kind not in NOT_FINITE
        with np.errstate(under="ignore"):
            g = GRADIENTS[kind](rng, setting.shape).astype(np.float32)
        grads = {"w": jnp.asarray(g, setting.dtype)}
        updates, state = update(grads, state, params)
        u = np.asarray(updates["w"], np.float32)
        if finite:
            assert np.isfinite(u).all(), (step, kind)
        if not projected:
            continue
        if finite and setting.moments != "rotate":
            largest = 1.0 if setting.inner == "lion" else LARGEST
            numbers = np.prod(view.low_rank_shape)
            assert np.linalg.norm(u) <= 1.3 * largest * RATE * numbers**0.5, (step, kind)
        r = jnp.asarray(rng.standard_normal(setting.shape), jnp.float32)
        found, there, again = back(state, r)
        for p in map(np.asarray, found):
            assert_a_basis(setting, p)
        if setting.projector_dtype is None:
            np.testing.assert_allclose(again, there, atol=1e-4)
