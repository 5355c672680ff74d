"""The committed experiments on GSM-Symbolic: every figure of their tables follows from the committed records."""

import json
from pathlib import Path

import pytest

from trl_cmdp.cli import main
from trl_cmdp.evaluation import read_rollout_records, summarize


RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("gsm_symbolic*"))
NAMES = ("constrained", "grpo", "gkd", "lambda", "student", "teacher")
SPLITS = ("validation", "test")


pytestmark = [
    pytest.mark.parametrize("split", SPLITS),
    pytest.mark.parametrize("results", RESULTS, ids=lambda folder: folder.name),
]


def records(results: Path, name: str, split: str) -> Path:
    return results / "records" / f"{name}-{split}.jsonl"


def test_tables_follow_from_the_records(results, split, tmp_path, capsys):
    files = [str(records(results, name, split)) for name in NAMES]
    assert main(["evaluate", "--records", *files, "--judge", "process", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == (results / split / "table.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_records_are_whole_and_summarised(results, name, split):
    settings, rollouts = read_rollout_records(records(results, name, split))
    assert (settings.name, settings.split) == (name, split)
    assert settings.git_commit is not None
    summary = summarize(settings, rollouts)
    assert summary.num_missing == 0
    committed = json.loads((results / split / "summary.json").read_text())["evaluations"][NAMES.index(name)]
    for figure in ("right", "length"):
        assert vars(getattr(summary.sampled, figure)) == pytest.approx(committed["sampled"][figure])
    for figure in ("satisfaction", "mean", "divergence"):
        assert vars(getattr(summary.sampled.costs, figure)) == pytest.approx(committed["sampled"]["costs"][figure])
