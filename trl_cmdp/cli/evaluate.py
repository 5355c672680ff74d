"""`trl-cmdp evaluate`: roll a student out on a task, and tell how right and how far from its teacher it is."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ._arguments import positive_float
from ._evaluation import COST_LIMIT, COST_SCOPE, add_rollout_arguments, output_folder, read_evaluation, roll_out
from ._judge import add_judge_arguments, check_judge_arguments, judge_evaluations, win_rate_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..evaluation import EvaluationSettings, RolloutRecord

RECORDS_FILE = "records.jsonl"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a student against its teacher on a task, or compare evaluations",
        description="Roll a student out on the problems of a task, and write records.jsonl, summary.json and table.md: "
        "right final answers, satisfaction of the limit, costs, divergence and length, each with its interval. The "
        "same command goes on where it stopped. With --records, compute everything again from records, without a "
        "model, and the differences to the first of them.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--student", metavar="PATH_OR_ID", help="model, or folder of a LoRA adapter")
    what.add_argument("--records", nargs="+", type=Path, metavar="FILE", help="records of finished evaluations")
    parser.add_argument(
        "--output_dir", type=Path, help="where files are written (default: outputs/evaluate-TASK-NAME)"
    )
    parser.add_argument("--cost_limit", type=positive_float, help=f"limit (default: {COST_LIMIT}, or the records')")
    parser.add_argument(
        "--cost_scope",
        choices=["mean", "sum", "worst_prefix"],
        help=f"cost of a rollout (default: {COST_SCOPE}, or the records')",
    )

    rollouts = add_rollout_arguments(parser)
    rollouts.add_argument("--greedy", action="store_true", help="a greedy rollout of each problem too")
    add_judge_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns 0, 2 for a mistake in what was asked for, 130 if stopped."""
    try:
        check_judge_arguments(arguments)
        if arguments.records:
            output_dir, evaluations = arguments.output_dir, [read_evaluation(path) for path in arguments.records]
        else:
            output_dir = output_folder("evaluate", arguments)
            evaluations = [roll_out(arguments, output_dir / RECORDS_FILE)]
        _report(evaluations, arguments, output_dir)
    except (ValueError, OSError, ImportError) as error:
        print(f"trl-cmdp evaluate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. What is recorded stays: the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def _report(
    evaluations: "Sequence[tuple[EvaluationSettings, list[RolloutRecord]]]",
    arguments: argparse.Namespace,
    output_dir: Path | None,
) -> None:
    """Print the tables, and write them where there is a folder."""
    from ..evaluation import compare_evaluations, summarize
    from ..reports.evaluation_table import difference_table, evaluation_table, strata_table

    asked = {"cost_limit": arguments.cost_limit, "cost_scope": arguments.cost_scope}
    summaries = [summarize(*evaluation, **asked) for evaluation in evaluations]
    if len({(summary.cost_limit, summary.cost_scope) for summary in summaries}) > 1:
        raise ValueError("The records have more than one limit or scope: give --cost_limit and --cost_scope.")
    differences = [
        compare_evaluations(evaluation, evaluations[0], greedy=greedy, **asked)
        for greedy in (False, True)
        for evaluation, summary in zip(evaluations[1:], summaries[1:], strict=True)
        # Both have rollouts of the kind.
        if None not in ((one.greedy if greedy else one.sampled) for one in (summaries[0], summary))
    ]
    win_rates = judge_evaluations(evaluations, arguments, output_dir) if arguments.judge else []
    parts = [evaluation_table(summaries), strata_table(summaries), difference_table(differences)]
    parts.append(win_rate_table(win_rates))
    table = "\n".join(part for part in parts if part)
    print(f"\n{table}")
    if output_dir is None:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    summary = {"evaluations": list(map(asdict, summaries)), "differences": list(map(asdict, differences))}
    if win_rates:
        summary["win_rates"] = win_rates
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    (output_dir / "table.md").write_text(table, encoding="utf-8")
    print(f"summary.json and table.md are in {output_dir}/.")
