"""`trl-cmdp demo`: its files, its options, and its errors."""

import json

import pytest
from transformers import AutoModelForCausalLM

from trl_cmdp.cli import demo, main


RATES = ("final_answer_correctness", "valid_steps_rate", "satisfaction_rate")


@pytest.mark.parametrize("method", ["constrained", "grpo"])
def test_quick_run_writes_metrics_curves_and_a_loadable_student(tmp_path, monkeypatch, method):
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
    assert main(["report", str(tmp_path), "--output-dir", str(tmp_path / "report")]) == 0
    assert "<html" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    "arguments", [["--cost_limit", "0"], ["--cost_limit", "-1"], ["--steps", "0"], ["--method", "x"]]
)
def test_a_mistake_exits_with_2_and_names_the_argument(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(["demo", *arguments])
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err
