"""
What TRL's own tests ask of `GRPOTrainer`, with a teacher: every option trains, and within the limit it is GRPO's run.

Features with metrics of their own are in test_conformance.py, tools in test_tools.py, and loss types, and truncated
completions (which TRL counts, and we leave out), in test_loss_paths.py.
"""

import math
from pathlib import Path

import pytest
import torch
from helpers import (
    EOS,
    PAD,
    VOCAB,
    history,
    length_reward,
    make_dataset,
    make_lora,
    make_teacher,
    make_tokenizer,
    run,
    same_weights,
    save_model,
    weights,
)
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import GRPOTrainer

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer


STEPS = 2


def large_reward(completions, **kwargs) -> list[float]:
    """Far above the violation penalty of 20."""
    return [1000.0 * len(completion) for completion in completions]


def sparse_reward(completions, **kwargs) -> list[float | None]:
    return [None if index % 3 == 0 else float(len(set(text))) for index, text in enumerate(completions)]


def reward_of_another_column(completions, answer, **kwargs) -> list[float]:
    return [float(text.startswith(expected[0])) for text, expected in zip(completions, answer, strict=True)]


def reward_that_logs(completions, trainer_state, log_extra, log_metric, **kwargs) -> list[float]:
    log_extra("length", [len(completion) for completion in completions])
    log_metric("longest", float(max(map(len, completions))))
    return [float(len(completion) > trainer_state.global_step) for completion in completions]


async def async_reward(completions, **kwargs) -> list[float]:
    return length_reward(completions)


def reward_model(path: Path) -> str:
    """Folder of a reward model with its tokenizer."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return save_model(path, LlamaForSequenceClassification(config), make_tokenizer())


def conversations() -> dict:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if thinking %}#{% endif %}"
    )
    dataset = make_dataset().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    return {
        "tokenizer": tokenizer,
        "train_dataset": dataset,
        "reward_funcs": lambda completions, **kwargs: length_reward([turn[0]["content"] for turn in completions]),
    }


OPTIONS = {
    "large_rewards": lambda path: {"reward_funcs": large_reward},
    "large_rewards_unscaled": lambda path: {"reward_funcs": large_reward, "scale_rewards": "none"},
    "weights": lambda path: {"reward_funcs": [length_reward, large_reward], "reward_weights": [0.7, -0.3]},
    "none_outputs": lambda path: {"reward_funcs": [sparse_reward, length_reward]},
    "normalize_then_sum": lambda path: {
        "reward_funcs": [sparse_reward, length_reward, large_reward],
        "reward_weights": [0.7, -0.3, 1.0],
        "multi_objective_aggregation": "normalize_then_sum",
        "per_device_train_batch_size": 8,
    },
    "normalize_then_sum_token": lambda path: {
        "reward_funcs": [length_reward, large_reward],
        "multi_objective_aggregation": "normalize_then_sum",
        "credit_assignment": "token",
    },
    "async": lambda path: {"reward_funcs": [async_reward, large_reward]},
    "reward_model": lambda path: {"reward_funcs": reward_model(path)},
    "reward_model_and_function": lambda path: {
        "reward_funcs": [reward_model(path), length_reward],
        "reward_processing_classes": [make_tokenizer(), None],
    },
    "another_column": lambda path: {"reward_funcs": reward_of_another_column},
    "logging_reward": lambda path: {"reward_funcs": reward_that_logs},
    "conversations": lambda path: conversations(),
    "chat_template_kwargs": lambda path: {**conversations(), "chat_template_kwargs": {"thinking": True}},
    "bias_correction_kl": lambda path: {"beta": 0.1, "use_bias_correction_kl": True, "peft_config": make_lora()},
    "pad_to_multiple_of": lambda path: {"pad_to_multiple_of": 8},
    "off_policy_mask": lambda path: {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
    "sequence_importance_sampling": lambda path: {"importance_sampling_level": "sequence", "num_iterations": 2},
    "delta": lambda path: {"delta": 2.0, "num_iterations": 2},
    "cast_lm_head_to_fp32": lambda path: {"cast_lm_head_to_fp32": True},
    "gradient_checkpointing": lambda path: {"beta": 0.1, "gradient_checkpointing": True, "peft_config": make_lora()},
    "scale_rewards_of_the_batch": lambda path: {"scale_rewards": "batch", "per_device_train_batch_size": 8},
    "groups_larger_than_the_batch": lambda path: {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "dataloader_workers": lambda path: {"dataloader_num_workers": 1},
    "sampling": lambda path: {"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1},
    "generation_kwargs": lambda path: {"generation_kwargs": {"do_sample": True, "top_k": 5}},
    "evaluation": lambda path: {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "per_device_eval_batch_size": 8,
        "eval_dataset": {"a": make_dataset(1), "b": make_dataset(1)},
    },
    "num_generations_eval": lambda path: {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_generations_eval": 1,
        "eval_dataset": make_dataset(1),
    },
}


def train(folder: Path, option: str, trainer_class: type[GRPOTrainer] = ConstrainedDistillTrainer, **changes):
    arguments = {**OPTIONS[option](folder / "reward"), "max_steps": STEPS, **changes}
    if trainer_class is GRPOTrainer:
        arguments.pop("credit_assignment", None)
        return run(folder, GRPOTrainer, **arguments)
    return run(folder, trainer_class, teacher_model=make_teacher(), **arguments)


@pytest.mark.parametrize("option", OPTIONS)
def test_within_the_limit_it_is_grpo_and_about_it_trains(tmp_path, option):
    grpo = train(tmp_path / "grpo", option, GRPOTrainer)
    within = train(tmp_path / "within", option, cost_limit=1e6)
    about = train(tmp_path / "about", option, cost_limit=1.7)
    for name in ("loss", "grad_norm", "reward", "eval_reward", "eval_a_reward"):
        assert history(within, name) == history(grpo, name), name
    assert same_weights(within, grpo)
    assert not same_weights(about, grpo)
    assert all(value.isfinite().all() for value in weights(about).values())
    assert all(math.isfinite(value) for name in ("loss", "grad_norm") for value in history(about, name))
    assert max(history(about, "distill_loss")) > 0


class TestSeveralRewards:
    """`multi_objective_aggregation="normalize_then_sum"` in the other methods."""

    def test_lagrangian_without_multiplier_is_grpo(self, tmp_path):
        grpo = train(tmp_path / "grpo", "normalize_then_sum", GRPOTrainer)
        trainer = train(tmp_path / "ours", "normalize_then_sum", LagrangianDistillTrainer, multiplier_init=0.0)
        assert history(trainer, "loss") == history(grpo, "loss")
        assert same_weights(trainer, grpo)

    @pytest.mark.parametrize("trainer_class", [GKDDistillTrainer, MiniLLMDistillTrainer])
    def test_only_logged(self, tmp_path, trainer_class):
        apart = train(tmp_path / "apart", "normalize_then_sum", trainer_class)
        whole = train(
            tmp_path / "whole", "normalize_then_sum", trainer_class, multi_objective_aggregation="sum_then_normalize"
        )
        assert history(apart, "loss") == history(whole, "loss")
        assert history(apart, "rewards/large_reward/mean") == history(whole, "rewards/large_reward/mean")
        assert min(history(apart, "rewards/large_reward/mean")) > 0
