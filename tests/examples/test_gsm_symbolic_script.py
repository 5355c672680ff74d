"""The experiment on GSM-Symbolic, at a size that learns nothing: every stage, resumed, side by side."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from datasets import enable_progress_bars
from transformers.utils import logging


SCRIPTS = Path(__file__).parents[2] / "examples" / "scripts"
sys.path.append(str(SCRIPTS))

from gsm_symbolic import main  # noqa: E402
from gsm_symbolic_run import models  # noqa: E402
from gsm_symbolic_run.evaluation import seeds_table  # noqa: E402
from gsm_symbolic_run.processes import run_all  # noqa: E402
from gsm_symbolic_run.run import Run  # noqa: E402
from gsm_symbolic_run.scales import METHODS, SCALES  # noqa: E402

from trl_cmdp.evaluation import read_rollout_records  # noqa: E402
from trl_cmdp.evaluation.provenance import weights_fingerprint  # noqa: E402


TINY = SCALES["tiny"]
MODELS = ("constrained", *(name for name in METHODS if name != "constrained"), "student", "teacher")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Output of a whole run."""
    folder = tmp_path_factory.mktemp("gsm-symbolic")
    main(["--scale", "tiny", "--output-dir", str(folder), "--jobs", "1"])
    yield folder
    enable_progress_bars()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_model_is_in_records_and_tables(folder, split):
    seed = folder / "seed-0"
    for name in MODELS:
        settings, rollouts = read_rollout_records(seed / "records" / f"{name}-{split}.jsonl")
        assert (settings.name, settings.split, settings.seed) == (name, split, 0)
        assert settings.student_fingerprint == weights_fingerprint(seed / name)
        assert settings.teacher_fingerprint == weights_fingerprint(seed / "teacher")
        assert len(rollouts) == TINY.num_samples * settings.num_problems
    rows = (seed / "evaluate" / split / "table.md").read_text().splitlines()[2 : 2 + len(MODELS)]
    assert [row.split("|")[1].strip() for row in rows] == list(MODELS)
    assert (seed / "evaluate" / split / "report" / "report.html").exists()


def test_problems_are_made_once_and_those_to_tune_on_are_not_reported(folder):
    run = Run(folder / "seed-0", TINY, 0)
    numbers = {
        "solutions": TINY.teacher_problems,
        "prompts": TINY.steps * TINY.prompts_per_step,
        "tuning": TINY.tuning_problems,
        "validation": TINY.validation_problems,
        "test": TINY.test_problems,
    }
    prompts = {name: set(run.problems(name)["prompt"]) for name in numbers}
    assert {name: len(each) for name, each in prompts.items()} == numbers
    assert not prompts["tuning"] & (prompts["validation"] | prompts["solutions"] | prompts["test"])


def test_the_same_command_makes_what_is_missing_and_no_more(folder, capsys):
    shutil.rmtree(folder / "seed-0" / "gkd")
    main(["--scale", "tiny", "--output-dir", str(folder), "--jobs", "1"])
    output = capsys.readouterr().out
    assert output.count("is there already") == 4 + len(METHODS) - 1
    assert "seed 0, gkd, step 2/2" in output
    assert (folder / "seed-0" / "gkd" / "trainer_state.json").exists()


def test_a_folder_of_another_scale_is_refused(folder):
    with pytest.raises(SystemExit, match="other settings"):
        main(["--scale", "cpu-smoke", "--output-dir", str(folder)])


def test_a_stage_that_the_scale_has_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--scale", "cpu", "--stages", "pid"])
    assert "the stages of scale cpu are" in capsys.readouterr().err


def test_models_are_kept_when_fewer_methods_are_compared(folder, capsys):
    command = ["--scale", "tiny", "--output-dir", str(folder), "--methods", "constrained", "grpo"]
    main([*command, "--stages", "student", "grpo", "constrained"])
    assert capsys.readouterr().out.count("is there already") == 3
    with pytest.raises(SystemExit, match="evaluate was made with other settings"):
        main([*command, "--stages", "evaluate"])


