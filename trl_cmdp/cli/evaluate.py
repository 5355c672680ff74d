"""`trl-cmdp evaluate`: roll a student out on a task: how often is it correct, and how far is it from its teacher?"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .._defaults import COST_LIMIT
from .._files import write_whole
from .._messages import message, say
from ._arguments import mistakes, positive_float
from ._evaluation import add_evaluation_arguments, output_folder, read_evaluation, roll_out
from ._judge import add_judge_arguments, check_judge_arguments, judge_evaluations
from ._results import add_json_option
from ._student_run import with_run_settings


if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..evaluation.summary import Evaluation

RECORDS_FILE = "records.jsonl"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a student against its teacher on a task, or compare evaluations",
        description="Roll a student out on the problems of a task, and write records.jsonl, summary.json and table.md: "
        "correct final answers, satisfaction of the limit, costs, divergence and length, each with its interval. The "
        "same command resumes a stopped evaluation. With --records, compute everything again from records, without a "
        "model, and the differences to the first of them.",
    )
    rollouts = add_evaluation_arguments(parser, "records of finished evaluations")
    parser.add_argument("--cost_limit", type=positive_float, help=f"limit (default: {COST_LIMIT}, or the records')")
    rollouts.add_argument("--greedy", action="store_true", help="a greedy rollout of each problem too")
    add_judge_arguments(parser)
    add_json_option(parser)
    parser.set_defaults(run=run, resumes=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    with mistakes():
        check_judge_arguments(arguments)
    if arguments.records:
        output_dir, evaluations = arguments.output_dir, [read_evaluation(path) for path in arguments.records]
    else:
        arguments = with_run_settings(arguments)
        output_dir = output_folder("evaluate", arguments)
        evaluations = [roll_out(arguments, output_dir / RECORDS_FILE)]
    with mistakes():
        _report(evaluations, arguments, output_dir)
    return 0


def _report(evaluations: "Sequence[Evaluation]", arguments: argparse.Namespace, output_dir: Path | None) -> None:
    """Print the tables, and write them where there is a folder."""
    from ..evaluation import compare_evaluations, summarize
    from ..reports.tables import difference_table, evaluation_table, strata_table, win_rate_table

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
    table = message("\n".join(part for part in parts if part))
    summary = {"evaluations": list(map(asdict, summaries)), "differences": list(map(asdict, differences))}
    if win_rates:
        summary["win_rates"] = win_rates
    arguments.show(f"\n{table}", summary)
    if output_dir is None:
        return
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "summary.json", text)
    write_whole(output_dir / "table.md", table)
    say(f"summary.json and table.md are in {output_dir}/.")
