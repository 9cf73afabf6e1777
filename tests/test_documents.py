"""What the pages say of the package as a whole."""

import re

import galore_jax
from tests.documents import ROOT


def test_the_api_has_all_that_is_public():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\.\. auto\w+:: galore_jax\.(\w+)$", text, re.M)
    assert sorted(shown) == sorted(galore_jax.__all__)


def test_every_guide_is_on_the_site_and_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs/guides").glob("*.md"):
        assert f"guides/{path.stem}\n" in index
        assert f"docs/guides/{path.name}" in readme
