"""`trl-cmdp demo`: its files, its options, and its errors."""

import json

import pytest
from transformers import AutoModelForCausalLM

from trl_cmdp.cli import demo, main
from trl_cmdp.evaluation.summary import summarize
from trl_cmdp.reports import read_runs
from trl_cmdp.reports.runs import EvaluationRun


RATES = ("final_answer_correctness", "valid_steps_rate", "satisfaction_rate")


@pytest.mark.parametrize("method", ["constrained", "grpo"])
def test_quick_run_writes_metrics_curves_rollouts_a_report_and_a_loadable_student(
    tmp_path, monkeypatch, capsys, method
):
    monkeypatch.setattr(demo, "QUICK_STEPS", 2)
    monkeypatch.setattr(demo, "QUICK_HELD_OUT", 30)
    arguments = ["--quick", "--seed", "5", "--cost-limit", "0.25", "--method", method, "--output-dir", str(tmp_path)]
    assert main(["demo", *arguments]) == 0

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == {"before", "after", "teacher", "config"}
    for row in (metrics["before"], metrics["after"], metrics["teacher"]):
        assert row["n"] == 30
        assert row["cost_limit"] == 0.25
        assert all(0 <= row[rate] <= 1 for rate in RATES)
        low, high = row["satisfaction_interval"]
        assert low <= row["satisfaction_rate"] <= high
        assert row["mean_divergence"] >= 0
        assert set(RATES) <= set(row["greedy"])
    assert metrics["teacher"]["mean_divergence"] < 1e-6
    assert metrics["teacher"]["satisfaction_rate"] == 1.0
    assert metrics["before"] != metrics["after"]
    assert metrics["config"]["method"] == method
    assert metrics["config"]["steps"] == 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(tmp_path / "student")

    page = tmp_path / "report" / "report.html"
    output = capsys.readouterr().out
    assert output.endswith(f"{page.as_uri()}#rollouts\n")
    assert max(len(line) for line in output.splitlines() if line.startswith("|")) <= 80
    assert f"{method}: " in page.read_text()
    names = {"student-before": "before", method: "after", "teacher": "teacher"}
    runs = [run for run in read_runs([tmp_path]) if isinstance(run, EvaluationRun)]
    assert {run.name.replace(" ", "-") for run in runs} == names.keys()
    for run in runs:
        row, summary = metrics[names[run.name.replace(" ", "-")]], summarize(run.settings, run.records)
        for of_kind, kind in ((row, summary.sampled), (row["greedy"], summary.greedy)):
            assert kind.right.value == of_kind["final_answer_correctness"]
            assert kind.costs.satisfaction.value == of_kind["satisfaction_rate"]
            assert kind.costs.mean.value == pytest.approx(of_kind["mean_cost"], abs=1e-5)
            assert kind.length.value == pytest.approx(of_kind["mean_length"])


@pytest.mark.parametrize(
    "arguments", [["--cost_limit", "0"], ["--cost_limit", "-1"], ["--steps", "0"], ["--method", "x"]]
)
def test_a_mistake_exits_with_2_and_names_the_argument(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(["demo", *arguments])
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err
