"""The data of the rollout browser: where a rollout leaves the limit, and which rollouts the page holds."""

import json
import sys
from collections import Counter

import pytest
import torch
from report_runs import LIMIT, rollout, rollouts, settings

from trl_cmdp.core import rollout_cost
from trl_cmdp.evaluation.summary import summarize
from trl_cmdp.reports.rollout_browser import (
    MAX_CHARACTERS,
    browser_data,
    choose_problems,
    cost_through,
    distinct_excerpts,
    first_exceeding,
    keep_shown,
    script_json,
)


@pytest.mark.parametrize("scope", ["mean", "sum", "worst_prefix"])
def test_costs_of_prefixes_are_costs_of_rollouts_cut_there(scope):
    costs = [0.3, 0.1, 0.7, 0.0, 0.2]
    through = cost_through(costs, scope)
    for end in range(1, len(costs) + 1):
        cut = torch.tensor([costs[:end]], dtype=torch.float64)
        assert through[end - 1] == pytest.approx(rollout_cost(cut, torch.ones_like(cut), scope).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("costs", "scope", "index"),
    [
        ([0.1, 0.2, 0.9], "mean", 2),  # 0.1, 0.15, 0.4
        ([0.9, 0.0, 0.0], "mean", 0),  # and back within the limit
        ([0.2, 0.2, 0.2], "sum", 1),
        ([0.9, 0.0, 0.0], "worst_prefix", 0),
        ([0.3], "mean", None),  # the limit itself is within
        ([0.1, 0.1], "mean", None),
    ],
)
def test_the_mark_is_on_the_first_token_with_which_the_prefix_exceeds_the_limit(costs, scope, index):
    assert first_exceeding(costs, LIMIT, scope) == index


def test_what_is_within_the_limit_is_what_the_summary_counts():
    records = [*rollouts(1), rollout(0, 2, [0.3]), rollout(0, 3, [0.1, 0.2, 0.6])]  # on the limit, to a rounding
    summary = summarize(settings(), records).sampled
    data = browser_data(["constrained"], [(settings(), records)], set(range(6)))
    within = [one["within"] for one in data["rollouts"]]
    assert sum(within) / len(within) == summary.costs.satisfaction.value
    assert all(one["first"] is not None for one in data["rollouts"] if not one["within"])


def test_the_teachers_own_prompt_is_in_the_page():
    data = browser_data(["constrained"], [(settings(), [rollout(0, 0, [0.1], teacher_prompt="hint")])], {0})
    assert data["problems"][0]["teacher_prompt"] == "hint"
    data = browser_data(["constrained"], [(settings(), rollouts(1))], {0})
    assert data["problems"][0]["teacher_prompt"] is None


def test_problems_are_chosen_at_even_distances_with_all_their_rollouts():
    evaluations = [(settings(name), rollouts(1)) for name in ("a", "b")]
    assert choose_problems(evaluations) == set(range(6))
    assert choose_problems(evaluations, max_rollouts=12) == {0, 2, 4}  # 4 rollouts of each problem
    assert choose_problems(evaluations, max_tokens=12 * 3) == {0, 2, 4}
    assert choose_problems(evaluations, max_rollouts=1) == {0}
    data = browser_data(["a", "b"], evaluations, {0, 2, 4})
    assert [one["problem"] for one in data["rollouts"] if one["student"] == 1] == [0, 0, 2, 2, 4, 4]
    assert list(data["problems"]) == [0, 2, 4]


def test_of_one_problem_with_too_many_rollouts_some_are_kept():
    evaluations = [(settings(name), [rollout(0, sample, [0.1, 0.2]) for sample in range(40)]) for name in ("a", "b")]
    kept = keep_shown(evaluations, choose_problems(evaluations, max_rollouts=8), max_rollouts=8)
    assert [[record.sample for record in records] for _, records in kept] == [[0, 10, 20, 30]] * 2
    few = keep_shown(evaluations, {0})
    assert [len(records) for _, records in few] == [40, 40]


def test_a_page_of_long_tokens_stays_small():
    records = [rollout(problem, 0, [0.1] * 10, tokens=["<" * 1000] * 10) for problem in range(200)]
    evaluations = [(settings(), records)]
    shown = choose_problems(evaluations)
    assert 10 < len(shown) < 100
    data = browser_data(["a"], keep_shown(evaluations, shown), shown)
    assert len(script_json(data)) < 4e6


def test_images_are_those_of_the_problem_and_count_into_the_pages_size():
    image = f"data:image/jpeg;base64,{'A' * 30_000}"
    records = [rollout(problem, sample, [0.1], images=[image, image]) for problem in range(100) for sample in range(2)]
    evaluations = [(settings(), records)]
    shown = choose_problems(evaluations)
    assert 40 < len(shown) < 60
    data = browser_data(["a"], evaluations, shown)
    assert all(problem["images"] == [image, image] for problem in data["problems"].values())
    assert len(script_json(data)) < MAX_CHARACTERS
    assert browser_data(["a"], [(settings(), [rollout(0, 0, [0.1])])], {0})["problems"][0]["images"] == []


def test_choosing_problems_takes_work_in_proportion_to_them():
    def calls(count):
        evaluations = [(settings(), [rollout(problem, 0, None, tokens=["x"]) for problem in range(count)])]
        seen = Counter()
        sys.setprofile(lambda frame, event, argument: seen.update([event]))
        try:
            choose_problems(evaluations, max_rollouts=10)
        finally:
            sys.setprofile(None)
        return seen.total()

    assert calls(2000) < 6 * calls(500)


def test_without_a_teacher_there_are_no_costs():
    data = browser_data(["a"], [(settings(teacher=None), [rollout(0, 0, None)])], {0})
    assert "costs" not in json.dumps(data["rollouts"])


TEMPLATE = "Solve the problem.\nWrite the answer after ####.\n\n{}\n\nAnswer:"
ALIKE = "A class of 29 students has various hobbies. 6 of them like to read, and {} play chess."


@pytest.mark.parametrize(
    ("prompts", "excerpts"),
    [
        (["3 + 4 =", "3 + 5 ="], ["… 4 =", "… 5 ="]),
        (["1+2=", "3+4="], ["1+2=", "3+4="]),
        ([TEMPLATE.format("How many?"), TEMPLATE.format("How long?")], ["… many?", "… long?"]),
        # A few-shot prompt beside two of a template: what is common to most goes.
        (
            [TEMPLATE.format("Add 1."), TEMPLATE.format("Take 2."), "Q: Add 3."],
            ["Add 1.", "Take 2.", "Q: Add 3."],
        ),
        (
            [ALIKE.format(7), ALIKE.format(8), "Tom has 5 apples."],
            ["A class of … 7 play chess.", "A class of … 8 play chess.", "Tom has 5 apples."],
        ),
        (["Same?", "Same?"], ["Same?", "Same?"]),
        (["Only\none"], ["Only one"]),
        (["", "a"], ["", "a"]),
        (["a", "a b"], ["a", "… b"]),
    ],
)
def test_prompts_in_the_list_are_told_apart(prompts, excerpts):
    assert list(distinct_excerpts(dict(enumerate(prompts))).values()) == excerpts


def test_different_prompts_have_different_excerpts():
    long = "word " * 200
    prompts = {index: f"{long}{index} {long}" for index in range(5)}
    assert len(set(distinct_excerpts(prompts).values())) == 5
    assert all(len(excerpt) <= 120 for excerpt in distinct_excerpts(prompts).values())
