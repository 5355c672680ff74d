"""`trl-cmdp calibrate`: what a student's rollouts cost, what imitation alone reaches, and the limits between."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import positive_float
from ._evaluation import (
    COST_SCOPE,
    add_rollout_arguments,
    output_folder,
    read_evaluation,
    replace_arguments,
    roll_out,
)
from ._imitation import add_imitation_arguments, check_imitation_arguments, imitate


if TYPE_CHECKING:
    from ..evaluation import Calibration, EvaluationSettings, RolloutRecord

START_RECORDS, IMITATION_RECORDS, IMITATION = "start.jsonl", "imitation.jsonl", "imitation"
JSON_FILE, PLOT_FILE = "calibration.json", "calibration.png"
_INERT = 0.95  # share of rollouts that satisfies a limit now, from which on it bounds next to nothing


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "calibrate",
        help="what a student's rollouts cost before training, to choose cost_limit by",
        description="Roll a student out on the problems of a task, before training and, with --imitation_steps, after "
        "a short run of imitation alone, and write calibration.json and calibration.png: costs in each scope, the share "
        "of rollouts within each of a few limits, and an estimate of the range of useful limits. The same command goes "
        "on where it stopped. With --records, compute everything again without a model.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--student", metavar="PATH_OR_ID", help="model, or folder of a LoRA adapter")
    what.add_argument(
        "--records", nargs="+", type=Path, metavar="FILE", help="records of the student, and of it after imitation"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="where files are written (default: outputs/calibrate-TASK-NAME)"
    )
    parser.add_argument(
        "--cost_scope",
        choices=["mean", "sum", "worst_prefix"],
        help=f"cost of a rollout (default: {COST_SCOPE}, or the records')",
    )
    parser.add_argument(
        "--limits", nargs="+", type=positive_float, metavar="LIMIT", help="limits to look at (default: 7 by the costs)"
    )
    add_imitation_arguments(parser)
    add_rollout_arguments(parser)
    # Of `evaluate`: a limit is on samples, and none is chosen yet.
    parser.set_defaults(run=run, greedy=False, cost_limit=None)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns 0, 2 for a mistake in what was asked for, 130 if stopped."""
    try:
        if arguments.records:
            if len(arguments.records) > 2:
                raise ValueError("--records takes two files: the student, and the student after imitation.")
            evaluations = [read_evaluation(path) for path in arguments.records]
            _report(evaluations, None, arguments, arguments.output_dir)
        else:
            _measure_and_report(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"trl-cmdp calibrate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. What is recorded stays: the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def _measure_and_report(arguments: argparse.Namespace) -> None:
    if not (arguments.teacher or arguments.teacher_adapter_name or arguments.teacher_model_server_url):
        raise ValueError(
            "--teacher (or --teacher_adapter_name, --teacher_model_server_url) is needed: costs are of it."
        )
    if arguments.num_samples < 1:
        raise ValueError(f"--num_samples must be at least 1, got {arguments.num_samples}.")
    check_imitation_arguments(arguments)
    arguments = replace_arguments(arguments, cost_scope=arguments.cost_scope or COST_SCOPE)
    output_dir = output_folder("calibrate", arguments)
    evaluations = [roll_out(arguments, output_dir / START_RECORDS)]
    imitation = None
    if arguments.imitation_steps:
        folder = output_dir / IMITATION
        imitation = imitate(arguments, folder)
        name = f"{evaluations[0][0].name} after imitation"
        trained = replace_arguments(arguments, student=str(folder), name=name)
        evaluations.append(roll_out(trained, output_dir / IMITATION_RECORDS))
    _report(evaluations, imitation, arguments, output_dir)


def _report(
    evaluations: "Sequence[tuple[EvaluationSettings, list[RolloutRecord]]]",
    imitation: dict[str, Any] | None,
    arguments: argparse.Namespace,
    output_dir: Path | None,
) -> None:
    """Print what there is to choose a limit by, and write it where there is a folder."""
    from ..evaluation import calibrate_limit
    from ..evaluation.provenance import git_state, library_versions

    calibration = calibrate_limit(*evaluations, cost_scope=arguments.cost_scope, limits=arguments.limits)
    suggestion = suggestion_text(calibration)
    parts = [_costs_text(calibration), _satisfaction_text(calibration)]
    if imitation is not None:
        parts.append(_imitation_text(imitation))
    print("\n" + "\n\n".join([*parts, suggestion]))
    if output_dir is None:
        return
    from ..reports.calibration_plot import plot_calibration

    output_dir.mkdir(parents=True, exist_ok=True)
    content = {
        **asdict(calibration),
        "suggestion_text": suggestion,
        "imitation_run": imitation,
        "versions": library_versions(),
        "git_commit": git_state()[0],
    }
    (output_dir / JSON_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    plot_calibration(calibration, evaluations, output_dir / PLOT_FILE)
    print(f"\n{JSON_FILE} and {PLOT_FILE} are in {output_dir}/.")


def suggestion_text(calibration: "Calibration") -> str:
    """
    The suggested range, or why there is none, in words.

    Args:
        calibration ([`~evaluation.Calibration`]):
            The calibration.

    Returns:
        `str`: A paragraph.
    """
    found, scope = calibration.suggestion, calibration.cost_scope
    start = f"{found.start:.3g} ({_UNITS[scope]}; the median of {calibration.start.num_rollouts} rollouts)"
    if found.verdict == "inert":
        upper = calibration.start.quantiles[scope]["0.95"]
        return (
            f"No suggestion: the student hardly differs from its teacher, 95% of its rollouts cost at most {upper:.3g}. "
            "It satisfies any limit of use already, so a limit would be inert and training would be GRPO."
        )
    if calibration.imitation is None or found.reached is None:
        return (
            f"Estimate: the student starts at {start}; a useful cost_limit lies below that. How far below is not known: "
            "imitation was not measured (--imitation_steps 50)."
        )
    reached = f"{found.reached:.3g} (95% of {calibration.imitation.num_rollouts} rollouts cost no more)"
    if found.verdict == "not_below":
        return (
            f"No suggestion: imitation reaches {reached}, which is not below where the student starts, {start}. Imitate "
            "for longer or at a higher learning rate, unless the student is as near to its teacher as imitation gets: "
            "then a limit has nothing to lead away from."
        )
    return (
        f"Estimate: a useful cost_limit for cost_scope={scope} lies between {found.reached:.2g} and {found.start:.2g}. "
        f"Imitation reaches {reached}; the student starts at {start}. The lower end is what this much imitation reached "
        "on these problems: more may reach less."
    )


_UNITS = {"mean": "nats per token", "sum": "nats per rollout", "worst_prefix": "nats per token of the worst prefix"}


def _students(calibration: "Calibration") -> list[tuple[str, Any]]:
    students = [("now", calibration.start), ("after imitation", calibration.imitation)]
    return [(name, distribution) for name, distribution in students if distribution is not None]


def _costs_text(calibration: "Calibration") -> str:
    from ..evaluation.calibration import LEVELS

    settings = calibration.start.settings
    rows = [
        [scope, name, *(f"{cost:.3g}" for cost in distribution.quantiles[scope].values())]
        for scope in calibration.start.quantiles
        for name, distribution in _students(calibration)
    ]
    return (
        f"Costs of {calibration.start.num_rollouts} rollouts of {settings.name} on {settings.num_problems} problems of "
        f"{settings.task} ({settings.split}), temperature {settings.temperature:g}, in nats: quantiles.\n\n"
        + _table(["cost_scope", "student", *(f"{level:.0%}" for level in LEVELS)], rows)
    )


def _satisfaction_text(calibration: "Calibration") -> str:
    rows = []
    for place, limit in enumerate(calibration.limits):
        shares = [distribution.satisfaction[place] for _, distribution in _students(calibration)]
        cells = [f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]" for share in shares]
        rows.append([f"{limit:g}" + " (inert)" * (shares[0].value >= _INERT), *cells])
    columns = [f"within it {name}, %" for name, _ in _students(calibration)]
    scope = calibration.cost_scope
    return (
        f"Rollouts within a limit, cost_scope={scope} ({_UNITS[scope]}), 95% intervals clustered by problem. Inert: at "
        f"least {_INERT:.0%} are within it before any training.\n\n" + _table(["cost_limit", *columns], rows)
    )


def _imitation_text(run: dict[str, Any]) -> str:
    settings, costs = run["settings"], run["mean_costs"]
    quarter = max(1, len(costs) // 4)
    last, before = costs[-quarter:], costs[-2 * quarter : -quarter] or costs[-quarter:]
    return (
        f"Imitation: {settings['steps']} steps of {settings['batch_size']} rollouts at learning rate "
        f"{settings['learning_rate']:g}, {settings['num_problems']} problems ({settings['split']}). Mean cost of its "
        f"rollouts: {costs[0]:.3g} at the first step, {sum(before) / len(before):.3g} over the third quarter, "
        f"{sum(last) / len(last):.3g} over the last."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown that is aligned as text too."""
    widths = [max(len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    lines = [columns, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )
