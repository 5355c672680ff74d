"""`trl-cmdp evaluate`: files, a second run, tables from records without a model, and mistakes in one line."""

import json
import linecache
import re
import shutil
import sys

import pytest
from fake_server import KEY, serving
from fake_vllm import FakeServer
from helpers import error_line, run_without_models
from transformers import AutoModelForCausalLM

from trl_cmdp.cli import main
from trl_cmdp.evaluation import read_rollout_records
from trl_cmdp.tasks import arithmetic
from trl_cmdp.tasks.arithmetic import demo_model_path, load_problems


STUDENT, TEACHER = demo_model_path("student"), demo_model_path("teacher")
SIZES = ["--task", "arithmetic", "--num_problems", "6", "--num_samples", "2", "--batch_size", "6"]
SIZES += ["--cost_limit", "0.25"]


def run(*options):
    return main(["evaluate", *map(str, options)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Evaluations of the student and of its teacher."""
    folder = tmp_path_factory.mktemp("evaluate")
    for model, name in ((STUDENT, "student"), (TEACHER, "teacher")):
        code = run("--student", model, "--teacher", TEACHER, "--output_dir", folder / name, "--greedy", *SIZES)
        assert code == 0
    return folder


def test_a_teacher_on_a_server_with_a_key(folders, tmp_path, monkeypatch):
    """Costs are those of the teacher in this process; the key comes from the environment and is in no file."""
    server = FakeServer(AutoModelForCausalLM.from_pretrained(TEACHER), TEACHER, key=KEY)
    server.models["data"][0]["max_model_len"] = 128
    options = ["--student", STUDENT, "--teacher", TEACHER, "--output_dir", tmp_path, "--greedy", *SIZES]
    with serving(server):
        options += ["--teacher_model_server_url", server.url]
        assert run(*options) == 2  # without it
        monkeypatch.setenv("TRL_CMDP_TEACHER_API_KEY", KEY)
        assert run(*options) == 0
    _, found = read_rollout_records(tmp_path / "records.jsonl")
    _, expected = read_rollout_records(folders / "student" / "records.jsonl")
    for record, local in zip(found, expected, strict=True):
        assert record.completion == local.completion
        assert record.costs == pytest.approx(local.costs, abs=1e-4)
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_the_teachers_end_of_turn(folders, tmp_path, capsys):
    """Its ids are the tokenizer's, other costs follow, and the records say so."""
    options = ["--student", STUDENT, "--teacher", TEACHER, "--greedy", *SIZES, "--output_dir"]
    assert run(*options, tmp_path / "swapped", "--teacher_eos_token", "=") == 0
    settings, found = read_rollout_records(tmp_path / "swapped" / "records.jsonl")
    assert settings.teacher_eos_token == "="
    _, expected = read_rollout_records(folders / "student" / "records.jsonl")
    assert [record.completion for record in found] == [record.completion for record in expected]
    assert [record.costs for record in found] != [record.costs for record in expected]
    assert run(*options, tmp_path / "unknown", "--teacher_eos_token", "<|im_end|>") == 2
    assert "is no token of the tokenizer" in error_line(capsys)


def test_records_summary_and_table_are_written(folders):
    settings, records = read_rollout_records(folders / "student" / "records.jsonl")
    asked = (settings.name, settings.task, settings.split, settings.max_new_tokens)
    assert asked == ("student", "arithmetic", "test", 40)
    assert settings.student_fingerprint is not None
    assert len(records) == 18
    assert [record.prompt for record in records if record.greedy] == load_problems(6, "test", 0)["prompt"]
    summary = json.loads((folders / "student" / "summary.json").read_text())["evaluations"][0]
    assert summary["cost_limit"] == 0.25
    assert summary["sampled"]["right"]["value"] == sum(record.right for record in records if not record.greedy) / 12
    assert "| student, greedy | 6 | 6 |" in (folders / "student" / "table.md").read_text()


def test_the_same_command_does_nothing_twice_and_another_one_is_refused(folders, tmp_path, capsys):
    shutil.copytree(folders / "student", tmp_path / "student")
    options = ["--student", STUDENT, "--teacher", TEACHER, "--output_dir", tmp_path / "student", "--greedy", *SIZES]
    before = (tmp_path / "student" / "records.jsonl").read_bytes()
    assert run(*options) == 0
    assert (tmp_path / "student" / "records.jsonl").read_bytes() == before
    capsys.readouterr()
    assert run(*options, "--temperature", "0.7") == 2
    assert "another `temperature`" in error_line(capsys)


REWARD = """
from trl_cmdp.tasks.arithmetic import final_answer_reward


def mine(completions, answer, **kwargs):
    return final_answer_reward(completions, answer)
"""
ROWS = [{"q": "1+2+3+4+5=", "a": "15", "b": "5", "p": "1+1+1+1+1="}] * 2


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder in which everything that an evaluation reads is, and its records: finished, and stopped half way."""
    folder = tmp_path_factory.mktemp("begun")
    for path, name in ((STUDENT, "student"), (TEACHER, "teacher")):
        shutil.copytree(path, folder / name)
    write_rows(folder / "data.jsonl", ROWS)
    (folder / "my_reward.py").write_text(REWARD)
    for name in ("mine", "other"):
        (folder / f"{name}_module.py").write_text(REWARD.replace("mine", name))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(*options_of(folder)) == 0
    content = (folder / "out" / "records.jsonl").read_bytes()
    (folder / "half").mkdir()
    (folder / "half" / "records.jsonl").write_bytes(content[: len(content) * 3 // 4])
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def options_of(folder, out="out", **changes):
    options = {
        "student": folder / "student",
        "teacher": folder / "teacher",
        "dataset": folder / "data.jsonl",
        "prompt_column": "q",
        "answer_column": "a",
        "reward": "my_reward.mine",
        "split": "train",
        "num_problems": 2,
        "num_samples": 2,
        "batch_size": 2,
        "max_new_tokens": 4,
        "output_dir": folder / out,
        **changes,
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def other_template(folder):
    """As text in the tokenizer's config, as transformers writes it too."""
    path = folder / "student" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages[0]['content'] }}"}))


