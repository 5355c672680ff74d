"""The package works from a folder on the path, of which no installer wrote what it is."""

import importlib.metadata
from pathlib import Path

import pytest
from helpers import error_line, make_teacher, run

from trl_cmdp import __version__
from trl_cmdp.cli import main


@pytest.fixture
def not_installed(monkeypatch):
    """No metadata of this package, as where it lies on `PYTHONPATH`."""
    known = importlib.metadata.distribution

    def distribution(name: str):
        if name.replace("_", "-").lower() == "trl-cmdp":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("trl-cmdp")


def test_a_checkpoint_and_its_card_are_written(not_installed, tmp_path):
    run(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, teacher_model=make_teacher())
    (card,) = Path(tmp_path).rglob("README.md")
    assert f"- trl-cmdp: {__version__}\n" in card.read_text()
    assert list(Path(tmp_path).rglob("checkpoint-1/*.safetensors"))


def test_a_missing_package_is_named_without_an_extra(not_installed, tmp_path, monkeypatch, capsys):
    def unavailable(*args):
        raise ImportError("No module named 'math_verify'")

    monkeypatch.setattr("trl_cmdp.cli._evaluation.load_task", unavailable)
    (tmp_path / "config.json").write_text("{}")
    assert main(["evaluate", "--student", str(tmp_path), "--task", "table", "--output_dir", str(tmp_path)]) == 2
    assert error_line(capsys).endswith("No module named 'math_verify'")
