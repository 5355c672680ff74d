"""kill -9 at random points of a run, twice each: what is resumed ends at the same weights, bit for bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent / "kill_runs.py"
pytestmark = pytest.mark.slow


def test_every_kill_is_survived(tmp_path, capsys):
    """20 kills of each trainer: from outside, at a forward, at an event, and while a checkpoint is written."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("kills survived 80 of 80 "), done.stdout
    figures = {name: int(number) for name, number in re.findall(r"(\w[a-z ]*) (\d+)[,)]", summary.partition(";")[2])}
    assert figures["cut off"] >= 5
    assert figures["in a cycle"] >= 5
