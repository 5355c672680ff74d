"""
Fill the tables of docs/comparison.md from what is committed.

    python benchmarks/claims.py && python benchmarks/comparison_page.py

The page holds `<!-- table: NAME -->` before each of them: a comparison under results/, written from its summary.json, or
`claims-1` to `claims-3`, the tables of results/claims.md. The text between them is written by hand, and quotes both.
"""

import json
import re
from pathlib import Path

from claims import RESULTS, number_of_seeds

from trl_cmdp._files import write_whole
from trl_cmdp.evaluation.comparison import Estimate
from trl_cmdp.reports.tables import markdown_table


PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n\n)(?:\|.*\n)*\n*")
COLUMNS = (
    *("method", "correct", "all steps valid", "satisfaction", "mean cost", "difference in correct"),
    *("steps to 0.95", "violations in the last quarter"),
)
TRAINING = ("right_difference", "steps_to_satisfaction", "late_violations")
LABELS = {
    "constant-limit": "constrained, constant limit",
    "unrewarded-0": "constrained, constant limit, no third place",
    "constrained-coef-1": "constrained, constant limit, no third place, `violation_distill_coef=1`",
    "dual": "dual λ",
    "pid": "PID λ",
    "gkd": "GKD",
    "minillm": "MiniLLM",
    "grpo": "GRPO",
    "student": "untrained student",
}


def filled(page: str) -> str:
    """The page with each table as the results have it."""
    return TABLE.sub(lambda found: f"{found[1]}{table(found[2])}\n", page)


def table(name: str) -> str:
    """A table by its name in the page."""
    if name.startswith("claims-"):
        return (RESULTS / "claims.md").read_text().strip().split("\n\n")[int(name[-1]) - 1] + "\n"
    return summary_table(json.loads((RESULTS / name / "summary.json").read_text())["methods"])


def summary_table(rows: list[dict]) -> str:
    """The methods of a comparison, by rank. One that was run on fewer seeds than another says on how many."""
    most = max(len(row["right"]["by_seed"]) for row in rows)
    lines = []
    for row in rows:
        num_seeds = len(row["right"]["by_seed"])
        label = LABELS.get(row["method"], row["method"].replace("lagrangian-", "λ = "))
        if row["trainer"] != "none" and not row["right_difference"]:  # the others' differences are to this one
            label = f"**{label}**"
        if num_seeds < most:
            label += f" ({number_of_seeds(num_seeds)})"
        figures = [f"{row[name]['value']:.3f}" for name in ("right", "valid", "satisfaction", "cost")]
        training = ["", "", ""]  # of a student or a teacher that was not trained
        if row["trainer"] != "none":
            difference, steps, late = (row[name] for name in TRAINING)
            training = [
                Estimate(**difference).text("+.3f") if difference else "–",
                f"{steps:.0f}" if steps is not None else "–",
                f"{late:.3f}" if late is not None else "–",
            ]
        lines.append((label, *figures, *training))
    return markdown_table(COLUMNS, lines)


if __name__ == "__main__":
    write_whole(PAGE, filled(PAGE.read_text()))
