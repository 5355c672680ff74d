"""
The dial of docs/dial.md, from the committed records of `python benchmarks/limit_dial.py`: no script, only radio buttons,
each of which shows what follows its label.
"""

import html
import json
import math
from pathlib import Path


_SHADES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # nats, as in the report
_LOW, _HIGH = 1e-3, 20.0  # nats per token: ends of the strips' axis
_CHOSEN = "limit 0.25"


def dial(folder: Path) -> str:
    """HTML of the dial, without blank lines, as Markdown wants it."""
    before, *stops = json.loads((folder / "numbers.json").read_text())
    parts = []
    for place, after in enumerate(stops):
        name = after["stop"]
        limit = math.inf if name == "no limit" else after["cost_limit"]
        parts += [
            f'<input type="radio" name="dial" id="dial-{place}"{" checked" * (name == _CHOSEN)}>',
            f'<label for="dial-{place}">{name}</label>',
            f'<div class="stop">{_figures(after)}',
            _strip("before training", before["costs"], limit),
            _strip("after training", after["costs"], limit),
            f"{_answers(_records(folder, before), _records(folder, after), limit)}</div>",
        ]
    return f'<div class="dial">{"".join(parts)}</div>'


def _figures(measured: dict) -> str:
    figures = {
        "correct": f"{100 * measured['final_answer_correctness']:.1f}%",
        "all steps valid": f"{100 * measured['valid_steps_rate']:.1f}%",
        f"within {measured['cost_limit']:g} nats per token": f"{100 * measured['satisfaction_rate']:.1f}%",
        "mean cost": f"{measured['mean_cost']:.3f}",
    }
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()) + "</dl>"


def _strip(when: str, costs: list[float], limit: float) -> str:
    """One mark for each answer at its cost, on a logarithmic axis, and the limit."""
    marks = "".join(
        f'<circle{_class(cost > limit)} cx="{_place(cost):.1f}%" cy="{5 + 25 * (index * 0.618 % 1):.0f}" r="2.2"/>'
        for index, cost in enumerate(costs)
    )
    inside = f", {100 * sum(cost <= limit for cost in costs) / len(costs):.0f}% of them within the limit"
    said = f"{when}: {len(costs)} answers by cost{inside if limit < math.inf else ''}"
    ticks = "".join(f'<text x="{_place(tick):.1f}%" y="48">{tick:g}</text>' for tick in (0.01, 0.1, 1, 10))
    x = f"{_place(limit):.1f}%"
    line = f'<line x1="{x}" x2="{x}" y1="0" y2="36"/>' if limit < math.inf else ""
    return f'<p class="strip-title">{said}</p><svg class="strip" role="img" aria-label="{said}">{marks}{line}{ticks}</svg>'


def _place(cost: float) -> float:
    """Percent of the strip's width."""
    return 100 * math.log(min(max(cost, _LOW), _HIGH) / _LOW) / math.log(_HIGH / _LOW)


def _records(folder: Path, measured: dict) -> list[dict]:
    """Of the first problems; the first line are the settings."""
    lines = (folder / f"{measured['stop'].replace(' ', '-')}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def _answers(before: list[dict], after: list[dict], limit: float) -> str:
    items = (
        f"<li><b>{html.escape(old['prompt'])}</b>{_answer('before', old, limit)}{_answer('after', new, limit)}</li>"
        for old, new in zip(before, after, strict=True)
    )
    return f"<ol>{''.join(items)}</ol>"


def _answer(when: str, record: dict, limit: float) -> str:
    tokens = "".join(
        f'<span class="shade-{sum(bound <= cost for bound in _SHADES)}">{html.escape(token)}</span>'
        for token, cost in zip(record["tokens"], record["costs"], strict=True)
    )
    cost = sum(record["costs"]) / len(record["costs"])
    judged = f" {'>' if cost > limit else '≤'} {limit:g}" if limit < math.inf else ""
    verdict = f"{when}: {'correct' if record['right'] else 'wrong'}, cost {cost:.2g}{judged}"
    return f"<div><code>{tokens}</code><small{_class(cost > limit)}>{html.escape(verdict)}</small></div>"


def _class(over: bool) -> str:
    return ' class="over"' if over else ""