@pytest.mark.parametrize(
    ("scale", "methods", "message"),
    [
        ("cpu", ["pid"], "the methods of scale cpu are"),
        ("tiny", ["grpo", "gkd"], "the stage evaluate compares with constrained"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused(capsys, scale, methods, message):
    with pytest.raises(SystemExit):
        main(["--scale", scale, "--methods", *methods])
    assert message in capsys.readouterr().err


def test_table_over_seeds(folder):
    run = Run(folder / "seed-0", TINY, 0)
    table = seeds_table([run, run])
    summary = json.loads((run.folder / "evaluate" / "test" / "summary.json").read_text())
    sampled = next(each["sampled"] for each in summary["evaluations"] if each["settings"]["name"] == "gkd")
    satisfaction, divergence = (sampled["costs"][name]["value"] for name in ("satisfaction", "divergence"))
    cells = f"{100 * satisfaction:.1f} ({100 * satisfaction:.1f}, {100 * satisfaction:.1f}) | {divergence:.3f} ("
    assert f"| test | gkd | 0.0 (0.0, 0.0) | {cells}" in table
    assert table.count("\n| ") == 2 + 2 * len(MODELS) - 1


class _Student:
    """Counts the solutions that its saved weights have seen."""

    def __init__(self, seen: int):
        self.seen = seen

    def save_pretrained(self, folder: Path) -> None:
        (folder / "seen").write_text(str(self.seen))


@pytest.fixture
def healed(monkeypatch, tmp_path):
    """Heals a student that is right in a share of its solutions; returns how many of these its weights have seen."""

    def heal(share_per_solution: float) -> int:
        def share_right(model, tokenizer, run):
            return 0.3 if model == "teacher" else share_per_solution * model.seen

        def load(folder, *_):
            return "teacher" if folder.name == "teacher" else int((folder / "seen").read_text())

        monkeypatch.setattr(models, "load_model", load)
        monkeypatch.setattr(models, "share_right", share_right)
        monkeypatch.setattr(
            models, "train_on_solutions", lambda seen, tokenizer, problems, *_: _Student(seen + len(problems))
        )
        monkeypatch.setattr(Run, "problems", lambda *_: models.Dataset.from_dict({"prompt": [""] * 100}))
        _Student(0).save_pretrained(tmp_path)
        models.heal(tmp_path, None, Run(tmp_path, TINY, 0))
        return int((tmp_path / "seen").read_text())

    return heal


def test_the_student_is_healed_until_it_is_in_range(healed, tmp_path):
    assert healed(0.1 / 24) == 24  # a third of the teacher's 0.3, after three rounds of 8
    rounds = json.loads((tmp_path / "healing.json").read_text())
    assert [each["solutions"] for each in rounds] == [8, 16, 24]
    assert [each["right"] for each in rounds] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])


@pytest.mark.parametrize("share", [0.3, 1e-4])
def test_a_student_that_does_not_come_into_range_is_an_error(healed, share):
    with pytest.raises(SystemExit, match="student_layers"):
        healed(share)


def test_one_call_that_fails_is_named_and_the_others_end(tmp_path):
    calls = {name: partial(os.mkdir, tmp_path / name) for name in ("first", "second")}
    (tmp_path / "first").mkdir()
    with pytest.raises(SystemExit, match="Failed: first\\."):
        run_all(calls, 2)
    assert (tmp_path / "second").is_dir()


@pytest.mark.slow
def test_seeds_are_evaluated_side_by_side(folder, tmp_path):
    shutil.copytree(folder / "seed-0", tmp_path / "seed-0")
    shutil.copytree(folder / "seed-0", tmp_path / "seed-1", ignore=shutil.ignore_patterns("evaluate", "records"))
    command = [sys.executable, str(SCRIPTS / "gsm_symbolic.py"), "--scale", "tiny", "--output-dir", str(tmp_path)]
    subprocess.run([*command, "--jobs", "2", "--seeds", "0", "1"], check=True)
    for name in MODELS:
        settings, _ = read_rollout_records(tmp_path / "seed-1" / "records" / f"{name}-test.jsonl")
        assert settings.seed == 1
    table = (tmp_path / "seeds.md").read_text()
    assert "seeds 0, 1" in table
    assert table.count("| constrained |") == 2
