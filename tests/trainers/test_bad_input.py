"""What is wrong is said before training where it can be known, at its step otherwise, with what to do about it."""

import math

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import (
    CHARACTERS,
    VOCAB,
    dense_costs,
    gradients_of,
    history,
    length_reward,
    loss_and_gradients,
    make_args,
    make_dataset,
    make_lora,
    make_model,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_tokenizer,
    make_trainer,
    metrics,
    micro_batches,
    random_completions,
    relative_error,
    run,
    save_model,
    scripted,
)
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, TrainerCallback

from trl_cmdp import (
    ConstrainedDistillTrainer,
    GKDDistillTrainer,
    LagrangianDistillTrainer,
    MiniLLMDistillTrainer,
)
from trl_cmdp.trainers.engine import checks


@pytest.mark.parametrize("trainer_class", [GKDDistillTrainer, MiniLLMDistillTrainer])
def test_a_method_that_imitates_needs_a_teacher(tmp_path, trainer_class):
    with pytest.raises(
        ValueError, match=rf"{trainer_class.__name__} learns from a teacher alone: pass `teacher_model`"
    ):
        make_trainer(tmp_path, trainer_class, model="./nothing")  # before it is loaded


@pytest.mark.parametrize("trainer_class", [ConstrainedDistillTrainer, LagrangianDistillTrainer])
def test_the_others_say_once_that_they_are_grpo(tmp_path, trainer_class, caplog):
    run(tmp_path, trainer_class)
    assert caplog.text.count(f"{trainer_class.__name__} has no teacher, so it trains as `GRPOTrainer` does") == 1


class TestVocabulary:
    @pytest.mark.parametrize(
        ("characters", "message"),
        [
            (CHARACTERS[::-1], "different tokenizers: 14 tokens differ"),
            (CHARACTERS + "*", r"different tokenizers.*'\*'"),
        ],
        ids=["same-size", "another-size"],
    )
    def test_unequal_tokenizers(self, tmp_path, characters, message):
        teacher = make_teacher(vocab_size=2 + len(characters))
        path = save_model(tmp_path / "teacher", teacher, make_tokenizer(characters))
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, teacher_model=path)

    @pytest.mark.parametrize("on_disk", [True, False])
    def test_without_tokenizer(self, tmp_path, on_disk, caplog):
        """
        Without the teacher's tokenizer nobody can tell padding from another vocabulary. Equal sizes are accepted, and
        that is said.
        """
        larger, equal = make_teacher(vocab_size=VOCAB + 8), make_teacher()
        if on_disk:
            larger, equal = save_model(tmp_path / "larger", larger), save_model(tmp_path / "equal", equal)
        with pytest.raises(ValueError, match=f"{VOCAB} tokens and the teacher of {VOCAB + 8}"):
            make_trainer(tmp_path, teacher_model=larger)
        make_trainer(tmp_path, teacher_model=equal)
        assert "Assuming that the teacher uses the student's tokenizer" in caplog.text

    @pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(VOCAB, VOCAB + 8), (VOCAB + 8, VOCAB)])
    def test_padded_vocabularies(self, tmp_path, student_vocab, teacher_vocab):
        """One tokenizer, heads padded to different sizes (Qwen2.5): costs and gradients on the shared tokens."""
        path = save_model(tmp_path / "teacher", make_teacher(vocab_size=teacher_vocab), make_tokenizer())
        trainer = make_scripted_trainer(
            tmp_path,
            completions=random_completions(4),
            model=make_model(spread=0.4, vocab_size=student_vocab),
            teacher_model=path,
            cost_limit=1e-9,
        )
        (batch,) = micro_batches(trainer, make_rows(4))
        batch["advantages"] = torch.zeros(4)
        _, gradients = loss_and_gradients(trainer, [batch])
        mask = batch["completion_mask"]
        costs = dense_costs(trainer.model, AutoModelForCausalLM.from_pretrained(path), batch) * mask
        torch.testing.assert_close(batch["costs"].double(), costs.detach(), rtol=1e-5, atol=1e-6)
        assert relative_error(gradients, gradients_of(costs.sum() / mask.sum(), trainer.model)) < 1e-5
        trainer.train()

    def test_token_beyond_the_teacher(self, tmp_path):
        """A padding id that the student sampled and the teacher lacks is an error that names the way out."""
        trainer = make_scripted_trainer(
            tmp_path,
            completions=[[2, VOCAB + 3]] * 4,
            model=make_model(vocab_size=VOCAB + 8),
            teacher_model=save_model(tmp_path / "teacher", make_teacher(), make_tokenizer()),
        )
        with pytest.raises(ValueError, match="suppress_tokens"):
            trainer.train()


