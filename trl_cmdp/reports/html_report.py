"""The report: one HTML page that needs nothing but itself, and its plots as PNGs beside it."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from .. import __version__
from .._defaults import COST_UNITS, FEASIBLE_SATISFACTION
from .._files import write_whole
from ..evaluation import RolloutSummary, compare_methods
from ..evaluation.summary import compare_evaluations, summarize
from ._figures import COLOURS, colours_by_name, legend_below, new_figure, png
from ._inline_svg import inline_svg
from .comparison_plots import CURVES, curve_window, draw_comparison_curve, draw_comparison_pareto
from .evaluation_plots import (
    FEWEST_ROLLOUTS,
    draw_cost_distribution,
    draw_evaluation_pareto,
    draw_position_profile,
    draw_strata,
    ordered_strata,
    position_profile,
)
from .page_tables import (
    PageTable,
    comparison_page_table,
    comparison_settings_table,
    differences_table,
    settings_table,
    strata_table,
    summary_table,
    training_table,
)
from .rollout_browser import MAX_ROLLOUTS, SHADES, browser_data, choose_problems, keep_shown, script_json
from .runs import ComparisonRun, EvaluationRun, Run, TrainingRun
from .training_curves import TRAINING_PANELS
from .verdict import comparison_verdict, evaluation_verdict, training_verdict


PAGE = "report.html"
_PANEL = (4.2, 3.1)  # inches: three beside one another on a desktop, one on a phone
_WIDE = (6.4, 4.4)
_JOINTS = re.compile(r"(?<=[/\\])(?=\w)|(?<=[.:-])(?=[^\W\d])")  # where a path or a name may be broken, and no number


@dataclass(frozen=True)
class _Plot:
    title: str
    caption: str
    svg: Markup
    wide: bool


class _Gallery:
    """Plots, each kept as the PNG of a file and as SVG for the page."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def add(self, figure: Figure, name: str, title: str, caption: str) -> _Plot:
        svg = inline_svg(figure, f"plot-{name}", f"{title}. {caption}")
        self.files[f"{name}.png"] = png(figure, title)  # in the page the title stands above the plot
        return _Plot(title, caption, svg, wide=figure.get_figwidth() > _PANEL[0])


def write_report(
    runs: Sequence[Run],
    output_dir: Path,
    *,
    title: str | None = None,
    max_rollouts: int = MAX_ROLLOUTS,
    refresh: int | None = None,
) -> list[Path]:
    """
    Write a report of runs, all its files or, where anything is wrong, none. The page loads itself anew every `refresh`
    seconds, if that is given.
    """
    if not runs:
        raise ValueError("There is no run to report.")
    training = [run for run in runs if isinstance(run, TrainingRun)]
    evaluations = [run for run in runs if isinstance(run, EvaluationRun)]
    evaluations.sort(key=lambda run: run.is_teacher)  # whom the others are measured by comes last
    comparisons = [run for run in runs if isinstance(run, ComparisonRun)]
    gallery = _Gallery()
    # One colour for a name, whether it was trained or evaluated.
    colours = colours_by_name(list({run.name for run in (*training, *evaluations)}))
    task = f"{evaluations[0].settings.task}, {evaluations[0].settings.split}" if evaluations else None
    evaluation = _evaluation_part(evaluations, colours, gallery) if evaluations else None
    parts = [_comparison_part(run, number, gallery) for number, run in enumerate(comparisons, start=1)]
    verdicts = [*(evaluation["verdicts"] if evaluation else ()), *(part["verdict"] for part in parts)]
    page = {
        "title": title or task or ", ".join(run.name for run in (*comparisons, *training)),
        "verdicts": verdicts or [training_verdict(run) for run in training],
        "evaluation": evaluation,
        "training": _training_part(training, colours, gallery) if training else None,
        "comparisons": parts,
        "browser": _browser_part(evaluations, max_rollouts) if evaluations else None,
        "sources": [run.source for run in runs],
        "series": {name: COLOURS.index(colour) for name, colour in colours.items()},
        "refresh": refresh,
        "version": __version__,
    }
    # A lone surrogate, which a record may hold, cannot be written otherwise.
    contents = {PAGE: _render(page).encode("utf-8", "replace"), **gallery.files}
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(output_dir / name, content)
    return [output_dir / name for name in contents]


