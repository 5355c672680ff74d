"""
The lowest TRL that the metadata allow and the newest that can be installed: students train on both.

Both are installed beside the environment's own and come first on the path. TRL 1.15 has its fused head in Triton alone,
which interprets its kernels where there is no GPU.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trl_cmdp.trainers.engine.trl_hooks import TESTED_TRL


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(SUPPORTED,) = (str(r.specifier) for r in map(Requirement, PROJECT["dependencies"]) if r.name == "trl")
(LOWEST,) = (part.removeprefix(">=") for part in SUPPORTED.split(",") if part.startswith(">="))
EQUAL_TO_GRPO = "tests/trainers/test_drop_in.py::TestEqualToGRPO::test_without_teacher_and_with_unreachable_limit"
TESTS = [
    "tests/cli/test_options.py",
    "tests/trainers/test_trl_hooks.py",
    "tests/trainers/test_grpo_options.py",
    f"{EQUAL_TO_GRPO}[grpo-1-False]",
    f"{EQUAL_TO_GRPO}[dapo-1-True]",
    "tests/trainers/test_drop_in.py::TestEqualToGRPO::test_a_reachable_limit_is_not_grpo",
    "tests/trainers/test_checkpoint.py::test_saved_student_loads_with_transformers_alone",
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("trl", [f"trl=={LOWEST}", f"trl{SUPPORTED}"], ids=["lowest", "newest"])
def test_supported(tmp_path, trl):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, trl, "triton"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    which = "from importlib.metadata import version; print(version('trl'))"
    version = subprocess.run(
        [sys.executable, "-c", which], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert version in Requirement(trl).specifier
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *TESTS], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, f"trl {version}\n{result.stdout}"
    assert version in TESTED_TRL, f"Add {version} to `TESTED_TRL`."
