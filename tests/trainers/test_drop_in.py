"""The trainer is a drop-in replacement for `GRPOTrainer`, bit for bit without a teacher."""

import dataclasses
import inspect

import pytest
import torch
from helpers import (
    history,
    length_reward,
    make_args,
    make_dataset,
    make_lora,
    make_model,
    make_teacher,
    make_tokenizer,
    run,
    same_weights,
    save_model,
    weights,
)
from trl import GRPOConfig, GRPOTrainer

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer, LagrangianDistillTrainer


GRPO_FIELDS = [field for field in dataclasses.fields(GRPOConfig) if field.init]
OUR_FIELDS = [field for field in dataclasses.fields(ConstrainedDistillConfig) if field.init]


class TestEqualToGRPO:
    @pytest.mark.parametrize(
        ("loss_type", "num_iterations", "lora"),
        [
            ("grpo", 1, False),
            ("grpo", 2, True),
            ("dapo", 1, True),
            ("dapo", 2, False),
            ("dr_grpo", 1, False),
            ("dr_grpo", 2, True),
            ("cispo", 1, True),
            ("cispo", 2, False),
        ],
    )
    def test_without_teacher_and_with_unreachable_limit(self, tmp_path, loss_type, num_iterations, lora):
        """No teacher is GRPO, and so is a limit that every rollout keeps (oracle 4): losses and weights, bit for bit."""
        settings = {
            "loss_type": loss_type,
            "num_iterations": num_iterations,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 3,
            "max_steps": 5,
        }

        def train(trainer_class, name, **kwargs):
            adapter = {"peft_config": make_lora()} if lora else {}
            return run(tmp_path / name, trainer_class, **adapter, **settings, **kwargs)

        reference = train(GRPOTrainer, "grpo")
        assert len(history(reference, "loss")) == 5
        assert any(norm > 0 for norm in history(reference, "grad_norm"))  # something was learnt
        for ours in (
            train(ConstrainedDistillTrainer, "ours"),
            train(ConstrainedDistillTrainer, "unreachable", teacher_model=make_teacher(), cost_limit=1e6),
        ):
            assert history(ours, "loss") == history(reference, "loss")
            assert history(ours, "grad_norm") == history(reference, "grad_norm")
            assert same_weights(ours, reference)

    @pytest.mark.parametrize(
        ("scale_rewards", "credit_assignment", "constraint_aggregation"),
        [
            ("group", "trajectory", "lexicographic"),
            ("group", "token", "sum_then_normalize"),
            ("batch", "trajectory", "sum_then_normalize"),
            ("batch", "token", "lexicographic"),
            ("none", "trajectory", "lexicographic"),
            ("none", "token", "sum_then_normalize"),
        ],
    )
    def test_unreachable_limit_in_every_form(self, tmp_path, scale_rewards, credit_assignment, constraint_aggregation):
        """With every rollout feasible, each form of the signal is GRPO's advantage."""
        arguments = {"scale_rewards": scale_rewards, "per_device_train_batch_size": 8, "max_steps": 3}
        reference = run(tmp_path / "grpo", GRPOTrainer, **arguments)
        ours = run(
            tmp_path / "ours",
            teacher_model=make_teacher(),
            cost_limit=1e6,
            credit_assignment=credit_assignment,
            constraint_aggregation=constraint_aggregation,
            **arguments,
        )
        assert any(norm > 0 for norm in history(reference, "grad_norm"))
        # The same numbers in another order: bits may differ except in the default form, tested above.
        torch.testing.assert_close(weights(ours), weights(reference), rtol=1e-4, atol=1e-6)

    def test_a_reachable_limit_is_not_grpo(self, tmp_path):
        """The comparison above would notice a difference."""
        reference = run(tmp_path / "grpo", GRPOTrainer)
        ours = run(tmp_path / "ours", teacher_model=make_teacher(), cost_limit=0.01)
        assert not same_weights(ours, reference)

    def test_multiplier_zero(self, tmp_path):
        reference = run(tmp_path / "grpo", GRPOTrainer)
        ours = run(tmp_path / "ours", LagrangianDistillTrainer, teacher_model=make_teacher(), multiplier_init=0.0)
        assert history(ours, "loss") == history(reference, "loss")
        assert same_weights(ours, reference)


