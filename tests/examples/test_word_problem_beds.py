"""The builder of the word-problem test beds, at a size that learns nothing."""

import json
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer


pytest.importorskip("reasoning_gym")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "scripts"))

from word_problems import (  # noqa: E402
    BEDS,
    MAX_COMPLETION_LENGTH,
    SCALES,
    TEMPLATES,
    Build,
    encode_solution,
    main,
    solutions_loss,
)

from trl_cmdp.cli._experiment import Experiment, load_experiment  # noqa: E402
from trl_cmdp.evaluation import read_records  # noqa: E402
from trl_cmdp.evaluation.judges import valid_steps  # noqa: E402


TINY = SCALES["tiny"]
EXPERIMENTS = {"": 1, "-long": 1, "-again": 1, "-half": 0.5, "-again-half": 0.5}  # share of the bed's limit
KEPT = ROOT / "benchmarks" / "models" / "word-problems"
RESULTS = ROOT / "benchmarks" / "results"
SHARES = ("correct", "valid_steps", "correct_with_valid_steps", "truncated")


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """A whole build."""
    folder = tmp_path_factory.mktemp("word-problems")
    main(["--scale", "tiny", "--output-dir", str(folder), "--jobs", "1"])
    return Build(folder, TINY, 0)


def test_no_problem_is_in_two_sets(build):
    numbers = {name: getattr(TINY, name) for name in ("solutions", "train", "validation", "test")}
    sets = {name: build.problems(name) for name in numbers}
    assert {name: len(problems) for name, problems in sets.items()} == numbers
    prompts = [prompt for problems in sets.values() for prompt in problems["prompt"]]
    assert len(set(prompts)) == len(prompts)
    for problems in sets.values():
        assert set(problems["template"]) <= set(TEMPLATES)
        assert set(problems["difficulty"]) == {"2"}
        assert all(map(valid_steps, problems["prompt"], problems["solution"]))


def test_the_tokenizer_reads_digits_one_by_one_and_anything_back(build):
    tokenizer = AutoTokenizer.from_pretrained(build.folder / "tokenizer")
    text = " 12 apples cost $3.50 – né\n#### 42"
    tokens = tokenizer.tokenize(text)
    assert [token for token in tokens if re.search(r"\d", token)] == list("1235042".replace("", " ").split())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for row in build.problems("test"):
        assert len(tokenizer(f" {row['solution']}{tokenizer.eos_token}")["input_ids"]) <= MAX_COMPLETION_LENGTH


def test_every_model_and_bed_is_measured(build):
    measured = json.loads((build.folder / "measured.json").read_text())
    assert list(measured["models"]) == ["teacher", *TINY.cuts]
    assert measured["models"]["student-rare"]["truncated"] == 1  # it has learned nothing
    assert measured["models"]["student-rare"]["mean_tokens"] == MAX_COMPLETION_LENGTH
    assert list(measured["beds"]) == list(BEDS)
    for bed in measured["beds"].values():
        assert 0 < bed["mean_cost"] < bed["cost_limit"]  # nor has its teacher
        assert bed["satisfaction"] == 1


def experiment_on(models: Path, build: Build, folder: Path, name: str) -> Experiment:
    """A committed experiment on these models and the problems of a tiny build, laid out in a folder as the script does."""
    outputs, experiments = folder / "outputs" / "word-problems", folder / "benchmarks" / "experiments"
    if not outputs.exists():
        experiments.mkdir(parents=True)
        outputs.mkdir(parents=True)
        (outputs / "problems").symlink_to(build.folder / "problems")
        for model in TINY.model_names:
            (outputs / model).symlink_to(models / model)
    text = (ROOT / "benchmarks" / "experiments" / f"{name}.yaml").read_text()
    (experiments / f"{name}.yaml").write_text(text.replace("held_out: 1000", f"held_out: {TINY.test}"))
    return load_experiment(str(experiments / f"{name}.yaml"))


def test_each_bed_has_an_experiment_that_compare_accepts(build, tmp_path):
    for (bed, (student, teacher, cost_limit)), (length, share) in product(BEDS.items(), EXPERIMENTS.items()):
        name = f"word-problems-{bed}{length}"
        assert experiment_on(build.folder, build, tmp_path, name).cost_limit == share * cost_limit
        named = yaml.safe_load((ROOT / "benchmarks" / "experiments" / f"{name}.yaml").read_text())
        assert named["student"] == f"../../outputs/word-problems/{student}"
        assert named["teacher"] == f"../../outputs/word-problems/{teacher}"
        assert named["max_completion_length"] == MAX_COMPLETION_LENGTH


def test_the_same_command_makes_what_is_missing_and_no_more(build, capsys):
    before = (build.folder / "student-rare" / "model.safetensors").read_bytes()
    shutil.rmtree(build.folder / "student-rare")
    (build.folder / "student-rare.partial").mkdir()  # of a run that was stopped
    main(["--scale", "tiny", "--output-dir", str(build.folder), "--jobs", "1"])
    output = capsys.readouterr().out
    assert re.findall(r"^([a-z-]+): \d+ s", output, re.MULTILINE) == ["student-rare"]
    assert (build.folder / "student-rare" / "model.safetensors").read_bytes() == before


def test_a_folder_of_other_settings_is_refused(build):
    with pytest.raises(SystemExit, match="other settings"):
        main(["--scale", "tiny", "--output-dir", str(build.folder), "--seed", "1"])


