"""Shared settings, made before JAX is imported; workers and the programs that tests start inherit.

Two workers share two cores, so BLAS must not start threads of its own: OpenBLAS threads that wait
for a busy core spin, and a decomposition takes ten times as long. Most of the tests' time is
compilation. They ask for code that is quick to compile rather than quick to run, and keep it in one
folder for the session.

README and guides are tests too: each of their Python and shell blocks runs, see tests/documents.py.
"""

import os
import pathlib
import shutil
import sys
import tempfile

import pytest
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

FAST_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", FAST_TO_COMPILE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

_made: list[str] = []
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _made.append(tempfile.mkdtemp(prefix="galore-jax-compiled-"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _made[0]


def pytest_unconfigure():
    """The process that made the folder removes it; workers have ended by then."""
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Who needs the oracles must have their mark, by which they are chosen where there are any."""
    report = yield
    unmarked = item.get_closest_marker("oracle") is None
    if report.skipped and unmarked and "oracles extra" in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} lacks pytest.mark.oracle"
    return report


@pytest.fixture(autouse=True, scope="module")
def clear_caches():
    """Programs of a module's tests are let go of: a process may not map as many as all of them."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with some text, in which the model called tiny is a smaller one."""
    from examples import llama  # It imports JAX, which the settings above come before.
    from tests.small_run import SMALL, write_texts

    monkeypatch.setitem(llama.CONFIGS, "tiny", SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_texts()
    return tmp_path


# --- README and guides ---


def _bash(example):
    from tests import documents  # It imports JAX, which the settings above precede.

    documents.bash(example)


def _setup(namespace):
    from tests import documents

    documents.setup(namespace)


def _teardown(namespace):
    from tests import documents

    documents.teardown(namespace)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("bash", _bash), SkipParser()],
    path=str(pathlib.Path(__file__).parent),
    patterns=["README.md", "docs/*.md", "docs/guides/*.md"],
    setup=_setup,
    teardown=_teardown,
).pytest()
