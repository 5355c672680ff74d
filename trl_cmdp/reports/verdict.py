"""What a report says first, in words: who is inside the limit, by how much, and what is wrong where nobody is."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from .._defaults import COST_UNITS, FEASIBLE_SATISFACTION
from ..evaluation import Comparison, EvaluationSettings, RolloutSummary
from ._curves import logged
from .page_tables import LAST_VALUES
from .runs import TrainingRun
from .tables import method_label


_MANY = 0.5  # from this share on, rollouts that are cut are worth a word
_ALL = 0.995


@dataclass(frozen=True)
class Verdict:
    """One line: whom it is about, whether that is inside the limit, and the figures behind it."""

    name: str
    inside: bool | None  # `None` where there is no limit
    state: str
    text: str


def evaluation_verdict(
    name: str, summary: RolloutSummary, settings: EvaluationSettings, teacher: RolloutSummary | None
) -> Verdict:
    """The verdict on a student's rollouts, beside the teacher's where they are recorded."""
    correct = f"correct {_percent(summary.right.value)}"
    if teacher is not None:
        correct += f", teacher {_percent(teacher.right.value)}"
    facts, costs = [correct], summary.costs
    inside = None if costs is None else costs.satisfaction.value >= FEASIBLE_SATISFACTION
    if costs is not None:
        limit = f"{settings.cost_limit:g} {COST_UNITS[settings.cost_scope]}"
        within = costs.satisfaction.value
        bound = f", at most {_percent(costs.violation_bound)} exceed it (95% confidence)" if inside else ""
        share = f"{_percent(within)} of the rollouts cost at most {limit}{bound}"
        facts.insert(0, share if within else f"the limit is {limit}, the mean cost {costs.mean.value:.3g}")
    cut = _cut(
        summary.truncated.value, settings.max_new_tokens, "--max_new_tokens, and max_completion_length in training"
    )
    facts += [*cut, *(["no answer is correct: read some below"] if summary.right.value == 0 else [])]
    return Verdict(name, inside, _state(inside, costs.satisfaction.value if costs else None), _sentence(facts))


def training_verdict(run: TrainingRun) -> Verdict:
    """The verdict on the end of a training run."""
    last = {
        key: mean(values[-LAST_VALUES:])
        for key in (
            *("reward", "constraint/satisfaction_rate", "constraint/limit", "completions/clipped_ratio"),
            *("completions/max_length", "frac_reward_zero_std"),
        )
        if (values := logged(run.history, key)[1])
    }
    satisfaction, limit = last.get("constraint/satisfaction_rate"), last.get("constraint/limit")
    facts = []
    if satisfaction is not None:
        of_limit = f" of {limit:.4g}" if limit is not None else ""
        facts.append(f"{_percent(satisfaction)} of the latest rollouts are within the limit{of_limit}")
    if "reward" in last:
        facts.append(f"reward {last['reward']:.3g}")
    facts += _cut(
        last.get("completions/clipped_ratio", 0), last.get("completions/max_length", 0), "max_completion_length"
    )
    if last.get("frac_reward_zero_std", 0) >= _ALL:
        facts.append(
            "the rewards of no group differ, so they teach nothing: look at some completions and their rewards"
        )
    inside = None if satisfaction is None else satisfaction >= FEASIBLE_SATISFACTION
    return Verdict(run.name, inside, _state(inside, satisfaction), _sentence(facts or ["nothing is logged yet"]))


def comparison_verdict(name: str, comparison: Comparison) -> Verdict:
    """The verdict on a comparison: which methods are inside the limit, and who of them answers best."""
    trained = [row for row in comparison.methods if row.trainer != "none"]
    inside = [row for row in trained if row.feasible]
    teachers = [row for row in comparison.methods if row.trainer == "none" and row.method == "teacher"]
    best = max(inside or trained or comparison.methods, key=lambda row: row.right.value)
    facts = [f"most correct answers{' of these' * bool(inside)}: {method_label(best)}, {_percent(best.right.value)}"]
    facts += [f"teacher {_percent(teacher.right.value)}" for teacher in teachers]
    if outside := [row for row in trained if not row.feasible]:
        shown = ", ".join(f"{method_label(row)} ({_percent(row.satisfaction.value)})" for row in outside)
        facts.append(f"outside, with the share of their rollouts that is within: {shown}")
    unit = COST_UNITS[comparison.cost_scope]
    state = f"{len(inside)} of {len(trained)} methods are inside the limit of {comparison.cost_limit:g} {unit}"
    return Verdict(name, bool(inside), state, _sentence(facts))


def _state(inside: bool | None, satisfaction: float | None) -> str:
    if inside is None:
        return "no cost is measured, as there is no teacher"
    if satisfaction == 0:
        return "no rollout is inside the limit"
    return "inside the limit" if inside else "outside the limit"


def _cut(truncated: float, length: float, option: str) -> Sequence[str]:
    if truncated < _MANY:
        return ()
    which = "all rollouts are" if truncated >= _ALL else f"{_percent(truncated)} are"
    return (f"{which} cut at {length:.0f} tokens: raise {option}",)


def _sentence(facts: Sequence[str]) -> str:
    text = "; ".join(facts)
    return f"{text[0].upper()}{text[1:]}."


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
