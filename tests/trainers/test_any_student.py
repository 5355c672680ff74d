"""Students and teachers that a rollout must be read to as it was sampled: learned positions, prompts, PEFT teachers."""

import pytest
import torch
from datasets import Dataset
from helpers import (
    CHARACTERS,
    EOS,
    PAD,
    VOCAB,
    capture_rollouts,
    history,
    make_lora,
    make_model,
    make_settings,
    make_teacher,
    make_tokenizer,
    make_trainer,
    run,
    save_model,
    weights,
)
from peft import (
    CPTConfig,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel
from trl import GRPOTrainer

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer
from trl_cmdp.evaluation import Rollout, evaluate, sample_rollouts, score_rollouts
from trl_cmdp.teachers import LocalTeacher


UNEQUAL = Dataset.from_dict({"prompt": ["1+2=", "3+4+5+6+7+8="] * 8, "answer": ["3", "33"] * 8})
PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


def gpt2(seed: int = 0, positions: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    size = {"vocab_size": VOCAB, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(**size, **tokens, **dropout, initializer_range=0.5))


def rollouts_of(batch: dict) -> list[Rollout]:
    """What was generated, without padding."""
    rows = []
    for row in range(len(batch["prompt_ids"])):
        ids = [
            batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()].tolist() for part in ("prompt", "completion")
        ]
        rows.append(Rollout("", "", *ids))
    return rows


def scored(trainer: GRPOTrainer, monkeypatch) -> tuple[list[Rollout], list[torch.Tensor]]:
    """Rollouts of one generation beside one another, and their costs in the trainer."""
    captured, outputs = capture_rollouts(trainer, monkeypatch), []
    generate = trainer._generate_and_score_completions
    monkeypatch.setattr(
        trainer, "_generate_and_score_completions", lambda rows: outputs.append(generate(rows)) or outputs[-1]
    )
    trainer.train()
    rollouts = rollouts_of(outputs[0])
    return rollouts, [
        costs[: len(rollout.completion_ids)] for rollout, costs in zip(rollouts, captured[0].costs, strict=True)
    ]


class TestLearnedPositions:
    SETTINGS = {"train_dataset": UNEQUAL, "per_device_train_batch_size": 8, "shuffle_dataset": False}

    def test_costs_are_those_of_the_rollouts_alone(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, model=gpt2(), teacher_model=gpt2(1), max_steps=1, **self.SETTINGS)
        rollouts, costs = scored(trainer, monkeypatch)
        assert len({len(rollout.prompt_ids) for rollout in rollouts}) == 2
        alone = [score_rollouts([rollout], gpt2(), gpt2(1))[0] for rollout in rollouts]
        torch.testing.assert_close(costs, alone, rtol=1e-5, atol=1e-5)

    def test_the_policy_loss_reads_tokens_where_they_were_sampled(self, tmp_path):
        """Log-probabilities in TRL's own loss, of rows of both lengths, are those of each row alone."""
        trainer = make_trainer(tmp_path, model=gpt2(), teacher_model=gpt2(1), **self.SETTINGS)
        prompts = [[5, 6, 7], [4, 3, 9, 10, 5, 6, 8]]
        length, completion = 7, [5, 8, EOS]
        input_ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt + completion for prompt in prompts])
        mask = (input_ids != PAD).long()
        both = trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, 3, compute_entropy=True)
        row = torch.tensor([[*prompts[0], *completion]])
        alone = trainer._get_per_token_logps_and_entropies(
            trainer.model, row, torch.ones_like(row), 3, compute_entropy=True
        )
        for values, expected in zip(both[:2], alone[:2], strict=True):
            torch.testing.assert_close(values[:1], expected)
        logits = trainer.model(row).logits[:, -4:-1].log_softmax(-1)
        torch.testing.assert_close(alone[0], logits.gather(-1, row[:, -3:, None])[..., 0])

    def test_the_reference_model_reads_them_there_too(self, tmp_path):
        """At the start it is the student: its KL is 0."""
        path = save_model(tmp_path / "student", gpt2(), make_tokenizer())
        trainer = run(
            tmp_path, model=path, teacher_model=gpt2(1), beta=0.1, max_steps=1, cost_limit=1e6, **self.SETTINGS
        )
        assert history(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)


