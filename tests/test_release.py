"""What a release consists of: one version, one set of linters, and an import that is light."""

import pathlib
import re
import subprocess
import sys
import tomllib

import galore_jax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    path = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{galore_jax.__version__}"\n' in path.read_text()
    assert f"\nversion: {galore_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_hooks_have_the_versions_of_the_linters():
    pinned = dict(
        re.findall(
            r"^(\w+)==([\d.]+)$",
            "\n".join(PROJECT["project"]["optional-dependencies"]["lint"]),
            re.MULTILINE,
        )
    )
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.findall(r"repo: \S+/(\w+)(?:-pre-commit)?\n +rev: v?(\S+)", hooks)
    assert dict(found) == pinned and pinned.keys() == {"ruff", "nbstripout"}


def test_the_import_brings_jax_and_optax_alone():
    code = "import optax, sys; before = {*sys.modules}; import galore_jax; "
    code += "print(*({*sys.modules} - before))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tops = {name.split(".")[0] for name in ended.stdout.split()}
    assert "galore_jax" in tops
    new = tops - {"galore_jax", "jax", "jaxlib", "optax", *sys.stdlib_module_names}
    assert not new, f"import galore_jax imports {sorted(new)} too"
