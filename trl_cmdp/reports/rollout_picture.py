"""A picture of rollouts of the same problems, each token shaded by its divergence from the teacher."""

import io
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .._defaults import COST_UNITS
from .._files import write_whole
from .._messages import printable
from ..evaluation import EvaluationSettings, EvaluationSummary, RolloutRecord
from ..evaluation.summary import Evaluation, summarize
from ._figures import short
from .rollout_browser import SHADES, cost_through, prompt_text


# Everything is measured in points, from the top left corner.
_SIZE, _ADVANCE, _LINE = 9.0, 5.42, 15.0  # of a character, and of a line of them
_MARGIN, _GAP, _SHADE = 14.0, 26.0, 30.0  # the last: a box of the legend
_MONO, _SANS = "DejaVu Sans Mono", "DejaVu Sans"


@dataclass(frozen=True)
class _Theme:
    """Colours, those of report.css."""

    paper: str
    ink: str
    muted: str
    over: str
    shades: tuple[str, ...]  # behind a token, from the second lowest cost on
    on_shades: tuple[str, ...]  # of its text


_LIGHT = _Theme(
    paper="#fdfdfb",
    ink="#1c1b19",
    muted="#63605a",
    over="#a3262f",
    shades=("#fcecd9", "#f3c89d", "#eca161", "#de7a30", "#c5581f", "#a7391e", "#812720"),
    on_shades=("#000000",) * 5 + ("#ffffff",) * 2,
)
_DARK = _Theme(
    paper="#161715",
    ink="#e8e6e0",
    muted="#a3a099",
    over="#ff9d96",
    shades=("#352119", "#5e2e1d", "#863d1e", "#aa5222", "#ca6d2b", "#e28e3a", "#f2b458"),
    on_shades=("#ffffff",) * 4 + ("#000000",) * 3,
)


def plot_rollouts(
    evaluations: Sequence[Evaluation],
    path: str | Path,
    *,
    problems: Sequence[int],
    width: int = 40,
    stacked: bool = False,
    dark: bool = False,
) -> None:
    """
    Draw the first rollout of some problems, by each student beside the others, with its verdict below.

    Args:
        evaluations (`Sequence[tuple[EvaluationSettings, Sequence[RolloutRecord]]]`):
            Settings and records of each student, with costs.
        path (`str` or `Path`):
            File, SVG or PNG by its suffix.
        problems (`Sequence[int]`):
            Indices of the problems.
        width (`int`, *optional*, defaults to `40`):
            Characters in a line of a rollout.
        stacked (`bool`, *optional*, defaults to `False`):
            Put the students below one another instead of side by side.
        dark (`bool`, *optional*, defaults to `False`):
            Draw for a dark page.

    Raises:
        ValueError: If a student has no rollout of a problem, or one without costs.
    """
    theme = _DARK if dark else _LIGHT
    rollouts = [
        [_first_rollout(records, problem, settings) for settings, records in evaluations] for problem in problems
    ]
    column = width * _ADVANCE
    num_columns = 1 if stacked else len(evaluations)
    content = max(num_columns * column + (num_columns - 1) * _GAP, _SHADE * (len(SHADES) + 1))
    total = 2 * _MARGIN + content
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    pen = _Pen(axes, theme)
    y = _MARGIN + 4
    if not stacked:
        for place, (settings, records) in enumerate(evaluations):
            pen.heading(_MARGIN + place * (column + _GAP), y + 8, summarize(settings, records))
        y += 46
    for row in rollouts:
        for line in textwrap.wrap(printable(prompt_text(row[0].prompt)), int(content / _ADVANCE)):
            pen.write(_MARGIN, y + _SIZE, line, family=_MONO, weight="bold")
            y += _LINE
        y, bottom = y + 3, y
        for place, (record, (settings, _)) in enumerate(zip(row, evaluations, strict=True)):
            x = _MARGIN if stacked else _MARGIN + place * (column + _GAP)
            end = pen.rollout(x, y, record, width)
            pen.verdict(x, end + 8, record, settings, named=stacked)
            bottom = max(bottom, end + 16)
            y = bottom if stacked else y
        y = bottom + 12
    y = pen.legend(_MARGIN, y + 2) + _MARGIN
    figure.set_size_inches(total / 72, y / 72)
    figure.set_facecolor(theme.paper)
    axes.set(xlim=(0, total), ylim=(y, 0))
    axes.axis("off")
    write_whole(path, _encoded(figure, Path(path).suffix.removeprefix(".")))


def _first_rollout(records: Sequence[RolloutRecord], problem: int, settings: EvaluationSettings) -> RolloutRecord:
    found = [record for record in records if record.problem == problem and record.costs]
    if not found:
        raise ValueError(f"{settings.name!r} has no rollout with costs of problem {problem}.")
    return min(found, key=lambda record: record.key)


