"""`trl-cmdp calibrate`: before and after imitation, a second run, records without a model, mistakes in one line."""

import json
import shutil

import pytest
from helpers import error_line, run_without_models
from transformers import AutoModelForCausalLM

from trl_cmdp import GKDDistillTrainer
from trl_cmdp.cli import main
from trl_cmdp.evaluation import read_rollout_records
from trl_cmdp.tasks.arithmetic import demo_model_path, load_problems


STUDENT, TEACHER = demo_model_path("student"), demo_model_path("teacher")
SIZES = ["--task", "arithmetic", "--num_problems", "6", "--batch_size", "6", "--max_new_tokens", "12"]
MODELS = ["--student", STUDENT, "--teacher", TEACHER]
IMITATION = ["--imitation_steps", "2", "--imitation_batch_size", "4", "--imitation_learning_rate", "1e-3"]


def run(*options):
    return main(["calibrate", *map(str, options)])


def content(folder):
    return json.loads((folder / "calibration.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A calibration with imitation."""
    folder = tmp_path_factory.mktemp("calibrate") / "out"
    assert run(*MODELS, *SIZES, *IMITATION, "--limits", "5", "0.5", "--output_dir", folder) == 0
    return folder


def test_everything_is_written(folder):
    settings, records = read_rollout_records(folder / "start.jsonl")
    after, trained = read_rollout_records(folder / "imitation.jsonl")
    assert [record.prompt for record in records] == load_problems(6, "test", 0)["prompt"]
    assert [record.prompt for record in records] == [record.prompt for record in trained]
    assert settings.student_fingerprint != after.student_fingerprint
    AutoModelForCausalLM.from_pretrained(folder / "imitation")

    written = content(folder)
    assert written["limits"] == [0.5, 5.0]
    costs = sorted(sum(record.costs) / len(record.costs) for record in records)
    assert written["start"]["satisfaction"][0]["value"] == sum(cost <= 0.5 for cost in costs) / 6
    assert written["start"]["quantiles"]["mean"]["0.5"] == pytest.approx((costs[2] + costs[3]) / 2)
    assert written["suggestion"]["start"] == written["start"]["quantiles"]["mean"]["0.5"]
    assert written["suggestion"]["reached"] == written["imitation"]["quantiles"]["mean"]["0.95"]
    assert len(written["imitation_run"]["mean_costs"]) == 2
    assert written["imitation_run"]["settings"]["split"] == "train"
    assert written["start"]["settings"]["versions"] == written["versions"]
    assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_resumes_and_another_one_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    before = (folder / "start.jsonl").read_bytes()
    weights = out / "imitation" / "model.safetensors"
    saved = weights.stat().st_mtime_ns
    (out / "start.jsonl").write_bytes(before[:-9])  # stopped while it was written
    (out / "imitation.jsonl").unlink()  # as if imitation had just ended
    options = [*MODELS, *SIZES, *IMITATION, "--limits", "5", "0.5", "--output_dir", out]
    assert run(*options) == 0
    assert weights.stat().st_mtime_ns == saved
    assert (out / "start.jsonl").read_bytes() == before
    mine, theirs = (read_rollout_records(at / "imitation.jsonl")[1] for at in (out, folder))
    assert mine == theirs
    assert run(*options, "--imitation_learning_rate", "1e-4") == 2
    assert "another `learning_rate`: 0.001, now 0.0001" in error_line(capsys)


def test_everything_comes_from_records_without_a_model(folder, tmp_path):
    records = [folder / name for name in ("start.jsonl", "imitation.jsonl")]
    options = ["--limits", "0.5", "5", "--output_dir", tmp_path / "again"]
    out = run_without_models("calibrate", "--records", *records, *options)
    again, first = content(tmp_path / "again"), content(folder)
    for name in ("start", "imitation", "suggestion", "suggestion_text", "limits"):
        assert again[name] == first[name]
    assert "| cost_limit |" in out.replace("  ", "")
    assert first["suggestion_text"] in out


def test_without_imitation_no_lower_end_is_invented(folder, capsys):
    assert run("--records", folder / "start.jsonl", "--cost_scope", "sum") == 0
    out = capsys.readouterr().out
    assert "the student starts at" in out
    assert "How far below is not known" in out
    assert "after imitation" not in out
    assert "cost_scope=sum (nats per rollout)" in out


def test_a_student_within_every_limit_is_told_so(tmp_path, capsys):
    options = ["--student", TEACHER, "--teacher", TEACHER, *SIZES, "--limits", "0.35", "--output_dir", tmp_path]
    assert run(*options) == 0
    out = capsys.readouterr().out
    assert "0.35 (inert)" in out
    assert "a limit would be inert" in out
    assert content(tmp_path)["suggestion"]["verdict"] == "inert"


def test_imitation_that_changes_nothing_is_told_so(folder, capsys):
    """The student's own records in place of those after imitation."""
    assert run("--records", folder / "start.jsonl", folder / "start.jsonl") == 0
    assert "which is not below where the student starts" in capsys.readouterr().out


def test_an_adapter_is_trained_on_and_its_base_stays_the_teacher(tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(STUDENT)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    options = ["--student", tmp_path / "adapter", "--teacher_adapter_name", "base", "--output_dir", tmp_path / "out"]
    assert run(*options, *SIZES, *IMITATION) == 0
    before, after = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "out/imitation"))
    assert before.read_bytes() != after.read_bytes()
    written = content(tmp_path / "out")
    assert written["imitation"]["num_rollouts"] == 6
    assert written["imitation_run"]["settings"]["teacher"] == "base"


def test_problems_to_imitate_on_are_never_measured_on(tmp_path, capsys, monkeypatch):
    """Of ten problems, two of which are given twice, four are measured on; what differs from them is left."""
    trained_on = []
    train = GKDDistillTrainer.train
    monkeypatch.setattr(
        GKDDistillTrainer, "train", lambda self: trained_on.extend(self.train_dataset["prompt"]) or train(self)
    )
    rows = [{"prompt": f"{digit}+1=", "answer": "1"} for digit in "1234567812"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dataset", tmp_path / "mine.jsonl", "--split", "train", "--num_problems", "4", *IMITATION]
    options += ["--max_new_tokens", "4", "--imitation_split", "train"]
    options += ["--reward", "trl_cmdp.tasks.arithmetic.final_answer_reward"]
    assert run(*MODELS, *options, "--imitation_problems", "6", "--output_dir", tmp_path / "out") == 0
    measured = {record.prompt for record in read_rollout_records(tmp_path / "out" / "start.jsonl")[1]}
    assert set(trained_on) == {row["prompt"] for row in rows} - measured
    assert run(*MODELS, *options, "--imitation_problems", "7", "--output_dir", tmp_path / "more") == 2
    assert "7 of the split 'train' after the 4 measured on" in error_line(capsys)


def test_the_chat_template_holds_before_imitation_in_it_and_after(tmp_path, monkeypatch):
    seen = []
    train = GKDDistillTrainer.train
    monkeypatch.setattr(
        GKDDistillTrainer,
        "train",
        lambda self: seen.append((self.chat_template_kwargs, self.processing_class.chat_template)) or train(self),
    )
    template = "{{ messages[0]['content'] }}{{ sign }}"
    (tmp_path / "template.jinja").write_text(template)
    rows = [{"prompt": f"{digit}+1", "answer": "1"} for digit in "12345678"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dataset", tmp_path / "mine.jsonl", "--split", "train", "--num_problems", "2", *IMITATION]
    options += ["--imitation_problems", "6", "--max_new_tokens", "4", "--reward", "helpers.length_reward"]
    options += ["--chat_template", tmp_path / "template.jinja", "--chat_template_kwargs", '{"sign": "="}']
    assert run(*MODELS, *options, "--output_dir", tmp_path / "out") == 0
    assert seen == [({"sign": "="}, template)]
    for name in ("start", "imitation"):
        settings, _ = read_rollout_records(tmp_path / "out" / f"{name}.jsonl")
        assert (settings.chat_template, settings.chat_template_kwargs) == (template, {"sign": "="})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 3}'])
def test_a_damaged_imitation_is_one_line(content, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "imitation" / "imitation.json").write_text(content)
    assert run(*MODELS, *SIZES, *IMITATION, "--limits", "5", "0.5", "--output_dir", tmp_path / "out") == 2
    assert "imitation.json is" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", STUDENT, *SIZES], "--teacher"),
        (MODELS, "--task or --dataset"),
        ([*MODELS, *SIZES, "--num_samples", "0"], "--num_samples must be at least 1"),
        ([*MODELS, *SIZES, "--imitation_steps", "-1"], "--imitation_steps must be at least 0"),
        ([*MODELS, *SIZES, *IMITATION, "--imitation_batch_size", "3"], "multiple of 2"),
        ([*MODELS, *SIZES, *IMITATION, "--backend", "vllm"], "give both to --records"),
        ([*MODELS, *SIZES, *IMITATION, "--imitation_split", "dev"], "`split` must be 'train' or 'test'"),
        (["--records", "a", "b", "c"], "--records takes two files"),
        (["--records", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_mistake_is_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*options) == 2
    assert message in error_line(capsys)
