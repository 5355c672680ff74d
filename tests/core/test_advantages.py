"""Group-relative advantages against a plain-Python reference, TRL's own formula, and the properties DESIGN promises."""

import itertools
import math

import pytest
import torch
from core_reference import SCOPES, advantages, batches, tensors
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from trl_cmdp.core import constrained_advantages


FORMS = list(itertools.product(["trajectory", "token"], ["lexicographic", "sum_then_normalize"]))
SCALES = ["group", "batch", "none"]
TOLERANCE = 1e-7  # TRL's nanstd takes its Bessel factor in float32, whatever it is given
REWARD = st.sampled_from([1.0, 0.0, -0.5, 0.25, math.nan])


def trl_advantages(rewards, num_generations, scale_rewards):
    """GRPO's advantages of one summed reward, line by line as in trl/trainer/grpo_trainer.py 1.16."""
    mean_grouped_rewards = torch.nanmean(rewards.view(-1, num_generations), dim=1)
    mean_grouped_rewards = mean_grouped_rewards.repeat_interleave(num_generations, dim=0)
    if scale_rewards in ["group", "none"]:
        std_rewards = nanstd(rewards.view(-1, num_generations), dim=1)
        std_rewards = std_rewards.repeat_interleave(num_generations, dim=0)
    else:
        std_rewards = nanstd(rewards).expand_as(rewards)
    advantages = rewards - mean_grouped_rewards
    if scale_rewards != "none":
        advantages = advantages / (std_rewards + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


def trl_normalize_then_sum(rewards, weights, num_generations):
    """GRPO's advantages of several rewards (B, F), each standardised before the sum, by TRL's operations."""
    grouped = rewards.view(-1, num_generations, rewards.size(1))
    each = (grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    total = (each.view_as(rewards) * weights.unsqueeze(0)).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = torch.nan
    return torch.nan_to_num((total - torch.nanmean(total)) / (nanstd(total) + 1e-4), nan=0.0)


def single_tokens(costs):
    """Rollouts of one token each, which cost what is given."""
    costs = torch.tensor(costs, dtype=torch.float64).unsqueeze(-1)
    return costs, torch.ones_like(costs)


@pytest.mark.parametrize(("credit_assignment", "aggregation"), FORMS)
@pytest.mark.parametrize("scale_rewards", SCALES)
@hypothesis_settings(max_examples=50)
@given(
    batch=batches(group_sizes=(1, 2, 4)),
    data=st.data(),
    scope=st.sampled_from(SCOPES),
    penalty=st.sampled_from([20.0, 1.5]),
    horizon=st.integers(1, 9),
)
def test_equals_the_reference(credit_assignment, aggregation, scale_rewards, batch, data, scope, penalty, horizon):
    """DESIGN's formulas one rollout at a time, with NaN rewards, holes, empty rollouts and costs at the limit."""
    costs, mask, limit, size = batch
    rewards = data.draw(st.lists(REWARD, min_size=len(costs), max_size=len(costs)))
    settings = (size, limit, penalty, scope, credit_assignment, aggregation, scale_rewards, horizon)
    expected = torch.tensor(advantages(rewards, costs, mask, *settings), dtype=torch.float64)
    actual = constrained_advantages(torch.tensor(rewards).double(), *tensors(costs, mask), *settings)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("credit_assignment", "aggregation"), FORMS)
@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("cost_limit", [math.inf, 1.0])
def test_all_feasible_is_grpo_bit_for_bit(credit_assignment, aggregation, scale_rewards, missing, cost_limit):
    """With every rollout inside the budget the advantages are TRL's, float32 bit for bit, NaN rewards included."""
    torch.manual_seed(0)
    for _ in range(20):
        rewards = torch.randn(24) * 3 if torch.rand(()) < 0.5 else torch.randint(0, 2, (24,)).float()
        if missing:
            rewards[torch.rand(24) < 0.3] = torch.nan
        costs, mask = torch.rand(24, 7), torch.rand(24, 7) < 0.8
        mask[:, 2] = True
        actual = constrained_advantages(
            rewards, costs, mask, 6, cost_limit, 20.0, "mean", credit_assignment, aggregation, scale_rewards, 9
        )
        expected = trl_advantages(rewards, 6, scale_rewards)
        assert actual.dtype == torch.float32
        if credit_assignment == "trajectory":
            assert torch.equal(actual, expected)
        else:  # on every token that counts; what lies behind the last one is masked in the loss
            assert torch.equal(actual[mask], expected.unsqueeze(-1).expand(24, 7)[mask])


class TestNormalizeThenSum:
    """Several rewards, each standardised before their weighted sum, with NaN where a function did not score."""

    WEIGHTS = torch.tensor([1.0, 0.3, -2.0])

    @pytest.fixture
    def rewards(self):
        torch.manual_seed(0)
        rewards = torch.randn(24, 3) * torch.tensor([1.0, 30.0, 1e4])
        rewards[torch.rand(24, 3) < 0.3] = torch.nan
        rewards[3] = torch.nan
        return rewards

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    @pytest.mark.parametrize("scale_rewards", SCALES)
    @pytest.mark.parametrize("violators", [[], [6, 9, 20]])
    def test_a_feasible_group_is_grpo_bit_for_bit(self, rewards, credit_assignment, scale_rewards, violators):
        """Whatever the other groups of the batch hold."""
        costs = torch.rand(24, 5)
        costs[violators] += 2
        actual = constrained_advantages(
            rewards, costs, torch.ones(24, 5), 6, 1.0, 20.0, "mean", credit_assignment, "lexicographic", scale_rewards, 5,
            self.WEIGHTS,
        )  # fmt: skip
        feasible = [row for row in range(24) if row // 6 not in {violator // 6 for violator in violators}]
        expected = trl_normalize_then_sum(rewards, self.WEIGHTS, 6)
        expected = expected if credit_assignment == "trajectory" else expected.unsqueeze(-1).expand(24, 5)
        assert torch.equal(actual[feasible], expected[feasible])

    @pytest.mark.parametrize("scale_rewards", SCALES)
    def test_z_is_over_the_feasible_rollouts(self, scale_rewards):
        """By hand: two functions over the three that are feasible, the deviation of the batch's four sums as TRL's."""
        rewards = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 6.0], [9.0, 9.0]]).double()
        costs, mask = single_tokens([0.0, 0.0, 0.0, 5.0])
        weights = torch.tensor([1.0, 0.5])
        values = constrained_advantages(
            rewards, costs, mask, 4, 1.0, 20.0, scale_rewards=scale_rewards, reward_weights=weights
        )
        first = [1 / (1 + 1e-4), -1 / (1 + 1e-4), 0.0]
        second = [-2.0 / (math.sqrt(12) + 1e-4), -2.0 / (math.sqrt(12) + 1e-4), 4.0 / (math.sqrt(12) + 1e-4)]
        whole = (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4) @ weights.double()
        z = [(a + 0.5 * b) / (whole.std().item() + 1e-4) for a, b in zip(first, second, strict=True)]
        utilities = torch.tensor([*z, min(z) - 1 - 5 / 20]).double()
        torch.testing.assert_close(values, utilities - utilities.mean(), rtol=TOLERANCE, atol=TOLERANCE)

    def test_degenerate_batches_are_finite(self, rewards):
        """Groups of one give 0, and so does what nothing scores; a single feasible rollout has no z of its own."""
        costs, mask = torch.full((24, 2), 0.5), torch.ones(24, 2)
        settings = {"cost_limit": 1.0, "penalty": 20.0, "reward_weights": self.WEIGHTS}
        assert torch.equal(constrained_advantages(rewards, costs, mask, 1, **settings), torch.zeros(24))
        unscored = torch.full_like(rewards, torch.nan)
        assert torch.equal(constrained_advantages(unscored, costs, mask, 4, **settings), torch.zeros(24))
        costs[1:] = 3.0
        utilities = torch.tensor([0.0, *[-1 - 3 / 20] * 3])
        alone = constrained_advantages(rewards, costs, mask, 4, **settings)[:4]
        torch.testing.assert_close(alone, utilities - utilities.mean(), rtol=0, atol=1e-5)

    def test_with_sum_then_normalize(self):
        with pytest.raises(ValueError, match="Leave out `reward_weights`"):
            constrained_advantages(
                torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2), 2, 1.0, 20.0,
                constraint_aggregation="sum_then_normalize", reward_weights=torch.ones(2),
            )  # fmt: skip