class TestPromptLearning:
    @pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
    def test_it_trains_beside_a_teacher(self, tmp_path, monkeypatch, config):
        """Costs are those of the rollouts alone, and what is trained changes."""
        settings = {
            "train_dataset": UNEQUAL,
            "per_device_train_batch_size": 8,
            "shuffle_dataset": False,
            "cost_limit": 0.1,
        }
        model = get_peft_model(make_model(spread=0.4), config)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = make_trainer(tmp_path, model=model, teacher_model=make_teacher(), max_steps=1, **settings)
        before = weights(trainer)
        rollouts, costs = scored(trainer, monkeypatch)
        after = weights(trainer)
        assert any(not torch.equal(after[name], before[name]) for name in before)
        model.load_state_dict(start)
        alone = [score_rollouts([rollout], model, make_teacher())[0] for rollout in rollouts]
        torch.testing.assert_close(costs, alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("limit", [1e6, None])
    def test_without_a_divergence_it_is_grpo(self, tmp_path, limit):
        teacher = {} if limit is None else {"teacher_model": make_teacher(), "cost_limit": limit}

        def train(trainer_class, name, **kwargs):
            torch.manual_seed(0)
            return run(tmp_path / name, trainer_class, peft_config=PROMPTS["prompt tuning"], **kwargs)

        assert history(train(ConstrainedDistillTrainer, "ours", **teacher), "loss") == history(
            train(GRPOTrainer, "grpo"), "loss"
        )

    @pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
    def test_one_that_generates_without_its_prompt_is_refused(self, tmp_path, monkeypatch, config):
        """As PEFT 0.21 lets it under transformers 5.24. A student, a teacher that samples, and what is evaluated."""
        student, teacher = (get_peft_model(make_model(seed, spread=0.4), config) for seed in (0, 1))
        monkeypatch.setattr(
            PeftModelForCausalLM,
            "prepare_inputs_for_generation",
            lambda model, *args, **kwargs: model.base_model_prepare_inputs_for_generation(*args, **kwargs),
        )
        message = (
            "No completions can be sampled from the {}, LlamaForCausalLM with .*not generate from its own distribution"
        )
        with pytest.raises(ValueError, match=message.format("student")):
            make_trainer(tmp_path, model=student, teacher_model=make_teacher())
        with pytest.raises(ValueError, match=message.format("model")):
            sample_rollouts(student, make_tokenizer(), ["1+2="], max_new_tokens=4)
        with pytest.raises(ValueError, match=message.format("teacher")):
            make_trainer(tmp_path, MiniLLMDistillTrainer, teacher_model=teacher)

    def test_what_trl_cannot_train_is_refused_by_name(self, tmp_path):
        config = CPTConfig(cpt_token_ids=[4, 5], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match="LlamaForCausalLM, or its adapter cannot be trained"):
            make_trainer(tmp_path, peft_config=config, teacher_model=make_teacher())


def test_an_architecture_that_trl_reads_otherwise_is_refused_by_name(tmp_path):
    """The head of BERT stands on a transformation of its backbone's hidden states, which TRL's loss leaves out."""
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.is_decoder, config.initializer_range = True, 0.5
    with pytest.raises(ValueError, match="BertLMHeadModel"):
        make_trainer(tmp_path, model=BertLMHeadModel(config), teacher_model=make_teacher())


class TestAnyTeacher:
    """Whatever one entry takes as a teacher, all take."""

    @pytest.mark.parametrize(
        "trainer_class",
        [ConstrainedDistillTrainer, LagrangianDistillTrainer, GKDDistillTrainer, MiniLLMDistillTrainer],
    )
    def test_a_peft_model(self, tmp_path, trainer_class):
        model = get_peft_model(make_teacher(), make_lora(init_lora_weights=False))
        ours = run(tmp_path / "ours", trainer_class, teacher_model=model)
        merged = run(tmp_path / "merged", trainer_class, teacher_model=model.merge_and_unload())
        assert history(ours, "loss") == pytest.approx(history(merged, "loss"), rel=1e-3, abs=1e-5)

    def test_a_path_an_instance_and_one_wrapped(self, tmp_path):
        student, path = make_model(spread=0.4), save_model(tmp_path / "teacher", make_teacher(), make_tokenizer())
        rollouts = [Rollout("", "", [5, 6], [7, 8, EOS])]
        expected = score_rollouts(rollouts, student, make_teacher())
        for teacher in (path, LocalTeacher(make_teacher())):
            torch.testing.assert_close(score_rollouts(rollouts, student, teacher), expected)
            assert history(run(tmp_path, teacher_model=teacher, max_steps=1), "constraint/cost")
        with pytest.raises(TypeError, match="one teacher at a time"):
            score_rollouts(rollouts, student, {"a": make_teacher()})


class TestUnfit:
    """The same error from every entry, in place of an `IndexError`."""

    def evaluated(self, student, teacher, tokenizer=None, **changes):
        problems = Dataset.from_dict({"prompt": ["1+2=", "3+4="], "answer": ["3", "7"]})
        return evaluate(
            student,
            make_tokenizer() if tokenizer is None else tokenizer,
            problems,
            lambda completions, **kwargs: [0.0] * len(completions),
            settings=make_settings(**changes),
            teacher=teacher,
        )

    def test_ids_beyond_the_teacher(self):
        student = make_model(vocab_size=VOCAB + 8)
        with torch.no_grad():
            student.lm_head.weight[VOCAB:] = 100 * student.lm_head.weight[:8]
        with pytest.raises(ValueError, match="beyond the teacher's"):
            self.evaluated(student, make_teacher())

    def test_too_few_positions(self, tmp_path):
        message = "positions"
        with pytest.raises(ValueError, match=message):
            self.evaluated(make_model(), gpt2(positions=8), max_new_tokens=12)
        with pytest.raises(ValueError, match=message):
            score_rollouts([Rollout("", "", [5] * 6, [6] * 4)], make_model(), gpt2(positions=8))
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, teacher_model=gpt2(positions=8), max_completion_length=8)
        trainer = make_trainer(
            tmp_path, teacher_model=gpt2(positions=8), max_completion_length=6, train_dataset=UNEQUAL
        )
        with pytest.raises(ValueError, match=message):
            trainer.train()

    def test_a_tokenizer_without_eos(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        message = "tokenizer has no EOS token"
        with pytest.raises(ValueError, match=message):
            self.evaluated(make_model(), make_teacher(), tokenizer)
        with pytest.raises(ValueError, match=message):
            sample_rollouts(make_model(), tokenizer, [CHARACTERS[:2]], max_new_tokens=2)
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, teacher_model=make_teacher(), tokenizer=tokenizer)
