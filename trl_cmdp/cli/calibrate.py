"""`trl-cmdp calibrate`: what a student's rollouts cost, what imitation alone reaches, and the limits between."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._defaults import COST_SCOPE, COST_UNITS, FEASIBLE_SATISFACTION
from .._files import write_whole
from .._messages import say
from ._arguments import Mistake, mistakes, positive_float
from ._evaluation import add_evaluation_arguments, output_folder, read_evaluation, replace_arguments, roll_out
from ._imitation import add_imitation_arguments, check_imitation_arguments, imitate
from ._results import add_json_option
from ._student_run import with_run_settings


if TYPE_CHECKING:
    from ..evaluation import Calibration, CostDistribution
    from ..evaluation.summary import Evaluation

START_RECORDS, IMITATION_RECORDS, IMITATION = "start.jsonl", "imitation.jsonl", "imitation"
JSON_FILE, PLOT_FILE = "calibration.json", "calibration.png"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "calibrate",
        help="what a student's rollouts cost before training, to choose cost_limit",
        description="Roll a student out on the problems of a task, before training and, with --imitation_steps, after "
        "a short run of imitation alone, and write calibration.json and calibration.png: costs in each scope, the share "
        "of rollouts within each of a few limits, and an estimate of the range of useful limits. The same command "
        "resumes a stopped calibration. With --records, compute everything again without a model.",
    )
    add_evaluation_arguments(parser, "records of the student, and of it after imitation")
    parser.add_argument(
        "--limits",
        nargs="+",
        type=positive_float,
        metavar="LIMIT",
        help="limits to look at (default: 7 from the costs)",
    )
    add_imitation_arguments(parser)
    add_json_option(parser)
    # Of `evaluate`: a limit is on samples, and none is chosen yet.
    parser.set_defaults(run=run, resumes=True, greedy=False, cost_limit=None)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if not arguments.records:
        _measure_and_report(arguments)
        return 0
    if len(arguments.records) > 2:
        raise Mistake("--records takes two files: the student, and the student after imitation.")
    _report([read_evaluation(path) for path in arguments.records], None, arguments, arguments.output_dir)
    return 0


def _measure_and_report(arguments: argparse.Namespace) -> None:
    arguments = with_run_settings(arguments, "cost_limit")  # it is what is sought
    if not (arguments.teacher or arguments.teacher_adapter_name or arguments.teacher_model_server_url):
        raise Mistake("--teacher (or --teacher_adapter_name, --teacher_model_server_url) is needed: costs are of it.")
    if arguments.num_samples < 1:
        raise Mistake(f"--num_samples must be at least 1, got {arguments.num_samples}.")
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
    evaluations: "Sequence[Evaluation]",
    imitation: dict[str, Any] | None,
    arguments: argparse.Namespace,
    output_dir: Path | None,
) -> None:
    """Print the figures that a limit is chosen from, and write them where there is a folder."""
    from ..evaluation import calibrate_limit
    from ..evaluation.provenance import git_state, library_versions

    with mistakes():
        calibration = calibrate_limit(*evaluations, cost_scope=arguments.cost_scope, limits=arguments.limits)
    suggestion = suggestion_text(calibration)
    parts = [_costs_text(calibration), _satisfaction_text(calibration)]
    if imitation is not None:
        parts.append(_imitation_text(imitation))
    content = {
        **asdict(calibration),
        "suggestion_text": suggestion,
        "imitation_run": imitation,
        "versions": library_versions(),
        "git_commit": git_state()[0],
    }
    arguments.show("\n" + "\n\n".join(part.rstrip() for part in (*parts, suggestion)), content)
    if output_dir is None:
        return
    from ..reports.calibration_plot import plot_calibration

    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / JSON_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    plot_calibration(calibration, evaluations, output_dir / PLOT_FILE)
    say(f"\n{JSON_FILE} and {PLOT_FILE} are in {output_dir}/.")


def suggestion_text(calibration: "Calibration") -> str:
    """The suggested range, or why there is none, in words."""
    found, scope = calibration.suggestion, calibration.cost_scope
    start = f"{found.start:.3g} ({COST_UNITS[scope]}; the median of {calibration.start.num_rollouts} rollouts)"
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


def _students(calibration: "Calibration") -> "list[tuple[str, CostDistribution]]":
    students = [("now", calibration.start), ("after imitation", calibration.imitation)]
    return [(name, distribution) for name, distribution in students if distribution is not None]


def _costs_text(calibration: "Calibration") -> str:
    from ..evaluation.calibration import LEVELS
    from ..reports.tables import markdown_table

    settings = calibration.start.settings
    rows = [
        [scope, name, *(f"{cost:.3g}" for cost in distribution.quantiles[scope].values())]
        for scope in calibration.start.quantiles
        for name, distribution in _students(calibration)
    ]
    return (
        f"Costs of {calibration.start.num_rollouts} rollouts of {settings.name} on {settings.num_problems} problems of "
        f"{settings.task} ({settings.split}), temperature {settings.temperature:g}, in nats: quantiles.\n\n"
        + markdown_table(["cost_scope", "student", *(f"{level:.0%}" for level in LEVELS)], rows, left=(), padded=True)
    )


def _satisfaction_text(calibration: "Calibration") -> str:
    from ..reports.tables import markdown_table, percent

    rows = []
    for limit, *shares in zip(
        calibration.limits, *(one.satisfaction for _, one in _students(calibration)), strict=True
    ):
        inert = shares[0].value >= FEASIBLE_SATISFACTION  # the limit bounds next to nothing
        rows.append([f"{limit:g}{' (inert)' * inert}", *map(percent, shares)])
    columns = [f"within it {name}, %" for name, _ in _students(calibration)]
    scope = calibration.cost_scope
    return (
        f"Rollouts within a limit, cost_scope={scope} ({COST_UNITS[scope]}), 95% intervals clustered by problem. Inert: at "
        f"least {FEASIBLE_SATISFACTION:.0%} are within it before any training.\n\n"
        + markdown_table(["cost_limit", *columns], rows, left=(), padded=True)
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
