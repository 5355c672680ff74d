"""Our metrics and the completions reach the real trackers, read back from the files that those write."""

import hashlib
import json
import sqlite3
import struct
from pathlib import Path

import pytest
from helpers import METRICS, history, make_dataset, make_teacher, run

from trl_cmdp import ConstrainedDistillTrainer
from trl_cmdp.trainers.telemetry.shading import shade_tokens


def train(folder, tracker: str, **kwargs) -> ConstrainedDistillTrainer:
    trainer = run(
        folder,
        teacher_model=make_teacher(),
        report_to=tracker,
        log_completions=True,
        cost_limit=1.75,
        project="trl-cmdp-tests",
        run_name="run",
        **kwargs,
    )
    trainer.end()
    return trainer


def test_tokens_are_the_redder_the_more_they_cost():
    shaded = shade_tokens(["<b>", "x", "y"], [0.0, 1.0, 4.0], 4.0)
    assert "&lt;b&gt;" in shaded
    assert "<b>" not in shaded
    opacities = [float(part.split(")")[0]) for part in shaded.split("rgba(214,69,65,")[1:]]
    assert opacities == sorted(opacities)
    assert opacities[0] == 0
    assert opacities[1] == pytest.approx(opacities[2] / 2, abs=0.01)
    assert 'title="4.000 nats"' in shaded
    assert "rgba(214,69,65,0.00)" in shade_tokens(["x"], [0.0], 0.0)


def wandb_records(path: Path) -> list:
    """Records of a `.wandb` file: LevelDB's log format, blocks of 32 KiB, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, parts, position = path.read_bytes(), [], [], 7
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(b"".join(parts)))
            parts.clear()
    return records


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = train(tmp_path / "out", "wandb", hub_token="hf_PlantedTokenOfTheTests1234")
    wandb.finish()
    wandb.teardown()  # the end of the file is written when its process ends
    (path,) = tmp_path.rglob("run-*.wandb")
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "history"
    ]
    for metric in METRICS:
        assert [row[f"train/{metric}"] for row in rows if f"train/{metric}" in row] == pytest.approx(
            history(trainer, metric)
        )
    tables = {
        name: [row[f"{name}/path"] for row in rows if f"{name}/path" in row]
        for name in ("completions", "completions_by_cost")
    }
    assert len(tables["completions"]) >= 2
    assert len(tables["completions_by_cost"]) == 2
    # Cells of HTML are in the tables' artifacts, which wait for `wandb sync` as they are.
    staged = [file.read_bytes() for file in (tmp_path / "data" / "artifacts" / "staging").iterdir()]
    pages = {hashlib.sha256(content).hexdigest(): content.decode() for content in staged}
    columns = ["step", "prompt", "completion", "reward", "cost", "feasible"]
    cells = [
        dict(zip(columns, row, strict=True))
        for table in (json.loads(content) for content in pages.values() if content.startswith("{"))
        if table.get("columns") == columns
        for row in table["data"]
    ]
    assert sorted({cell["step"] for cell in cells}) == [1, 2]
    assert len(cells) >= 8
    for cell in cells:
        assert cell["completion"]["_type"] == "html-file"
        page = pages[cell["completion"]["sha256"]]
        costs = [float(part.split(" nats")[0]) for part in page.split('title="')[1:]]
        assert sum(costs) / len(costs) == pytest.approx(cell["cost"], abs=2e-3)
        assert cell["feasible"] is (cell["cost"] <= 1.75)
    stored = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"PlantedTokenOfTheTests" not in stored


@pytest.mark.slow
def test_trackio_local(tmp_path, monkeypatch):
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    trainer = train(tmp_path / "out", "trackio")
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    for metric in METRICS:
        values = [row[name] for row in rows for name in (metric, f"train/{metric}") if name in row]
        assert values == pytest.approx(history(trainer, metric))
    assert any("completions" in row for row in rows)


@pytest.mark.slow
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tmp_path / "out", "tensorboard")
    (path,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(path.parent)).Reload()
    for metric in METRICS:
        scalars = events.Scalars(f"train/{metric}")
        assert [scalar.value for scalar in scalars] == pytest.approx(history(trainer, metric), rel=1e-5)
        assert [scalar.step for scalar in scalars] == [1, 2]


@pytest.mark.slow
def test_the_panels_are_of_metrics_that_are_logged(tmp_path, monkeypatch):
    from trl_cmdp.reports.wandb_panels import wandb_workspace

    trainer = train(tmp_path, "none")
    names = {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        for entry in [*trainer.state.log_history, trainer.evaluate(make_dataset(1))]
        for name in entry
    }
    workspace = wandb_workspace("team", "project")
    shown = {metric for section in workspace.sections for panel in section.panels[:-1] for metric in map(str, panel.y)}
    assert shown - names == {"train/lagrange_multiplier"}  # of the Lagrangian trainer
    assert "completions_by_cost" in workspace._to_model().model_dump_json()
