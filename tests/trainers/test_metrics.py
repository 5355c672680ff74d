"""The metrics of DESIGN section 4: what they hold, over which window, in training and evaluation; and the table."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import (
    EOS,
    LIMIT,
    dense_costs,
    history,
    length_reward,
    make_dataset,
    make_model,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_tokenizer,
    metrics,
    random_completions,
    scripted,
)
from torch.nn.utils.rnn import pad_sequence

from trl_cmdp.core import constrained_advantages, infeasible_steps, rollout_cost


def in_turn(batches):
    """`rollout_func` that hands out one list of completions per generation batch, in turn, for ever."""
    calls = []

    def rollout(prompts, trainer):
        batch = batches[len(calls) % len(batches)]
        calls.append(None)
        return scripted(batch)(prompts, trainer)

    return rollout


def costs_of(batches):
    """Per-token costs and mask of each list of completions, from the dense divergence of the untrained student."""
    model, teacher, prompt = make_model(spread=0.4), make_teacher(), make_tokenizer()([PROMPT], return_tensors="pt")
    results = []
    for completions in batches:
        ids = [torch.tensor(tokens) for tokens in completions]
        ids, mask = (pad_sequence(rows, batch_first=True) for rows in (ids, [torch.ones_like(row) for row in ids]))
        batch = {"completion_ids": ids, "completion_mask": mask}
        for name, values in (("prompt_ids", prompt["input_ids"]), ("prompt_mask", prompt["attention_mask"])):
            batch[name] = values.expand(len(ids), -1)
        results.append((dense_costs(model, teacher, batch).detach() * mask, mask))
    return results


def expected_metrics(results, limit):
    """The window's metrics from its costs: numerators and denominators summed over the window."""
    cost = torch.cat([costs.sum(1) / mask.sum(1) for costs, mask in results])
    infeasible = sum(infeasible_steps(costs, mask, limit, "mean").sum().item() for costs, mask in results)
    tokens = sum(int(mask.sum()) for _, mask in results)
    return {
        "constraint/cost": cost.mean().item(),
        "constraint/cost_max": cost.max().item(),
        "constraint/limit": limit,
        "constraint/satisfaction_rate": (cost <= limit).double().mean().item(),
        "constraint/unjudged_frac": 0.0,
        "constraint/violated_token_frac": infeasible / tokens,
        "teacher/divergence": sum(costs.sum().item() for costs, _ in results) / tokens,
        # Loss type dapo: the violating rollouts' costs over all tokens of the step; the window's mean over its steps.
        "distill_loss": sum(
            (costs.sum(1) * (costs.sum(1) / mask.sum(1) > limit)).sum().item() / mask.sum().item()
            for costs, mask in results
        )
        / len(results),
    }


BATCHES = [random_completions(4, seed) for seed in range(4)]
PAIRS = [BATCHES[0] + BATCHES[1], BATCHES[2] + BATCHES[3]]
PROMPT = "1+2="


def one_prompt(count: int = 4):
    """A dataset in which the order does not matter."""
    return make_dataset(1).select([0] * count)


def build(tmp_path, batches, **kwargs):
    """Trainer of a student that stays as it is, which writes these completions in turn."""
    settings = {"rollout_func": in_turn(batches), "train_dataset": one_prompt(), "learning_rate": 0.0, **kwargs}
    return make_scripted_trainer(tmp_path, completions=batches[0], **settings)


