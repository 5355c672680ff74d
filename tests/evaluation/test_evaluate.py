"""Evaluation: what is recorded, and that a stopped evaluation ends as if it had not been stopped."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from filelock import FileLock, Timeout
from helpers import make_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.core import token_divergence
from trl_cmdp.evaluation import evaluate, read_rollout_records
from trl_cmdp.evaluation.progress import show_progress
from trl_cmdp.evaluation.provenance import (
    dotted_name,
    git_state,
    library_versions,
    source_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from trl_cmdp.tasks.arithmetic import demo_model_path, final_answer_reward, load_problems


SETTINGS = make_settings(num_problems=5, num_samples=3, seed=3, max_new_tokens=27, versions=library_versions())
PROBLEMS = load_problems(5, "test", seed=3)


@pytest.fixture(scope="module")
def models():
    return [AutoModelForCausalLM.from_pretrained(demo_model_path(name)) for name in ("student", "teacher")]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path("student"))


@pytest.fixture(scope="module")
def run(models, tokenizer):
    def evaluate_student(path=None, settings=SETTINGS, problems=PROBLEMS, reward=final_answer_reward, **kwargs):
        kwargs = {"teacher": models[1], **kwargs}
        return evaluate(models[0], tokenizer, problems, reward, settings=settings, records_path=path, **kwargs)

    return evaluate_student


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """Records, and the file's bytes, of an evaluation that was not stopped."""
    path = tmp_path_factory.mktemp("evaluation") / "records.jsonl"
    return run(path), path.read_bytes()


def test_every_rollout_is_recorded(finished, tokenizer, models):
    records, content = finished
    sampled = [(problem, False, sample) for problem in range(5) for sample in range(3)]
    assert [record.key for record in records] == sampled + [(problem, True, 0) for problem in range(5)]
    assert read_rollout_records(content.decode()) == (SETTINGS, records)
    for record in records:
        problem = PROBLEMS[record.problem]
        assert (record.prompt, record.answer, record.difficulty) == (problem["prompt"], problem["answer"], None)
        assert record.right == (final_answer_reward([record.completion], [record.answer]) == [1.0])
        assert "".join(record.tokens).removesuffix("<eos>") == record.completion
        assert record.truncated == (record.completion_ids[-1] != tokenizer.eos_token_id)
        assert len(record.completion_ids) == 27 or not record.truncated
        prompt_ids = tokenizer(record.prompt)["input_ids"]
        with torch.no_grad():
            ids = torch.tensor([prompt_ids + record.completion_ids])
            student, teacher = (model(ids).logits[0, len(prompt_ids) - 1 : -1].double() for model in models)
        expected = token_divergence(student, teacher)
        torch.testing.assert_close(torch.tensor(record.costs, dtype=torch.float64), expected, rtol=1e-4, atol=1e-5)
    assert {record.truncated for record in records} == {True, False}
    assert {record.right for record in records} == {True, False}
    assert len({record.completion for record in records}) > 5


def test_the_seed_decides_the_samples(finished, run):
    """And no greedy rollout."""
    others = run(settings=replace(SETTINGS, seed=4))
    assert [record.completion for record in finished[0]] != [record.completion for record in others]
    assert [record.completion for record in finished[0][-5:]] == [record.completion for record in others[-5:]]


def test_every_batch_has_a_seed_of_its_own(run):
    """Of the same prompts, batches draw other samples."""
    settings = replace(SETTINGS, greedy=False, num_samples=4, teacher=None)
    records = run(settings=settings, problems=PROBLEMS.select([0] * 5), teacher=None)
    batches = [tuple(record.completion for record in records[start : start + 4]) for start in range(0, 20, 4)]
    assert len(set(batches)) > 2


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_stopped_evaluation_is_resumed_to_the_same_bytes(finished, run, tmp_path, kept):
    """Wherever the file was cut: in the settings, in a line, in a batch."""
    records, content = finished
    path = tmp_path / "records.jsonl"
    path.write_bytes(content[: int(kept * len(content))])
    seen = []
    assert run(path, progress=lambda done, total: seen.append((done, total))) == records
    assert path.read_bytes() == content
    assert seen[-1] == (20, 20)
    assert seen[0][0] == (0 if kept < 0.1 else seen[0][0])
    assert (seen[0][0] > 0) == (kept > 0.2)


