"""The tables in README.md and docs/ are those of the JSON."""

import json

import pytest

from benchmarks import rows, tables


def filled(name):
    return f"# A page\n\n<!-- table: {name} -->\n{tables.markdown(name)}<!-- end of table -->\n\n"


def test_the_pages_agree_with_the_json(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", rows.TABLES)
def test_every_table_has_a_json_and_as_many_cells_in_each_row(name):
    lines = tables.markdown(name).splitlines()
    assert len(lines) > 2
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert tables.rewritten(filled(name)) == (filled(name), [])


def test_a_table_is_written_and_then_agrees(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(filled("tiers").replace("1.63", "0.63") + "text\n" + filled("state"))
    assert tables.main(["--check", str(page)]) == 1
    assert capsys.readouterr().out == f"{page}: table 'tiers' is not that of its JSON\n"
    assert tables.main([str(page)]) == 0
    assert page.read_text() == filled("tiers") + "text\n" + filled("state")
    assert tables.main(["--check", str(page)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- table: nothing -->\n<!-- end of table -->\n",
            "table 'nothing' is unknown",
        ),
        ("<!-- table: tiers -->\n| | |\n", "table 'tiers' has no end"),
        ("<!-- table: tiers -->\n" + filled("state"), "table 'tiers' has no end"),
        (
            "<!-- table: tiers -->\n <!--end of table--> \n<!-- end of table -->",
            "an end of no table",
        ),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_wrong_marks_are_told_and_nothing_is_written(tmp_path, capsys, text, message, flags):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert tables.main([*flags, str(page)]) == 1
    assert message in capsys.readouterr().out
    assert page.read_text() == text


def without(found, *keys):
    """A JSON with keys taken out wherever they are."""
    if isinstance(found, dict):
        return {k: without(v, *keys) for k, v in found.items() if k not in keys}
    return [without(x, *keys) for x in found] if isinstance(found, list) else found


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("checkpoint", "peak_mb"),
        ("glance", "over_adamw"),
        ("gpu", "plain_seconds"),
        ("memory", "tier 2"),
        ("muon", "over_adamw"),
        ("precision", "relative_to_float32"),
        ("quality", "way_from_adamw_to_muon"),
        ("recipes", "16gb, 1x2048"),
        ("state", "galore"),
    ],
)
def test_what_is_not_there_was_not_measured(tmp_path, name, key):
    files, _ = rows.TABLES[name]
    for file in files:
        found = json.loads((tables.RESULTS / f"{file}.json").read_text())
        found = without(found, key) | ({key: {}} if key in found else {})
        (tmp_path / f"{file}.json").write_text(json.dumps(found))
    was, now = tables.markdown(name), tables.markdown(name, tmp_path)
    assert now.count(rows.NOT_MEASURED) > was.count(rows.NOT_MEASURED)


def test_rows_are_sorted_and_one_that_diverged_is_last():
    row = {"losses": [2.0], "perplexity": 7.4, "state_of_kernels": 1e6}
    methods = {"AdamW": row | {"loss": 2.0}, "new": row | {"loss": 1.0}}
    methods["Fira"] = row | {"loss": float("inf"), "perplexity": float("inf")}
    shown = list(rows.quality({"methods": methods, "verdicts": {}}))
    assert [line[0] for line in shown[1:]] == ["new", "`optax.adamw`", "`fira`, T = 50"]
    assert shown[-1][1] == "diverged"
