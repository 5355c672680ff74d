"""The committed experiments on GSM-Symbolic: every figure of their tables follows from the committed records."""

import json
from pathlib import Path

import pytest

from trl_cmdp.cli import main
from trl_cmdp.evaluation import read_rollout_records, summarize


RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("gsm_symbolic*"))
SPLITS = ("validation", "test")
# Every model of the committed summaries, in the order of their tables.
EVALUATIONS = [
    pytest.param(results, split, committed, id=f"{results.name}-{split}-{committed['settings']['name']}")
    for results in RESULTS
    for split in SPLITS
    for committed in json.loads((results / split / "summary.json").read_text())["evaluations"]
]


def records(results: Path, name: str, split: str) -> Path:
    return results / "records" / f"{name}-{split}.jsonl"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("results", RESULTS, ids=lambda folder: folder.name)
def test_tables_follow_from_the_records(results, split, tmp_path, capsys):
    summary = json.loads((results / split / "summary.json").read_text())
    names = [each["settings"]["name"] for each in summary["evaluations"]]
    assert sorted(records(results, name, split).name for name in names) == sorted(
        path.name for path in (results / "records").glob(f"*-{split}.jsonl")
    )
    files = [str(records(results, name, split)) for name in names]
    assert main(["evaluate", "--records", *files, "--judge", "process", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == (results / split / "table.md").read_text()


@pytest.mark.parametrize(("results", "split", "committed"), EVALUATIONS)
def test_records_are_whole_and_summarised(results, split, committed):
    name = committed["settings"]["name"]
    settings, rollouts = read_rollout_records(records(results, name, split))
    assert (settings.name, settings.split) == (name, split)
    assert settings.git_commit is not None
    summary = summarize(settings, rollouts)
    assert summary.num_missing == 0
    for figure in ("right", "length"):
        assert vars(getattr(summary.sampled, figure)) == pytest.approx(committed["sampled"][figure])
    for figure in ("satisfaction", "mean", "divergence"):
        assert vars(getattr(summary.sampled.costs, figure)) == pytest.approx(committed["sampled"]["costs"][figure])
