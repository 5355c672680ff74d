"""
How often the process judge rejects what is right and accepts what is wrong.

    python benchmarks/process_judge.py

Worked solutions of GSM-Symbolic from reasoning-gym, as they are and corrupted: one result changed by 1 to 10, one operand
replaced by a number that the problem does not hold, one line with an equation deleted. Corrupted are only solutions that
were accepted as they are. Intervals are clustered by template. A minute of one core.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import reasoning_gym

from trl_cmdp.evaluation import Rate
from trl_cmdp.evaluation.judges import process_verdict


NUMBER = r"(?<![\d.,/])\d+(?![\d%/]|[.,]\d)"  # a whole integer
SUFFIX = " Give the result as your final answer. Do not include units."


def changed(pattern: str, solution: str, rng: random.Random, new: Callable[[int], int]) -> str | None:
    """The solution with one match of the pattern's group replaced."""
    steps = solution.split("####")[0]
    matches = list(re.finditer(pattern, steps))
    if not matches:
        return None
    match = rng.choice(matches)
    return solution[: match.start(1)] + str(new(int(match[1]))) + solution[match.end(1) :]


def corruptions(problem: str, solution: str, rng: random.Random) -> dict[str, str | None]:
    taken = set(map(int, re.findall(r"\d+", problem + solution)))
    lines = solution.splitlines()
    cut = rng.choice([i for i, line in enumerate(lines) if re.search(r"=.*\d", line)])
    return {
        "result": changed(
            rf"=\s*[$€£]?({NUMBER})(?!\s*[-+*/×x(])",
            solution,
            rng,
            lambda n: n + rng.choice([-1, 1]) * rng.randint(1, 10),
        ),
        "operand": changed(
            rf"({NUMBER})(?=\s*[-+*×x])",
            solution,
            rng,
            lambda n: rng.choice([k for k in range(2, 200) if k not in taken]),
        ),
        "deleted": "\n".join(lines[:cut] + lines[cut + 1 :]),
    }


def rate(templates: dict[int, list[bool]]) -> dict[str, Any]:
    of_all = Rate.of_clusters(templates.values())
    return {"k": of_all.k, "n": of_all.n, "rate": of_all.value, "interval": list(of_all.interval)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "process_judge.json")
    options = parser.parse_args()
    problems = reasoning_gym.create_dataset("gsm_symbolic", size=options.size, seed=options.seed)
    rng = random.Random(options.seed)
    accepted = defaultdict(lambda: defaultdict(list))  # kind: template: verdicts
    for i, problem in enumerate(problems):
        question, solution = problem["question"].removesuffix(SUFFIX), problem["metadata"]["answer_cot"]
        template = problems.task_indices[i]
        valid = process_verdict(question, solution).valid
        accepted["gold"][template].append(valid)
        if not valid:
            continue
        for kind, corrupted in corruptions(question, solution, rng).items():
            if corrupted is not None:
                accepted[kind][template].append(process_verdict(question, corrupted).valid)
    result = {
        "size": options.size,
        "seed": options.seed,
        "reasoning_gym": version("reasoning-gym"),
        "accepted": {kind: rate(templates) for kind, templates in accepted.items()},
        "gold_by_template": {str(t): [sum(v), len(v)] for t, v in sorted(accepted["gold"].items())},
    }
    for kind, row in result["accepted"].items():
        print(
            "{}: accepted {}/{} = {:.4f} [{:.4f}, {:.4f}]".format(
                kind, row["k"], row["n"], row["rate"], *row["interval"]
            )
        )
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
