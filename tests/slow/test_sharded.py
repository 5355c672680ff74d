"""Student and teacher sharded by FSDP2 over two CPU processes give what they give whole in one."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error


SCRIPT = Path(__file__).parent / "sharded_run.py"
SETTINGS = [
    "fused", "separate", "recomputed", "in_tiles", "one_process_violates", "resharded",
    "resharded_separate", "tied", "several_teachers", "several_recomputed"
]  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process and two made of it."""
    paths = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    runpy.run_path(str(SCRIPT))["main"](str(paths[0]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(SCRIPT), str(paths[1])]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(path / "results.pt") for path in paths]


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_costs_loss_and_gradients(results, setting):
    """Of two steps, so that weights gathered before the first update would be seen in the second."""
    one, two = (result[setting] for result in results)
    assert (one["processes"], two["processes"]) == (1, 2)
    for total, local in two["sizes"].values():
        assert local is not None
        assert local < total
    for expected, step in zip(one["steps"], two["steps"], strict=True):
        assert step["kept"] == expected["kept"] == ("recomputed" not in setting)
        assert step["scores"].keys() == {"costs", "student_logps", "teacher_logps"}
        for name, values in expected["scores"].items():
            torch.testing.assert_close(step["scores"][name], values, rtol=1e-5, atol=1e-5)
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["gradients"].keys() == expected["gradients"].keys()
        assert relative_error(step["gradients"], expected["gradients"]) < 1e-5
    first, second = one["steps"]
    assert first["scores"]["costs"].mean() > 0.1
    assert relative_error(second["gradients"], first["gradients"]) > 1e-2, "the update moved what is compared"
