"""Student and teacher sharded by FSDP2 over two CPU processes give what they give whole in one."""

import runpy
from pathlib import Path

import pytest
import torch
from helpers import relative_error, run_processes


SCRIPT = Path(__file__).parent / "sharded_run.py"
SETTINGS = runpy.run_path(str(SCRIPT))["SETTINGS"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process and two made of it."""
    paths = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    runpy.run_path(str(SCRIPT))["main"](str(paths[0]))
    run_processes(2, SCRIPT, paths[1])
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
