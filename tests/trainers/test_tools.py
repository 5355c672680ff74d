"""Tools, environments and custom rollouts: costs, limit and gradient are on the student's own tokens alone."""

import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    capture_rollouts,
    dense_costs,
    dense_logps,
    gradients_of,
    loss_and_gradients,
    make_model,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_trainer,
    metrics,
    micro_batches,
    random_completions,
    relative_error,
    scripted,
)

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer
from trl_cmdp.core import constrained_advantages, rollout_cost, token_divergence, violation_weights


SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "scripts" / "calculator_tool.py"))
TOKENIZER = SCRIPT["make_tokenizer"]()
CALL = '<call>{{"name": "calculate", "arguments": {{"expression": "{}"}}}}</call><eos>'
REWARDS = [1.0, 0.0, 0.5, 0.25]
LIMIT = 2.03  # two of the four rollouts violate it
# What each of the four rollouts writes, turn by turn: a call, none, a call that fails, and two.
TURNS = [
    [CALL.format("7*8"), "#56<eos>"],
    ["#12<eos>"],
    [CALL.format("9?0"), "#1<eos>"],
    [CALL.format("1+1"), CALL.format("2+2"), "#4<eos>"],
]
RESULTS = [["56"], [], ["?"], ["2", "4"]]


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def expected_rollouts(budget: int) -> list[tuple[list[int], list[int]]]:
    """Token ids and mask of each rollout, written out by TRL's rules: what does not fit is dropped or cut."""
    rollouts = []
    for turns, results in zip(TURNS, RESULTS, strict=True):
        ids, mask = ids_of(turns[0]), [1] * len(ids_of(turns[0]))
        for result, turn in zip(results, turns[1:], strict=True):
            tool, own = ids_of(f"<tool>{result}<assistant>"), ids_of(turn)
            if len(ids) + len(tool) > budget:
                break
            own = own[: budget - len(ids) - len(tool)]
            ids, mask = ids + tool + own, mask + [0] * len(tool) + [1] * len(own)
        rollouts.append((ids, mask))
    return rollouts


def script_generation(model) -> None:
    """Make `model.generate` write the turns, whichever rollouts it is asked to continue, and from the first again."""
    turn = 0

    def generate(input_ids, **kwargs):
        nonlocal turn
        turns = [ids_of(turns[turn]) for turns in TURNS if len(turns) > turn][: len(input_ids)]
        turn = (turn + 1) % 3
        width = max(map(len, turns))
        padded = [ids + [TOKENIZER.pad_token_id] * (width - len(ids)) for ids in turns]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    model.generate = generate


class Environment:
    """The calculator as a method of an environment."""

    def reset(self, **kwargs) -> None:
        return None

    def calculate(self, expression: str) -> str:
        """
        Calculates.

        Args:
            expression: What to calculate.

        Returns:
            The result.
        """
        return SCRIPT["calculate"](expression)


SOURCES = {"tools": {"tools": [SCRIPT["calculate"]]}, "environment": {"environment_factory": Environment}}


def build(folder, trainer_class=ConstrainedDistillTrainer, *, by="tools", **kwargs):
    model = make_model(vocab_size=len(TOKENIZER), spread=0.4)
    script_generation(model)
    defaults = {
        "teacher_model": make_teacher(vocab_size=len(TOKENIZER)),
        "cost_limit": LIMIT,
        "max_completion_length": 20,
        "beta": 0.0,
        **SOURCES[by],
    }
    return make_trainer(
        folder,
        trainer_class,
        model=model,
        reward_funcs=lambda completions, **_: REWARDS[: len(completions)],
        tokenizer=TOKENIZER,
        **{"train_dataset": SCRIPT["make_dataset"](), **defaults, **kwargs},
    )


def rows_of(trainer) -> list[dict]:
    return [trainer.train_dataset[0]] * 4