def test_models_can_be_taken_rather_than_trained(build, tmp_path, capsys):
    arguments = ["--scale", "tiny", "--output-dir", str(tmp_path), "--jobs", "1"]
    main([*arguments, "--models", str(build.folder)])
    assert "loss" not in capsys.readouterr().out
    for name in TINY.model_names:
        weights = [(folder / name / "model.safetensors").read_bytes() for folder in (tmp_path, build.folder)]
        assert weights[0] == weights[1]
    assert (tmp_path / "measured.json").read_bytes() == (build.folder / "measured.json").read_bytes()
    with pytest.raises(SystemExit, match="other settings"):  # or it would go on with models that it had not made
        main(arguments)


def test_a_folder_without_all_models_is_refused(build, tmp_path):
    shutil.copytree(build.folder / "teacher", tmp_path / "models" / "teacher")
    with pytest.raises(SystemExit, match="has no student-rare, student-middling, teacher-mediocre: name"):
        main(["--scale", "tiny", "--output-dir", str(tmp_path / "out"), "--models", str(tmp_path / "models")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", sorted(path.name for path in RESULTS.glob("word-problems-*-again*")))
def test_the_kept_models_are_those_of_the_records(build, tmp_path, experiment):
    """Their weights, tokenizer and config have the fingerprints that every record of the bed has."""
    sources = experiment_on(KEPT, build, tmp_path, experiment).checked().sources
    records = read_records((RESULTS / experiment / "records.jsonl").read_text())
    for key in ("student_fingerprint", "teacher_fingerprint"):
        assert {record.settings[key] for record in records} == {sources[key]}


@pytest.mark.slow
def test_the_kept_models_do_what_the_page_says(tmp_path):
    """On a processor that rounds otherwise too: they are sampled, and a share of 1000 answers varies by this much."""
    main(["--output-dir", str(tmp_path), "--models", str(KEPT)])
    found, committed = (
        json.loads(path.read_text()) for path in (tmp_path / "measured.json", RESULTS / "word_problems.json")
    )
    for name, model in committed["models"].items():
        shares = {key: pytest.approx(model[key], abs=0.06) for key in SHARES}
        assert found["models"][name] == {**model, **shares, "mean_tokens": pytest.approx(model["mean_tokens"], abs=1)}
    for name, bed in committed["beds"].items():
        assert found["beds"][name]["mean_cost"] == pytest.approx(bed["mean_cost"], rel=0.1)
        assert found["beds"][name]["satisfaction"] == pytest.approx(bed["satisfaction"], abs=0.06)


def test_a_student_is_cut_out_of_its_teacher(build):
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(build.folder / name) for name in ("teacher", "student-rare")
    )
    cut = TINY.cuts["student-rare"]
    assert student.config.num_hidden_layers == len(student.model.layers) == cut.num_layers < len(teacher.model.layers)
    assert student.config.intermediate_size == cut.num_neurons < teacher.config.intermediate_size
    # Healed for two steps, it is still near to what was cut out.
    torch.testing.assert_close(student.lm_head.weight, teacher.lm_head.weight, atol=0.005, rtol=0)
    for row in student.model.layers[0].mlp.gate_proj.weight:
        assert (teacher.model.layers[0].mlp.gate_proj.weight - row).abs().amax(1).min() < 0.005


def test_the_results_of_equations_can_be_left_out(build):
    tokenizer = AutoTokenizer.from_pretrained(build.folder / "tokenizer")
    prompt, completion = "Question: 3 and 18*2?\nAnswer:", " He has 18*2=36 or 36 - 3 = 33.\n#### 33"
    for results, learned in ((True, f"{completion}<eos>"), (False, " He has 18*2= or 36 - 3 = .\n#### 33<eos>")):
        ids, is_target = encode_solution(tokenizer, prompt, completion, results)
        assert tokenizer.decode(ids) == f"{prompt}{completion}<eos>"
        assert tokenizer.decode([token for token, target in zip(ids, is_target, strict=True) if target]) == learned


def test_the_loss_is_that_of_the_tokens_to_be_learned(build):
    model = AutoModelForCausalLM.from_pretrained(build.folder / "teacher")
    batch = [([10, 11, 12, 13, 1], [False, False, True, False, True]), ([14, 15, 1], [False, True, True])]
    losses = []
    for ids, is_target in batch:
        logits, targets = model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:])
        losses.append(F.cross_entropy(logits, targets, reduction="none")[torch.tensor(is_target[1:])])
    torch.testing.assert_close(solutions_loss(model, batch), torch.cat(losses).mean())


@pytest.mark.parametrize(("record", "truncated"), [("word_problems", 0.004), ("word_problems_first", 0)])
def test_the_page_has_the_figures_of_the_committed_record(record, truncated):
    measured = json.loads((RESULTS / f"{record}.json").read_text())
    page = (ROOT / "docs" / "test_beds.md").read_text()
    for name, model in measured["models"].items():
        cells = (
            f"{model['parameters'] / 1e6:.2f} M | {100 * model['correct']:.1f} | {100 * model['valid_steps']:.1f} |"
        )
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(cells)}$", page, re.MULTILINE)
        assert model["truncated"] <= truncated
    for name, bed in measured["beds"].items():
        quantiles = ", ".join(f"{cost:.2f}" for cost in bed["cost_quantiles"].values())
        figures = f"{bed['cost_limit']} | {100 * bed['satisfaction']:.1f} | {bed['mean_cost']:.3f} | {quantiles}"
        assert f"| `word-problems-{name}` | `{bed['student']}` | `{bed['teacher']}` | {figures} |" in page
        assert (bed["student"], bed["teacher"], bed["cost_limit"]) == BEDS[name]
