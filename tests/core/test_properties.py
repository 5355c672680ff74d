"""What holds for any input of the mathematics: bounds, order, and what must not matter. Examples are drawn, seeded."""

import math
from dataclasses import asdict

import pytest
import torch
from core_reference import SCOPES, batches, tensors
from head_reference import logits_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_cmdp.core import (
    AutoLimit,
    Comparison,
    DualMultiplier,
    Head,
    PIDMultiplier,
    bootstrap_interval,
    chunked_divergence,
    chunked_policy_divergence,
    clopper_pearson_interval,
    clustered_rate_interval,
    constrained_advantages,
    modified_reward,
    returns_to_go,
    rollout_cost,
    token_divergence,
    token_modified_rewards,
    violation_weights,
    wilson_interval,
)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALES = [1e-3, 1.0, 30.0, 1e4]
betas = st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=40)


@st.composite
def logit_pairs(draw, impossible=False):
    """Student's and teacher's logits (N, V) of any dtype and size; with `impossible` some are −inf, never a whole row."""
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    both = []
    for _ in range(2):
        logits = draw(st.sampled_from(SCALES)) * torch.randn(shape, generator=generator, dtype=torch.float64)
        if impossible:
            share = draw(st.sampled_from([0.0, 0.1, 0.6]))
            hit = torch.rand(shape, generator=generator) < share
            hit[:, draw(st.integers(0, shape[1] - 1))] = False
            logits[hit] = -torch.inf
        both.append(logits.to(dtype))
    if draw(st.booleans()):  # nearly equal models
        both[1] = both[0] + (1e-3 * torch.randn(shape, generator=generator)).to(dtype)
    return both


def head_of(logits):
    """Hidden states and head whose projection is exactly these logits; what is −inf in the first row is in all."""
    weight = logits.T.masked_fill(logits.T.isneginf(), 0.0).contiguous()
    bias = torch.where(logits[0].isneginf(), logits[0], 0.0)
    return torch.eye(len(logits), dtype=logits.dtype), Head(weight, bias)


@few
@given(logit_pairs(), betas)
def test_not_negative_and_zero_at_equality_alone(pair, beta):
    """
    2β(1 − β)·TV² ≤ JSD_β ≤ H(β) (Pinsker, and what a coin of weight β can tell), 2·TV² ≤ KL: with the lower bound a
    divergence is 0 for equal distributions alone. Equal logits give 0.
    """
    student, teacher = pair
    slack = 1e-12 if student.dtype == torch.float64 else 1e-5
    costs = token_divergence(student, teacher, beta).double()
    distance = (student.double().softmax(-1) - teacher.double().softmax(-1)).abs().sum(-1) / 2  # (N,), TV
    inside = 0 < beta < 1
    assert (costs >= -slack).all()
    assert (costs >= 2 * (beta * (1 - beta) if inside else 1) * distance**2 - slack).all()
    if inside:
        assert (costs <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + slack).all()
    assert (token_divergence(student, student, beta).abs() <= slack).all()


@few
@given(logit_pairs(impossible=True), betas, st.sampled_from([0.5, 1.0, 3.0]))
def test_no_nan_and_infinite_where_support_is_violated(pair, beta, temperature):
    """
    Any finite logits and any −inf: never NaN. A KL is +inf where its second distribution excludes a token that its first
    one gives a probability (one that its precision can tell from 0), and finite otherwise; a JSD is always finite.
    """
    student, teacher = pair
    costs = token_divergence(student, teacher, beta, temperature)
    assert not costs.isnan().any()
    first, second = (student, teacher) if beta == 1 else (teacher, student)
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    probability = (first.to(wide) / temperature).log_softmax(-1).exp()
    violated = ((probability > 0) & (second == -torch.inf)).any(-1)
    assert torch.equal(costs == torch.inf, violated & (beta in (0.0, 1.0)))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_probability_that_underflows_is_one_of_zero(beta):
    """A token that the first model gives less than its precision can hold, and the second excludes, is no NaN."""
    likely, excluded = torch.tensor([0.0, -200.0]), torch.tensor([0.0, -torch.inf])
    student, teacher = (likely, excluded) if beta == 1 else (excluded, likely)
    student.requires_grad_()
    cost = token_divergence(student, teacher, beta)
    cost.backward()
    assert cost == 0
    assert torch.equal(student.grad, torch.zeros(2))