def mask_of(rollouts) -> torch.Tensor:
    mask = torch.zeros(len(rollouts), max(len(own) for _, own in rollouts), dtype=torch.long)
    for row, (_, own) in enumerate(rollouts):
        mask[row, : len(own)] = torch.tensor(own)
    return mask


def dense_loss(trainer, batch, mask, weights, advantages) -> torch.Tensor:
    """The whole loss, from full logits over the whole sequence, tool tokens in the context (dapo's normaliser)."""
    costs = dense_costs(trainer.model, trainer.teacher_model, batch)
    logps = dense_logps(trainer.model, batch)
    advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    policy = -((logps - logps.detach()).exp() * advantages * mask).sum()
    return (policy + (costs * weights).sum()) / mask.sum()


@pytest.mark.parametrize(
    ("by", "budget", "credit_assignment"),
    [
        ("tools", 24, "trajectory"),
        ("environment", 24, "token"),
        ("tools", 20, "token"),  # an answer is cut
        ("environment", 16, "trajectory"),  # a result is dropped
    ],
)
def test_tool_loop(tmp_path, monkeypatch, by, budget, credit_assignment):
    """TRL's own loop: ids, mask, costs, verdicts, weights and the gradient of the whole loss."""
    settings = {"max_completion_length": budget, "credit_assignment": credit_assignment}
    trainer = build(tmp_path, by=by, violation_distill_coef=1.0, **settings)
    captured = capture_rollouts(trainer, monkeypatch)
    batch = micro_batches(trainer, rows_of(trainer))[0]
    # TRL shuffles a generation batch: put its rows back in the order of the turns.
    expected = expected_rollouts(budget)
    mask = mask_of(expected)
    rollouts = captured[0]
    assert torch.equal(rollouts.mask.long(), mask)
    order = [
        next(row for row, ids in enumerate(batch["completion_ids"].tolist()) if ids[: len(own)] == own)
        for own, _ in expected
    ]
    assert sorted(order) == [0, 1, 2, 3]

    costs = dense_costs(trainer.model, trainer.teacher_model, batch).detach()[order]
    torch.testing.assert_close(rollouts.costs.double(), costs * mask, rtol=1e-4, atol=1e-6)
    cost = (costs * mask).sum(1) / mask.sum(1)
    logged = metrics(trainer)
    assert logged["constraint/cost"] == pytest.approx(cost.mean().item(), rel=1e-4)
    assert logged["constraint/satisfaction_rate"] == (cost <= LIMIT).double().mean()
    assert 0 < logged["constraint/satisfaction_rate"] < 1
    everything = rollout_cost(costs, batch["completion_mask"][order])
    assert not torch.allclose(everything, cost, rtol=1e-2), "with the tool's tokens the costs are others"
    tool_tokens, tokens = sum(own.count(0) for _, own in expected), sum(len(own) for _, own in expected)
    assert logged["tools/token_frac"] == pytest.approx(tool_tokens / tokens)

    form = ("mean", credit_assignment)
    weights = violation_weights(costs, mask, LIMIT, *form)
    advantages = constrained_advantages(torch.tensor(REWARDS), costs, mask, 4, LIMIT, 20.0, *form, horizon=budget)
    torch.testing.assert_close(batch["divergence_weights"][order].double(), weights)
    torch.testing.assert_close(batch["advantages"][order].double(), advantages.double(), rtol=1e-4, atol=1e-5)
    loss, gradients = loss_and_gradients(trainer, [batch])
    ordered = {name: batch[name][order] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    reference = dense_loss(trainer, ordered, mask, weights, advantages)
    assert loss == pytest.approx(reference.item(), rel=1e-4, abs=1e-6)
    assert relative_error(gradients, gradients_of(reference, trainer.model)) < 1e-5


def test_a_teacher_with_a_prompt_of_its_own(tmp_path, monkeypatch):
    """The tool loop's completions, results included, behind what the teacher reads; without tools in either template."""
    data = SCRIPT["make_dataset"]()
    hint = [{"role": "user", "content": "7*8=56#1+1"}]
    trainer = build(tmp_path, train_dataset=data.add_column("teacher_prompt", [hint] * len(data)))
    captured = capture_rollouts(trainer, monkeypatch)
    batch = micro_batches(trainer, rows_of(trainer))[0]
    expected = expected_rollouts(20)
    mask = mask_of(expected)
    assert torch.equal(captured[0].mask.long(), mask)
    of_teacher = ids_of("<user>7*8=56#1+1<assistant>")
    for row, (completion, _) in enumerate(expected):
        logits = []
        for model, prompt in ((trainer.model, batch["prompt_ids"][0].tolist()), (trainer.teacher_model, of_teacher)):
            whole = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
            logits.append(whole[len(prompt) - 1 : -1])
        costs = token_divergence(*logits).detach() * mask[row, : len(completion)]
        found = captured[0].costs[row, : len(completion)].double()
        torch.testing.assert_close(found, costs, rtol=1e-4, atol=1e-6)


class TestRolloutFunc:
    COMPLETIONS = random_completions(4)

    def run(self, folder, env_mask=None, **kwargs):
        trainer = make_scripted_trainer(folder, completions=self.COMPLETIONS, env_mask=env_mask, **kwargs)
        return trainer._generate_and_score_completions(make_rows(4))

    def test_mask_of_another_length(self, tmp_path):
        """TRL would pad it with 1, and count the environment's last tokens as the student's."""
        env_mask = [[1] * len(ids) for ids in self.COMPLETIONS]
        env_mask[1] = env_mask[1][:-1]
        with pytest.raises(ValueError, match="`env_mask` of lengths"):
            self.run(tmp_path, env_mask)

    def test_logprobs_of_another_length(self, tmp_path):
        def rollout(prompts, trainer):
            return {**scripted(self.COMPLETIONS)(prompts, trainer), "logprobs": [[0.0]] * 4}

        with pytest.raises(ValueError, match="`logprobs` of lengths"):
            self.run(tmp_path, rollout_func=rollout)

    def test_longer_than_the_horizon(self, tmp_path):
        """A rollout of one's own may be longer than `max_completion_length`; nothing falls after its end then."""
        output = self.run(tmp_path, max_completion_length=2, credit_assignment="token", cost_limit=0.01)
        assert output["advantages"].isfinite().all()


class TestGKDCompletions:
    """The dataset's completions as conversations, off policy."""

    def build(self, folder, completion):
        dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "7*8"}], "completion": completion}] * 4)
        return make_trainer(
            folder,
            GKDDistillTrainer,
            model=make_model(vocab_size=len(TOKENIZER)),
            reward_funcs=None,
            train_dataset=dataset,
            tokenizer=TOKENIZER,
            lmbda=0.0,
            max_completion_length=20,
            teacher_model=make_teacher(vocab_size=len(TOKENIZER)),
        )

    def test_other_roles_are_refused(self, tmp_path):
        call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "7*8"}}}
        completion = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "56", "tool_calls": None},
            {"role": "assistant", "content": "#56", "tool_calls": None},
        ]
        trainer = self.build(tmp_path, completion)
        with pytest.raises(ValueError, match="role 'tool'"):
            micro_batches(trainer, rows_of(trainer))

    def test_nothing_after_the_end_of_the_turn(self, tmp_path, monkeypatch):
        """Templates often write a newline after the end of a turn, which no student does."""
        template = SCRIPT["CHAT_TEMPLATE"].replace("<eos>", "<eos>?")
        monkeypatch.setattr(TOKENIZER, "chat_template", template)
        trainer = self.build(tmp_path, [{"role": "assistant", "content": "#56"}])
        batch = micro_batches(trainer, rows_of(trainer))[0]
        assert TOKENIZER.decode(batch["completion_ids"][0]) == "#56<eos>"
