"""The committed comparisons: tables and summaries are what the committed records say, and the records are whole."""

import json
from pathlib import Path

import pytest

from trl_cmdp.cli._experiment import load_experiment
from trl_cmdp.cli.compare import in_order
from trl_cmdp.evaluation import compare_methods, read_records
from trl_cmdp.reports import comparison_table


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted(path.parent for path in BENCHMARKS.glob("results/*/records.jsonl"))


def experiment_of(folder):
    path = BENCHMARKS / "experiments" / f"{folder.name}.yaml"
    return load_experiment(str(path) if path.exists() else folder.name)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_table_follows_from_the_records(folder):
    records = read_records((folder / "records.jsonl").read_text())
    comparison = compare_methods(in_order(records, experiment_of(folder)))
    assert comparison_table(comparison) == (folder / "table.md").read_text()
    rows = {row["method"]: row for row in json.loads((folder / "summary.json").read_text())["methods"]}
    assert {row.method: row.right.value for row in comparison.methods} == {
        name: row["right"]["value"] for name, row in rows.items()
    }


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_every_record_is_of_its_experiment(folder):
    """
    The settings of each cell are those of the committed experiment, and its commit is named. Models and data that are
    built by a script are not at hand: what a record says of their content is taken as it is.
    """
    cells = {(cell.method, cell.seed): cell.settings for cell in experiment_of(folder).cells()}
    records = read_records((folder / "records.jsonl").read_text())
    for record in records:
        settings = {key: value for key, value in record.settings.items() if not key.endswith("_fingerprint")}
        assert settings == cells[record.method, record.seed]
        assert record.git_commit is not None


def test_the_preset_is_complete():
    """Every method and seed of the arithmetic preset is there, those of a method from one clean commit."""
    records = read_records((BENCHMARKS / "results" / "arithmetic" / "records.jsonl").read_text())
    cells = load_experiment("arithmetic").cells()
    assert {(record.method, record.seed) for record in records} == {(cell.method, cell.seed) for cell in cells}
    trained = {(record.method, record.git_commit) for record in records}
    assert len(trained) == len({method for method, _ in trained})
    assert not any(record.git_dirty for record in records)


def test_readme_quotes_the_preset():
    """Each row of the README's comparison is a row of the committed table."""

    def rows(text, columns):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "[" in line]
        return {tuple(row[column] for column in columns) for row in cells if len(row) > max(columns)}

    readme = (BENCHMARKS.parent / "README.md").read_text()
    section = readme.split("## What it is compared with")[1].split("##")[0]
    quoted = rows(section, range(1, 5))
    assert len(quoted) == 10
    assert quoted <= rows((BENCHMARKS / "results" / "arithmetic" / "table.md").read_text(), range(3, 7))
