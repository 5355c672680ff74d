"""`trl-cmdp evaluate` of problems with images, from a file to the report."""

import json

import pytest
from datasets import Dataset
from helpers import error_line, flags, make_lora, make_model, make_tokenizer, save_model
from peft import get_peft_model
from tiny_vision import make_image_dataset, make_processor, make_seeing_teacher, make_vlm

from trl_cmdp.cli import main
from trl_cmdp.evaluation import read_rollout_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    processor = make_processor("idefics")
    save_model(path / "student", make_vlm("idefics"), processor)
    save_model(path / "teacher", make_seeing_teacher("idefics"), processor)
    adapted = get_peft_model(make_vlm("idefics").from_pretrained(path / "student"), make_lora(task_type="CAUSAL_LM"))
    adapted.save_pretrained(path / "adapter")
    save_model(path / "text", make_model(vocab_size=18), make_tokenizer("0123456789+=,#<>"))
    for name, seed in (("problems", 0), ("others", 1)):
        problems = make_image_dataset((2, 0), copies=1, seed=seed).add_column("answer", ["3", "7", "11", "15"])
        problems.to_parquet(path / f"{name}.parquet")
    return path


def evaluate(folder, output_dir, student="student", **options):
    """The records of an evaluation of two rollouts a problem."""
    given = {
        "student": folder / student,
        "dataset": folder / "problems.parquet",
        "split": "train",
        "num_samples": 2,
        "max_new_tokens": 4,
        "output_dir": output_dir,
        **options,
    }
    code = main(["evaluate", *flags(given)])
    return code, read_rollout_records(output_dir / "records.jsonl")[1] if code == 0 else None


def test_from_a_file_to_the_report(folder, tmp_path, capsys):
    code, records = evaluate(folder, tmp_path, teacher=folder / "teacher")
    assert code == 0
    assert len(records) == 8
    assert sorted({len(record.images or []) for record in records}) == [0, 2]
    assert all(cost > 1e-3 for record in records for cost in record.costs)
    assert main(["report", str(tmp_path), "--output_dir", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert json.dumps(records[0].images or records[2].images, separators=(",", ":")) in page
    capsys.readouterr()
    assert evaluate(folder, tmp_path, teacher=folder / "teacher", dataset=folder / "others.parquet")[0] == 2
    assert "another `problems_fingerprint`" in error_line(capsys)  # of images alone


def test_an_adapter_and_its_base(folder, tmp_path):
    code, records = evaluate(folder, tmp_path, "adapter", teacher_adapter_name="base")
    assert code == 0
    assert {cost for record in records for cost in record.costs} == {0.0}  # a new adapter changes nothing


@pytest.mark.slow
def test_calibrate_after_imitation(folder, tmp_path):
    """The copy that imitates is trained on the images, saved with its processor and measured again."""
    given = {"student": folder / "student", "teacher": folder / "teacher", "dataset": folder / "problems.parquet"}
    given |= {"split": "train", "num_problems": 2, "num_samples": 2, "max_new_tokens": 4, "output_dir": tmp_path}
    given |= {"imitation_steps": 2, "imitation_split": "train", "imitation_problems": 2, "imitation_batch_size": 4}
    assert main(["calibrate", *flags(given)]) == 0
    _, before = read_rollout_records(tmp_path / "start.jsonl")
    _, after = read_rollout_records(tmp_path / "imitation.jsonl")
    assert [record.images for record in after] == [record.images for record in before]
    assert [record.costs for record in after] != [record.costs for record in before]


def test_a_student_of_text(folder, tmp_path, capsys):
    assert evaluate(folder, tmp_path, "text")[0] == 2
    assert "has no processor beside its tokenizer" in error_line(capsys)


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_prompts_of_the_teachers_own(folder, tmp_path, capsys, command):
    """Refused before a model is loaded."""
    problems = Dataset.from_parquet(str(folder / "problems.parquet"))
    problems.add_column("teacher_prompt", ["1+2="] * len(problems)).to_parquet(tmp_path / "both.parquet")
    given = {"student": folder / "student", "teacher": folder / "teacher", "dataset": tmp_path / "both.parquet"}
    assert main([command, *flags({**given, "split": "train", "output_dir": tmp_path / "out"})]) == 2
    assert "'teacher_prompt' cannot be used together with images" in error_line(capsys)
