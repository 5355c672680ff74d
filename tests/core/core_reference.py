"""DESIGN's section 1 in plain Python, one token at a time: what the tests of `core` compare with."""

import math

import torch
from hypothesis import strategies as st


SCOPES = ("mean", "sum", "worst_prefix")


def cost_of(tokens, scope):
    """C of a list of counted token costs, 0 for none."""
    if not tokens:
        return 0.0
    if scope == "sum":
        return sum(tokens)
    if scope == "mean":
        return sum(tokens) / len(tokens)
    return max(sum(tokens[:t]) / t for t in range(1, len(tokens) + 1))


def rollout(costs, mask):
    """Costs of the tokens that count, and their positions."""
    positions = [t for t, counts in enumerate(mask) if counts]
    return [costs[t] for t in positions], positions


def step_rewards(reward, costs, mask, limit, penalty, scope, horizon):
    """R̂_t of one rollout, by position; the last entry is the sum over the steps L < t ≤ H."""
    tokens, positions = rollout(costs, mask)
    length, total = len(tokens), cost_of(tokens, scope)
    steps = [0.0] * (len(costs) + 1)
    for t, position in enumerate(positions, start=1):
        if t < length:
            violated = cost_of(tokens[: t - 1], scope) > limit
            steps[position] = -(penalty + tokens[t - 1]) / horizon if violated else 0.0
        else:
            steps[position] = reward if total <= limit else -(penalty + tokens[t - 1]) / horizon
    for _ in range(length + 1, horizon + 1):
        steps[-1] += -(penalty + total) / horizon if total > limit else 0.0
    return steps


def mean_and_std(values):
    """Mean and Bessel-corrected deviation of what is not NaN; NaN where there are too few."""
    known = [value for value in values if not math.isnan(value)]
    mean = sum(known) / len(known) if known else math.nan
    if len(known) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1))


def standardize(value, mean, std):
    """(value − mean)/(std + 1e-4), only centred for std None, 0 where it is not defined."""
    result = value - mean if std is None else (value - mean) / (std + 1e-4)
    return 0.0 if math.isnan(result) else result


def advantages(
    rewards, costs, mask, size, limit, penalty, scope, credit_assignment, aggregation, scale_rewards, horizon
):
    """A_i, or A_it by position, of all groups of `size`."""
    if size == 1:
        return [0.0 if credit_assignment == "trajectory" else [0.0] * len(row) for row in costs]
    everyone = range(len(rewards))
    tokens = [rollout(c, m)[0] for c, m in zip(costs, mask, strict=True)]
    cost = [cost_of(t, scope) for t in tokens]
    feasible = [c <= limit for c in cost]
    scored = [r if t else math.nan for r, t in zip(rewards, tokens, strict=True)]
    groups = [range(start, start + size) for start in range(0, len(rewards), size)]

    def statistics(values, group):
        mean, std = mean_and_std([values[i] for i in group])
        if scale_rewards == "batch":
            std = mean_and_std(values)[1]
        return mean, None if scale_rewards == "none" else std

    result = [None] * len(rewards)
    for group in groups:
        if aggregation == "lexicographic":
            within = [scored[i] if feasible[i] else math.nan for i in everyone]
            z = {i: standardize(within[i], *statistics(within, group)) for i in group}
            if credit_assignment == "trajectory":
                floor = min([0.0, *(z[i] for i in group if feasible[i])])
                size_of = 1.0 if scale_rewards == "none" else penalty
                utility = {
                    i: z[i] if feasible[i] else floor - (penalty + min(cost[i], penalty)) / size_of for i in group
                }
                for i in group:
                    result[i] = utility[i] - sum(utility.values()) / size
                continue
            unit = 1.0 if scale_rewards == "none" else penalty
            steps = {
                i: [step / unit for step in step_rewards(0.0, costs[i], mask[i], limit, penalty, scope, horizon)]
                for i in everyone
            }
            first = [sum(steps[i]) for i in everyone]
            for i in group:
                result[i] = [
                    z[i] + standardize(sum(steps[i][t:]), *statistics(first, group)) for t in range(len(costs[i]))
                ]
        else:
            # A feasible rollout without a reward has no R̂.
            unknown = [feasible[i] and math.isnan(scored[i]) for i in everyone]
            known = [0.0 if math.isnan(r) else r for r in scored]
            if credit_assignment == "trajectory":
                whole = [
                    math.nan if unknown[i] else known[i] if feasible[i] else -(penalty + cost[i]) for i in everyone
                ]
                for i in group:
                    result[i] = standardize(whole[i], *statistics(whole, group))
                continue
            steps = [step_rewards(known[i], costs[i], mask[i], limit, penalty, scope, horizon) for i in everyone]
            first = [math.nan if unknown[i] else sum(steps[i]) for i in everyone]
            for i in group:
                result[i] = [
                    0.0 if unknown[i] else standardize(sum(steps[i][t:]), *statistics(first, group))
                    for t in range(len(costs[i]))
                ]
    return result


@st.composite
def batches(draw, group_sizes=(1,), max_groups=3, max_length=6):
    """
    Costs and mask of shape (B, T) with holes, empty and full rows. Costs and limit are eighths, so that sums are exact
    and a cost that equals the limit equals it in every implementation. Masked positions hold NaN, inf or anything.
    """
    size = draw(st.sampled_from(group_sizes))
    rows = size * draw(st.integers(1, max_groups))
    length = draw(st.integers(1, max_length))
    row = st.lists(st.booleans(), min_size=length, max_size=length) | st.just([True] * length)
    mask = draw(st.lists(row | st.just([False] * length), min_size=rows, max_size=rows))
    value = st.integers(0, 16).map(lambda eighths: eighths / 8)
    junk = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0])
    costs = [[draw(value if counts else junk) for counts in row] for row in mask]
    limit = draw(st.integers(0, 16).map(lambda eighths: eighths / 8))
    return costs, mask, limit, size


def tensors(costs, mask):
    return torch.tensor(costs, dtype=torch.float64), torch.tensor(mask, dtype=torch.int64)
