"""Win rates and agreement, from judgements made by hand."""

import pytest
from helpers import make_rollout

from trl_cmdp.evaluation.judges import Judgement, read_judgements, write_judgements
from trl_cmdp.evaluation.win_rates import agreement, pair_rollouts, win_rate


def made(outcomes, judge="j", orders=None, failures=None):
    orders = orders or [[]] * len(outcomes)
    return [
        Judgement(i // 2, False, i % 2, judge, outcome, orders[i], failures or {}, ["ours", "theirs"])
        for i, outcome in enumerate(outcomes)
    ]


def rollout(problem, completion, prompt="P?"):
    return make_rollout(problem, prompt=prompt, completion=completion)


def test_rates_and_failures():
    orders = [["win", "win"], ["win", "loss"], ["loss", "loss"], [None, "win"]]
    rates = win_rate(made(["win", "tie", "loss", None], orders=orders, failures={"malformed": 1}))
    assert (rates.num_pairs, rates.num_judged, rates.failures) == (4, 3, {"malformed": 4})
    assert [(rate.k, rate.n) for rate in (rates.win, rates.tie, rates.loss)] == [(1, 3)] * 3
    assert rates.win.clusters == ((1, 2), (0, 1))
    assert (rates.position_consistency.k, rates.position_consistency.n) == (2, 3)
    assert win_rate(made([None])).win is None


def test_kappa():
    a = ["win", "win", "tie", "loss", "loss", None]
    b = ["win", "tie", "tie", "loss", "win", "win"]
    result = agreement(made(a), made(b, "k"))
    assert (result.rate.k, result.rate.n) == (3, 5)
    assert result.kappa == pytest.approx((3 / 5 - 8 / 25) / (1 - 8 / 25))
    low, high = result.kappa_interval
    assert low < result.kappa < high
    assert agreement(made(["win"] * 2), made(["win"] * 2, "k")).kappa is None
    assert agreement(made([None]), made(["win"], "k")) is None


def test_records_come_back():
    judgements = made(["win", None], orders=[["win", "win"], [None, "tie"]], failures={"no_reply": 1})
    text = write_judgements(judgements)
    assert read_judgements(text) == judgements
    assert read_judgements(text[:-5]) == judgements[:1]
    with pytest.raises(ValueError, match="Line 1"):
        read_judgements(text.replace('"outcome":"win"', '"outcome":"won"'))
    with pytest.raises(ValueError, match="`students`"):
        read_judgements(text.replace('"ours"', "7"))


def test_pairing():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "P?"}]
    (pair,) = pair_rollouts([rollout(0, "a", messages)], [rollout(0, "b", messages)], ("ours", "theirs"))
    assert (pair.prompt, pair.solution, pair.other, pair.students) == ("P?", "a", "b", ("ours", "theirs"))
    with pytest.raises(ValueError, match="no partner"):
        pair_rollouts([rollout(0, "a")], [rollout(1, "b")])
    with pytest.raises(ValueError, match="differs"):
        pair_rollouts([rollout(0, "a")], [rollout(0, "b", "Q?")])


def test_judgements_of_several_are_refused():
    with pytest.raises(ValueError, match="one judge"):
        win_rate(made(["win"]) + made(["win"], "k"))
    with pytest.raises(ValueError, match="twice"):
        win_rate(made(["win"]) * 2)