def test_nothing_is_done_twice(finished, run, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(finished[1])

    def no_reward(**kwargs):
        raise AssertionError("a finished evaluation rolled out again")

    assert run(path, reward=no_reward) == finished[0]
    # At another commit of the same versions, too.
    assert run(path, reward=no_reward, settings=replace(SETTINGS, git_commit="another")) == finished[0]
    assert path.read_bytes() == finished[1]


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.9), ("student_fingerprint", "abc"), ("versions", {}), ("cost_limit", 0.3)]
)
def test_other_settings_are_an_error_that_names_the_field(finished, run, tmp_path, field, value):
    path = tmp_path / "records.jsonl"
    path.write_bytes(finished[1])
    with pytest.raises(ValueError, match=f"another `{field}`"):
        run(path, settings=replace(SETTINGS, **{field: value}))
    assert path.read_bytes() == finished[1]


def test_a_lost_line_is_an_error(finished, run, tmp_path):
    lines = finished[1].decode().splitlines(keepends=True)
    path = tmp_path / "records.jsonl"
    path.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(ValueError, match="lost a line"):
        run(path)


def test_two_evaluations_do_not_write_one_file(run, tmp_path):
    with FileLock(tmp_path / ".records.jsonl.lock"), pytest.raises(Timeout):
        run(tmp_path / "records.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_problems": 4}, "4 problems"),
        ({"num_samples": 0, "greedy": False}, "nothing to evaluate"),
        ({"temperature": 0.0}, "temperature"),
        ({"cost_scope": "median"}, "cost_scope"),
        ({"teacher": None}, "settings.teacher"),
        ({"backend": "other"}, "backend"),
        ({"backend": "vllm"}, "engine"),
    ],
)
def test_arguments_that_do_not_fit(run, changes, message):
    with pytest.raises(ValueError, match=message):
        run(settings=replace(SETTINGS, **changes))


def in_messages(content):
    return PROBLEMS.map(lambda row: {"prompt": [{"role": "user", "content": content(row["prompt"])}]})


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}{{ sign }}"], ids=["own", "given"])
def test_arguments_of_the_chat_template(run, models, tmp_path, template):
    """Messages become tokens with the template and the arguments of the settings, which the records name."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ sign }}" if template is None else "{{ nothing }}"
    problems = in_messages(lambda prompt: prompt.removesuffix("="))
    settings = replace(
        SETTINGS, teacher=None, num_samples=1, chat_template=template, chat_template_kwargs={"sign": "="}
    )
    plain = run(settings=replace(SETTINGS, teacher=None, num_samples=1), teacher=None)
    path = tmp_path / "records.jsonl"
    records = evaluate(
        models[0], tokenizer, problems, lambda completions, **_: [1.0] * len(completions), settings=settings,
        records_path=path,
    )  # fmt: skip
    assert [record.completion_ids for record in records] == [record.completion_ids for record in plain]
    assert read_rollout_records(path) == (settings, records)
    with pytest.raises(ValueError, match=r"another `chat_template_kwargs`: \{'sign': '='\}, now None"):
        evaluate(
            models[0], tokenizer, problems, final_answer_reward, records_path=path,
            settings=replace(settings, chat_template_kwargs=None),
        )  # fmt: skip


def test_parts_of_text_are_recorded_as_text(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    problems = in_messages(lambda prompt: [{"type": "text", "text": prompt}])
    settings = replace(SETTINGS, teacher=None, num_samples=1, greedy=False)
    arguments = {"settings": settings, "records_path": tmp_path / "records.jsonl"}
    records = evaluate(models[0], tokenizer, problems, lambda completions, **_: [1.0] * len(completions), **arguments)
    assert [record.prompt[0]["content"] for record in records] == PROBLEMS["prompt"]
    assert read_rollout_records(tmp_path / "records.jsonl") == (settings, records)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["1+2="] * 4 + [None], "Row 4 of the dataset of problems: .*null"),
        ([1, 2, 3, 4, 5], "Row 0 of the dataset of problems: .*`int`"),
        ([[{"from": "human", "value": "1+2="}]] * 5, "Row 0 of the dataset of problems: .*ShareGPT"),
        ([[{"role": "user", "content": "1+2="}]] * 5, "messages, and the tokenizer has no chat template"),
    ],
)
def test_prompts_that_are_none(run, tmp_path, prompts, message):
    problems = PROBLEMS.remove_columns("prompt").add_column("prompt", prompts)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "records.jsonl", problems=problems)
    assert not (tmp_path / "records.jsonl").exists()


def test_images_need_a_processor(models):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    tokenizer.chat_template = "1+2="
    problems = in_messages(lambda prompt: [{"type": "image"}, {"type": "text", "text": prompt}])
    settings = replace(SETTINGS, teacher=None)
    with pytest.raises(ValueError, match=r"Row 0 of the dataset of problems: .*Give the student's processor"):
        evaluate(models[0], tokenizer, problems, final_answer_reward, settings=settings)


def test_a_missing_column_and_a_reward_that_is_none_are_errors(run):
    with pytest.raises(ValueError, match="no column 'answer'"):
        run(problems=PROBLEMS.remove_columns("answer"))
    with pytest.raises(ValueError, match="3 rewards for 4"):
        run(reward=lambda **kwargs: [1.0] * 3)


def test_without_a_teacher_there_are_no_costs_and_with_strata_there_are(run):
    problems = PROBLEMS.add_column("difficulty", [2, 2, 3, 3, 3])
    settings = replace(SETTINGS, teacher=None, num_samples=0)
    records = run(settings=settings, teacher=None, problems=problems)
    assert {record.costs for record in records} == {None}
    assert [record.difficulty for record in records] == ["2", "2", "3", "3", "3"]


def test_the_reward_is_called_as_trl_calls_it(run, models):
    """Messages in, messages out, and every column."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    problems = PROBLEMS.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    calls = []

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        calls.append((prompts, completions, completion_ids, answer, kwargs))
        return [1.0 if index else None for index in range(len(completions))]

    settings = replace(SETTINGS, num_samples=0, teacher=None, batch_size=5)
    records = evaluate(models[0], tokenizer, problems, reward, settings=settings)
    ((prompts, completions, completion_ids, answers, others),) = calls
    assert prompts == [record.prompt for record in records] == problems["prompt"]
    assert completions == [[{"role": "assistant", "content": record.completion}] for record in records]
    assert completion_ids == [record.completion_ids for record in records]
    assert (answers, others) == (list(problems["answer"]), {})
    assert [record.right for record in records] == [False, True, True, True, True]


