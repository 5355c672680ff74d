"""Prompts with images: costs and gradients are those of each row alone, with its own images."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, IterableDataset
from helpers import (
    FIRST,
    VOCAB,
    gradients_of,
    history,
    loss_and_gradients,
    make_lora,
    make_model,
    make_teacher,
    make_tokenizer,
    make_trainer,
    micro_batches,
    random_completions,
    relative_error,
    same_weights,
    save_model,
    weights,
)
from huggingface_hub import ModelCard
from tiny_vision import (
    FAMILIES,
    dense_logits,
    make_image,
    make_image_dataset,
    make_processor,
    make_seeing_teacher,
    make_vlm,
)
from transformers import BitsAndBytesConfig
from trl import GRPOTrainer

from trl_cmdp import (
    ConstrainedDistillTrainer,
    GKDDistillTrainer,
    MiniLLMDistillTrainer,
)
from trl_cmdp.core import token_divergence
from trl_cmdp.teachers import LocalTeacher, ServerTeacher, check_images


NUM_IMAGES = (2, 0, 2, 0)  # of four prompts: as many images as rows, so that no number tells which are whose
MINUTE = {"per_device_train_batch_size": 2, "num_generations": 2, "gradient_accumulation_steps": 4}
LAST = 15  # id after those of the characters, where the tokens of images begin


def make_vision_trainer(output_dir, family, trainer_class=ConstrainedDistillTrainer, **kwargs):
    """Trainer of a student and a teacher of one family, on prompts with and without images."""
    processor = make_processor(family)
    defaults = {
        "model": make_vlm(family),
        "teacher_model": make_seeing_teacher(family),
        "train_dataset": make_image_dataset(NUM_IMAGES, copies=1),
        "reward_funcs": lambda completion_ids, **_: [float(sum(ids) % 5) for ids in completion_ids],
        "tokenizer": processor,
    }
    if trainer_class is GRPOTrainer:
        del defaults["teacher_model"]
    return make_trainer(output_dir, trainer_class, **{**MINUTE, **defaults, **kwargs})


def make_rows(trainer) -> list[dict]:
    """Rows of a generation batch: each prompt twice."""
    return [trainer.train_dataset[index // 2] for index in range(8)]


def hand_out(completions):
    """`rollout_func` that hands out completions in the order of the rows, with prompts as the processor expands them."""

    def rollout(prompts, trainer):
        encoded = trainer.processing_class.apply_chat_template(prompts, tokenize=True, return_dict=True)
        return {"prompt_ids": encoded["input_ids"], "completion_ids": completions[: len(prompts)], "logprobs": None}

    return rollout


# By its first token each is found again after the shuffle.
COMPLETIONS = [[FIRST + number, *ids] for number, ids in enumerate(random_completions(8, longest=5, vocab_size=LAST))]
DENSE = {
    "rollout_func": hand_out(COMPLETIONS),
    "cost_limit": 1e-9,
    "violation_distill_coef": 1.0,
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
}


def assert_dense(trainer, teacher_logits=None):
    """
    Costs, and the divergence's part of the gradient, of one accumulation window: from each row alone, in float64.
    `teacher_logits` gives a teacher's of a row and a completion.
    """
    student, processor, rows = trainer.model, trainer.processing_class, make_rows(trainer)
    if teacher_logits is None:
        teacher_logits = partial(dense_logits, trainer.teacher_model, processor)
    batches = micro_batches(trainer, rows)
    total = 0.0
    for batch in batches:
        for index, mask in enumerate(batch["completion_mask"].bool()):
            found = batch["completion_ids"][index][mask].tolist()
            row = rows[COMPLETIONS.index(found)]
            with torch.no_grad():
                of_teacher = teacher_logits(row, found)
            costs = token_divergence(dense_logits(student, processor, row, found), of_teacher)
            torch.testing.assert_close(batch["costs"][index][mask], costs.detach().float(), rtol=1e-4, atol=1e-5)
            total = total + (batch["divergence_weights"][index][mask] * costs).sum()
    divergence = gradients_of(total / (2 * trainer.max_completion_length * 4), student)

    _, gradients = loss_and_gradients(trainer, batches)
    without = [{name: values for name, values in batch.items() if name != "divergence_weights"} for batch in batches]
    _, own = loss_and_gradients(trainer, without)
    expected = {name: own[name] + divergence[name] for name in own}
    assert relative_error(gradients, expected) < 1e-4
    assert relative_error(own, expected) > 0.1  # the divergence weighs
    return batches, divergence


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_and_gradients_are_dense(tmp_path, family):
    batches, divergence = assert_dense(make_vision_trainer(tmp_path, family, **DENSE))
    if family != "idefics":  # whose rows TRL is to split one by one
        assert {0, 2, 4} == {sum(batch["num_images"]) for batch in batches}
    assert any("vis" in name and gradient.any() for name, gradient in divergence.items())  # it reaches the eye


@pytest.mark.parametrize("memory_mb", [256, 1e-6], ids=["kept", "recomputed"])
def test_several_teachers(tmp_path, memory_mb):
    teachers = {"near": make_seeing_teacher("qwen"), "far": make_vlm("qwen", seed=2)}
    names = ["near", "far", "far", "near"]
    trainer = make_vision_trainer(
        tmp_path,
        "qwen",
        teacher_model=teachers,
        train_dataset=make_image_dataset((2, 0, 1, 1), copies=1).add_column("teacher", names),
        teacher_hidden_memory_mb=memory_mb,
        **DENSE,
    )
    processor = trainer.processing_class
    assert_dense(trainer, lambda row, ids: dense_logits(teachers[row["teacher"]], processor, row, ids))


def test_the_students_own_base(tmp_path):
    trainer = make_vision_trainer(
        tmp_path, "gemma", teacher_model=None, teacher_adapter_name="base", peft_config=make_lora(), **DENSE
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # an adapter that has learnt something
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def of_base(row, ids):
        with trainer.model.disable_adapter():
            return dense_logits(trainer.model, trainer.processing_class, row, ids)

    assert_dense(trainer, of_base)


def test_a_quantised_teacher(tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    path = save_model(tmp_path / "teacher", make_seeing_teacher("llava"), make_processor("llava"))
    trainer = make_vision_trainer(
        tmp_path,
        "llava",
        teacher_model=path,
        teacher_model_init_kwargs={"quantization_config": quantization, "dtype": "float32"},
        **DENSE,
    )
    assert any(type(part) is Linear4bit for part in trainer.teacher_model.modules())
    assert_dense(trainer)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unreachable_limit_is_grpo(tmp_path, family):
    """To the last bit, from generation to weights."""
    settings = {"train_dataset": make_image_dataset((1, 2)), "gradient_accumulation_steps": 2}
    ours = make_vision_trainer(tmp_path / "ours", family, cost_limit=1e9, **settings)
    ours.train()
    grpo = make_vision_trainer(tmp_path / "grpo", family, GRPOTrainer, **settings)
    grpo.train()
    assert same_weights(ours, grpo)
    assert history(ours, "loss") == history(grpo, "loss")
    assert any(history(ours, "grad_norm"))
    assert history(ours, "teacher/divergence")[0] > 0


@pytest.mark.parametrize(("family", "with_teacher"), [*((family, True) for family in FAMILIES), ("idefics", False)])
def test_rows_of_text_among_rows_with_images(tmp_path, family, with_teacher):
    """Also without a teacher, where TRL fails at them."""
    trainer = make_vision_trainer(tmp_path, family, **({} if with_teacher else {"teacher_model": None}))
    before = weights(trainer)
    trainer.train()
    assert len(history(trainer, "constraint/cost")) == (2 if with_teacher else 0)
    changed = [name for name, values in weights(trainer).items() if not torch.equal(values, before[name])]
    assert any("vis" in name for name in changed)


def test_log_probabilities_of_the_reference_and_of_before_are_of_each_row(tmp_path):
    """Before the first step both are the student's own, which the loss finds again."""
    path = save_model(tmp_path / "student", make_vlm("idefics"), make_processor("idefics"))
    dataset = make_image_dataset((0, 1, 2, 1), copies=1)  # as many images as rows, but not in each micro-batch
    settings = {"beta": 0.1, "num_iterations": 2, "train_dataset": dataset}
    trainer = make_vision_trainer(tmp_path, "idefics", model=path, **settings)
    for batch in micro_batches(trainer, make_rows(trainer)):
        length = batch["completion_ids"].size(1)
        ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        images = {name: batch[name] for name in ("pixel_values", "pixel_attention_mask", "num_images")}
        now, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, **images)
        counted = batch["completion_mask"].bool()
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            torch.testing.assert_close(batch[name][counted], now[counted], rtol=1e-4, atol=1e-5)
    trainer = make_vision_trainer(tmp_path / "run", "idefics", model=path, **settings)
    trainer.train()
    assert len(history(trainer, "kl")) == 2


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (ConstrainedDistillTrainer, {"teacher_hidden_memory_mb": 1e-6}),
        (GKDDistillTrainer, {"lmbda": 0.5}),
        (GKDDistillTrainer, {"lmbda": 0.0, "seq_kd": True}),
        (MiniLLMDistillTrainer, {"teacher_mixed_alpha": 0.5}),
    ],
    ids=("student", "dataset", "teacher", "mixture"),
)
def test_resumes_in_the_middle_of_a_generation_cycle(tmp_path, trainer_class, settings):
    """The images of the rollouts that are left are those that were saved, wherever completions and costs come from."""
    dataset = make_image_dataset(NUM_IMAGES)
    answers = [[{"role": "assistant", "content": f"{number}<eos>"}] for number in range(len(dataset))]
    settings = {
        **settings,
        "train_dataset": dataset.add_column("completion", answers),
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "learning_rate": 0.02,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = make_vision_trainer(tmp_path / "whole", "qwen", trainer_class, **settings)
    start = weights(whole)
    whole.train()
    assert any(not torch.equal(values, start[name]) for name, values in weights(whole).items())
    resumed = make_vision_trainer(tmp_path / "whole", "qwen", trainer_class, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same_weights(resumed, whole)


def test_the_best_checkpoint_is_loaded(tmp_path):
    """Also of a model that transformers saves under other names, which it does not find when it loads the best one."""
    trainer = make_vision_trainer(
        tmp_path,
        "llava",
        eval_dataset=make_image_dataset((1,), copies=1),
        per_device_eval_batch_size=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")  # and not the last one
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint, dtype="auto")
    torch.testing.assert_close(weights(trainer), dict(best.named_parameters()), rtol=0, atol=0)
    assert "eval_constraint/cost" in trainer.state.log_history[0] | trainer.state.log_history[1]


def test_the_cards_example_runs(tmp_path, monkeypatch, capsys):
    """And takes an image: what is saved is a checkpoint with its processor."""
    trainer = make_vision_trainer(tmp_path / "student", "idefics")
    trainer.save_model()
    trainer.create_model_card("student")
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    (example,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    make_image(0).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(example.replace(', device_map="auto"', ""), {})
    assert capsys.readouterr().out.strip()


class TestWhatCannotBeRead:
    """Refused before training, by what is wrong."""

    def refused(self, tmp_path, message, **kwargs):
        with pytest.raises(ValueError, match=message):
            make_vision_trainer(tmp_path, kwargs.pop("family", "idefics"), **kwargs)

    def test_by_a_teacher_of_text(self, tmp_path):
        vocab_size = len(make_processor("idefics").tokenizer)
        self.refused(tmp_path, "does not look at images", teacher_model=make_teacher(vocab_size=vocab_size))

    def test_by_a_teacher_of_text_that_rounds_each_row_its_own_way(self, tmp_path, monkeypatch):
        """As a product of matrices may: equal rows are not equal to the bit wherever they lie in memory."""
        read = LocalTeacher.hidden_states

        def rounded(self, *args, **kwargs):
            hidden = read(self, *args, **kwargs)
            return hidden * (1 + 1e-6 * torch.arange(len(hidden)).unsqueeze(1))

        monkeypatch.setattr(LocalTeacher, "hidden_states", rounded)
        vocab_size = len(make_processor("idefics").tokenizer)
        self.refused(tmp_path, "does not look at images", teacher_model=make_teacher(vocab_size=vocab_size))

    def test_a_teacher_of_nan_is_not_called_blind(self, tmp_path, monkeypatch):
        read = LocalTeacher.hidden_states
        monkeypatch.setattr(
            LocalTeacher, "hidden_states", lambda self, *args, **kwargs: read(self, *args, **kwargs) * torch.nan
        )
        with pytest.raises(ValueError, match="returned NaN"):
            make_vision_trainer(tmp_path, "idefics").train()

    def test_by_a_teacher_with_another_image_token(self, tmp_path):
        teacher = make_seeing_teacher("idefics")
        teacher.config.image_token_id -= 1
        self.refused(tmp_path, "same image token", teacher_model=teacher)

    def test_by_a_teacher_with_more_tokens_for_an_image(self, tmp_path):
        teacher = make_seeing_teacher("qwen")
        teacher.model.visual.spatial_merge_size = 2
        self.refused(tmp_path, "cannot read images as the student's processor", family="qwen", teacher_model=teacher)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda processor: setattr(processor, "image_seq_len", 9), "make 11 and 16 tokens"),
            (lambda processor: setattr(processor.image_processor, "image_mean", [0.1] * 3), "image_mean"),
            (lambda processor: setattr(processor.image_processor, "max_image_size", {"longest_edge": 16}), "shapes"),
        ],
    )
    def test_by_another_processor(self, tmp_path, change, message):
        processor = make_processor("idefics")
        change(processor)
        path = save_model(tmp_path / "teacher", make_seeing_teacher("idefics"), processor)
        self.refused(tmp_path, message, teacher_model=path)

    def test_by_a_student_of_text(self, tmp_path):
        student, tokenizer = make_model(vocab_size=VOCAB + 1), make_tokenizer("0123456789+=,#\n")
        tokenizer.chat_template = "{{ messages[0].content }}"
        teacher = make_teacher(vocab_size=VOCAB + 1)
        self.refused(tmp_path, "reads text alone", model=student, tokenizer=tokenizer, teacher_model=teacher)

    def test_by_a_server(self, tmp_path):
        """Before it is asked for anything: there is none at this address."""
        server = {"teacher_model": None, "teacher_model_server_url": "http://localhost:9"}
        self.refused(tmp_path, "A teacher server reads text alone", **server)
        dataset = make_image_dataset((1,), copies=1)
        text = dataset.remove_columns("images")
        self.refused(
            tmp_path, "evaluation dataset has the column 'images'", train_dataset=text, eval_dataset=dataset, **server
        )

    def test_by_a_server_that_is_asked_all_the_same(self):
        """As with images that a tool returns, where the data say nothing."""
        teacher = ServerTeacher(
            SimpleNamespace(exact=True, vocab_size=20, head=None, concurrency=1), torch.device("cpu")
        )
        with pytest.raises(ValueError, match="A teacher server reads text alone"):
            check_images(teacher, make_processor("idefics"), torch.device("cpu"))
        ids = torch.ones(1, 3, dtype=torch.long)
        with pytest.raises(ValueError, match="A teacher server reads text alone"):
            teacher.hidden_states(ids, ids, ids[:, 1:].bool(), pixel_values=torch.zeros(1))

    @pytest.mark.parametrize("where", ["column", "first message", "later message"])
    def test_beside_a_prompt_of_the_teachers_own(self, tmp_path, where):
        """Before a model is loaded, whatever the teacher is."""
        dataset = make_image_dataset((1,), copies=1)
        if where != "column":
            image = {"type": "image", "text": None}
            texts = [[{"type": "text", "text": prompt}] for prompt in ("1+2=", "3+4=")]
            contents = [[image, *texts[0]], texts[1]] if where == "first message" else [texts[0], [image, *texts[1]]]
            dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": content}] for content in contents]})
        dataset = dataset.add_column("teacher_prompt", ["1+2=3"] * len(dataset))
        message = "'teacher_prompt' cannot be used together with images"
        nothing = {"model": "./nothing", "teacher_model": "./nothing", "train_dataset": dataset}
        self.refused(tmp_path, message, **nothing)
        self.refused(tmp_path, message, **nothing, teacher_model_server_url="http://localhost:9")

    def test_beside_a_prompt_of_the_teachers_own_in_a_later_row_of_a_stream(self, tmp_path):
        text = [{"type": "text", "text": "1+2="}]
        contents = [text] * 16 + [[{"type": "image", "image": make_image(0)}, *text]] * 4
        rows = [{"prompt": [{"role": "user", "content": content}], "teacher_prompt": "3"} for content in contents]
        stream = IterableDataset.from_generator(lambda: iter(rows))
        trainer = make_vision_trainer(tmp_path, "idefics", train_dataset=stream, max_steps=5)
        with pytest.raises(ValueError, match="'teacher_prompt' cannot be used together with images"):
            trainer.train()

    def test_in_a_later_row(self, tmp_path):
        """With the first batch that has an image: a stream is not read before."""
        text = [{"type": "text", "text": "1+2="}]
        contents = [text, [{"type": "image", "image": make_image(0)}, *text]] * 2
        rows = [{"prompt": [{"role": "user", "content": content}]} for content in contents]
        stream = IterableDataset.from_generator(lambda: iter(rows))
        teacher = make_teacher(vocab_size=len(make_processor("idefics").tokenizer))
        trainer = make_vision_trainer(tmp_path, "idefics", train_dataset=stream, teacher_model=teacher)
        with pytest.raises(ValueError, match="does not look at images"):
            trainer.train()