@few
@given(logit_pairs(impossible=True), st.floats(1e-6, 0.99), betas)
def test_a_floor_under_the_teacher_bounds_the_cost(pair, floor, beta):
    """KL(π‖(1 − ε)μ + ε/V) ≤ log(V/ε), whatever the teacher excludes; the JSD stays below its own bound."""
    student, teacher = pair
    costs = token_divergence(student, teacher, beta, teacher_prob_floor=floor).double()
    assert not costs.isnan().any()
    bound = math.log(student.shape[-1] / floor) if beta == 1 else math.log(2)
    if beta > 0:  # the forward KL is bounded by the student's support alone
        assert (costs <= bound + 1e-5).all()


@st.composite
def head_problems(draw):
    """Heads in float64 with unequal widths and biases that exclude tokens; a comparison; and a bound for any tile."""
    generator = torch.Generator().manual_seed(draw(seeds))
    rows, vocab = draw(st.integers(0, 9)), draw(st.integers(1, 40))
    problem = {}
    for who in ("student", "teacher"):
        width = draw(st.integers(1, 6))
        bias = draw(st.sampled_from([0.0, 1.0, 1e4])) * torch.randn(vocab, generator=generator, dtype=torch.float64)
        bias[torch.rand(vocab, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = -torch.inf
        bias[draw(st.integers(0, vocab - 1))] = 0.0
        problem[f"{who}_hidden"] = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        problem[f"{who}_head"] = Head(torch.randn(vocab, width, generator=generator, dtype=torch.float64), bias)
    row_mb = 5 * vocab * 8 / 2**20
    memory_mb = row_mb * draw(st.sampled_from([1e-3, 1.5, 2.7, 5.2, 1e4]))
    comparison = Comparison(draw(betas), draw(st.sampled_from([0.6, 1.0])), draw(st.sampled_from([0.0, 0.05])))
    return problem, comparison, memory_mb


@few
@given(head_problems())
def test_chunked_equals_dense(drawn):
    """Any shape, tile size, divergence and support: the same costs, infinities included, and the same gradient."""
    problem, comparison, memory_mb = drawn
    hidden = problem["student_hidden"].requires_grad_()
    logits = (logits_of(problem[f"{who}_hidden"], problem[f"{who}_head"]) for who in ("student", "teacher"))
    options = {"teacher_prob_floor": comparison.teacher_prob_floor}
    dense = token_divergence(*logits, comparison.beta, comparison.temperature, **options)
    finite = dense.isfinite()
    (expected,) = torch.autograd.grad(dense[finite].sum(), hidden, allow_unused=True, materialize_grads=True)
    loss, costs = chunked_divergence(**problem, weights=finite.double(), **asdict(comparison), memory_mb=memory_mb)
    (grad,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(costs, dense.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)
    *_, of_policy = chunked_policy_divergence(
        **problem,
        comparison=comparison,
        token_ids=torch.zeros(len(hidden), dtype=torch.int64),
        weights=torch.ones(len(hidden)),
        memory_mb=memory_mb,
    )
    torch.testing.assert_close(of_policy, costs, rtol=1e-9, atol=1e-11)


@few
@given(logit_pairs(impossible=True), betas)
def test_chunked_is_never_nan_either(pair, beta):
    """Half precision and logits of 1e4, as the trainers compute it: no NaN; finite, infinite and size as dense."""
    _, costs = chunked_divergence(*head_of(pair[0]), *head_of(pair[1]), beta=beta)
    student, teacher = (
        hidden.double() @ head.weight.double().T + head.bias.double() for hidden, head in map(head_of, pair)
    )
    assert not costs.isnan().any()
    if pair[0].dtype != torch.float64:  # float32's notion of a probability of 0
        student, teacher = student.float(), teacher.float()
    torch.testing.assert_close(costs, token_divergence(student, teacher, beta), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@few
@given(batch=batches(), raised=st.floats(0, 3))
def test_a_higher_limit_makes_no_feasible_rollout_infeasible(scope, batch, raised):
    costs, mask, limit, _ = batch
    costs, mask = tensors(costs, mask)
    feasible = rollout_cost(costs, mask, scope) <= limit
    assert (rollout_cost(costs, mask, scope)[feasible] <= limit + raised).all()
    for credit_assignment in ("trajectory", "token"):
        low, high = (violation_weights(costs, mask, d, scope, credit_assignment) for d in (limit, limit + raised))
        assert (high <= low).all()


@pytest.mark.parametrize("scope", ["sum", "worst_prefix"])
@few
@given(batch=batches(), rewards=st.lists(st.floats(-5, 5), min_size=3, max_size=3), horizon=st.integers(6, 12))
def test_token_and_trajectory_reward_agree_within_the_budget(scope, batch, rewards, horizon):
    """
    Where a prefix never costs more than the whole, a feasible rollout has no infeasible step: its steps add up to
    R̂(y) = R(y). A violator's add up to less than −n/H.
    """
    costs, mask, limit, _ = batch
    costs, mask = tensors(costs, mask)
    rewards = torch.tensor(rewards[: len(costs)]).double()
    assume(mask.any(-1).all())
    whole = modified_reward(rewards, costs, mask, limit, 20.0, scope)
    steps = token_modified_rewards(rewards, costs, mask, limit, 20.0, scope, horizon=horizon)
    first = returns_to_go(steps)[:, 0]
    feasible = rollout_cost(costs, mask, scope) <= limit
    torch.testing.assert_close(first[feasible], whole[feasible], rtol=0, atol=1e-12)
    assert (first[~feasible] <= -20.0 / horizon).all()


@st.composite
def groups(draw, most=3):
    """Rewards within ±5, costs as of [`batches`], groups of 4, every rollout with a token."""
    costs, mask, limit, size = draw(batches(group_sizes=(4,), max_groups=most))
    costs, mask = tensors(costs, mask)
    costs[~mask.any(-1), 0], mask[~mask.any(-1), 0] = 0.0, 1
    rewards = draw(st.lists(st.floats(-5, 5), min_size=len(costs), max_size=len(costs)))
    return torch.tensor(rewards).double(), costs, mask, size, limit


@pytest.mark.parametrize("aggregation", ["lexicographic", "sum_then_normalize"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@few
@given(batch=groups(), penalties=st.lists(st.floats(5.5, 1e4), min_size=2, max_size=2), scope=st.sampled_from(SCOPES))
def test_no_penalty_lifts_a_violator_above_a_feasible_rollout(aggregation, scale_rewards, batch, penalties, scope):
    """
    In every group, at every penalty above the largest |reward|, whatever the violator's reward. Feasible rollouts are
    ordered by their reward, and violators by their cost.
    The lexicographic order is the same at any two penalties that no cost exceeds.
    """
    rewards, costs, mask, size, limit = batch
    cost = rollout_cost(costs, mask, scope).view(-1, size)
    feasible = cost <= limit
    orders = []
    for penalty in penalties:
        values = constrained_advantages(
            rewards, costs, mask, size, limit, penalty, scope, "trajectory", aggregation, scale_rewards
        ).view(-1, size)
        assert values.isfinite().all()
        for value, reward, own_cost, inside in zip(values, rewards.view(-1, size), cost, feasible, strict=True):
            if inside.any() and (~inside).any():
                assert value[~inside].max() < value[inside].min()
            assert (value[inside][reward[inside].argsort()].diff() >= -1e-9).all()
            violators = value[~inside][own_cost[~inside].argsort()]
            assert (violators.diff() <= 1e-9).all()
        orders.append(values)
    if aggregation == "lexicographic" and cost.max() <= min(penalties):
        one, other = ((values[..., None] - values[..., None, :]).mul(1e6).round().sign() for values in orders)
        distinct = (one != 0) & (other != 0)
        assert torch.equal(one[distinct], other[distinct])


@few
@given(
    groups(),
    seeds,
    st.sampled_from(SCOPES),
    st.sampled_from(["trajectory", "token"]),
    st.sampled_from(["lexicographic", "sum_then_normalize"]),
    st.sampled_from(["group", "batch", "none"]),
)
def test_padding_and_order_do_not_matter(batch, seed, scope, credit_assignment, aggregation, scale_rewards):
    """Columns of garbage on either side, another order within groups and of groups: the same advantages."""
    rewards, costs, mask, size, limit = batch

    def compute(rewards, costs, mask):
        settings = (20.0, scope, credit_assignment, aggregation, scale_rewards, 12)
        return constrained_advantages(rewards, costs, mask, size, limit, *settings)

    expected = compute(rewards, costs, mask)
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).double().expand(len(costs), 4)
    outside = torch.zeros(len(costs), 4, dtype=mask.dtype)
    padded = compute(rewards, torch.cat([junk, costs, junk], 1), torch.cat([outside, mask, outside], 1))
    if credit_assignment == "token":
        padded = padded[:, 4:-4]
    torch.testing.assert_close(padded, expected, rtol=1e-12, atol=1e-12)

    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(costs)).view(-1, size)[torch.randperm(len(costs) // size, generator=generator)]
    order = torch.cat([group[torch.randperm(size, generator=generator)] for group in order])
    permuted = compute(rewards[order], costs[order], mask[order])
    torch.testing.assert_close(permuted, expected[order], rtol=1e-9, atol=1e-9)


@few
@given(
    st.lists(st.floats(-1e6, 1e6), max_size=30),
    st.floats(0, 10),
    st.floats(0, 1),
    st.tuples(*[st.floats(0, 1e3)] * 3),
    st.floats(0, 0.999),
)
def test_multipliers_stay_between_zero_and_their_maximum(violations, maximum, start, gains, ema):
    dual = DualMultiplier(start * maximum, gains[0], maximum)
    pid = PIDMultiplier(start * maximum, *gains, ema, maximum)
    for violation in violations:
        for multiplier in (dual, pid):
            multiplier.update(violation)
            assert 0.0 <= multiplier.value <= maximum


@few
@given(st.lists(st.floats(1e-3, 1e3), min_size=1), st.floats(0.01, 1), st.floats(0.1, 10))
def test_auto_limit_lies_among_the_costs_that_it_is_taken_from(costs, quantile, margin):
    limit = AutoLimit(8, quantile, margin, costs=costs).settle()
    assert margin * min(costs) * (1 - 1e-9) <= limit <= margin * max(costs) * (1 + 1e-9)


@few
@given(st.integers(0, 40), st.integers(1, 40), st.integers(2, 30), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_intervals_hold_the_rate_and_shrink_with_more_of_the_same(k, n, times, confidence):
    """Clusters too: the same clusters again and again narrow the interval. A rate in all of them is never certain."""
    k = min(k, n)
    successes = torch.tensor([k, n - k, n // 2])
    clusters = [(successes.repeat(m), torch.full((3 * m,), n)) for m in (1, times)]
    rate = successes.sum().item() / (3 * n)
    ends = [
        (k / n, [interval(m * k, m * n, confidence) for m in (1, times)])
        for interval in (wilson_interval, clopper_pearson_interval)
    ]
    ends.append((rate, [clustered_rate_interval(*cluster, confidence) for cluster in clusters]))
    for point, ((low, high), (lower, upper)) in ends:
        assert 0 <= low <= point <= high <= 1
        assert 0 <= lower <= point <= upper <= 1
        assert upper - lower < high - low


@few
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), seeds)
def test_bootstrap_holds_the_mean_and_stays_among_the_values(values, seed):
    values = torch.tensor(values).double()
    low, high = bootstrap_interval(values, num_resamples=400, seed=seed)
    assert values.min() - 1e-9 <= low <= values.mean() + 1e-9
    assert values.mean() - 1e-9 <= high <= values.max() + 1e-9