def _evaluation_part(runs: Sequence[EvaluationRun], colours: dict[str, str], gallery: _Gallery) -> dict[str, Any]:
    settings = runs[0].settings
    summaries = {run.name: summarize(run.settings, run.records) for run in runs}
    kinds = {
        kind: {name: part for name, summary in summaries.items() if (part := getattr(summary, kind)) is not None}
        for kind in ("sampled", "greedy")
    }
    # The plots are of the samples, as in training, or of greedy rollouts where there are no others.
    greedy = not kinds["sampled"]
    drawn = kinds["greedy" if greedy else "sampled"]
    of_kind = [run for run in runs if run.name in drawn]
    # The teacher's costs are 0: a line in the one plot, nothing in the others.
    students = [run for run in of_kind if not run.is_teacher] or of_kind
    teacher = next((drawn[run.name] for run in of_kind if run not in students), None)
    measured = {run.name: drawn[run.name] for run in students}
    costs = settings.teacher is not None
    plots = []
    if costs:
        figure = draw_evaluation_pareto(measured, teacher, colours, settings.cost_limit, settings.cost_scope, _WIDE)
        caption = (
            f"One mark for each student with 95% intervals, filled where at least {FEASIBLE_SATISFACTION:.0%} of the "
            f"rollouts are within the limit.{' The dotted line is the teacher.' * (teacher is not None)}"
        )
        plots.append(gallery.add(figure, "pareto", "Correct answers against cost", caption))
    titles = {"sampled": "Sampled rollouts", "greedy": "Greedy rollouts"}
    return {
        "verdicts": [evaluation_verdict(run.name, drawn[run.name], settings, teacher) for run in students],
        "settings": settings,
        "unit": COST_UNITS[settings.cost_scope],
        "num_students": sum(not run.is_teacher for run in runs),
        "tables": [summary_table(titles[kind], of_names) for kind, of_names in kinds.items() if of_names],
        "missing": {name: summary.num_missing for name, summary in summaries.items() if summary.num_missing},
        "differences": _differences(of_kind, greedy),
        "settings_table": settings_table(runs),
        "names": [run.name for run in runs],
        "plots": plots,
        "cost_plots": _cost_plots(students, colours, greedy, gallery) if costs else [],
        "strata_plots": _strata_plots(drawn, colours, costs, gallery),
        "strata_table": strata_table(strata, drawn) if (strata := ordered_strata(drawn)) else None,
    }


def _strata_plots(
    drawn: dict[str, RolloutSummary], colours: dict[str, str], costs: bool, gallery: _Gallery
) -> list[_Plot]:
    plots = []
    for name, title in {"right": "Correct answers", "satisfaction": "Satisfaction"}.items():
        if ordered_strata(drawn) and (name == "right" or costs):
            figure = new_figure(*_PANEL)
            axes = figure.subplots()
            draw_strata(axes, drawn, colours, name)
            if len(drawn) > 1:
                legend_below(figure, axes, 3, fontsize=8)
            caption = "Rate by difficulty with its 95% interval, problems as clusters."
            plots.append(gallery.add(figure, f"difficulty-{name}", f"{title} by difficulty", caption))
    return plots


def _cost_plots(
    runs: Sequence[EvaluationRun], colours: dict[str, str], greedy: bool, gallery: _Gallery
) -> list[_Plot]:
    figure = new_figure(*_PANEL)
    draw_cost_distribution(figure.subplots(), runs, colours, greedy)
    caption = "Share of rollouts of at most each cost. Where a line crosses the limit it shows the satisfaction."
    plots = [gallery.add(figure, "costs", "Distribution of the costs", caption)]
    profiles = [position_profile(run, greedy) for run in runs]
    highest = max(max([*means, *high]) for means, _, high in profiles)
    for number, (run, profile) in enumerate(zip(runs, profiles, strict=True), start=1):
        figure = new_figure(*_PANEL)
        axes = figure.subplots()
        draw_position_profile(axes, profile, colours[run.name])
        axes.set_ylim(0, 1.05 * highest or 1)  # one scale for all students
        caption = f"Mean, and the band from the 10% to the 90% quantile, as far as {_how_many(run, greedy)} last."
        title = f"{run.name}: divergence by token"
        plots.append(gallery.add(figure, f"divergence-{number}", title, caption))
    return plots


def _how_many(run: EvaluationRun, greedy: bool) -> str:
    number = sum(record.greedy == greedy and bool(record.costs) for record in run.records)
    if number == 1:
        return "the one rollout"
    return f"{FEWEST_ROLLOUTS} rollouts" if number > FEWEST_ROLLOUTS else f"all {number} rollouts"