@given(
    rewards=st.lists(st.floats(-100, 100), min_size=8, max_size=8),
    costs=st.lists(st.floats(0, 1e6), min_size=8, max_size=8),
)
def test_bounded_and_centred(rewards, costs):
    """Lexicographic advantages sum to 0 in each group; neither rewards nor costs make them large (G = 8: |z| < √7)."""
    costs, mask = single_tokens(costs)
    values = constrained_advantages(torch.tensor(rewards).double(), costs, mask, 8, 1.0, 20.0)
    assert values.abs().max() <= 2 * math.sqrt(7) + 2
    assert abs(values.sum().item()) < 1e-9


def test_lexicographic_by_hand():
    """Rewards 1, 0 inside and costs 2, 30 outside, n = 10, d = 1: z = ±0.7070, U = −1.907, −2.707, less their mean."""
    costs, mask = single_tokens([0.0, 1.0, 2.0, 30.0])
    values = constrained_advantages(torch.tensor([1.0, 0.0, 7.0, 7.0]).double(), costs, mask, 4, 1.0, 10.0)
    z = 0.5 / (math.sqrt(0.5) + 1e-4)
    utilities = [z, -z, -z - 1.2, -z - 2.0]
    assert values.tolist() == pytest.approx([u - sum(utilities) / 4 for u in utilities])


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_one_feasible_rollout_has_no_reward_part(scale_rewards):
    """With at most one feasible rollout z is 0: its reward cannot be told from the violation."""
    costs, mask = single_tokens([0.0, 2.0, 3.0, 2.0])
    values = [
        constrained_advantages(
            torch.tensor([reward, 1.0, 1.0, 1.0]).double(), costs, mask, 4, 1.0, 20.0, scale_rewards=scale_rewards
        )
        for reward in (0.0, 5.0)
    ]
    assert torch.equal(values[0], values[1])
    assert values[0][0] > values[0][1] == values[0][3] > values[0][2]


