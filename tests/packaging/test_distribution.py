"""The wheel and the source distribution: what they hold, what they say of themselves, and that the wheel runs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIST_INFO = f"trl_cmdp-{PROJECT['version']}.dist-info"

pytestmark = pytest.mark.slow


def build(source, folder, *what):
    """With the environment's setuptools: nothing is downloaded."""
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def contents(wheel):
    """Name and bytes of each file."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that nothing built earlier is packed and nothing built here is left."""
    folder = tmp_path_factory.mktemp("checkout") / "trl-cmdp"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "site")
    return shutil.copytree(ROOT, folder, ignore=skipped)


@pytest.fixture(scope="module")
def dist(tmp_path_factory, source):
    """The source distribution, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    build(source, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(source, wheel):
    """Every file beneath `trl_cmdp/` as it stands there: data too, and one that `package-data` forgets is missed."""
    expected = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in (source / "trl_cmdp").rglob("*")
        if path.is_file()
    }
    for name in ("trl_cmdp/py.typed", "trl_cmdp/reports/report.js", "trl_cmdp/cli/experiments/arithmetic.yaml"):
        assert name in expected
    held = contents(wheel)
    assert {name: data for name, data in held.items() if not name.startswith(DIST_INFO)} == expected
    assert held[f"{DIST_INFO}/licenses/LICENSE"] == (source / "LICENSE").read_bytes()


def test_wheel_of_the_checkout_is_the_wheel_of_the_source_distribution(tmp_path, source, wheel):
    build(source, tmp_path, "--wheel")
    (of_the_checkout,) = tmp_path.glob("*.whl")
    assert of_the_checkout.name == wheel.name
    assert contents(of_the_checkout) == contents(wheel)


def test_source_distribution_holds_what_it_is_built_from(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "trl_cmdp/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "outputs/"))]


def test_metadata(source, wheel):
    metadata: Message = message_from_bytes(contents(wheel)[f"{DIST_INFO}/METADATA"])
    assert metadata["Name"] == "trl-cmdp"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode().strip() == (source / "README.md").read_text().strip()
    assert {"peft", "quantization", "vllm", "eval", "docs", "dev"} <= set(metadata.get_all("Provides-Extra"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(needed) == len(PROJECT["dependencies"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """A fresh environment that has the wheel, and what it needs from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    # A path in a .pth file only adds that folder: the editable install that it holds stays unknown.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(environment, command, *arguments):
    """Outside the checkout, and without the variables that would lead back to it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [environment / "bin" / command, *arguments],
        cwd=environment,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_installed_package_is_the_wheels(installed):
    assert Path(run(installed, "python", "-c", "import trl_cmdp; print(trl_cmdp.__file__)")).is_relative_to(installed)


def test_commands_run(installed):
    assert f"- trl_cmdp: {PROJECT['version']}\n" in run(installed, "trl-cmdp", "env")
    assert "--cost_limit" in run(installed, "trl-cmdp", "demo", "--help")


def test_data_files_are_found(installed):
    """A preset of `compare` and a model of a task, by the functions that look for them."""
    script = (
        "from pathlib import Path\n"
        "from trl_cmdp.cli._experiment import preset_names\n"
        "from trl_cmdp.tasks import arithmetic\n"
        "print(*preset_names(), Path(arithmetic.demo_model_path('student'), 'model.safetensors').is_file())"
    )
    assert run(installed, "python", "-c", script).split() == ["arithmetic", "True"]
