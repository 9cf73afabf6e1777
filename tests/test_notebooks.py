"""The notebooks run from top to bottom, and are kept without their outputs."""

import json
import pathlib
import sys

import nbclient
import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def this_python() -> KernelManager:
    """Kernels of the Python that runs the tests, whatever `python3` is registered as."""
    manager = KernelManager()
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager._kernel_spec = KernelSpec(argv=argv, display_name="tests", language="python")
    return manager


@pytest.mark.slow
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("GALORE_JAX_NOTEBOOK_STEPS", "12")
    monkeypatch.setenv("GALORE_JAX_NOTEBOOK_MODEL", "stand-in")  # Downloads nothing.
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, km=this_python(), resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_is_stored_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    for cell in notebook["cells"]:
        assert set(cell) <= {
            "cell_type",
            "id",
            "metadata",
            "source",
            "outputs",
            "execution_count",
        }
        assert not cell["metadata"]
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_installs_as_the_others_do(path):
    """A notebook stands alone, so each repeats these two cells."""

    def first(path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return [cell["source"] for cell in notebook["cells"][1:3]]

    assert "Install" in first(path)[0][0]
    assert first(path) == first(NOTEBOOKS[0])
