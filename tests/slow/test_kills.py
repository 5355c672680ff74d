"""kill -9 at random points of a run and at its end, four times each: it ends at the same weights, bit for bit."""

import re
from pathlib import Path

import pytest
from helpers import run_python


SCRIPT = Path(__file__).parent / "kill_runs.py"
pytestmark = pytest.mark.slow


def test_every_kill_is_survived(tmp_path, capsys):
    """
    40 kills of each trainer: 20 from outside, at a forward, at an event, and while a checkpoint is written; 20 in the last
    step, after the last checkpoint, and inside the final save.
    """
    done = run_python(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("kills survived 160 of 160 "), done.stdout
    figures = {name: int(number) for name, number in re.findall(r"(\w[a-z ]*) (\d+)[,)]", summary.partition(";")[2])}
    assert figures["cut off"] >= 5
    assert figures["in a cycle"] >= 5
    assert [figures[kind] for kind in ("last step", "last checkpoint", "final save")] == [24, 28, 28]
