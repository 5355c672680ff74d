"""
The picture at the top of the README: what GRPO and the constrained student write to the same problems, each token
shaded by its divergence from the teacher.

    python benchmarks/shaded_rollouts.py            # draws docs/images/rollouts-*.svg from the committed records
    python benchmarks/shaded_rollouts.py --train    # makes the records anew: two runs of `trl-cmdp demo`, in minutes

The problems are the first of the test split, the rollouts the first sample of each: none was chosen.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp._files import write_whole
from trl_cmdp.core.fingerprint import fingerprint_of_weights
from trl_cmdp.evaluation import EvaluationSettings, evaluate, read_rollout_records
from trl_cmdp.reports.rollout_picture import plot_rollouts
from trl_cmdp.tasks import arithmetic


ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "shaded_rollouts"
IMAGES = ROOT / "docs" / "images"
METHODS = {"grpo": "GRPO, reward alone", "constrained": "constrained, limit 0.25"}
SEED, COST_LIMIT = 0, 0.25
NUM_PROBLEMS, NUM_SHOWN = 200, 5


def record(method, runs):
    """Train a student with the demo, unless it is there, and record its answers to held-out problems."""
    folder = runs / f"{method}-seed-{SEED}"  # where benchmarks/demo.py has it too
    if not (folder / "student" / "model.safetensors").exists():
        options = [
            "--method",
            method,
            "--seed",
            str(SEED),
            "--cost-limit",
            str(COST_LIMIT),
            "--output-dir",
            str(folder),
        ]
        subprocess.run([sys.executable, "-m", "trl_cmdp", "demo", *options], check=True)
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    teacher = AutoModelForCausalLM.from_pretrained(arithmetic.demo_model_path("teacher"))
    settings = EvaluationSettings(
        name=METHODS[method],
        student=f"trl-cmdp demo --method {method} --seed {SEED}",
        student_fingerprint=fingerprint_of_weights(student.named_parameters()),
        teacher="teacher of trl_cmdp.tasks.arithmetic",
        teacher_fingerprint=fingerprint_of_weights(teacher.named_parameters()),
        task="arithmetic",
        num_problems=NUM_PROBLEMS,
        seed=SEED,
        max_new_tokens=arithmetic.MAX_COMPLETION_LENGTH,
        batch_size=NUM_PROBLEMS,
        cost_limit=COST_LIMIT,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    problems = arithmetic.load_problems(NUM_PROBLEMS, "test", SEED)
    reward = arithmetic.final_answer_reward
    records = evaluate(student, tokenizer, problems, reward, settings=settings, teacher=teacher)
    lines = [settings.to_json(), *(record.to_json() for record in records)]
    write_whole(RECORDS / f"{method}.jsonl", "".join(f"{line}\n" for line in lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="make the records anew")
    parser.add_argument("--runs", type=Path, default=Path("outputs/benchmark-demo"), help="folder of the two runs")
    arguments = parser.parse_args()
    if arguments.train:
        for method in METHODS:
            record(method, arguments.runs)
    evaluations = [read_rollout_records(RECORDS / f"{method}.jsonl") for method in METHODS]
    for theme in ("light", "dark"):
        path = IMAGES / f"rollouts-{theme}.svg"
        plot_rollouts(evaluations, path, problems=range(NUM_SHOWN), width=38, dark=theme == "dark")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