def test_the_students_own_base_is_a_teacher(models, tokenizer):
    """A student whose adapter does nothing costs nothing; one that does costs what its merged weights cost."""
    peft = pytest.importorskip("peft")
    from accelerate import Accelerator

    from trl_cmdp.teachers import AdapterTeacher

    base = AutoModelForCausalLM.from_pretrained(demo_model_path("student"))
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    settings = replace(SETTINGS, num_samples=1, greedy=False, teacher="base")
    teacher = AdapterTeacher(student, Accelerator(), "base")
    records = evaluate(student, tokenizer, PROBLEMS, final_answer_reward, settings=settings, teacher=teacher)
    expected = evaluate(student, tokenizer, PROBLEMS, final_answer_reward, settings=settings, teacher=models[0])
    assert max(max(record.costs) for record in records) > 1e-3
    for record, other in zip(records, expected, strict=True):
        assert record.completion_ids == other.completion_ids
        assert record.costs == pytest.approx(other.costs, abs=2e-6)


def test_a_repetition_penalty_of_the_model_is_not_part_of_its_distribution(models, run, monkeypatch):
    """transformers fills what a generation config leaves open from the model's own."""
    settings = replace(SETTINGS, num_samples=1, greedy=True)
    expected = [record.completion_ids for record in run(settings=settings)]
    kept = models[0].generation_config
    changed = kept.__class__(**{**kept.to_dict(), "repetition_penalty": 5.0, "min_p": 0.5})
    monkeypatch.setattr(models[0], "generation_config", changed)
    assert [record.completion_ids for record in run(settings=settings)] == expected
    assert models[0].generation_config.repetition_penalty == 5.0


def test_progress_without_a_terminal_is_plain_lines(capsys):
    with show_progress("student") as progress:
        for done in range(101):
            progress(done, 100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "student: 0/100"
    assert lines[-1] == "student: 100/100"
    assert len(lines) == 21


def test_a_fingerprint_is_of_the_weights(tmp_path):
    assert weights_fingerprint("org/model") is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = weights_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_fingerprint(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert weights_fingerprint(tmp_path) != first
    commit, _ = git_state()
    assert commit is None or len(commit) == 40


def test_a_fingerprint_is_of_a_tokenizer_and_of_a_source():
    """Another template, another special token; another module, also behind a partial; a built-in has no source."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    found = {tokenizer_fingerprint(tokenizer)}
    tokenizer.chat_template = "{{ messages }}"
    found.add(tokenizer_fingerprint(tokenizer))
    tokenizer.pad_token = tokenizer.eos_token
    found.add(tokenizer_fingerprint(tokenizer))
    assert len(found) == 3
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(demo_model_path("student"))) in found
    assert source_fingerprint(evaluate) not in (None, source_fingerprint(final_answer_reward))
    assert source_fingerprint(partial(evaluate, engine=None)) == source_fingerprint(evaluate)
    assert source_fingerprint(len) is None
    assert dotted_name(evaluate) == "trl_cmdp.evaluation.evaluator.evaluate"


@pytest.mark.parametrize(
    "changes",
    [{"temperature": math.inf}, {"temperature": math.nan}, {"cost_limit": math.nan}, {"teacher_beta": math.nan}],
)
def test_numbers_that_are_not_finite(run, changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must"):
        run(settings=replace(SETTINGS, **changes))
