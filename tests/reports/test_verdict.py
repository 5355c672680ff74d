"""What the report says first: true of the figures, and what to do where nobody is inside the limit."""

import pytest
from helpers import make_cell
from report_runs import LIMIT, rollout, settings, teacher_rollouts

from trl_cmdp.evaluation import compare_methods
from trl_cmdp.evaluation.summary import summarize
from trl_cmdp.reports.page_tables import comparison_page_table
from trl_cmdp.reports.runs import TrainingRun
from trl_cmdp.reports.verdict import comparison_verdict, evaluation_verdict, training_verdict


def verdict_of(records, **changed):
    asked = settings(**changed)
    teacher = summarize(settings(), teacher_rollouts()).sampled
    return evaluation_verdict("mine", summarize(asked, records).sampled, asked, teacher)


def test_inside_the_limit():
    verdict = verdict_of([rollout(problem, 0, [0.1], right=problem > 2) for problem in range(6)])
    assert (verdict.inside, verdict.state) == (True, "inside the limit")
    bound = "100.0% of the rollouts cost at most 0.3 nats per token, at most 39.3% exceed it (95% confidence)"
    assert verdict.text == f"{bound}; correct 50.0%, teacher 100.0%."


def test_outside_the_limit():
    verdict = verdict_of([rollout(problem, 0, [0.2 * problem]) for problem in range(6)])
    assert (verdict.inside, verdict.state) == (False, "outside the limit")
    assert verdict.text.startswith("33.3% of the rollouts cost at most 0.3 nats per token; correct 100.0%")


def test_where_nothing_works_it_says_what_to_do():
    records = [rollout(problem, 0, [2.0], right=False, truncated=True) for problem in range(6)]
    verdict = verdict_of(records, max_new_tokens=40)
    assert verdict.state == "no rollout is inside the limit"
    for part in (
        "the mean cost 2;",
        "all rollouts are cut at 40 tokens: raise --max_new_tokens",
        "no answer is correct",
    ):
        assert part in verdict.text


def test_without_a_teacher_no_limit_is_judged():
    asked = settings(teacher=None)
    summary = summarize(asked, [rollout(problem, 0, None) for problem in range(6)]).sampled
    verdict = evaluation_verdict("mine", summary, asked, None)
    assert (verdict.inside, verdict.text) == (None, "Correct 100.0%.")


@pytest.mark.parametrize(
    ("logged", "inside", "parts"),
    [
        (
            {"constraint/satisfaction_rate": 0.97, "constraint/limit": LIMIT, "reward": 0.5},
            True,
            ["97.0% of the latest rollouts are within the limit of 0.3", "reward 0.5"],
        ),
        ({"constraint/satisfaction_rate": 0.5}, False, ["50.0% of the latest rollouts"]),
        ({"reward": 0.5}, None, ["Reward 0.5"]),
        (
            {"completions/clipped_ratio": 1.0, "completions/max_length": 48, "frac_reward_zero_std": 1.0, "reward": 0},
            None,
            ["all rollouts are cut at 48 tokens: raise max_completion_length", "rewards of no group differ"],
        ),
        ({}, None, ["Nothing is logged yet."]),
    ],
)
def test_the_end_of_a_training_run(logged, inside, parts):
    history = [{"step": step, **logged} for step in range(1, 13)]
    verdict = training_verdict(TrainingRun("run", "", history, 8, 12))
    assert verdict.inside is inside
    for part in parts:
        assert part in verdict.text


def test_a_comparison_names_the_best_inside_and_who_is_outside():
    cells = [
        make_cell("constrained", 0, [(1, 1, 0.1, 3)] * 9 + [(0, 0, 0.1, 3)]),
        make_cell("grpo", 0, [(1, 1, 0.9, 3)] * 10),
        make_cell("teacher", 0, [(1, 1, 0.0, 3)] * 8 + [(0, 0, 0.0, 3)] * 2, trainer="none"),
    ]
    verdict = comparison_verdict("nested", compare_methods(cells))
    assert (verdict.inside, verdict.state) == (True, "1 of 2 methods are inside the limit of 0.25 nats per token")
    assert verdict.text == (
        "Most correct answers of these: constrained, 90.0%; teacher 80.0%; outside, with the share of their rollouts "
        "that is within: grpo (0.0%)."
    )


def test_a_comparison_in_another_scope_with_rewards_and_unchecked_steps_says_so():
    outcomes = [(1, None, 0.1, 3, 0.7)] * 4
    cells = [make_cell(name, 0, outcomes, settings={"cost_limit": 2, "cost_scope": "sum"}) for name in ("a", "b")]
    comparison = compare_methods(cells)
    assert comparison_verdict("mine", comparison).state == "2 of 2 methods are inside the limit of 2 nats per rollout"
    table = comparison_page_table(comparison)
    assert table.columns[2:5] == ("correct answers", "reward", "within the limit")
    assert table.rows[0][1][2].value == "0.700"