def other_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    model.get_input_embeddings().weight.data += 1e-3
    model.save_pretrained(folder / "teacher")


CHANGES = {
    "reward": ("reward", {"reward": "other_module.other"}, None),
    "the reward's source": (
        "reward_fingerprint",
        {},
        lambda folder: (folder / "my_reward.py").write_text(REWARD.replace("return ", "return 2 * ")),
    ),
    "teacher": ("teacher_fingerprint", {}, other_weights),
    "answers": (
        "problems_fingerprint",
        {},
        lambda folder: write_rows(folder / "data.jsonl", [ROWS[0], {**ROWS[1], "a": "16"}]),
    ),
    "answer column": ("problems_fingerprint", {"answer_column": "b"}, None),
    "prompt column": ("problems_fingerprint", {"prompt_column": "p"}, None),
    "difficulty column": ("problems_fingerprint", {"difficulty_column": "b"}, None),
    "chat template": ("(problems|tokenizer)_fingerprint", {}, other_template),  # the prompts are then messages
    "dtype": ("(teacher_fingerprint|student_dtype)", {"dtype": "bfloat16"}, None),
}


@pytest.mark.parametrize("out", ["out", "half"])
@pytest.mark.parametrize(("field", "changes", "edit"), CHANGES.values(), ids=CHANGES)
def test_what_decides_a_record_may_not_change(begun, tmp_path, monkeypatch, capsys, out, field, changes, edit):
    """Neither of a finished evaluation, whose figures would be called the new ones, nor of one half way."""
    folder = tmp_path / "begun"
    shutil.copytree(begun, folder)
    if edit is not None:
        edit(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for module in ("my_reward", "other_module"):
        sys.modules.pop(module, None)
    linecache.clearcache()
    before = (folder / out / "records.jsonl").read_bytes()
    # The folder's own paths are part of the settings, so the records are given them.
    text = before.decode().replace(str(begun), str(folder))
    (folder / out / "records.jsonl").write_text(text)
    assert run(*options_of(folder, out, **changes)) == 2
    assert re.search(rf"is of an evaluation with another `{field}`", error_line(capsys))
    assert (folder / out / "records.jsonl").read_text() == text


def test_the_same_evaluation_is_resumed_where_it_was_stopped(begun, tmp_path, monkeypatch):
    shutil.copytree(begun / "half", tmp_path / "half")
    monkeypatch.chdir(begun)
    assert run(*options_of(begun, output_dir=tmp_path / "half")) == 0
    assert (tmp_path / "half" / "records.jsonl").read_bytes() == (begun / "out" / "records.jsonl").read_bytes()


def test_tables_come_from_records_without_a_model(folders, tmp_path):
    files = [folders / name / "records.jsonl" for name in ("student", "teacher")]
    out = run_without_models("evaluate", "--records", *files, "--output_dir", tmp_path / "both")
    assert "| teacher − student | 6 |" in out
    assert "| teacher − student, greedy | 6 |" in out
    both = json.loads((tmp_path / "both" / "summary.json").read_text())
    alone = json.loads((folders / "student" / "summary.json").read_text())
    assert both["evaluations"][0] == alone["evaluations"][0]
    assert [difference["greedy"] for difference in both["differences"]] == [False, True]


def test_another_limit_is_asked_of_the_same_records(folders, capsys):
    assert run("--records", folders / "student" / "records.jsonl", "--cost_limit", "100") == 0
    assert "| 100.0 [" in capsys.readouterr().out


def test_a_dataset_of_ones_own(tmp_path):
    rows = [{"q": "1+2+3+4+5=", "a": "15", "level": 5}, {"q": "1+1+1+1+1=", "a": "5", "level": 5}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = run(
        *("--student", STUDENT, "--dataset", tmp_path / "mine.jsonl", "--split", "train", "--num_problems", "2"),
        *("--prompt_column", "q", "--answer_column", "a", "--difficulty_column", "level", "--max_new_tokens", "8"),
        *("--reward", "trl_cmdp.tasks.arithmetic.final_answer_reward", "--output_dir", tmp_path / "out"),
    )
    assert code == 0
    settings, records = read_rollout_records(tmp_path / "out" / "records.jsonl")
    assert settings.teacher is None
    assert {record.difficulty for record in records} == {"5"}
    assert {record.answer for record in records} == {"15", "5"}


def test_an_adapter_is_a_student_and_its_base_its_teacher(tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(STUDENT)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    options = ["--student", tmp_path / "adapter", "--teacher_adapter_name", "base", "--output_dir", tmp_path / "out"]
    assert run(*options, "--task", "arithmetic", "--num_problems", "3", "--max_new_tokens", "8") == 0
    settings, records = read_rollout_records(tmp_path / "out" / "records.jsonl")
    assert settings.name == "adapter"
    assert settings.student_fingerprint is not None
    assert max(cost for record in records for cost in record.costs) > 1e-4


TEMPLATE = "{{ messages[0]['content'] }}{% if not thinking %}={% endif %}"


def test_the_chat_template_and_its_arguments(tmp_path):
    """As in training: those asked for make the tokens, and stand in the records."""
    for name, prompt in (("messages", [{"role": "user", "content": "1+2+3+4+5"}]), ("text", "1+2+3+4+5=")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "15"}) + "\n")
    (tmp_path / "template.jinja").write_text(TEMPLATE)

    def completions(name, *options):
        dataset = [
            "--dataset",
            tmp_path / f"{name.partition('-')[0]}.jsonl",
            "--split",
            "train",
            "--num_problems",
            "1",
        ]
        reward = ["--reward", "helpers.length_reward", "--max_new_tokens", "8", "--num_samples", "0", "--greedy"]
        assert run("--student", STUDENT, *dataset, *reward, "--output_dir", tmp_path / name, *options) == 0
        settings, records = read_rollout_records(tmp_path / name / "records.jsonl")
        return settings, [record.completion_ids for record in records]

    _, expected = completions("text")
    template = ["--chat_template", tmp_path / "template.jinja"]
    settings, found = completions("messages", *template, "--chat_template_kwargs", '{"thinking": false}')
    assert (settings.chat_template, settings.chat_template_kwargs) == (TEMPLATE, {"thinking": False})
    assert found == expected
    _, thinking = completions("messages-thinking", *template, "--chat_template_kwargs", '{"thinking": true}')
    assert thinking != expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "data.jsonl has no rows"),
        ('{"prompt": "1+2=", "answer": "3"}\nwords\n', "data.jsonl, line 2 is not JSON"),
        ('{"question": "1+2=", "answer": "3"}\n', "has no column 'prompt'"),
        ('{"prompt": null, "answer": "3"}\n', "Row 0 of the dataset"),
        ('{"prompt": 12, "answer": "3"}\n', "of type `int` (12)"),
        ('{"prompt": [{"from": "human", "value": "1+2="}], "answer": "3"}\n', "ShareGPT"),
        ('{"prompt": [{"role": "user", "content": "1+2="}], "answer": "3"}\n', "no chat template"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_problems_that_cannot_be_used_are_one_line_before_a_model_is_loaded(
    command, rows, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    (tmp_path / "data.jsonl").write_text(rows)
    dataset = ["--dataset", str(tmp_path / "data.jsonl"), "--split", "train", "--num_problems", "1"]
    models = ["--student", STUDENT, "--teacher", TEACHER, "--output_dir", str(tmp_path / "out")]
    assert main([command, *models, *dataset]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat_template_kwargs", "thinking"], "must be JSON"),
        (["--chat_template_kwargs", "[1]"], "must be a JSON object"),
        (["--chat_template", "missing.jinja"], "cannot be read"),
    ],
)
def test_arguments_that_cannot_be_parsed(options, message, capsys):
    with pytest.raises(SystemExit):
        run("--student", STUDENT, "--task", "arithmetic", *options)
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", STUDENT], "--task or --dataset"),
        (["--student", STUDENT, "--task", "nothing"], "no task 'nothing'"),
        (["--student", "no/such/folder/anywhere", "--task", "arithmetic"], "no/such"),
        (["--student", STUDENT, "--task", "arithmetic", "--split", "dev"], "split"),
        (["--student", STUDENT, "--task", "arithmetic", "--prompt_column", "q"], "prompt_column"),
        (["--student", STUDENT, "--task", "arithmetic", "--teacher_adapter_name", "base"], "adapter"),
        (["--student", STUDENT, "--task", "arithmetic", "--reward", "nonsense"], "Unknown reward"),
        (["--records", "missing.jsonl"], "missing.jsonl"),
        (["--records", "damaged.jsonl"], "damaged.jsonl: Line 1"),
    ],
)
def test_a_mistake_is_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "damaged.jsonl").write_text("{}\n")
    assert run(*options) == 2
    assert message in error_line(capsys)


def test_an_error_inside_a_task_is_not_a_mistake_of_the_command(monkeypatch):
    """Only an option that the task does not have is one."""
    monkeypatch.setattr(arithmetic, "load_problems", lambda n, split, seed: len(n))
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        run("--student", STUDENT, "--task", "arithmetic")


@pytest.mark.parametrize("start", ["def mine(**kwargs):\n    ", ""], ids=["when called", "when imported"])
def test_an_error_of_the_reward_is_not_a_mistake_of_the_command(start, tmp_path, monkeypatch):
    """It is raised with its traceback, and names the reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rewards_that_break", raising=False)
    (tmp_path / "rewards_that_break.py").write_text(f"{start}raise ValueError('of my own')\n")
    options = ["--student", STUDENT, "--task", "arithmetic", "--num_problems", "1", "--max_new_tokens", "2"]
    with pytest.raises(RuntimeError, match=r"reward.*of my own") as error:
        run(*options, "--reward", "rewards_that_break.mine", "--output_dir", tmp_path / "out")
    assert isinstance(error.value.__cause__, ValueError)
