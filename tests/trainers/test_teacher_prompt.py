"""A teacher that reads a prompt of its own, the dataset's `teacher_prompt`, behind which it scores the student's tokens."""

import json
import shutil

import pytest
import torch
from datasets import Dataset, Image, IterableDataset
from fake_server import serving
from fake_vllm import FakeServer
from helpers import (
    EOS,
    PAD,
    VOCAB,
    assert_gradient_is_dense,
    capture_rollouts,
    dense_logits,
    loss_and_gradients,
    make_dataset,
    make_lora,
    make_model,
    make_scripted_trainer,
    make_teacher,
    make_tokenizer,
    make_trainer,
    micro_batches,
    random_completions,
    relative_error,
    run,
    same_weights,
    save_model,
)
from transformers import GPT2Config, GPT2LMHeadModel

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer
from trl_cmdp.core import token_divergence


TOKENIZER = make_tokenizer()
# What the teacher reads in the place of each prompt: longer or shorter than it.
HINTS = {"1+2=": "1+2=3#1+2=", "3+4=": "7", "5+6=": "5+6=11,5+6=11,5+6=", "7+8=": "#7+8="}
PLAIN = {"template": "{% for message in messages %}{{ message.content }}{% endfor %}"}
# The teacher's template brackets every message.
BRACKETS = "{% for message in messages %}#{{ message.content }}#{% endfor %}{% if add_generation_prompt %}={% endif %}"


def dataset(hints=HINTS) -> Dataset:
    data = make_dataset()
    return data.add_column("teacher_prompt", [hints.get(prompt, prompt) for prompt in data["prompt"]])


def rows(data: Dataset, count: int = 8) -> list[dict]:
    """Groups of four."""
    return [data[index // 4] for index in range(count)]


def costs_by_hand(student, teacher, batch, temperature=1.0, beta=1.0):
    """Divergence (B, T) of rows that are built one by one, without padding, from what each prompt's teacher reads."""
    logits = dense_logits(student, batch)
    of_teacher = []
    for ids, mask, completion in zip(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], strict=True):
        prompt = TOKENIZER.decode(ids[mask.bool()])
        row = torch.tensor([TOKENIZER(HINTS[prompt])["input_ids"] + completion.tolist()])
        of_teacher.append(teacher(row).logits[0, -(len(completion) + 1) : -1].double())
    return token_divergence(logits, torch.stack(of_teacher), beta=beta, temperature=temperature)


@pytest.mark.parametrize(
    ("recomputed", "batch_size", "settings"),
    [
        (False, 8, {}),
        (True, 4, {"temperature": 0.7, "teacher_beta": 0.5}),
        (True, 8, {"env_mask": [[index % 3 != 1 for index in range(len(ids))] for ids in random_completions(8)]}),
    ],
    ids=["kept", "recomputed", "tools"],
)
def test_costs_and_gradient_are_dense(tmp_path, monkeypatch, recomputed, batch_size, settings):
    trainer = make_scripted_trainer(
        tmp_path,
        LagrangianDistillTrainer,
        multiplier="fixed",
        multiplier_init=1.0,
        train_dataset=dataset(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        teacher_hidden_memory_mb=1e-6 if recomputed else 256,
        **settings,
    )
    captured = capture_rollouts(trainer, monkeypatch)
    batches = micro_batches(trainer, rows(dataset()))
    (rollouts,) = captured
    assert 0 < rollouts.mask.sum() < rollouts.mask.numel()
    args = trainer.args
    for batch in batches:
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        expected = costs_by_hand(trainer.model, trainer.teacher_model, batch, args.temperature, args.teacher_beta)
        torch.testing.assert_close(batch["costs"].double(), expected.detach() * mask, rtol=1e-4, atol=1e-6)
    assert_gradient_is_dense(trainer, batches, costs=costs_by_hand)


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (ConstrainedDistillTrainer, {"cost_limit": 1.7, "unrewarded_distill_coef": 0.1}),
        (ConstrainedDistillTrainer, {"cost": "teacher_nll", "cost_limit": 3.0, "credit_assignment": "token"}),
        (
            ConstrainedDistillTrainer,
            {"teacher_adapter_name": "base", "peft_config": make_lora(), "cost_limit": 1e-3},
        ),
        (LagrangianDistillTrainer, {"multiplier": "pid"}),
        (GKDDistillTrainer, {"lmbda": 0.5, "seq_kd": True}),
        (MiniLLMDistillTrainer, {"teacher_mixed_alpha": 0.3}),
    ],
    ids=["constrained", "teacher_nll", "base", "pid", "seq_kd", "mixed"],
)
def test_equal_to_the_prompt_it_changes_nothing(tmp_path, trainer_class, settings):
    """Bit for bit; and another prompt does change the training."""
    if "teacher_adapter_name" not in settings:
        settings = {**settings, "teacher_model": make_teacher()}
    settings = {**settings, "gradient_accumulation_steps": 2, "learning_rate": 0.02}
    plain, equal, other = (
        run(tmp_path / name, trainer_class, model=make_model(spread=0.6), train_dataset=data, **settings)
        for name, data in (("plain", make_dataset()), ("equal", dataset({})), ("other", dataset()))
    )
    assert same_weights(equal, plain)
    assert not same_weights(other, plain)


