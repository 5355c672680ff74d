"""The dial of docs/dial.md, from the committed records of `python benchmarks/limit_dial.py`: no script, only radios."""

import html
import json
import math
from pathlib import Path


_SHADES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # nats, as in the report
_LOW, _HIGH = 1e-3, 20.0  # nats per token: ends of the strip's axis
_CHOSEN = "limit 0.25"


def dial(folder: Path) -> str:
    """HTML of the dial, without blank lines, as Markdown wants it."""
    numbers = json.loads((folder / "numbers.json").read_text())
    stops = []
    for place, measured in enumerate(numbers):
        name = measured["stop"]
        checked = " checked" if name == _CHOSEN else ""
        stops.append(
            f'<input type="radio" name="dial" id="dial-{place}"{checked}><label for="dial-{place}">{name}</label>'
            f'<div class="stop">{_figures(measured)}{_strip(measured)}{_rollouts(folder, name)}</div>'
        )
    return f'<div class="dial">{"".join(stops)}</div>'


def _figures(measured: dict) -> str:
    figures = {
        "correct": f"{100 * measured['final_answer_correctness']:.1f}%",
        "all steps valid": f"{100 * measured['valid_steps_rate']:.1f}%",
        f"within {measured['cost_limit']:g} nats per token": f"{100 * measured['satisfaction_rate']:.1f}%",
        "mean cost": f"{measured['mean_cost']:.3f}",
    }
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()) + "</dl>"


def _place(cost: float) -> float:
    """Percent of the strip's width, logarithmic."""
    return 100 * math.log(min(max(cost, _LOW), _HIGH) / _LOW) / math.log(_HIGH / _LOW)


def _strip(measured: dict) -> str:
    """One mark for each rollout at its cost, and the limit."""
    limit = measured["cost_limit"]
    marks = "".join(
        f'<circle cx="{_place(cost):.1f}%" cy="{8 + 29 * (index * 0.618 % 1):.0f}" r="2.2"'
        + (' class="over"/>' if cost > limit else "/>")
        for index, cost in enumerate(measured["costs"])
    )
    ticks = "".join(f'<text x="{_place(tick):.1f}%" y="58">{tick:g}</text>' for tick in (0.01, 0.1, 1, 10))
    line = f'<line x1="{_place(limit):.1f}%" x2="{_place(limit):.1f}%" y1="0" y2="45"/>'
    title = f"Costs of {len(measured['costs'])} answers, in nats per token; the line is the limit"
    return f'<svg class="strip" role="img" aria-label="{title}">{marks}{line}{ticks}</svg><p class="axis">{title}</p>'


def _rollouts(folder: Path, name: str) -> str:
    settings, *records = map(json.loads, (folder / f"{name.replace(' ', '-')}.jsonl").read_text().splitlines())
    items = []
    for record in records:
        tokens = "".join(
            f'<span class="shade-{sum(bound <= cost for bound in _SHADES)}">{html.escape(token)}</span>'
            for token, cost in zip(record["tokens"], record["costs"], strict=True)
        )
        cost, limit = sum(record["costs"]) / len(record["costs"]), settings["cost_limit"]
        verdict = (
            f"{'correct' if record['right'] else 'wrong'}, cost {cost:.2g} {'≤' if cost <= limit else '>'} {limit:g}"
        )
        over = ' class="over"' if cost > limit else ""
        items.append(
            f"<li><b>{html.escape(record['prompt'])}</b><code>{tokens}</code><small{over}>{verdict}</small></li>"
        )
    return f"<ol>{''.join(items)}</ol>"
