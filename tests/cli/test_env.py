"""`trl-cmdp env`: versions and hardware, and nothing of the user's."""

import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from trl_cmdp import __version__
from trl_cmdp.cli import env, main


def test_prints_versions_and_no_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setattr(env, "PACKAGES", (*env.PACKAGES, "no-such-package"))
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"- trl_cmdp: {__version__}\n" in out
    assert f"- python: {platform.python_version()}\n" in out
    for package in ("torch", "transformers", "trl", "accelerate", "datasets"):
        assert f"- {package}: {version(package)}\n" in out
    assert "- no-such-package: not installed\n" in out
    for name in ("peft", "bitsandbytes", "vllm", "platform", "CPUs", "CUDA devices"):
        assert f"- {name}: " in out
    assert "hf_planted" not in out
    assert str(Path.home()) not in out


def test_devices_are_named(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"GPU {index}")
    assert main(["env"]) == 0
    assert "- CUDA devices: GPU 0, GPU 1\n" in capsys.readouterr().out


def test_takes_no_arguments(capsys):
    with pytest.raises(SystemExit) as error:
        main(["env", "--verbose"])
    assert error.value.code == 2
    assert "unrecognized arguments: --verbose" in capsys.readouterr().err
