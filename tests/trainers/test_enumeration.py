"""
Oracle 1 (DESIGN section 6): on a problem so small that every sequence can be listed, the trainer's gradient, averaged
over all groups with their probabilities, is the gradient of the objective.

The trainer's own code runs on one batch that holds every ordered pair of sequences (G = 2). As its loss is linear in
advantages and divergence weights, each pair's are scaled by the pair's probability. The reference is autograd through
the dense logits in float64.
"""

from itertools import product

import pytest
import torch
from datasets import Dataset
from helpers import EOS, gradients_of, make_model, make_tokenizer, make_trainer, relative_error, scripted

import trl_cmdp.trainers.constrained_trainer as constrained_trainer
from trl_cmdp.core import (
    infeasible_steps,
    modified_reward,
    rollout_cost,
    token_divergence,
    token_modified_rewards,
    violation_weights,
)


VOCAB = 3  # <pad>, which is a token like any other here, <eos>, and one character
HORIZON = 4
PENALTY = 2.0
TEMPERATURE = 0.7
SCOPES = ["mean", "sum", "worst_prefix"]
PROMPT = "0"


def enumerate_sequences() -> list[list[int]]:
    """Every completion: ended by EOS, or cut at the horizon."""
    return [
        list(tokens)
        for length in range(1, HORIZON + 1)
        for tokens in product(range(VOCAB), repeat=length)
        if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == HORIZON)
    ]