@pytest.mark.parametrize(("credit_assignment", "aggregation"), FORMS)
@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("how", ["unscorable", "masked"])
def test_unjudged_rollouts_leave_the_rewards_of_others_alone(credit_assignment, aggregation, scale_rewards, how):
    """Feasible group: the others' advantages are those of the group without it, and its own are 0."""
    torch.manual_seed(0)
    rewards, costs, mask = torch.randn(5).double(), torch.rand(5, 3).double(), torch.ones(5, 3)
    if how == "unscorable":
        rewards[2] = torch.nan
    else:
        mask[2] = 0
        rewards[2] = 50.0  # what TRL scored on a completion that `mask_truncated_completions` drops
    others = torch.tensor([0, 1, 3, 4])
    settings = (2.0, 20.0, "mean", credit_assignment, aggregation, scale_rewards, 4)
    values = constrained_advantages(rewards, costs, mask, 5, *settings)
    without = constrained_advantages(rewards[others], costs[others], mask[others], 4, *settings)
    torch.testing.assert_close(values[others], without, rtol=1e-12, atol=1e-12)
    assert torch.equal(values[2], torch.zeros_like(values[2]))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_generations": 3}, "groups of 3"),
        ({"scope": "median"}, "median"),
        ({"credit_assignment": "step"}, "step"),
        ({"constraint_aggregation": "add"}, "add"),
        ({"scale_rewards": "std"}, "std"),
        ({"credit_assignment": "token"}, "horizon"),
    ],
)
def test_errors(changes, match):
    """Each wrong argument is named."""
    arguments = {"num_generations": 2, "cost_limit": 1.0, "penalty": 20.0} | changes
    with pytest.raises(ValueError, match=match):
        constrained_advantages(torch.ones(4), torch.ones(4, 2), torch.ones(4, 2), **arguments)
