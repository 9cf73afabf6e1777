"""A finished run of the bigram model, and folders with a copy of it."""

import contextlib
import shutil

import pytest

from tests.examples.bigram import run
from tests.small_run import write_texts


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Texts, their tokenizer and a run called `whole` that nothing happens to."""
    path = tmp_path_factory.mktemp("begun")
    with contextlib.chdir(path):
        write_texts()
        assert run("--run-dir", "whole") == 0
    return path


@pytest.fixture
def run_folder(begun, tmp_path, monkeypatch):
    """A folder of its own with that in it."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
