"""pretrain on a mesh, in one process and in two, against one device."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import checkpoints, command_line, meshes, pretrain
from examples import config as config_lib
from examples import data as data_lib
from examples.errors import UserError
from tests.examples.bigram import run
from tests.problems import run_with_devices
from tests.small_run import metrics

ROOT = pathlib.Path(__file__).parents[2]

# --- The flags ---


def test_sizes():
    assert meshes.sizes("data=2,fsdp=4", 8) == {"data": 2, "fsdp": 4}
    assert meshes.sizes("fsdp=8", 8) == {"fsdp": 8}
    assert meshes.sizes("data=-1,fsdp=2", 8) == {"data": 4, "fsdp": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data=2,fsdp=3", "multiply to the number of devices, 8 here"),
        ("fsdp=16", "8 here"),
        ("data=-1,fsdp=3", "8 here"),
        ("data=-1,fsdp=-1", "8 here"),
        ("model=8", "'model' is none of data, fsdp"),
        ("data=2,data=4", "'data' is none of"),
        ("data=two", "'data=two' gives no size"),
        ("data=0,fsdp=8", "'data=0' gives no size"),
        ("data", "'data' gives no size"),
    ],
)
def test_a_mesh_that_cannot_be(text, words):
    with pytest.raises(UserError, match=f"^--mesh {text}: ") as caught:
        meshes.sizes(text, 8)
    assert words in str(caught.value)


def test_batches_that_are_not_cut_evenly(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    for flags, words in (
        ({"batch_size": 12}, "--batch-size 12 is not cut evenly over 8 devices.*multiple of 8"),
        ({"batch_size": 24, "accumulate": 2}, "24 in --accumulate 2 micro.*multiple of 16"),
    ):
        with pytest.raises(UserError, match=words):
            meshes.create(config_lib.from_recipe(mesh="data=2,fsdp=4", **flags))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"--mesh: 2 processes need one.*fsdp=8"):
        meshes.create(config_lib.from_recipe())


def test_mistakes_in_the_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(["--mesh", "fsdp=64", "--batch-size", "64"]) == 2
    assert capsys.readouterr().err.startswith("error: --mesh fsdp=64: the sizes must multiply")
    assert not list(tmp_path.iterdir())
    for flags, words in (
        ("--processes 2", "--coordinator HOST:PORT, --processes and --process-id go together"),
        ("--coordinator a:1 --process-id 0", "--processes is None"),
        ("--coordinator auto --processes 2 --process-id 1", "go together"),
        ("--coordinator a:1 --processes 2 --process-id 2", "from 0 to 1"),
        ("--process-id -1", "--process-id is -1"),
        ("--grad-norm subspace", "--tier full has whole gradients"),
    ):
        with pytest.raises(UserError, match=words):
            command_line.parse(flags.split())


# --- Where things lie ---


def test_fsdp_cuts_the_longest_axis_that_it_divides():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    shapes = {
        "blocks": {"up": (4, 36, 60), "square": (4, 36, 36), "odd": (4, 30, 12), "norm": (4, 36)},
        "embed": (300, 36),
        "none": (7, 9),
        "norm": (36,),
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )
    found = jax.tree.map(lambda s: tuple(s.spec), meshes.parameter_shardings(mesh, params))
    assert found == {
        "blocks": {
            "up": (None, None, "fsdp"),
            "square": (None, None, "fsdp"),
            "odd": (None, None, "fsdp"),
            "norm": (None, None),
        },
        "embed": ("fsdp", None),
        "none": (None, None),
        "norm": (None,),
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_reads_its_rows_of_the_same_batches(processes):
    """From the same position, however many they are."""
    tokens = np.arange(16 * 31 + 1, dtype=np.uint32)
    whole = iter(data_lib.batches(tokens, 16, 6, seed=0))
    parts = [iter(data_lib.batches(tokens, 16, 6, 0, (k, processes))) for k in range(processes)]
    for _ in range(12):  # Over two epochs.
        rows = [next(part) for part in parts]
        np.testing.assert_array_equal(np.concatenate(rows), next(whole))
    assert all(part.get_state() == whole.get_state() for part in parts)


# --- Whole runs ---

EIGHT = """
import os, pathlib, tempfile
import jax, numpy as np
from examples import config, llama, meshes, pretrain, runs
from tests.examples.bigram import FLAGS
from tests.small_run import write_texts

llama.CONFIGS["tiny"] = llama.LlamaConfig(300, 36, 60, heads=3, layers=3, kv_heads=1)
FLAGS = [*FLAGS, "--optimizer", "galore_adamw", "--rank", "5", "--update-proj-gap", "2",
         "--method", "random", "--batch-size", "16", "--steps", "7", "--eval-every", "99"]
# A chain of runs, of which the first one alone has to validate.
MESH = ["--mesh", "data=2,fsdp=4"]

os.chdir(tempfile.mkdtemp())
write_texts()

def train(*flags):
    assert pretrain.main(flags) == 0

train(*FLAGS, "--run-dir", "one")
train(*FLAGS, *MESH, "--stop-at", "2", "--run-dir", "several")
train("--resume", "several", "--tier", "subspace", "--stop-at", "4")
train("--resume", "several", "--tier", "layerwise", "--stop-at", "6")
train("--resume", "several", "--mesh", "", "--tier", "full")
one, several = (runs.read_metrics(pathlib.Path(name)) for name in ("one", "several"))
for key in ("loss", "val_loss"):
    values = ([row[key] for row in rows if key in row] for rows in (several, one))
    np.testing.assert_allclose(*values, rtol=1e-5, err_msg=key)
norms = [(a["grad_norm"], b["grad_norm"]) for a, b in zip(several, one) if "grad_norm" in a]
assert len(norms) == 5
np.testing.assert_allclose(*zip(*norms), rtol=1e-4)

# Each device has its share from the start.
made = config.read(pathlib.Path("several"))
mesh, (_, init, tx, *_) = meshes.create(made), pretrain.setup(made)
wanted = meshes.abstract_state(mesh, jax.eval_shape(init), tx)
state = meshes.new_state(init, tx, jax.tree.map(lambda x: x.sharding, wanted))

def share(tree):
    leaves = jax.tree.leaves(tree)
    return sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)

assert share(state["params"]) < 0.26 and share(state["opt_state"]) < 0.21, (
    share(state["params"]), share(state["opt_state"]))
"""


@pytest.mark.slow
def test_a_mesh_trains_as_one_device():
    """In one tier after another; saved on eight devices and resumed there, and on one."""
    run_with_devices(8, EIGHT)


TWO = """
import os, signal, sys
import jax
from tests.examples import bigram

def stop(done):
    if done == 5 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)

sys.exit(bigram.run(*sys.argv[1:], before_step=stop))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(run_folder):
    """One of them is told to stop; both do, after the same step. One goes on alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", TWO, "--mesh", "data=2,fsdp=2", "--run-dir", "two"]
    command += ["--save-every", "99"]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id"]
    started = [
        subprocess.Popen(
            [*command, str(k)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for k in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "stopped after step 7 of 12" in said[0][0] and "stopped" not in said[1][0]
    assert checkpoints.choose(pathlib.Path("two")) == 7
    assert run("--resume", "two", "--mesh", "") == 0
    rows, wanted = metrics("two"), metrics("whole")
    assert [row["step"] for row in rows] == list(range(1, 13))
    for key in ("loss", "val_loss"):
        values = [row[key] for row in wanted if key in row]
        assert [row[key] for row in rows if key in row] == pytest.approx(values, rel=1e-5)
