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
    make_model,
    make_teacher,
    make_tokenizer,
    run,
    weights,
)
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer


GRPO_FIELDS = [field for field in dataclasses.fields(GRPOConfig) if field.init]
OUR_FIELDS = [field for field in dataclasses.fields(ConstrainedDistillConfig) if field.init]


class TestEqualToGRPO:
    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    @pytest.mark.parametrize("num_iterations", [1, 2])
    @pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
    def test_without_teacher_and_with_unreachable_limit(self, tmp_path, loss_type, num_iterations, lora):
        """No teacher is GRPO, and so is a limit that every rollout keeps (oracle 4): losses and weights, bit for bit."""

        def train(trainer_class, name, **kwargs):
            trainer_kwargs = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None}
            if "teacher" in kwargs:
                trainer_kwargs["teacher_model"] = kwargs.pop("teacher")
            trainer = run(
                tmp_path / name,
                trainer_class,
                trainer_kwargs=trainer_kwargs,
                loss_type=loss_type,
                num_iterations=num_iterations,
                gradient_accumulation_steps=2,
                max_completion_length=3,
                max_steps=5,
                **kwargs,
            )
            return history(trainer, "loss"), history(trainer, "grad_norm"), weights(trainer)

        reference = train(GRPOTrainer, "grpo")
        assert len(reference[0]) == 5
        assert any(norm > 0 for norm in reference[1])  # something was learnt, so that equality says something
        for losses, norms, trained in (
            train(ConstrainedDistillTrainer, "ours"),
            train(ConstrainedDistillTrainer, "unreachable", teacher=make_teacher(), cost_limit=1e6),
        ):
            assert losses == reference[0]
            assert norms == reference[1]
            assert trained.keys() == reference[2].keys()
            assert all(torch.equal(trained[name], reference[2][name]) for name in trained)

    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    @pytest.mark.parametrize("constraint_aggregation", ["lexicographic", "sum_then_normalize"])
    def test_unreachable_limit_in_every_form(self, tmp_path, scale_rewards, credit_assignment, constraint_aggregation):
        """With every rollout feasible, each form of the signal is GRPO's advantage."""
        arguments = {"scale_rewards": scale_rewards, "per_device_train_batch_size": 8, "max_steps": 3}
        reference = run(tmp_path / "grpo", GRPOTrainer, **arguments)
        ours = run(
            tmp_path / "ours",
            trainer_kwargs={"teacher_model": make_teacher()},
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
        ours = run(tmp_path / "ours", trainer_kwargs={"teacher_model": make_teacher()}, cost_limit=0.01)
        assert any(not torch.equal(weights(ours)[name], weights(reference)[name]) for name in weights(ours))


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
        trainer_kwargs={"teacher_model": make_teacher()},
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
    def test_plain_config_without_teacher(self, tmp_path):
        """A script of GRPOTrainer's runs with the class name changed alone."""
        trainer = ConstrainedDistillTrainer(
            make_model(),
            length_reward,
            make_args(tmp_path, GRPOConfig),
            make_dataset(),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        assert len(history(trainer, "loss")) == 2
        assert not any(
            name.startswith(("constraint/", "teacher/")) for entry in trainer.state.log_history for name in entry
        )

    def test_plain_config_with_teacher(self, tmp_path):
        with pytest.raises(TypeError, match="ConstrainedDistillConfig"):
            ConstrainedDistillTrainer(
                make_model(),
                length_reward,
                make_args(tmp_path, GRPOConfig),
                make_dataset(),
                processing_class=make_tokenizer(),
                teacher_model=make_teacher(),
            )

    def test_no_args_builds_our_config(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        # GRPOConfig's own default, bf16, is refused on a machine without GPU unless `use_cpu` is set.
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        make_model().save_pretrained(tmp_path / "student")
        make_tokenizer().save_pretrained(tmp_path / "student")
        trainer = ConstrainedDistillTrainer(str(tmp_path / "student"), length_reward, train_dataset=make_dataset())
        assert type(trainer.args) is ConstrainedDistillConfig
        assert trainer.args.cost_limit == 0.35
        assert trainer.args.output_dir.startswith("student-")

    def test_no_reward_with_teacher(self, tmp_path):
        """With a teacher the reward may be absent: it is 0, and the limit still trains."""
        trainer = run(tmp_path, reward_funcs=None, trainer_kwargs={"teacher_model": make_teacher()}, cost_limit=0.01)
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

    def test_defaults_of_the_contract(self):
        defaults = {field.name: field.default for field in OUR_FIELDS}
        assert {
            "cost_limit": 0.35,
            "cost_scope": "mean",
            "violation_penalty": 20.0,
            "violation_distill_coef": 1.0,
            "credit_assignment": "trajectory",
            "constraint_aggregation": "lexicographic",
            "teacher_beta": 1.0,
            "teacher_prob_floor": 0.0,
            "divergence_memory_mb": None,
            "teacher_model_init_kwargs": None,
            "teacher_model_revision": None,
        }.items() <= defaults.items()

    @pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
    def test_command_line(self, tmp_path, parser_class):
        (args,) = parser_class(ConstrainedDistillConfig).parse_args_into_dataclasses(
            [
                *("--output_dir", str(tmp_path), "--bf16", "False", "--use_cpu", "True"),
                *("--cost_limit", "0.2", "--cost_scope", "worst_prefix", "--credit_assignment", "token"),
                *("--teacher_model_init_kwargs", '{"dtype": "bfloat16"}'),
            ]
        )
        assert args.cost_limit == 0.2
        assert args.cost_scope == "worst_prefix"
        assert args.credit_assignment == "token"
        assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}

    def test_config_survives_its_dictionary(self, tmp_path):
        """What a checkpoint's `training_args` holds builds the same config again."""
        args = make_args(tmp_path, cost_limit=0.2, teacher_model_init_kwargs={"dtype": "bfloat16"})
        assert args.to_dict()["cost_limit"] == 0.2
        assert args.to_dict()["teacher_model_init_kwargs"] == {"dtype": "bfloat16"}
