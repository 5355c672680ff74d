"""Exact optima (DESIGN, section 6, oracle 2): what the modified reward leads to is the constrained problem's solution."""

import itertools

import pytest
import torch
from core_reference import SCOPES

from trl_cmdp.core import constrained_advantages, modified_reward, rollout_cost, token_divergence, violation_weights


VOCAB, HORIZON, EOS = 3, 3, 0
PENALTY = 20.0


class Enumeration:
    """Every sequence over 3 tokens that ends with EOS or after 3 steps, a teacher, rewards, and a tabular policy."""

    def __init__(self, scope, seed):
        generator = torch.Generator().manual_seed(seed)
        whole = itertools.product(range(VOCAB), repeat=HORIZON)
        sequences = sorted({s[: s.index(EOS) + 1] if EOS in s else s for s in whole})
        prefixes = sorted({s[:t] for s in sequences for t in range(len(s))})
        rows = [[*s, *[EOS] * (HORIZON - len(s))] for s in sequences]
        self.tokens = torch.tensor(rows)  # (S, H)
        self.states = torch.tensor(
            [[prefixes.index(s[:t]) if t < len(s) else 0 for t in range(HORIZON)] for s in sequences]
        )
        self.mask = torch.tensor([[t < len(s) for t in range(HORIZON)] for s in sequences])
        self.num_states = len(prefixes)
        teacher = torch.randn(self.num_states, VOCAB, generator=generator, dtype=torch.float64).mul(1.5)
        self.costs = -self.token_logps(teacher)
        self.costs[~self.mask] = torch.nan
        self.rewards = torch.rand(len(sequences), generator=generator, dtype=torch.float64)
        self.scope = scope
        self.cost = rollout_cost(self.costs, self.mask, scope)
        self.limit = self.cost.median().item() + 1e-9
        # The best sequence of all must break the limit, or the constraint would not bind.
        self.rewards[self.cost.argmax()] = 1.5

    def token_logps(self, logits):
        return logits.log_softmax(-1)[self.states, self.tokens]

    def logps(self, logits):
        return (self.token_logps(logits) * self.mask).sum(-1)  # (S,)

    def visits(self, probs):
        """Probability of each state and action, (states, 3)."""
        visits = torch.full((self.num_states, VOCAB), 1e-300, dtype=torch.float64)
        weights = (probs.detach().unsqueeze(-1) * self.mask)[self.mask]
        return visits.index_put_((self.states[self.mask], self.tokens[self.mask]), weights, accumulate=True)

    def constrained_optimum(self):
        """Index of the largest R among the sequences with C ≤ d."""
        feasible = [i for i, cost in enumerate(self.cost.tolist()) if cost <= self.limit]
        return max(feasible, key=lambda i: self.rewards[i].item())

    def arguments(self, rows=slice(None)):
        return self.rewards[rows], self.costs[rows], self.mask[rows]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_ascent_on_the_modified_reward_reaches_the_constrained_optimum(scope, seed):
    """
    Cost teacher_nll, the exact natural gradient of E[R̂] (plain ascent crosses the plateaus of a softmax too slowly): all
    mass ends on the best sequence within the budget.
    """
    problem = Enumeration(scope, seed)
    optimum = problem.constrained_optimum()
    assert problem.rewards.argmax() != optimum
    modified = modified_reward(*problem.arguments(), problem.limit, PENALTY, scope)
    assert modified.argmax() == optimum
    logits = torch.zeros(problem.num_states, VOCAB, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        probs = problem.logps(logits).exp()
        (grad,) = torch.autograd.grad((probs * modified).sum(), logits)
        with torch.no_grad():  # the gradient is (probability of visiting s and taking a) · A(s, a): keep A
            logits += 0.5 * grad / problem.visits(probs)
    probs = problem.logps(logits).exp().detach()
    assert probs[optimum] > 0.98
    assert probs[problem.cost > problem.limit].sum() < 0.01


def train_on_samples(problem, credit_assignment, aggregation):
    """REINFORCE with `constrained_advantages` on 4 groups of 16, the score function alone; the final probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(problem.num_states, VOCAB, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        probs = problem.logps(logits).detach().exp()
        drawn = torch.multinomial(probs, 64, replacement=True, generator=generator)
        advantages = constrained_advantages(
            *problem.arguments(drawn),
            16,
            problem.limit,
            PENALTY,
            problem.scope,
            credit_assignment,
            aggregation,
            horizon=HORIZON,
        )
        if credit_assignment == "trajectory":
            advantages = advantages.unsqueeze(-1)
        loss = -(advantages * problem.token_logps(logits)[drawn] * problem.mask[drawn]).sum() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return problem.logps(logits).exp().detach()


@pytest.mark.parametrize(
    ("scope", "credit_assignment"),
    [*((scope, "trajectory") for scope in SCOPES), ("sum", "token"), ("worst_prefix", "token")],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_policy_gradient_reaches_the_constrained_optimum(scope, credit_assignment, seed):
    """From the uniform policy, by sampled groups and lexicographic advantages, to the exact optimum."""
    problem = Enumeration(scope, seed)
    probs = train_on_samples(problem, credit_assignment, "lexicographic")
    assert probs.argmax() == problem.constrained_optimum()
    assert probs.max() > 0.9
    assert probs[problem.cost > problem.limit].sum() < 0.02


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
def test_sum_then_normalize_keeps_the_budget(scope, credit_assignment):
    """Its optimum is the same, but a penalty of 20 drowns the reward while any rollout violates: only C ≤ d is sure."""
    problem = Enumeration(scope, 0)
    probs = train_on_samples(problem, credit_assignment, "sum_then_normalize")
    assert probs[problem.cost > problem.limit].sum() < 0.05


TEACHER = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
LIMIT = 0.1


def divergence(policies):
    """KL(π‖μ) of each row."""
    return token_divergence(policies.log(), TEACHER.log().expand_as(policies))


def tilted_optimum():
    """π* ∝ μ·exp(R/η), with η by bisection on KL(π*‖μ) = d."""
    low, high = 1e-2, 1e3
    for _ in range(200):
        eta = (low + high) / 2
        policy = (TEACHER.log() + REWARDS / eta).softmax(-1)
        low, high = (eta, high) if divergence(policy) > LIMIT else (low, eta)
    return policy


def expected_modified_reward(policies, penalty):
    """Σ_a π(a)·R̂(a), where every action of π costs D(π, μ)."""
    costs = divergence(policies).repeat_interleave(len(REWARDS)).unsqueeze(-1)
    rewards = REWARDS.repeat(len(policies))
    modified = modified_reward(rewards, costs, torch.ones_like(costs), LIMIT, penalty)
    return (policies * modified.view(policies.shape)).sum(-1)


def simplex_grid(parts):
    points = [(i, j, parts - i - j) for i in range(1, parts) for j in range(1, parts - i)]
    return torch.tensor(points, dtype=torch.float64) / parts


def test_tilted_policy_solves_the_constrained_problem():
    """No policy of a fine grid with KL ≤ d has a larger expected reward than π*, and one comes close."""
    best = tilted_optimum()
    assert divergence(best).item() == pytest.approx(LIMIT, abs=1e-12)
    grid = simplex_grid(400)
    values = (grid @ REWARDS)[divergence(grid) <= LIMIT]
    assert (best @ REWARDS) - 5e-3 < values.max() <= best @ REWARDS


@pytest.mark.parametrize("penalty", [1.0, 20.0, 1e6])
def test_maximiser_of_the_modified_reward_is_the_tilted_policy(penalty):
    """Grid, then local search on E[R̂]: the maximiser is feasible, has π*'s value and is π*, for every n above |R|."""
    best = tilted_optimum()
    grid = simplex_grid(100)
    current = grid[expected_modified_reward(grid, penalty).argmax()]
    generator = torch.Generator().manual_seed(0)
    for radius in torch.logspace(-2, -7, 40).tolist():
        moves = radius * torch.randn(2000, len(REWARDS), generator=generator, dtype=torch.float64)
        near = torch.cat([current.unsqueeze(0), (current + moves - moves.mean(-1, keepdim=True)).clamp(min=1e-9)])
        near = near / near.sum(-1, keepdim=True)
        current = near[expected_modified_reward(near, penalty).argmax()]
    assert divergence(current) <= LIMIT
    assert (current @ REWARDS).item() == pytest.approx((best @ REWARDS).item(), abs=1e-6)
    assert current @ REWARDS <= best @ REWARDS + 1e-12
    assert (current - best).abs().max() < 1e-3


def test_both_parts_of_the_gradient_reach_the_tilted_policy():
    """Reward alone inside the budget, the differentiated divergence alone outside it, on the exact expectation."""
    best = tilted_optimum()
    logits = TEACHER.log().clone().requires_grad_()
    averaged = []
    for step in range(3000):
        policy = logits.softmax(-1)
        cost = token_divergence(logits, TEACHER.log())
        rows = cost.detach().expand(len(REWARDS)).unsqueeze(-1)  # the cost of every action, as a rollout of one token
        mask = torch.ones_like(rows)
        modified = modified_reward(REWARDS, rows, mask, LIMIT, PENALTY)
        weight = violation_weights(rows, mask, LIMIT)[0, 0]
        (grad,) = torch.autograd.grad((policy * modified).sum() - weight * cost, logits)
        with torch.no_grad():
            logits += 0.5 / (1 + step) ** 0.5 * grad
        if step >= 2500:
            averaged.append(policy.detach())
    policy = torch.stack(averaged).mean(0)
    assert divergence(policy).item() == pytest.approx(LIMIT, rel=0.05)
    assert (policy @ REWARDS).item() == pytest.approx((best @ REWARDS).item(), abs=5e-3)
    assert (policy - best).abs().max() < 1e-2
