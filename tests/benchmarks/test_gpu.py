"""benchmarks/gpu.py, at sizes that a CPU computes in seconds, through the code that a card runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from gpu_divergence import FORMS, TINY_CASES, methods_of


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command, and returns its record."""

    def command(*arguments: str) -> dict:
        output = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--output", str(output)])
        gpu.main()
        return json.loads(output.read_text())

    yield command
    logging.set_verbosity_warning()


def test_every_method_agrees_with_float64(run, capsys):
    record = run("--tiny", "--only", "divergence")
    assert "step" not in record
    rows = record["divergence"]["rows"]
    assert [(row["dtype"], row["form"], row["method"]) for row in rows] == [
        (str(case.dtype), form, method) for case in TINY_CASES for form in FORMS for method in methods_of(form)
    ]
    assert {"ours, torch", "trl", "dense"} <= {row["method"] for row in rows}
    tolerances = {str(torch.float32): 1e-5, str(torch.bfloat16): 2e-2}
    for row in rows:
        assert max(row["errors"].values()) < tolerances[row["dtype"]]
        assert row["ms"] > 0
    assert "head's gradient" in capsys.readouterr().out


def test_step_of_each_kind_is_timed(run):
    record = run("--tiny", "--only", "step")
    assert "divergence" not in record
    step = record["step"]
    for name in ("violating", "feasible"):
        parts = step["trainings"][name]["parts"]
        assert min(parts[part] for part in ("student", "teacher", "divergence", "backward")) > 0
        bound = step["trainings"]["grpo"]["seconds"] + sum(step["forwards"].values())
        assert step["ratio"][name] == pytest.approx(step["trainings"][name]["seconds"] / bound)
    assert step["trainings"]["grpo"]["parts"]["teacher"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_full_size_is_refused_on_a_cpu(run):
    with pytest.raises(SystemExit, match="--tiny"):
        run()
