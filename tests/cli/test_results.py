"""What commands show of their results: tables in a terminal, Markdown where it is piped, JSON for a machine."""

import io
import json
import re
import sys

import pytest
from helpers import write_records
from report_runs import rollouts, settings, write_evaluation

from trl_cmdp.cli import demo, main


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def in_terminal(monkeypatch):
    """What a command shows in a terminal of a width, line by line."""

    def shown(columns, *arguments):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("TERM", "xterm")
            assert main([str(argument) for argument in arguments]) == 0
        return [line.strip() for line in re.sub(r"\x1b\[\d*m", "", terminal.getvalue()).splitlines()]

    return shown


@pytest.fixture
def evaluate(tmp_path):
    """The command on the records of two evaluations, one of a name that could be taken for markup."""
    paths = []
    for name, scale in (("grpo", 1.0), ("ours[bold]", 0.1)):
        folder = tmp_path / name
        folder.mkdir()
        paths.append(write_evaluation(folder, rollouts(scale), name) / "records.jsonl")
    return ["evaluate", "--records", *map(str, paths)]


def test_a_wide_terminal_has_a_row_for_each_student(evaluate, in_terminal):
    lines = in_terminal(300, *evaluate)
    heads = [line for line in lines if line.startswith("student ")]
    assert "satisfaction, %" in heads[0]
    assert [line.split()[0] for line in lines if line.startswith(("grpo ", "ours"))][:2] == ["grpo", "ours[bold]"]


def test_a_narrower_one_a_row_for_each_metric(evaluate, in_terminal):
    lines = in_terminal(140, *evaluate)
    assert max(map(len, lines)) <= 140
    assert any(line.split() == ["student", "grpo", "ours[bold]"] for line in lines)
    row = next(line for line in lines if line.startswith("satisfaction, %"))
    assert row.count("[") == 2  # a rate with its interval for each student


def test_the_narrowest_a_table_for_each_student(evaluate, in_terminal):
    lines = in_terminal(75, *evaluate)
    assert max(map(len, lines)) <= 75
    for name in ("grpo", "ours[bold]"):
        assert any(line.split() == ["student", name] for line in lines)
    rows = [line for line in lines if line.startswith("satisfaction, %")]
    assert [row.count("[") for row in rows][:2] == [1, 1]


def test_a_pipe_gets_markdown_and_a_machine_json_alone(evaluate, tmp_path, capsys):
    assert main([*evaluate, "--output_dir", str(tmp_path / "out")]) == 0
    piped = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() in piped
    assert "| grpo |" in piped
    assert main([*evaluate, "--output_dir", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "summary.json and table.md are in" in err


def test_calibrate_shows_the_same_way(tmp_path, in_terminal, capsys):
    write_records(tmp_path / "start.jsonl", settings("start"), rollouts(1.0))
    calibrate = ["calibrate", "--records", str(tmp_path / "start.jsonl")]
    lines = in_terminal(200, *calibrate)
    assert any(line.startswith("cost_limit") and "within it now, %" in line for line in lines)
    assert not any(line.startswith("|") for line in lines)
    assert main([*calibrate, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cost_scope"] == "mean"


def test_so_does_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUICK_STEPS", 1)
    monkeypatch.setattr(demo, "QUICK_HELD_OUT", 4)
    assert main(["demo", "--quick", "--json", "--output-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "metrics.json").read_text())
    assert "held-out problems" in err