def test_several_teachers_read_their_own(tmp_path, monkeypatch):
    data = dataset().add_column("teacher", [("near", "far")[index % 2] for index in range(32)])
    teachers = {"near": make_teacher(), "far": make_teacher(2, hidden_size=20)}
    trainer = make_scripted_trainer(tmp_path, train_dataset=data, teacher_model=dict(teachers), cost_limit=1.0)
    for batch in micro_batches(trainer, rows(data)):
        near, far = (costs_by_hand(trainer.model, teacher, batch).detach() for teacher in teachers.values())
        expected = torch.where(batch["teacher_index"].unsqueeze(1) == 0, near, far) * batch["completion_mask"]
        torch.testing.assert_close(batch["costs"].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False], ids=["hidden_states", "log_probs"])
def test_servers(tmp_path, monkeypatch, exact):
    """The same numbers as with the teacher in this process."""
    folder = save_model(tmp_path / "teacher", make_teacher(), TOKENIZER)
    settings = {} if exact else {"cost": "log_ratio", "violation_distill_coef": 0.0, "cost_limit": 1.0}
    results = []
    with serving(FakeServer(make_teacher().eval(), folder, *([] if exact else ["v1/completions"]))) as server:
        for of_teacher in ({}, {"teacher_model": None, "teacher_model_server_url": server.url}):
            trainer = make_scripted_trainer(tmp_path, train_dataset=dataset(), **{**settings, **of_teacher})
            captured = capture_rollouts(trainer, monkeypatch)
            batches = micro_batches(trainer, rows(dataset()))
            results.append((captured[0], loss_and_gradients(trainer, batches)[1]))
    (local, local_gradients), (remote, remote_gradients) = results
    name = "costs" if exact else "teacher_logps"
    torch.testing.assert_close(getattr(remote, name), getattr(local, name), rtol=1e-5, atol=1e-5)
    assert relative_error(remote_gradients, local_gradients) < 1e-4


def greedy(teacher, prompt: str, length: int) -> list[int]:
    """What a teacher writes behind a prompt."""
    ids = TOKENIZER(prompt)["input_ids"]
    for _ in range(length):
        ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(TOKENIZER(prompt)["input_ids"]) :]


class TestSampledFromTheTeacher:
    """Completions that the teacher writes, or has a part in, are written behind its own prompt."""

    def completions(self, folder, trainer_class, **settings):
        """Of two prompts, whose teacher's have unequal lengths."""
        trainer = make_trainer(
            folder,
            trainer_class,
            train_dataset=dataset(),
            teacher_model=make_teacher(),
            temperature=1e-4,
            per_device_train_batch_size=8,
            **settings,
        )
        (batch,) = micro_batches(trainer, rows(dataset()))
        shown = zip(batch["prompt_ids"], batch["completion_ids"], batch["completion_mask"], strict=True)
        return [(TOKENIZER.decode(prompt), ids[mask.bool()].tolist()) for prompt, ids, mask in shown]

    def test_of_the_teacher(self, tmp_path):
        expected = {prompt: greedy(make_teacher(), hint, 6) for prompt, hint in HINTS.items()}
        assert all(expected[prompt] != greedy(make_teacher(), prompt, 6) for prompt in ("1+2=", "3+4="))
        for prompt, completion in self.completions(tmp_path, GKDDistillTrainer, lmbda=0.0, seq_kd=True):
            assert completion == expected[prompt]

    def test_of_a_mixture(self, tmp_path):
        """At this temperature the likeliest token of either model has all of its probability: one draw in 1000 is the
        student's."""
        expected = {prompt: greedy(make_teacher(), hint, 6) for prompt, hint in HINTS.items()}
        assert expected["1+2="] != greedy(make_teacher(), "1+2=", 6)
        found = self.completions(tmp_path, MiniLLMDistillTrainer, teacher_mixed_alpha=0.999)
        assert sum(completion == expected[prompt] for prompt, completion in found) >= 7


