"""Names that stand in files and would lead out of a folder if they were taken for paths."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from helpers import make_cell, make_model, make_rollout, make_settings, make_teacher, write_records
from safetensors.torch import save_file

from trl_cmdp.cli import main
from trl_cmdp.cli._evaluation import output_folder
from trl_cmdp.teachers._checkpoint import load_head


ESCAPES = ["../../escaped", "/tmp/escaped", "..", "a/b"]


@pytest.mark.parametrize("absolute", [False, True])
def test_the_index_of_a_checkpoint_names_files_of_its_folder_alone(tmp_path, absolute):
    """A head that lies outside would be read: the file is there, and fits."""
    model, folder = make_model(), tmp_path / "model"
    model.config.save_pretrained(folder)
    outside = tmp_path / "outside.safetensors"
    save_file({"lm_head.weight": model.lm_head.weight.detach()}, outside)
    name = str(outside) if absolute else "../outside.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match="no file of its folder"):
        load_head(str(folder), model.config)
    outside.rename(folder / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "outside.safetensors"}})
    )
    assert torch.equal(load_head(str(folder), model.config).weight, model.lm_head.weight)


@pytest.mark.parametrize("link", [False, True])
def test_files_of_the_hubs_cache_are_links(tmp_path, link):
    """There each file of a snapshot is a link to a blob outside of it: links are followed, as the client made them."""
    model = make_teacher()
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    if link:
        weights.rename(tmp_path / "blob")
        weights.symlink_to(tmp_path / "blob")
    assert torch.equal(load_head(str(tmp_path / "model"), model.config).weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_students_name_is_no_path(name):
    arguments = argparse.Namespace(output_dir=None, dataset=None, task="table", name=name, student="s")
    folder = output_folder("evaluate", arguments)
    assert folder.parent == Path("outputs")
    assert folder.name.startswith("evaluate-table-")


def hostile_records(folder):
    """Records of two evaluations and of a comparison, and a trainer's state, all of whose names are paths."""
    files = [folder / f"{index}.jsonl" for index in range(2)]
    for name, file in zip(ESCAPES, files, strict=False):
        settings = make_settings(num_problems=1, num_samples=1, greedy=False, name=name, student=name)
        write_records(file, settings, [make_rollout(0, 0, [0.1], prompt="1+2=", answer="3", completion=name)])
    cells = [make_cell(name, trainer="none", config={"output_dir": name}) for name in ESCAPES]
    (folder / "cells.jsonl").write_text("".join(cell.to_json() + "\n" for cell in cells))
    state = {
        "log_history": [{"step": 1, "reward": 1.0, "../../escaped": 1.0}],
        "train_batch_size": 4,
        "global_step": 1,
        "best_model_checkpoint": "../../escaped",
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return map(str, files)


def everything(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_reports_and_judgements_stay_in_their_folder(tmp_path):
    inner = tmp_path / "x" / "y"
    (inner / "runs").mkdir(parents=True)
    files = hostile_records(inner / "runs")
    before = everything(tmp_path)
    assert main(["report", str(inner / "runs"), "--output_dir", str(inner / "report")]) == 0
    arguments = ["--records", *files, "--judge", "process", "--output_dir", str(inner / "judged")]
    assert main(["evaluate", *arguments]) == 0
    written = everything(tmp_path) - before
    assert {path.parent for path in written} == {inner / "report", inner / "judged"}
    assert {"report.html", "judgements.jsonl"} <= {path.name for path in written}
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/b", ""])
def test_a_methods_name_in_an_experiment_is_no_path(name, tmp_path, capsys):
    """It is part of the names of logs and folders."""
    experiment = tmp_path / "mine.yaml"
    methods = f"{{{json.dumps(name)}: {{trainer: grpo}}}}"
    experiment.write_text(
        f"task: arithmetic\ncost_limit: 0.3\nsteps: 1\nseeds: [0]\nheld_out: 1\nmethods: {methods}\n"
    )
    assert main(["compare", str(experiment), "--output-dir", str(tmp_path / "out")]) == 2
    assert "the method name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
