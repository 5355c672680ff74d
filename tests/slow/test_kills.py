"""kill -9 at random points of a run, twice each: what is resumed ends at the same weights, bit for bit."""

import re
from pathlib import Path

import pytest
from helpers import run_python


SCRIPT = Path(__file__).parent / "kill_runs.py"
pytestmark = pytest.mark.slow


def test_every_kill_is_survived(tmp_path, capsys):
    """20 kills of each trainer: from outside, at a forward, at an event, and while a checkpoint is written."""
    done = run_python(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("kills survived 80 of 80 "), done.stdout
    figures = {name: int(number) for name, number in re.findall(r"(\w[a-z ]*) (\d+)[,)]", summary.partition(";")[2])}
    assert figures["cut off"] >= 5
    assert figures["in a cycle"] >= 5
