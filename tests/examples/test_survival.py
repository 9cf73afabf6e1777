"""Runs survive signals, kills, damaged files, full disks and a second process."""

import errno
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples import checkpoints, config, files, runs
from examples.errors import UserError
from tests.examples.bigram import run
from tests.small_run import metrics

ROOT = pathlib.Path(__file__).parents[2]


def arrays(name, step=12):
    """All arrays of a checkpoint."""
    with ocp.CheckpointManager(pathlib.Path(name, "checkpoints").resolve()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(step, args=args)["state"]
    return jax.tree.map(np.asarray, state)


def assert_same(name, other="whole"):
    """That two runs ended alike, bit for bit, and tell of each step once."""
    assert [row["step"] for row in metrics(name)] == list(range(1, 13))
    assert metrics(name) == metrics(other)
    jax.tree.map(np.testing.assert_array_equal, arrays(name), arrays(other))


def one_line(capsys):
    """The error message, which has to be one line."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [text for text in err.splitlines() if "error:" in text]
    return line


class Killed(BaseException):
    """Ends a run between two steps, as nothing in it expects."""


def die_at(step):
    def before_step(done):
        if done == step:
            raise Killed

    return before_step


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C has an effect, also where the tests run in the background and it has none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- Stopping ---


def test_a_stopped_run_saves_its_last_step(run_folder, capsys):
    def stop(done):
        if done == 6:
            signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    assert run("--run-dir", "parts", before_step=stop) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    said = capsys.readouterr().out
    assert "stopped after step 7 of 12; continue with --resume parts" in said
    assert metrics("parts") == metrics("whole")[:7]
    assert not pathlib.Path("parts/summary.json").exists()
    assert run("--resume", "parts") == 0
    assert_same("parts")


def test_ctrl_c_is_such_a_signal(run_folder, capsys):
    def stop(done):
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    assert run("--run-dir", "parts", before_step=stop) == 0
    assert "stopped after step 2 of 12" in capsys.readouterr().out
    assert checkpoints.choose(pathlib.Path("parts")) == 2


def test_a_second_ctrl_c_stops_at_once(run_folder, capsys):
    def stop(done):
        if done == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    assert run("--run-dir", "parts", before_step=stop) == 130
    assert "continue with --resume parts" in capsys.readouterr().err
    assert checkpoints.choose(pathlib.Path("parts")) == 4


def test_lost_steps_are_taken_again(run_folder):
    """A run that died after its last checkpoint: logged steps are dropped and repeated."""
    assert run("--run-dir", "died", "--stop-at", "8") == 0
    lost = [json.dumps(row | {"loss": 0.0}) + "\n" for row in metrics("whole")[8:11]]
    with pathlib.Path("died/metrics.jsonl").open("a") as file:
        file.write("".join(lost) + '{"step": 1')
    for _ in range(2):  # The second time there is nothing left to do.
        assert run("--resume", "died") == 0
        assert_same("died")


# --- Damage ---


def largest(step):
    """The largest file of a checkpoint in the folder `hurt`."""
    files = [p for p in pathlib.Path(f"hurt/checkpoints/{step}").rglob("*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncated(step):
    os.truncate(largest(step), largest(step).stat().st_size // 2)


def flipped(step):
    content = bytearray(largest(step).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(b ^ 0xFF for b in content[middle : middle + 64])
    largest(step).write_bytes(content)


def deleted(step):
    largest(step).unlink()


def gone(step):
    shutil.rmtree(f"hurt/checkpoints/{step}")


def emptied_metadata(step):
    pathlib.Path(f"hurt/checkpoints/{step}/_CHECKPOINT_METADATA").write_text("")


def half_checksums(step):
    path = pathlib.Path(f"hurt/checksums/{step}.json")
    path.write_text(path.read_text()[:40])


def test_a_damaged_checkpoint_is_found_and_passed_over(run_folder, capsys):
    for hurt in (truncated, deleted, gone, half_checksums, emptied_metadata, flipped):
        shutil.rmtree("hurt", ignore_errors=True)
        shutil.copytree("whole", "hurt")
        hurt(12)
        capsys.readouterr()
        assert checkpoints.choose(pathlib.Path("hurt")) == 8, hurt
        said = capsys.readouterr().out
        assert "the checkpoint of step 12 is damaged" in said, hurt
        assert "going on from that of step 8" in said
    assert run("--resume", "hurt") == 0
    assert_same("hurt")
    # Again, with one put aside already, and what orbax itself would stumble over.
    emptied_metadata(12)
    assert run("--resume", "hurt") == 0
    assert_same("hurt")


def test_where_no_checkpoint_is_sound_nothing_is_touched(run_folder, capsys):
    shutil.copytree("whole", "hurt")
    flipped(12)
    deleted(8)
    before = sorted(pathlib.Path("hurt").rglob("*"))
    assert run("--resume", "hurt") == 2
    line = one_line(capsys)
    assert line.startswith("error: --resume: no checkpoint in 'hurt' is sound (step 12: ")
    assert "step 8: " in line
    assert sorted(pathlib.Path("hurt").rglob("*")) == before
    shutil.rmtree("hurt/checkpoints")
    assert run("--resume", "hurt") == 2
    assert "it is gone" in one_line(capsys)


def test_a_checkpoint_that_was_just_finished_counts(run_folder):
    """The process died before the checksums; and in the middle of the save after it."""
    assert run("--run-dir", "parts", "--stop-at", "8") == 0
    pathlib.Path("parts/checksums/8.json").unlink()
    left = pathlib.Path("parts/checkpoints/12.orbax-checkpoint-tmp/state")
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    assert checkpoints.choose(pathlib.Path("parts")) == 8
    assert run("--resume", "parts") == 0
    assert not left.exists()
    assert checkpoints.sealed(pathlib.Path("parts")) == {8, 12}
    assert_same("parts")
    # An older one without checksums is what a deletion has left of it.
    pathlib.Path("parts/checksums/8.json").unlink()
    assert checkpoints.damage(pathlib.Path("parts"), 8) == "it has no checksums"


def test_a_checkpoint_without_checksums_that_does_not_load(run_folder, capsys):
    shutil.copytree("whole", "hurt")
    shutil.rmtree("hurt/checkpoints/12/state")
    pathlib.Path("hurt/checksums/12.json").unlink()
    assert run("--resume", "hurt") == 2
    line = one_line(capsys)
    assert "'hurt/checkpoints/12' does not load" in line and "Remove it" in line
    shutil.rmtree("hurt/checkpoints/12")
    assert run("--resume", "hurt") == 0
    assert_same("hurt")


# --- Before the first checkpoint ---


@pytest.mark.parametrize("again", [["--resume", "died"], ["--run-dir", "died"]])
def test_a_run_without_a_checkpoint_begins_anew(run_folder, again):
    with pytest.raises(Killed):
        run("--run-dir", "died", before_step=die_at(3))
    assert len(metrics("died")) == 3 and not checkpoints.exist(pathlib.Path("died"))
    assert run(*again) == 0
    assert_same("died")


def test_a_folder_is_taken_for_the_same_run_alone(run_folder, capsys):
    with pytest.raises(Killed):
        run("--run-dir", "died", before_step=die_at(3))
    assert run("--run-dir", "died", "--seed", "1") == 2
    assert "already holds a run. Continue it with --resume died" in one_line(capsys)
    assert run("--run-dir", "died", "--stop-at", "4") == 0
    capsys.readouterr()
    assert run("--run-dir", "died") == 2
    assert "already holds a run" in one_line(capsys)


def test_a_mistake_leaves_no_folder(run_folder):
    assert run("--run-dir", "new", "--data", "nowhere.txt") == 2
    assert not pathlib.Path("new").exists()


# --- One process a run ---


def test_a_second_process_is_sent_away(run_folder, capsys):
    told = []

    def second(done):
        if done == 2:
            told.append(run("--resume", "one"))
            told.append(run("--run-dir", "one"))

    assert run("--run-dir", "one", before_step=second) == 0
    assert told == [2, 2]
    err = capsys.readouterr().err
    assert "error: --resume one: another process is at work on this run." in err
    assert "error: --run-dir one: another process is at work on this run." in err
    assert [row["step"] for row in metrics("one")] == list(range(1, 13))


def test_where_there_are_no_locks_the_run_says_so_and_goes_on(run_folder, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    assert run("--run-dir", "one", "--stop-at", "4") == 0
    assert "one is not locked (Operation not supported)" in capsys.readouterr().out
    monkeypatch.setattr(runs, "fcntl", None)
    assert run("--resume", "one") == 0
    assert "no flock" in capsys.readouterr().out


# --- Disks ---


@pytest.fixture
def small_files():
    """A function that lets files grow to a kilobyte only: a disk refuses in the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=1000: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_when_saving(run_folder, monkeypatch, capsys, small_files):
    def fill(done):
        if done == 7:
            small_files(20_000)  # Metrics still fit.

    monkeypatch.setattr(runs, "plot_loss", lambda *_: None)

    assert run("--run-dir", "parts", before_step=fill) == 2
    line = one_line(capsys)
    assert "the checkpoint of step 8 could not be written: File too large." in line
    assert "continue with --resume parts" in line
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert run("--resume", "parts") == 0
    assert_same("parts")


def test_a_disk_that_is_full_for_the_metrics(run_folder, capsys, small_files):
    def fill(done):
        if done == 9:
            small_files(pathlib.Path("parts/metrics.jsonl").stat().st_size + 100)

    assert run("--run-dir", "parts", before_step=fill) == 2
    assert "'parts/metrics.jsonl' could not be written: File too large." in one_line(capsys)
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert run("--resume", "parts") == 0
    assert_same("parts")


def test_a_disk_that_is_full_at_the_start(run_folder, capsys, small_files):
    assert run("--run-dir", "one", "--stop-at", "1") == 0  # The tokenizer is in the cache now.
    capsys.readouterr()
    small_files()
    assert run("--run-dir", "two") == 2
    line = one_line(capsys)
    assert line.startswith("error: --run-dir two cannot be written to: File too large.")
    assert not pathlib.Path("two").exists()
    assert run("--run-dir", "texts/0.txt/two") == 2
    assert "--run-dir texts/0.txt/two cannot be written to: Not a directory." in one_line(capsys)
    assert run("--run-dir", "two", "--cache-dir", "other") == 2
    assert "--cache-dir: 'other/bpe-" in one_line(capsys)


def test_other_errors_keep_their_traceback(run_folder):
    def mistake(done):
        raise KeyError(done)

    with pytest.raises(KeyError):
        run("--run-dir", "one", before_step=mistake)
    with pytest.raises(ValueError, match="mine"), files.disk_errors("a", "b"):
        raise ValueError("mine")


def test_what_a_library_says_of_a_disk():
    for text in ("OS error 28: ENOSPC No space left on device", "Read-only file system"):
        with pytest.raises(UserError, match=r"^x: (No space left|Read-only)"), \
                files.disk_errors("x", "y"):  # fmt: skip
            try:
                raise RuntimeError(text)
            except RuntimeError as error:
                raise ValueError("could not save") from error


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    files.write_atomically(path, "one")

    def fails(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="full"):
        files.write_atomically(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


# --- The config ---


def test_a_config_that_cannot_be_trusted_is_refused(run_folder, capsys):
    assert run("--run-dir", "one", "--stop-at", "1") == 0
    path = pathlib.Path("one/config.json")
    text = path.read_text()
    saved = json.loads(text)
    assert saved["format"] == config.FORMAT
    for broken, words in (
        (text[: len(text) // 2], "is damaged"),
        ("", "is damaged"),
        ("[1]", "is damaged"),
        (json.dumps(saved | {"format": 2}), "of another version of this program (format 2, here 1"),
        (json.dumps({k: v for k, v in saved.items() if k != "format"}), "(format None"),
        (json.dumps(saved | {"rnk": 4}), "of another version"),
    ):
        path.write_text(broken)
        capsys.readouterr()
        assert run("--resume", "one") == 2
        line = one_line(capsys)
        assert line.startswith("error: --resume: 'one/config.json' ") and words in line
    assert run("--run-dir", "one") == 2
    assert "error: --run-dir: 'one/config.json' " in one_line(capsys)


# --- Killed ---

KILLED = """
import os, signal, sys
from tests.examples import bigram

def kill(done):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)

sys.exit(bigram.run(*sys.argv[1:], before_step=kill))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_as_it_saves(run_folder):
    """Its first checkpoint at that; what it has locked is free."""

    command = [sys.executable, "-c", KILLED, "--run-dir", "died"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    assert subprocess.run(command, env=env, capture_output=True).returncode == -signal.SIGKILL
    assert len(metrics("died")) == 4
    assert run("--resume", "died") == 0
    assert_same("died")
