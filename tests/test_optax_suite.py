"""Optax's own tests of contributed optimizers, over ours in the place of its galore."""

import importlib.util
import pathlib
import warnings

import optax
import pytest

import galore_jax

pytest.importorskip("absl.testing", reason="needs absl-py")


def bare_link(learning_rate: optax.ScalarOrSchedule, rank=8, update_proj_gap=200):
    return optax.chain(
        galore_jax.galore(rank=rank, update_proj_gap=update_proj_gap),
        optax.adamw(learning_rate),
    )


def suite(name, factory, **kwargs):
    """Optax's test case with `factory` as the one optimizer under test.

    Its module builds lists of optimizers and then the tests from them; the lists are
    replaced between the two.
    """
    origin = importlib.util.find_spec("optax.contrib._common_test").origin
    lists, tests = pathlib.Path(origin).read_text().split("# pylint: enable=invalid-name", 1)
    namespace = {"__name__": f"{__name__}.{name}"}
    exec(compile(lists, origin, "exec"), namespace)
    entry = {
        "opt_name": "galore",
        "opt_kwargs": {"learning_rate": 1e-2, **kwargs},
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    assert any(e["opt_name"] == "galore" for e in namespace["_MAIN_OPTIMIZERS_UNDER_TEST"])
    namespace["_MAIN_OPTIMIZERS_UNDER_TEST"] = namespace["_ALL_OPTIMIZERS_UNDER_TEST"] = (entry,)
    exec(compile(tests, origin, "exec"), namespace)
    namespace["_get_opt_factory"] = lambda opt_name: factory
    case = namespace["ContribTest"]
    case.__name__ = case.__qualname__ = name
    case.__module__ = __name__
    return pytest.mark.filterwarnings("ignore:galore projects no leaf:UserWarning")(case)


# As Optax tests its own: rank 8 on matrices of side 2, where nothing is projected.
TestAlias = suite("TestAlias", galore_jax.galore_adamw, rank=8)
# And with something projected: rank 1 of 2, refreshed often enough to see both directions.
TestAliasProjecting = suite(
    "TestAliasProjecting", galore_jax.galore_adamw, rank=1, update_proj_gap=10
)
TestBareLinkProjecting = suite("TestBareLinkProjecting", bare_link, rank=1, update_proj_gap=10)

TestAdamW8bit = suite("TestAdamW8bit", galore_jax.adamw8bit)


def test_the_suite_is_optaxs_and_tests_ours():
    names = [n for n in dir(TestAlias) if n.startswith("test_")]
    assert len(names) >= 15 and any("converge" in n or "optimizers" in n for n in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TestAliasProjecting("test_optimizers2").test_optimizers2()
