"""benchmarks.all knows every benchmark; each has its flags, and says how it was called."""

import importlib
import json
import pathlib

import pytest

from benchmarks import all as all_benchmarks
from benchmarks import report

FOLDER = pathlib.Path(report.__file__).parent


def test_every_benchmark_is_in_the_list():
    writing = {p.stem for p in FOLDER.glob("*.py") if "report.write(" in p.read_text()}
    assert {*all_benchmarks.BENCHMARKS} == writing
    assert len(set(all_benchmarks.BENCHMARKS)) == len(all_benchmarks.BENCHMARKS)
    assert {*all_benchmarks.NEED_MORE} < writing


@pytest.mark.parametrize("name", all_benchmarks.BENCHMARKS)
def test_every_benchmark_has_a_quick_form_and_says_its_command(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m benchmarks.{name} ")
    assert "--quick" in said and "--out" in said
    assert '"command": args.command' in (FOLDER / f"{name}.py").read_text()


def test_one_that_runs_and_one_that_fails(tmp_path, capsys):
    assert all_benchmarks.main(["--quick", "--only", "state", "--out", str(tmp_path)]) == 0
    name, seconds, unit, how = capsys.readouterr().out.splitlines()[0].split()
    assert (name, unit, how) == ("state", "s", "ok") and float(seconds) > 0
    found = json.loads((tmp_path / "state.json").read_text())
    assert found["command"] == "python -m benchmarks.state --quick"
    assert found["cores"] > 0 and found["device"] and found["python"]
    assert {"jax", "jaxlib", "optax", "flax", "galore_jax"} <= found["versions"].keys()
    assert found["models"].keys() == {"60m"}
    assert not all_benchmarks.run("no_such_one", [])
    assert "FAILED" in (said := capsys.readouterr().out) and "No module named" in said


def parsed(*argv, **quick):
    parser = report.parser("One line.\n\n    python -m benchmarks.one FOLDER\n")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("folder", nargs="?")
    return report.parse(parser, argv, **quick)


def test_quick_is_small_and_elsewhere_unless_it_is_told_otherwise():
    assert (parsed(steps=2).steps, parsed(steps=2).out) == (100, report.RESULTS)
    quick = parsed("--quick", steps=2)
    assert (quick.steps, quick.out) == (2, report.QUICK)
    assert report.RESULTS not in (quick.out, *quick.out.parents)
    told = parsed("--quick", "--steps", "7", "--out", "here", steps=2)
    assert (told.steps, told.out) == (7, pathlib.Path("here"))


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ([], "python -m benchmarks.one"),
        (["/a/b/model/", "--steps", "3"], "python -m benchmarks.one model/ --steps 3"),
        (["--steps=3", "--out", "/a/b"], "python -m benchmarks.one --steps=3"),
        (["--out=/a/b", "my model"], "python -m benchmarks.one 'my model'"),
    ],
)
def test_a_command_is_told_without_where_things_lay(argv, command):
    assert parsed(*argv).command == command
    assert report.portable(["--data=/a/b.txt"]) == ["--data=b.txt"]


def test_a_package_that_is_not_there_has_no_version(tmp_path):
    report.write("x", {"command": "c"}, ("no-such-package",), tmp_path)
    versions = json.loads((tmp_path / "x.json").read_text())["versions"]
    assert versions["no-such-package"] == "not installed"
    assert versions["jax"] != "not installed"