def _differences(runs: Sequence[EvaluationRun], greedy: bool) -> PageTable | None:
    """Every other student's difference to the constrained one, or to the first."""
    reference = next((run for run in runs if run.settings.name == "constrained"), runs[0])
    differences = [
        compare_evaluations((run.settings, run.records), (reference.settings, reference.records), greedy=greedy)
        for run in runs
        if run is not reference
    ]
    return differences_table(differences) if differences else None


def _training_part(runs: Sequence[TrainingRun], colours: dict[str, str], gallery: _Gallery) -> dict[str, Any]:
    plots = []
    for panel in TRAINING_PANELS:
        if panel.is_logged(runs):
            figure = new_figure(*_PANEL)
            panel.draw(figure.subplots(), runs, colours)
            plots.append(gallery.add(figure, f"training-{panel.name}", panel.title, panel.caption(runs)))
    return {"plots": plots, "table": training_table(runs), "num_runs": len(runs)}


def _comparison_part(run: ComparisonRun, number: int, gallery: _Gallery) -> dict[str, Any]:
    try:
        comparison = compare_methods(run.records)
    except ValueError as error:
        raise ValueError(f"{run.source}: {error}") from error
    several = len({record.seed for record in run.records}) > 1
    figure = draw_comparison_pareto(comparison, size=_WIDE)
    caption = (
        f"One mark for each method with 95% intervals{', its seeds behind it' * several}, filled where at least "
        f"{FEASIBLE_SATISFACTION:.0%} of the rollouts are within the limit."
    )
    plots = [gallery.add(figure, f"comparison-{number}-pareto", "Correct answers against cost", caption)]
    for key, (title, _) in CURVES.items():
        if any(key in entry for record in run.records for entry in record.history):
            figure = new_figure(_PANEL[0], _PANEL[1] + 0.9 * (key == "reward"))
            axes = figure.subplots()
            draw_comparison_curve(axes, run.records, key, comparison.reference)
            if key == "reward":
                legend_below(figure, axes, 3, fontsize=8)
            window = curve_window(run.records)
            caption = f"{'Means over the seeds, over' if several else 'Means over'} {window} logged values."
            plots.append(gallery.add(figure, f"comparison-{number}-{key}", title, caption))
    return {
        "id": f"comparison-{number}",
        "name": run.name,
        "verdict": comparison_verdict(run.name, comparison),
        "comparison": comparison,
        "unit": COST_UNITS[comparison.cost_scope],
        "table": comparison_page_table(comparison),
        "several": several,
        "plots": plots,
        "settings_table": comparison_settings_table(run, comparison.task),
    }


def _browser_part(runs: Sequence[EvaluationRun], max_rollouts: int) -> dict[str, Any]:
    evaluations = [(run.settings, run.records) for run in runs]
    problems = choose_problems(evaluations, max_rollouts)
    num_chosen = sum(record.problem in problems for run in runs for record in run.records)
    evaluations = keep_shown(evaluations, problems, max_rollouts)
    data = browser_data([run.name for run in runs], evaluations, problems)
    difficulties = dict.fromkeys(
        problem["difficulty"] for problem in data["problems"].values() if problem["difficulty"] is not None
    )
    return {
        "data": Markup(script_json(data)),
        "names": [run.name for run in runs],
        "shown": len(data["rollouts"]),
        "total": sum(len(run.records) for run in runs),
        "whole": len(data["rollouts"]) == num_chosen,
        "problems_shown": len(problems),
        "problems_total": len({record.problem for run in runs for record in run.records}),
        "difficulties": list(difficulties),
        "costs": runs[0].settings.teacher is not None,
        "shades": [(0.0, SHADES[0]), *zip(SHADES, (*SHADES[1:], None), strict=True)],
        "unit": COST_UNITS[runs[0].settings.cost_scope],
        "limit": runs[0].settings.cost_limit,
        "scope": runs[0].settings.cost_scope,
    }


def _render(page: dict[str, Any]) -> str:
    folder = files("trl_cmdp.reports")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    # Nothing is loaded, nothing is sent, and nothing runs but this style and this script. Images are in the page itself.
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    template = environment.from_string((folder / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(page, policy=policy, style=Markup(style), script=Markup(script))


def _breakable(text: str) -> Markup:
    """A text in which a path or a name may go on in the next line behind what joins its parts."""
    return Markup("<wbr>").join(_JOINTS.split(text))


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
