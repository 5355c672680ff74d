"""
What `trl-cmdp report` takes of 10⁵ records of one student, 200 MB: seconds, memory, size of the page.

    python benchmarks/large_report.py [--problems 100000] [--samples 1]
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from trl_cmdp.cli import main
from trl_cmdp.evaluation import EvaluationSettings, RolloutRecord


TOKENS = 45  # of a rollout


def write(path: Path, num_problems: int, num_samples: int) -> None:
    """Records with costs, of four difficulties."""
    generator = random.Random(0)
    settings = EvaluationSettings(
        name="student",
        student="student",
        teacher="teacher",
        task="made up",
        num_problems=num_problems,
        num_samples=num_samples,
        max_new_tokens=2 * TOKENS,
    )
    with path.open("w") as file:
        file.write(settings.to_json() + "\n")
        for problem in range(num_problems):
            prompt = f"Problem {problem}: " + "what is the sum of these numbers? " * 8
            for sample in range(num_samples):
                ids = [generator.randrange(50_000) for _ in range(generator.randrange(TOKENS // 2, 3 * TOKENS // 2))]
                tokens = [f" word{index}" for index in ids]
                record = RolloutRecord(
                    problem=problem,
                    greedy=False,
                    sample=sample,
                    prompt=prompt,
                    answer=str(problem),
                    difficulty=f"{1 + problem % 4} steps",
                    completion="".join(tokens),
                    completion_ids=ids,
                    tokens=tokens,
                    truncated=False,
                    right=generator.random() < 0.5,
                    costs=[round(generator.expovariate(4), 6) for _ in ids],
                )
                file.write(json.dumps(vars(record)) + "\n")


def measure() -> None:
    """Make the records, report them, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder, "records.jsonl")
        write(records, arguments.problems, arguments.samples)
        size, start, cpu = records.stat().st_size, time.monotonic(), time.process_time()
        code = main(["report", str(records), "--output-dir", str(Path(folder, "report"))])
        figures = {
            "exit_code": code,
            "records_mb": round(size / 1e6, 1),
            "seconds": round(time.monotonic() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
            "page_mb": round(Path(folder, "report", "report.html").stat().st_size / 1e6, 2),
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    measure()