class TestTraining:
    @pytest.mark.parametrize("batches", [BATCHES, PAIRS], ids=["one-micro-batch", "two-micro-batches"])
    def test_values_over_a_logging_window(self, tmp_path, batches):
        """Each logged value is that of its window of two steps, weighted by count; nothing leaks into the next."""
        trainer = build(tmp_path, batches, logging_steps=2, max_steps=len(batches))
        trainer.train()
        results = costs_of(batches)
        assert len({mask.sum().item() for _, mask in results}) > 1  # a mean of means would be another number
        for window in range(len(batches) // 2):
            expected = expected_metrics(results[2 * window : 2 * window + 2], LIMIT)
            assert 0 < expected["constraint/satisfaction_rate"] < 1
            for name, value in expected.items():
                assert history(trainer, name)[window] == pytest.approx(value, rel=1e-4), name

    @pytest.mark.parametrize("scope", ["mean", "sum", "worst_prefix"])
    def test_cost_is_in_the_unit_of_the_scope(self, tmp_path, scope):
        trainer = build(tmp_path, BATCHES[:1], cost_scope=scope)
        trainer._generate_and_score_completions(make_rows(4))
        ((costs, mask),) = costs_of(BATCHES[:1])
        expected = rollout_cost(costs, mask, scope)
        logged = metrics(trainer)
        assert logged["constraint/cost"] == pytest.approx(expected.mean().item(), rel=1e-4)
        assert logged["constraint/cost_max"] == pytest.approx(expected.max().item(), rel=1e-4)

    @pytest.mark.parametrize(("cost_limit", "without_advantage"), [(LIMIT, 0.0), (1e3, 1.0)])
    def test_frac_reward_zero_std_is_of_our_advantages(self, tmp_path, cost_limit, without_advantage):
        """Equal rewards give GRPO nothing to learn from; the limit does."""
        trainer = build(tmp_path, BATCHES[:1], reward_funcs=None, cost_limit=cost_limit)
        trainer._generate_and_score_completions(make_rows(4))
        assert metrics(trainer)["frac_reward_zero_std"] == without_advantage

    def test_masked_rollouts_are_counted(self, tmp_path):
        """Completions without a token that counts: zero, no NaN, and a metric that says how many there were."""
        completions = [[2, 3, EOS], [4, 5], [6, EOS], [7, 8, 9]]
        mask = [[1, 1, 1], [0, 0], [0, 0], [1, 1, 1]]
        trainer = build(tmp_path, [completions], rollout_func=scripted(completions, mask), cost_limit=1e-9)
        trainer._generate_and_score_completions(make_rows(4))
        logged = metrics(trainer)
        assert logged["constraint/unjudged_frac"] == 0.5
        assert logged["constraint/satisfaction_rate"] == 0.0  # of the two that are judged
        ((costs, counted),) = costs_of([[completions[0], completions[3]]])
        assert logged["constraint/cost"] == pytest.approx(rollout_cost(costs, counted).mean().item(), rel=1e-4)
        assert logged["teacher/divergence"] == pytest.approx((costs.sum() / counted.sum()).item(), rel=1e-4)


class TestEvaluation:
    def build(self, tmp_path, **kwargs):
        settings = {"eval_dataset": one_prompt(3), "per_device_eval_batch_size": 4, **kwargs}
        return build(tmp_path, BATCHES, **settings)

    def test_evaluate_reports_satisfaction_cost_and_reward(self, tmp_path):
        """Over all batches of the evaluation, weighted by count, under the names with `eval_`."""
        trainer = self.build(tmp_path)
        evaluated = trainer.evaluate()
        for name, value in expected_metrics(costs_of(BATCHES[:3]), LIMIT).items():
            if name != "distill_loss":
                assert evaluated[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
        assert evaluated["eval_distill_loss"] > 0
        completions = [ids for batch in BATCHES[:3] for ids in batch]
        rewards = length_reward(make_tokenizer().batch_decode(completions, skip_special_tokens=True))
        assert evaluated["eval_reward"] == pytest.approx(sum(rewards) / len(rewards))
        again = trainer.evaluate()  # the next batches in turn: nothing of the first evaluation is left
        expected = expected_metrics(costs_of([BATCHES[3], *BATCHES[:2]]), LIMIT)
        assert again["eval_constraint/cost"] == pytest.approx(expected["constraint/cost"], rel=1e-4)

    def test_one_rollout_per_prompt(self, tmp_path):
        """Groups of one have no advantage, and are judged all the same."""
        evaluated = self.build(tmp_path, num_generations_eval=1, per_device_eval_batch_size=3).evaluate()
        expected = expected_metrics(costs_of([BATCHES[0][:3]]), LIMIT)
        for name in ("constraint/satisfaction_rate", "constraint/cost"):
            assert evaluated[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-4)

    def test_during_training(self, tmp_path):
        """Evaluations in between neither enter the training metrics nor take any from them."""
        trainer = self.build(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2, logging_steps=2)
        trainer.train()
        assert len(history(trainer, "eval_constraint/satisfaction_rate")) == 2
        # Batches in turn: train 0, evaluation 1 2 3, train 0, evaluation 1 2 3.
        for name, batches in (("constraint/cost", BATCHES[:1]), ("eval_constraint/cost", BATCHES[1:])):
            expected = expected_metrics(costs_of(batches), LIMIT)["constraint/cost"]
            assert history(trainer, name) == pytest.approx([expected] * len(history(trainer, name)), rel=1e-4)


class TestCompletionsTable:
    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    def test_columns_belong_to_their_rows(self, tmp_path, credit_assignment):
        """`cost`, `feasible` and our `advantage`, beside the right completion, also with columns of the user's own."""

        def reward(completions, log_extra, **kwargs):
            log_extra("length", [len(completion) for completion in completions])
            return [float(len(completion)) for completion in completions]

        trainer = build(
            tmp_path,
            PAIRS,
            reward_funcs=reward,
            credit_assignment=credit_assignment,
            max_steps=2,
            log_completions=True,
        )
        trainer.train()
        files = sorted((Path(tmp_path) / "completions").glob("*.parquet"))
        assert len(files) == 2
        for file, completions, (costs, mask) in zip(files, PAIRS, costs_of(PAIRS), strict=True):
            table = pd.read_parquet(file)
            texts = make_tokenizer().batch_decode(completions, skip_special_tokens=True)
            assert table["completion"].tolist() == texts
            assert table["length"].tolist() == [len(text) for text in texts]
            cost = rollout_cost(costs, mask)
            assert table["cost"].tolist() == pytest.approx(cost.tolist(), rel=1e-4)
            assert table["feasible"].tolist() == (cost <= LIMIT).tolist()
            advantages = constrained_advantages(
                torch.tensor([float(len(text)) for text in texts], dtype=torch.float64),
                costs,
                mask,
                num_generations=4,
                cost_limit=LIMIT,
                penalty=20.0,
                credit_assignment=credit_assignment,
                horizon=6,
            )
            if credit_assignment == "token":
                advantages = (advantages * mask).sum(1) / mask.sum(1)
            assert table["advantage"].tolist() == pytest.approx(advantages.tolist(), rel=1e-3, abs=1e-3)

    def test_evaluation_batch_of_another_size(self, tmp_path):
        """The table keeps as many rows as a generation batch has; the columns keep the same ones."""
        completions = random_completions(12)
        build(
            tmp_path,
            [completions],
            eval_dataset=one_prompt(3),
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=12,
            log_completions=True,
        ).evaluate()
        (file,) = (Path(tmp_path) / "completions").glob("*.parquet")
        table = pd.read_parquet(file)
        texts = make_tokenizer().batch_decode(completions, skip_special_tokens=True)
        assert table["completion"].tolist() == texts[-4:]
        ((costs, mask),) = costs_of([completions])
        assert table["cost"].tolist() == pytest.approx(rollout_cost(costs, mask)[-4:].tolist(), rel=1e-4)