class TestArguments:
    def test_several_rewards_in_one_that_is_standardised(self, tmp_path):
        with pytest.raises(ValueError, match="`constraint_aggregation='sum_then_normalize'` needs one reward"):
            make_trainer(
                tmp_path,
                multi_objective_aggregation="normalize_then_sum",
                constraint_aggregation="sum_then_normalize",
            )

    @pytest.mark.parametrize(
        "field", [{"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {"teacher_model_revision": "main"}]
    )
    def test_loading_arguments_with_an_instance(self, tmp_path, field):
        with pytest.raises(ValueError, match="is an instance"):
            make_trainer(tmp_path, teacher_model=make_teacher(), **field)

    def test_loading_arguments_with_a_path(self, tmp_path):
        path = save_model(tmp_path / "teacher", make_teacher(), make_tokenizer())
        trainer = make_trainer(tmp_path, teacher_model=path, teacher_model_init_kwargs={"dtype": "bfloat16"})
        assert trainer.teacher_model.dtype == torch.bfloat16
        assert make_trainer(tmp_path, teacher_model=path).teacher_model.dtype == torch.float32


class TestTeacherIsTheStudent:
    @pytest.mark.parametrize("lora", [False, True], ids=["same", "base-of-the-adapter"])
    def test_same_object(self, tmp_path, lora):
        model = make_model()
        with pytest.raises(ValueError, match="shares parameters with the model being trained"):
            make_trainer(tmp_path, model=model, teacher_model=model, peft_config=make_lora() if lora else None)
        if not lora:  # the caller may continue with it
            assert all(parameter.requires_grad for parameter in model.parameters())

    def test_shared_layer(self, tmp_path):
        model, teacher = make_model(), make_model(1)
        teacher.lm_head.weight = model.lm_head.weight
        with pytest.raises(ValueError, match="shares parameters"):
            make_trainer(tmp_path, model=model, teacher_model=teacher)

    def test_equal_weights_are_no_error(self, tmp_path):
        """A copy is a teacher at distance zero."""
        trainer = run(tmp_path, teacher_model=make_model(), learning_rate=0.0, max_steps=1)
        assert history(trainer, "constraint/cost")[0] == pytest.approx(0.0, abs=1e-6)


class TestRewards:
    @pytest.mark.parametrize(("size", "penalty"), [(20.0, 20.0), (-25.0, 20.0), (1.0, 0.5)])
    def test_penalty_not_above_the_largest_reward(self, tmp_path, size, penalty):
        with pytest.raises(
            ValueError, match=f"size {abs(size):g} at step 0 reaches the violation penalty {penalty:g}"
        ):
            run(
                tmp_path,
                reward_funcs=lambda completions, **kwargs: [size] + [0.0] * (len(completions) - 1),
                teacher_model=make_teacher(),
                violation_penalty=penalty,
                constraint_aggregation="sum_then_normalize",
            )

    @pytest.mark.parametrize(
        ("method", "value"),
        [
            (ConstrainedDistillTrainer, math.inf),
            (LagrangianDistillTrainer, -math.inf),
            (GKDDistillTrainer, 1e39),
            (MiniLLMDistillTrainer, math.inf),
        ],
    )
    def test_infinite(self, tmp_path, method, value):
        """Of the second function, in the second step; 1e39 is infinite in float32."""

        def unbounded(completions, trainer_state, **kwargs):
            return [value if trainer_state.global_step == 1 else None] + [0.0] * (len(completions) - 1)

        returned = f"'unbounded' returned {'-' if value < 0 else ''}inf at step 1. A reward must be finite"
        with pytest.raises(ValueError, match=returned):
            run(tmp_path, method, reward_funcs=[length_reward, unbounded], teacher_model=make_teacher())

    @pytest.mark.parametrize("teacher", [True, False])
    def test_missing_column(self, tmp_path, teacher):
        """Raised when the trainer is built, not at the first step."""

        def exact_match(completions, answer, **kwargs):
            return [float(a == c) for a, c in zip(answer, completions, strict=True)]

        arguments = {"reward_funcs": exact_match, "teacher_model": make_teacher() if teacher else None}
        dataset = make_dataset().rename_column("answer", "solution")
        with pytest.raises(ValueError, match=r"'exact_match' needs the column 'answer'.*training.*rename_column"):
            make_trainer(tmp_path, train_dataset=dataset, **arguments)
        for eval_dataset in (dataset, {"held_out": dataset}):
            with pytest.raises(ValueError, match=r"needs the column 'answer'.*(evaluation|held_out) dataset"):
                make_trainer(tmp_path, eval_dataset=eval_dataset, **arguments)
        run(tmp_path, **arguments)

    def test_arguments_that_are_no_columns(self, tmp_path):
        """What TRL passes itself, and arguments with a default, need no column."""

        def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, unit=1.0):
            return [unit] * len(completions)

        dataset = make_dataset().remove_columns("answer")
        make_trainer(tmp_path, reward_funcs=reward, train_dataset=dataset)


class TestPrompts:
    """What is wrong with prompts is said before a model is loaded; tests/test_prompts.py has all that can be wrong."""

    SHAREGPT = Dataset.from_list([{"prompt": [{"from": "human", "value": "1+2="}]}])
    MESSAGES = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+2="}]}] * 4)

    @pytest.mark.parametrize(
        ("trainer_class", "teacher"),
        [
            (ConstrainedDistillTrainer, "no/such/teacher"),
            (ConstrainedDistillTrainer, None),
            (GKDDistillTrainer, "no/such/teacher"),
        ],
    )
    def test_before_models_are_loaded(self, tmp_path, trainer_class, teacher):
        def trainer(**kwargs):
            models = {"model": "no/such/student", "teacher_model": teacher}
            return make_trainer(tmp_path, trainer_class, **models, **kwargs)

        for eval_dataset, name in ((self.SHAREGPT, "evaluation"), ({"held_out": self.SHAREGPT}, "held_out")):
            with pytest.raises(ValueError, match=f"Row 0 of the {name} dataset: .*ShareGPT"):
                trainer(eval_dataset=eval_dataset)
        with pytest.raises(ValueError, match=r"Row 32 of the training dataset: .* is null"):
            trainer(train_dataset=concatenate_datasets([make_dataset(), Dataset.from_dict({"prompt": [None]})]))
        with pytest.raises(ValueError, match="The training dataset has no column 'prompt', it has 'q', 'answer'"):
            trainer(train_dataset=make_dataset().rename_column("prompt", "q"))
        with pytest.raises(ValueError, match="The training dataset has no rows"):
            trainer(train_dataset=make_dataset(0))
        with pytest.raises(ValueError, match=r"prompts of the training dataset are messages.*no chat template"):
            trainer(train_dataset=self.MESSAGES)

    @pytest.mark.parametrize("loaded", [False, True], ids=["path", "model"])
    def test_the_students_own_tokenizer_without_template(self, tmp_path, loaded):
        path = save_model(tmp_path / "student", make_model(), make_tokenizer())
        model = AutoModelForCausalLM.from_pretrained(path) if loaded else path
        with pytest.raises(ValueError, match="no chat template"):
            ConstrainedDistillTrainer(
                model, length_reward, make_args(tmp_path), self.MESSAGES, teacher_model="no/such/teacher"
            )

    def test_the_template_needs_an_argument(self, tmp_path):
        """It is rendered with `chat_template_kwargs`."""
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ messages[0]['content'] + sign }}"
        arguments = {"train_dataset": self.MESSAGES, "tokenizer": tokenizer, "teacher_model": make_teacher()}
        with pytest.raises(ValueError, match="cannot render the first prompt of the training dataset: 'sign'"):
            make_trainer(tmp_path, **arguments)
        run(tmp_path, **arguments, chat_template_kwargs={"sign": "+"})

    def test_a_reward_model_without_template(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        reward = LlamaForSequenceClassification(make_model().config)
        arguments = {"reward_funcs": reward, "train_dataset": self.MESSAGES, "tokenizer": tokenizer}
        with pytest.raises(ValueError, match=r"tokenizer of the reward model .* has no chat template"):
            make_trainer(tmp_path, **arguments, reward_processing_classes=make_tokenizer())
        make_trainer(tmp_path, **arguments, reward_processing_classes=tokenizer)

    def test_a_rollout_func_takes_any_prompt(self, tmp_path):
        """It makes tokens of it. Only the column must be there."""

        def rollout(prompts, trainer):
            return {
                "prompt_ids": [[4 + seed] for seed in prompts],
                "completion_ids": [[5]] * len(prompts),
                "logprobs": None,
            }

        seeds = Dataset.from_dict({"prompt": [0, 1, 2, 3]})
        run(tmp_path, train_dataset=seeds, rollout_func=rollout, teacher_model=make_teacher())
        with pytest.raises(ValueError, match="no column 'prompt', it has 'seed'"):
            make_trainer(tmp_path, train_dataset=seeds.rename_column("prompt", "seed"), rollout_func=rollout)


class TestTrackers:
    @pytest.mark.parametrize(
        ("tracker", "install"),
        [("wandb", r'"trl-cmdp\[wandb\]"'), ("trackio", r'"trl-cmdp\[tracking\]"'), ("mlflow", "mlflow")],
    )
    def test_that_is_missing(self, tmp_path, monkeypatch, tracker, install):
        monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
        with pytest.raises(ImportError, match=f"names '{tracker}', which is not installed: pip install {install}"):
            make_trainer(tmp_path, model="no/such/student", report_to=["tensorboard", tracker])

    def test_that_is_none(self, tmp_path):
        with pytest.raises(ValueError, match=r"names 'wandbb', which is no tracker: take of .*wandb"):
            make_trainer(tmp_path, model="no/such/student", report_to="wandbb")


class Poison(TrainerCallback):
    """Makes a weight of the teacher NaN at the end of a step."""

    def __init__(self, weight: torch.Tensor, step: int):
        self.weight = weight
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.weight.view(-1)[:8] = math.nan


class TestNotFinite:
    @pytest.mark.parametrize("where", ["body", "head"])
    def test_nan_from_the_teacher(self, tmp_path, where):
        """Named, with the step; the last checkpoint loads."""
        teacher = make_teacher()
        weight = teacher.lm_head.weight if where == "head" else teacher.model.layers[0].mlp.up_proj.weight
        trainer = make_trainer(
            tmp_path,
            teacher_model=teacher,
            callbacks=[Poison(weight, 2)],
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            cost_limit=0.01,
        )
        with pytest.raises(ValueError, match="The teacher returned NaN or infinite values at step 2"):
            trainer.train()
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
        assert all(parameter.isfinite().all() for parameter in saved.parameters())
        for name, parameter in saved.named_parameters():
            assert torch.equal(parameter, trainer.model.get_parameter(name))  # the failing step changed nothing

    def test_nan_from_the_student(self, tmp_path):
        """Not blamed on the teacher."""
        trainer = make_scripted_trainer(tmp_path)
        with torch.no_grad():
            trainer.model.lm_head.weight.fill_(math.nan)
        with pytest.raises(ValueError, match=r"not finite at step 0, and it is not the teacher.*student diverged"):
            trainer.train()

    def test_infinite_divergence(self, tmp_path):
        """A teacher that gives a token probability 0 makes the reverse KL infinite: the message names the floor."""
        teacher = make_teacher()
        with torch.no_grad():
            teacher.lm_head.weight[5].fill_(-3e38)
            teacher.lm_head.weight[6].fill_(3e38)
        with pytest.raises(ValueError, match="not finite at step 0"):
            make_scripted_trainer(tmp_path, teacher_model=teacher).train()


class TestNothingToLearnFrom:
    COMPLETIONS = ([2, 3, 4], [5, 6], [7], [8, 9, 10, 11])

    @pytest.mark.parametrize(
        ("loss_type", "credit_assignment"),
        [("dapo", "trajectory"), ("grpo", "token"), ("bnpo", "trajectory"), ("dr_grpo", "token")],
    )
    def test_all_masked(self, tmp_path, loss_type, credit_assignment):
        """Rollouts of which no token counts are no error: they contribute zero and are counted."""
        mask = [[0] * len(ids) for ids in self.COMPLETIONS]
        before = dict(make_model().named_parameters())
        trainer = run(
            tmp_path,
            teacher_model=make_teacher(),
            rollout_func=scripted(self.COMPLETIONS, mask),
            loss_type=loss_type,
            credit_assignment=credit_assignment,
            cost_limit=0.01,
        )
        assert history(trainer, "constraint/unjudged_frac") == [1.0, 1.0]
        assert history(trainer, "grad_norm") == [0.0, 0.0]
        assert history(trainer, "loss") == [0.0, 0.0]
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())

    @pytest.mark.parametrize("credit_assignment", ["trajectory", "token"])
    @pytest.mark.parametrize("aggregation", ["lexicographic", "sum_then_normalize"])
    def test_one_masked(self, tmp_path, aggregation, credit_assignment):
        """Beside others that count, a masked rollout adds no gradient of its own and no NaN."""
        mask = [[1] * len(ids) for ids in self.COMPLETIONS]
        mask[1] = [0, 0]
        trainer = make_scripted_trainer(
            tmp_path,
            completions=self.COMPLETIONS,
            env_mask=mask,
            credit_assignment=credit_assignment,
            constraint_aggregation=aggregation,
        )
        (batch,) = micro_batches(trainer, make_rows(4))
        loss, gradients = loss_and_gradients(trainer, [batch])
        assert math.isfinite(loss)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert metrics(trainer)["constraint/unjudged_frac"] == 0.25
        masked_row = batch["tool_mask"].sum(1) == batch["tool_mask"].size(1) - 2
        assert (batch["divergence_weights"][masked_row] == 0).all()