def messages(data: Dataset) -> Dataset:
    """Prompts as text, the teacher's as messages."""
    return data.map(lambda row: {"teacher_prompt": [{"role": "user", "content": row["teacher_prompt"]}]})


class TestMessages:
    def test_of_the_teachers_own_template(self, tmp_path):
        """The student's prompts keep the student's."""
        tokenizer, own = make_tokenizer(), make_tokenizer()
        tokenizer.chat_template, own.chat_template = PLAIN["template"], BRACKETS
        teacher = save_model(tmp_path / "teacher", make_teacher(), own)
        data = messages(dataset()).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        trainer = make_trainer(tmp_path, train_dataset=data, tokenizer=tokenizer, teacher_model=teacher)
        (batch,) = micro_batches(trainer, rows(data, 4))
        assert TOKENIZER.decode(batch["prompt_ids"][0]) == "1+2="
        assert TOKENIZER.decode(batch["teacher_prompt_ids"][0]) == f"#{HINTS['1+2=']}#="
        assert trainer.latest_teacher_prompts() == [f"#{HINTS['1+2=']}#="] * 4

    @pytest.mark.parametrize("saved", [True, False], ids=["equal", "unknown"])
    def test_of_the_students_template(self, tmp_path, saved):
        """Where the teacher has the same one, or none is known. The prompts of the student may be text."""
        tokenizer = make_tokenizer()
        tokenizer.chat_template = PLAIN["template"]
        teacher = save_model(tmp_path / "teacher", make_teacher(), tokenizer) if saved else make_teacher()
        data = messages(dataset())
        trainer = make_trainer(tmp_path, train_dataset=data, tokenizer=tokenizer, teacher_model=teacher)
        (batch,) = micro_batches(trainer, rows(data, 4))
        assert TOKENIZER.decode(batch["teacher_prompt_ids"][0]) == HINTS["1+2="]

    def test_teacher_without_a_template(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = PLAIN["template"]
        teacher = save_model(tmp_path / "teacher", make_teacher(), make_tokenizer())
        with pytest.raises(
            ValueError, match=r"'teacher_prompt'\) are messages, and the teacher's own tokenizer .*teacher"
        ):
            make_trainer(tmp_path, train_dataset=messages(dataset()), tokenizer=tokenizer, teacher_model=teacher)

    def test_student_without_a_template(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"'teacher_prompt'.* are messages, and the tokenizer has no chat template"
        ):
            make_trainer(tmp_path, train_dataset=messages(dataset()), teacher_model=make_teacher())

    def test_that_the_template_refuses(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
        with pytest.raises(ValueError, match=r"first prompt of the teacher .*'teacher_prompt'.*no system messages"):
            make_trainer(
                tmp_path, train_dataset=messages(dataset()), tokenizer=tokenizer, teacher_model=make_teacher()
            )


def test_what_the_run_says_of_itself(tmp_path):
    """The model card, and the file that `trl-cmdp evaluate` reads."""
    cards = {}
    for name, data in (("own", dataset()), ("plain", make_dataset())):
        trainer = make_trainer(tmp_path / name, train_dataset=data, teacher_model=make_teacher())
        trainer.create_model_card("student")
        trainer.save_model(tmp_path / name)
        said = json.loads((tmp_path / name / "_run.json").read_text())
        cards[name] = (tmp_path / name / "README.md").read_text(), said.get("teacher_prompt")
    assert "given as an object, behind prompts of its own (`teacher_prompt`)" in cards["own"][0]
    assert "`teacher_prompt`" not in cards["plain"][0]
    assert (cards["own"][1], cards["plain"][1]) == (True, None)


def test_resume_inside_a_generation_cycle(tmp_path):
    """The rollouts that a checkpoint keeps have the teacher's prompts."""
    settings = {
        "train_dataset": dataset(),
        "teacher_model": make_teacher(),
        "num_iterations": 2,
        "cost_limit": 1.7,
        "learning_rate": 0.02,
        "teacher_hidden_memory_mb": 1e-6,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = run(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "stopped" / "checkpoint-1")
    resumed = make_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(resumed, whole)


def changed(index: int, value) -> list:
    values = list(dataset()["teacher_prompt"])
    values[index] = value
    return values


def with_column(values) -> Dataset:
    return make_dataset().add_column("teacher_prompt", values)


PICTURE = [[{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "1+2="}]}]] * 32


class TestBadInput:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (lambda: with_column(changed(3, None)), r"Row 3 of the training dataset.*'teacher_prompt'\) is null"),
            (lambda: with_column(changed(5, "")), r"Row 5 of the training dataset.*'teacher_prompt'\) is empty"),
            (lambda: with_column(list(range(32))), r"Row 0 .*'teacher_prompt'\) is of type `int`"),
            (lambda: with_column([[]] * 32), r"Row 0 .*'teacher_prompt'\) is an empty list"),
            (lambda: with_column(PICTURE), r"Row 0 .*'teacher_prompt'\) has content other than text"),
            (
                lambda: dataset().add_column("image", [None] * 32).cast_column("image", Image()),
                "cannot be used together with images",
            ),
        ],
        ids=["null", "empty", "number", "no_messages", "picture", "column_of_images"],
    )
    def test_before_a_model_is_loaded(self, tmp_path, data, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, model="./nothing", train_dataset=data(), teacher_model="./nothing")

    @pytest.mark.parametrize("stream", [False, True])
    def test_one_dataset_lacks_it(self, tmp_path, stream):
        data = dataset().to_iterable_dataset() if stream else dataset()
        with pytest.raises(
            ValueError, match="training dataset has the column 'teacher_prompt', and the easy dataset has not"
        ):
            make_trainer(
                tmp_path, train_dataset=data, eval_dataset={"easy": make_dataset()}, teacher_model=make_teacher()
            )
        with pytest.raises(ValueError, match=r"evaluation dataset has the column .* and the training dataset has not"):
            make_trainer(tmp_path, train_dataset=make_dataset(), eval_dataset=data, teacher_model=make_teacher())

    def test_rows_of_a_stream(self, tmp_path):
        """As they come, before a completion is sampled."""

        def stream():
            for index, row in enumerate(dataset()):
                yield row if index < 20 else {**row, "teacher_prompt": None}

        trainer = make_trainer(
            tmp_path, train_dataset=IterableDataset.from_generator(stream), teacher_model=make_teacher(), max_steps=8
        )
        with pytest.raises(ValueError, match=r"The row with the prompt '.\+.=': .*'teacher_prompt'\) is null"):
            trainer.train()

    def test_evaluation_without_it(self, tmp_path):
        trainer = make_trainer(tmp_path, train_dataset=dataset(), teacher_model=make_teacher())
        with pytest.raises(ValueError, match=r"Some rows .* have a 'teacher_prompt' and some have none"):
            trainer.evaluate(make_dataset().select(range(4)))
        trainer.evaluate(dataset().select(range(4)))

    def test_columns_that_are_removed(self, tmp_path):
        trainer = make_trainer(
            tmp_path, train_dataset=dataset(), teacher_model=make_teacher(), remove_unused_columns=True
        )
        with pytest.raises(ValueError, match="leave `remove_unused_columns` at false"):
            trainer.train()

    def test_no_room_for_the_completion(self, tmp_path):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=22, bos_token_id=PAD, eos_token_id=EOS
        )
        settings = {"train_dataset": dataset(), "teacher_model": GPT2LMHeadModel(config)}
        with pytest.raises(
            ValueError, match=r"Row 2 of the training dataset: its `teacher_prompt` of 18 .* reads 22 at"
        ):
            make_trainer(tmp_path, **settings)
        make_trainer(tmp_path, max_completion_length=4, **settings)

    def test_no_room_on_a_server(self, tmp_path):
        folder = save_model(tmp_path / "teacher", make_teacher(), TOKENIZER)
        with serving(FakeServer(make_teacher().eval(), folder)) as server:
            server.models["data"][0]["max_model_len"] = 22
            with pytest.raises(ValueError, match=r"Row 2 of .* teacher reads 23 at most.*`--max-model-len`"):
                make_trainer(tmp_path, train_dataset=dataset(), teacher_model_server_url=server.url)

    def test_an_environment(self, tmp_path):
        class Environment:
            def reset(self, **kwargs) -> None:
                return None

        with pytest.raises(
            ValueError, match=r"`environment_factory` cannot be used together with .* 'teacher_prompt'"
        ):
            make_trainer(
                tmp_path, train_dataset=dataset(), teacher_model=make_teacher(), environment_factory=Environment
            )


def test_without_a_teacher_it_is_a_column_like_any_other(tmp_path):
    """TRL hands it to the reward functions, and nobody else reads it."""
    seen = []

    def reward(completions, teacher_prompt, **kwargs):
        seen.extend(teacher_prompt)
        return [float(len(text) % 3) for text in completions]

    trainers = [
        run(tmp_path / name, train_dataset=data, reward_funcs=reward, model=make_model())
        for name, data in (("hints", dataset()), ("plain", dataset({})))
    ]
    assert same_weights(*trainers)
    assert set(seen) <= {*HINTS, *HINTS.values()}
    assert set(seen) & set(HINTS.values())