SEQUENCES = enumerate_sequences()
LENGTHS = torch.tensor([len(sequence) for sequence in SEQUENCES])
MASK = torch.arange(HORIZON) < LENGTHS.unsqueeze(1)  # (S, H)
# Any rewards do, as long as they are smaller than the penalty.
REWARDS = torch.rand(len(SEQUENCES), generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1


def exact_weights(costs, mask, cost_limit, scope, credit_assignment="trajectory"):
    """What the surrogate's weights would be for the explicit part of the gradient to be that of the objective."""
    counts = mask.sum(-1, keepdim=True)
    if scope == "sum":
        within = torch.ones_like(costs)
    elif scope == "mean":
        within = (1 / counts).expand_as(costs)
    else:
        position = torch.arange(1, costs.size(1) + 1)
        running = (costs * mask).cumsum(-1) / position
        worst = running.masked_fill(mask == 0, -1).argmax(-1, keepdim=True) + 1
        within = (position <= worst) / worst
    violated = (rollout_cost(costs, mask, scope) > cost_limit).unsqueeze(-1)
    if credit_assignment == "trajectory":
        return (violated * within * mask).to(costs.dtype)
    steps = infeasible_steps(costs, mask, cost_limit, scope)
    return ((steps + violated * within * (HORIZON - counts)) / HORIZON * mask).to(costs.dtype)


class Problem:
    """The enumerated objective, differentiable by the student's parameters."""

    def __init__(self, student, teacher, scope, beta):
        self.scope = scope
        tokens = torch.full((len(SEQUENCES), HORIZON), 0)
        for row, sequence in enumerate(SEQUENCES):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
        input_ids = torch.cat([torch.full((len(tokens), 1), 2), tokens], dim=1)  # the prompt is token 2
        logits, teacher_logits = (model(input_ids=input_ids).logits[:, :-1] for model in (student, teacher))
        logps = (logits / TEMPERATURE).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        self.logps = torch.where(MASK, logps, 0.0).sum(1)  # (S,)
        self.costs = token_divergence(logits, teacher_logits, beta=beta, temperature=TEMPERATURE)  # (S, H)
        self.probabilities = self.logps.exp()
        # A limit in the widest gap between the middle costs, so that rounding decides about no sequence and no prefix
        # (a prefix costs what the sequence costs that ends with it).
        cost = rollout_cost(self.costs, MASK, scope).detach().sort().values
        cost = cost[len(cost) // 4 : -len(cost) // 4]
        self.gap, widest = (value.item() for value in cost.diff().max(0))
        self.cost_limit = (cost[widest] + cost[widest + 1]).item() / 2

    def returns(self, credit_assignment: str, costs: torch.Tensor) -> torch.Tensor:
        """Modified return of each sequence, by functions that tests/core holds to the formulas, step by step."""
        arguments = (REWARDS, costs, MASK, self.cost_limit, PENALTY, self.scope)
        if credit_assignment == "trajectory":
            return modified_reward(*arguments)
        return token_modified_rewards(*arguments, horizon=HORIZON).sum(1)

    def score_part(self, credit_assignment: str) -> torch.Tensor:
        return (self.probabilities * self.returns(credit_assignment, self.costs).detach()).sum()

    def explicit_part(self, credit_assignment: str) -> torch.Tensor:
        return (self.probabilities.detach() * self.returns(credit_assignment, self.costs)).sum()

    def surrogate(self, credit_assignment: str) -> torch.Tensor:
        """−Σ_y π(y) Σ_t w_t D_t with w_t of DESIGN: violating rollouts, or infeasible steps."""
        weights = violation_weights(self.costs.detach(), MASK, self.cost_limit, self.scope, credit_assignment)
        return -(self.probabilities.detach() * (weights * self.costs).sum(1)).sum()

    def closeness(self) -> torch.Tensor:
        """−E over pairs of Σ_t w_t D_t where the reward is silent: w = 1 less the mean success of the pair, at least 0.3,
        which is also that of the better of the two within the limit, and times d/C outside it."""
        success = (REWARDS - REWARDS.min()) / (REWARDS.max() - REWARDS.min())
        cost = rollout_cost(self.costs.detach(), MASK, self.scope).unsqueeze(1)
        mean = (success.unsqueeze(1) + success) / 2  # (S, S), of each sequence and its companion
        better = (success.unsqueeze(1) > success) & (cost <= self.cost_limit)
        silence = torch.where(better, 0.0, 1 - mean).clamp(min=0.3)
        weights = silence * self.cost_limit / cost.clamp(min=self.cost_limit)
        probabilities = self.probabilities.detach()
        return -(probabilities * (MASK * self.costs).sum(1) * (weights @ probabilities)).sum()


def trainer_gradient(tmp_path, student, teacher, problem, scope, credit_assignment, beta, coefficient, unrewarded=0.0):
    """−H·∇(the trainer's loss), averaged over all groups with their probabilities."""
    pairs = list(product(range(len(SEQUENCES)), repeat=2))
    rows = [index for pair in pairs for index in pair]
    table = {tuple(sequence): reward for sequence, reward in zip(SEQUENCES, REWARDS.tolist(), strict=True)}
    trainer = make_trainer(
        tmp_path,
        model=student,
        reward_funcs=lambda completion_ids, **kwargs: [table[tuple(ids)] for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": [PROMPT]}),
        tokenizer=make_tokenizer("0"),
        teacher_model=teacher,
        rollout_func=scripted([SEQUENCES[index] for index in rows]),
        per_device_train_batch_size=len(rows),
        num_generations=2,
        max_completion_length=HORIZON,
        loss_type="dr_grpo",
        scale_rewards="none",
        temperature=TEMPERATURE,
        teacher_beta=beta,
        cost_scope=scope,
        cost_limit=problem.cost_limit,
        violation_penalty=PENALTY,
        violation_distill_coef=coefficient,
        unrewarded_distill_coef=unrewarded,
        credit_assignment=credit_assignment,
        constraint_aggregation="sum_then_normalize",
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([{"prompt": PROMPT} for _ in rows])
    probabilities = problem.probabilities.detach()
    scale = torch.tensor([probabilities[a] * probabilities[b] * len(pairs) for a, b in pairs for _ in range(2)])
    advantages = batch["advantages"]
    batch["advantages"] = advantages * (scale if advantages.dim() == 1 else scale.unsqueeze(1))
    if "divergence_weights" in batch:
        batch["divergence_weights"] = batch["divergence_weights"] * scale.unsqueeze(1)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: -HORIZON * parameter.grad for name, parameter in trainer.model.named_parameters()}


def add(first: dict, second: dict, factor: float) -> dict:
    """factor·first + second."""
    return {name: factor * first[name] + second[name] for name in first}


@pytest.fixture
def models():
    student = make_model(3, vocab_size=VOCAB, spread=0.7, dtype=torch.float64)
    teacher = make_model(4, vocab_size=VOCAB, spread=0.7, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize(
    ("scope", "credit_assignment", "beta", "coefficient"),
    [
        *((scope, credit, 1.0, 1.0) for scope in SCOPES for credit in ("trajectory", "token")),
        *(("mean", "trajectory", beta, 1.0) for beta in (0.0, 0.5)),
        ("mean", "trajectory", 1.0, 0.25),
    ],
)
def test_gradient_is_that_of_the_enumerated_objective(tmp_path, models, scope, credit_assignment, beta, coefficient):
    """(G−1)/G of the score-function part, as the group's mean holds the rollout itself, plus the surrogate's share."""
    student, teacher = models
    problem = Problem(student, teacher, scope, beta)
    assert problem.gap > 1e-3  # no cost so close to the limit that rounding decides
    assert problem.probabilities.sum().item() == pytest.approx(1.0, abs=1e-9)  # every sequence is listed

    score = gradients_of(problem.score_part(credit_assignment), student)
    surrogate = gradients_of(coefficient * problem.surrogate(credit_assignment), student)
    expected = add(score, surrogate, 0.5)
    ours = trainer_gradient(tmp_path, student, teacher, problem, scope, credit_assignment, beta, coefficient)
    assert relative_error(ours, expected) < 1e-4
    # Neither part is so small that the test would not see it missing.
    assert relative_error(expected, surrogate) > 0.05
    assert relative_error(expected, add(score, dict.fromkeys(score, 0.0), 0.5)) > 0.05


@pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
def test_closeness_where_the_reward_is_silent(tmp_path, models, credit_assignment):
    """The third place in the order adds its own gradient, and changes nothing in the two before it."""
    student, teacher = models
    problem = Problem(student, teacher, "mean", 1.0)
    score = gradients_of(problem.score_part(credit_assignment), student)
    surrogate = gradients_of(0.5 * problem.surrogate(credit_assignment), student)
    closeness = gradients_of(0.8 * problem.closeness(), student)
    without = add(score, surrogate, 0.5)
    arguments = (tmp_path, student, teacher, problem, "mean", credit_assignment, 1.0)
    ours = trainer_gradient(*arguments, coefficient=0.5, unrewarded=0.8)
    assert relative_error(ours, add(without, closeness, 1.0)) < 1e-4
    assert relative_error(ours, without) > 0.01


@pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
@pytest.mark.parametrize("scope", SCOPES)
def test_explicit_part_with_exact_weights(tmp_path, models, monkeypatch, scope, credit_assignment):
    """With the exact weights in place of the surrogate's, the whole gradient is autograd's, the indicator held."""
    student, teacher = models
    problem = Problem(student, teacher, scope, 1.0)
    monkeypatch.setattr(constrained_trainer, "violation_weights", exact_weights)
    expected = add(
        gradients_of(problem.score_part(credit_assignment), student),
        gradients_of(problem.explicit_part(credit_assignment), student),
        0.5,
    )
    ours = trainer_gradient(tmp_path, student, teacher, problem, scope, credit_assignment, 1.0, coefficient=1.0)
    assert relative_error(ours, expected) < 1e-4