def test_conversational_prompts(tmp_path):
    """Chat messages as prompts, rendered by the tokenizer's template: what most users train on."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    dataset = make_dataset().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    def reward(completions, answer, **kwargs):
        return [float(completion[0]["content"] == a) for completion, a in zip(completions, answer, strict=True)]

    trainer = run(
        tmp_path,
        reward_funcs=reward,
        train_dataset=dataset,
        tokenizer=tokenizer,
        teacher_model=make_teacher(),
        cost_limit=0.01,
    )
    assert all(norm > 0 for norm in history(trainer, "grad_norm"))


class TestSignature:
    def test_arguments_in_grpo_order(self):
        """Same arguments in the same order with the same defaults; additions are keyword-only."""
        theirs = list(inspect.signature(GRPOTrainer.__init__).parameters.values())
        ours = list(inspect.signature(ConstrainedDistillTrainer.__init__).parameters.values())
        assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
            (p.name, p.default, p.kind) for p in theirs
        ]
        assert [p.name for p in ours[len(theirs) :]] == ["teacher_model"]
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])

    def test_positional_arguments(self, tmp_path):
        """All of GRPOTrainer's arguments, by position alone."""
        tokenizer = make_tokenizer()
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        positional = (
            model,
            length_reward,
            make_args(tmp_path),
            make_dataset(),
            make_dataset(1),
            tokenizer,
            None,
            [],
            (optimizer, None),
            None,
            None,
            None,
            None,
            None,
        )
        assert len(positional) == len(inspect.signature(GRPOTrainer.__init__).parameters) - 1
        trainer = ConstrainedDistillTrainer(*positional)
        assert trainer.processing_class is tokenizer
        assert len(trainer.eval_dataset) == 4
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer


class TestArguments:
    def test_plain_config(self, tmp_path):
        """A script of GRPOTrainer's runs with the class name changed alone; with a teacher our config is needed."""
        arguments = {
            "model": make_model(),
            "reward_funcs": length_reward,
            "args": make_args(tmp_path, GRPOConfig),
            "train_dataset": make_dataset(),
            "processing_class": make_tokenizer(),
        }
        trainer = ConstrainedDistillTrainer(**arguments)
        trainer.train()
        assert len(history(trainer, "loss")) == 2
        names = {name for entry in trainer.state.log_history for name in entry}
        assert not any(name.startswith(("constraint/", "teacher/")) for name in names)
        with pytest.raises(TypeError, match="ConstrainedDistillConfig"):
            ConstrainedDistillTrainer(**arguments, teacher_model=make_teacher())

    def test_no_args_builds_our_config(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        # GRPOConfig's own default, bf16, is refused on a machine without GPU unless `use_cpu` is set.
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        student = save_model(tmp_path / "student", make_model(), make_tokenizer())
        trainer = ConstrainedDistillTrainer(student, length_reward, train_dataset=make_dataset())
        assert type(trainer.args) is ConstrainedDistillConfig
        assert trainer.args.cost_limit == 0.35
        assert trainer.args.output_dir.startswith("student-")

    def test_no_reward_with_teacher(self, tmp_path):
        """With a teacher the reward may be absent: it is 0, and the limit still trains."""
        trainer = run(tmp_path, reward_funcs=None, teacher_model=make_teacher(), cost_limit=0.01)
        assert history(trainer, "reward") == [0.0, 0.0]
        assert all(norm > 0 for norm in history(trainer, "grad_norm"))

    def test_neither_reward_nor_teacher(self, tmp_path):
        with pytest.raises(ValueError, match="`reward_funcs`, `teacher_model`"):
            run(tmp_path, reward_funcs=None)

    def test_config_fields(self):
        """GRPOConfig's fields keep their order, defaults and kind; ours follow, keyword-only."""
        names = [field.name for field in GRPO_FIELDS]
        kept = [field for field in OUR_FIELDS if field.name in set(names)]
        assert [field.name for field in kept] == names
        for ours, theirs in zip(kept, GRPO_FIELDS, strict=True):
            assert ours.default == theirs.default, ours.name
            assert ours.default_factory is theirs.default_factory, ours.name
            assert ours.kw_only == theirs.kw_only, ours.name
        added = [field for field in OUR_FIELDS if field.name not in set(names)]
        assert {field.name for field in added} >= {"cost_limit", "cost_scope", "violation_penalty", "teacher_beta"}
        assert all(field.kw_only for field in added)
        positional = inspect.signature(ConstrainedDistillConfig).parameters
        assert list(positional)[: len(names)] == names

    def test_config_survives_its_dictionary(self, tmp_path):
        """What a checkpoint's `training_args` holds builds the same config again."""
        args = make_args(tmp_path, cost_limit=0.2, teacher_model_init_kwargs={"dtype": "bfloat16"})
        assert args.to_dict()["cost_limit"] == 0.2
        assert args.to_dict()["teacher_model_init_kwargs"] == {"dtype": "bfloat16"}