class _Pen:
    """Draws in points."""

    def __init__(self, axes: Axes, theme: _Theme):
        self._axes, self._theme = axes, theme

    def write(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = _SIZE,
        colour: str = "",
        family: str = _SANS,
        weight: str = "",
    ) -> None:
        style = {"color": colour or self._theme.ink, "family": family, "fontweight": weight or "normal"}
        self._axes.text(x, y, text, fontsize=size, parse_math=False, **style)

    def heading(self, x: float, y: float, summary: EvaluationSummary) -> None:
        """Write a student's name, and the rates of all its sampled rollouts, or of the greedy ones."""
        rollouts = summary.sampled or summary.greedy
        self.write(x, y, short(summary.settings.name), size=11, weight="bold")
        rates = {"correct answers": rollouts.right, "within the limit": rollouts.costs.satisfaction}
        for line, (name, rate) in enumerate(rates.items()):
            interval = f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
            text = f"{name}: {100 * rate.value:.1f}% {interval} of {rate.num_rollouts} rollouts"
            self.write(x, y + 13 + 11 * line, text, size=7.5, colour=self._theme.muted)

    def rollout(self, x: float, y: float, record: RolloutRecord, width: int) -> float:
        """Draw the tokens of a rollout in lines of so many characters. Returns where the last line ends."""
        theme, line = self._theme, 0
        for index, line, column, piece in _placed(record.tokens, width):
            level = _level((record.costs or ())[index])
            left, top = x + column * _ADVANCE, y + line * _LINE
            if level:
                box = Rectangle((left, top), _cells(piece) * _ADVANCE, _LINE - 2, color=theme.shades[level - 1], lw=0)
                self._axes.add_patch(box)
            colour = theme.on_shades[level - 1] if level else theme.ink
            self.write(left, top + 9.7, piece, colour=colour, family=_MONO)
        return y + (line + 1) * _LINE

    def verdict(self, x: float, y: float, record: RolloutRecord, settings: EvaluationSettings, named: bool) -> None:
        """Write whether the answer is correct, and what the rollout cost."""
        cost = cost_through(record.costs or (), settings.cost_scope)[-1]
        inside, digits = cost <= settings.cost_limit, 3 if cost < 0.1 else 2
        limit = f"{settings.cost_limit:g} {COST_UNITS[settings.cost_scope]}"
        text = (
            f"{'correct' if record.right else 'wrong'} answer, cost {cost:.{digits}f} {'≤' if inside else '>'} {limit}"
        )
        text = f"{short(settings.name)}: {text}" if named else text
        self.write(x, y, text, size=7.5, colour=self._theme.muted if inside else self._theme.over)

    def legend(self, x: float, y: float) -> float:
        """Draw the scale of the shades. Returns where it ends."""
        theme = self._theme
        self.write(x, y + 8, "Divergence of each token from the teacher, in nats", size=7.5, colour=theme.muted)
        words = [f"< {SHADES[0]:g}", *(f"{bound:g}" for bound in SHADES[:-1]), f"≥ {SHADES[-1]:g}"]
        for level, word in enumerate(words):
            box = (
                {"facecolor": theme.shades[level - 1], "lw": 0} if level else {"facecolor": "none", "ec": theme.muted}
            )
            corner = (x + _SHADE * level, y + 14)
            self._axes.add_patch(Rectangle(corner, _SHADE, 12, **{"lw": 0.5, **box}))
            colour = theme.on_shades[level - 1] if level else theme.ink
            self.write(corner[0] + 5, corner[1] + 8.8, word, size=7, colour=colour)
        return y + 26


def _level(cost: float) -> int:
    return sum(bound <= cost for bound in SHADES)


def _placed(tokens: Sequence[str], width: int) -> Iterator[tuple[int, int, int, str]]:
    """Index of a token, line, column and text of each piece of it, in lines of so many characters."""
    line = column = 0
    for index, token in enumerate(tokens):
        text = printable(token).replace("\t", " ").replace("\n", "↵\n")
        if column and column + _cells(text.strip("\n")) > width and _cells(text) <= width:
            line, column = line + 1, 0
        piece, start = "", column
        for letter in text:
            if letter == "\n" or column + _cells(letter) > width:
                if piece:
                    yield index, line, start, piece
                line, column, start, piece = line + 1, 0, 0, ""
            if letter != "\n":
                piece, column = piece + letter, column + _cells(letter)
        if piece:
            yield index, line, start, piece


def _cells(text: str) -> int:
    """Width in characters of a terminal: letters of East Asia take two."""
    return sum(
        1 + (unicodedata.east_asian_width(letter) in "WF") - bool(unicodedata.combining(letter)) for letter in text
    )


def _encoded(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    # Text as outlines, so that it looks the same wherever the picture is shown; the salt makes the same picture the same file.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rollouts"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(buffer, format=form, dpi=200, metadata=metadata)
    return buffer.getvalue()
