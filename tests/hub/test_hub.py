"""Pushes to a server that speaks the Hub's API, with the Hub's own client, and what comes back from there."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pandas
import pytest
import torch
import transformers.utils.hub
from fake_hub import TOKEN, USER, FakeHub
from fake_server import serving
from helpers import (
    MINUTE_RUN,
    flags,
    make_dataset,
    make_lora,
    make_model,
    make_teacher,
    make_tokenizer,
    make_trainer,
    save_model,
)
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http
from safetensors.torch import load
from transformers import TrainerCallback

from trl_cmdp.cli import main


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub that this process's client takes for the Hub, and no waiting between its attempts."""
    with serving(FakeHub()) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.endpoint))
        monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
        monkeypatch.setenv("CI", "1")  # no telemetry
        yield server


class WaitForPush(TrainerCallback):
    """Steps are so short here that the second save would overwrite files which the first push still reads."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if args.push_to_hub and self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()


def make_pusher(folder, **kwargs):
    defaults = {
        "push_to_hub": True,
        "hub_token": TOKEN,
        "save_strategy": "steps",
        "save_steps": 1,
        "cost_limit": 1.75,
        "teacher_model": make_teacher(),
    }
    trainer = make_trainer(folder / "student", **{**defaults, **kwargs})
    trainer.add_callback(WaitForPush(trainer))
    return trainer


def saved(folder) -> dict[str, torch.Tensor]:
    return load((folder / "model.safetensors").read_bytes())


def push_warnings(caplog) -> list[str]:
    return [text for text in map(logging.LogRecord.getMessage, caplog.records) if "A push to the Hub failed" in text]


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_checkpoints_are_pushed_while_training(hub, tmp_path, caplog, strategy):
    trainer = make_pusher(tmp_path, hub_strategy=strategy, hub_always_push=True)
    trainer.train()
    files = hub.files(f"models/{USER}/student")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert equal(load(files["model.safetensors"]), saved(tmp_path / "student" / "checkpoint-2"))
    assert push_warnings(caplog) == []
    assert "Training in progress, step 1" in hub.messages[f"models/{USER}/student"]
    folders = {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
    }
    assert {path.split("/")[0] for path in files if "checkpoint" in path} == folders[strategy]


def test_the_token_is_sent_and_nowhere_else(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", TOKEN])
    trainer = make_pusher(tmp_path)
    trainer.command = [*sys.argv, f"--note={TOKEN}"]
    trainer.train()
    trainer.push_to_hub()
    on_disk = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"training_args.bin", "README.md"} <= {path.name for path in on_disk}
    assert [str(path) for path, content in on_disk.items() if TOKEN.encode() in content] == []
    assert TOKEN.encode() not in hub.stored()
    assert b"--hub_token ***" in hub.files(f"models/{USER}/student")["README.md"]
    sent = [headers.get("Authorization") for _, path, headers in hub.requests if path.startswith("/storage/")]
    assert sent
    assert set(sent) == {None}  # the storage is another host


FAULTS = {
    "500 at the commit": lambda method, path: "500" if "/commit/" in path else None,
    "500 in the large file": lambda method, path: "500" if method == "PUT" else None,
    "connection lost in the large file": lambda method, path: "drop" if method == "PUT" else None,
    "token revoked": lambda method, path: "401" if "/preupload/" in path else None,
    "server gone": lambda method, path: "drop",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_fails_leaves_training_unharmed(hub, tmp_path, caplog, fault):
    trainer = make_pusher(tmp_path)
    hub.fault = FAULTS[fault]
    trainer.train()
    assert trainer.state.global_step == 2
    assert equal(saved(tmp_path / "student" / "checkpoint-2"), trainer.model.state_dict())
    warnings = push_warnings(caplog)
    assert warnings
    cause = {
        "500": "500",
        "connection": r"Error while uploading .*, caused by (Read|Write|RemoteProtocol)Error",
        "server": "(Read|Write|RemoteProtocol)Error",
        "token": "401",
    }[fault.split()[0]]
    assert all(re.search(cause, text) and "the checkpoint is on disk" in text for text in warnings), warnings
    assert "secretsignature" not in "".join(warnings)
    assert TOKEN not in "".join(warnings)

    hub.fault = lambda method, path: None
    trainer.push_to_hub()
    assert equal(load(hub.files(f"models/{USER}/student")["model.safetensors"]), trainer.model.state_dict())


def test_completions_as_a_dataset(hub, tmp_path, monkeypatch):
    # TRL makes this repository with the token of the environment, not with `hub_token`.
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    trainer = make_pusher(
        tmp_path,
        push_to_hub=False,
        save_strategy="no",
        log_completions=True,
        log_completions_hub_repo=f"{USER}/completions",
    )
    trainer.train()
    trainer.commit_scheduler.trigger().result()
    trainer.commit_scheduler.stop()
    files = hub.files(f"datasets/{USER}/completions")
    assert {"README.md", "completions_00001.parquet", "completions_00002.parquet"} <= files.keys()
    table = pandas.read_parquet(io.BytesIO(files["completions_00002.parquet"]))
    assert {"prompt", "completion", "cost", "feasible", "advantage"} <= set(table.columns)


def environment(hub, cache):
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTEST"))}
    return {
        **keep,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(cache),
        "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)),
    }


LOAD_BACK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

base, model_id, adapter_id = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_id)
tokenizer = AutoTokenizer.from_pretrained(model_id)
ids = torch.tensor([tokenizer("1+2=")["input_ids"]])
answer = {"model": model(ids).logits.double().sum().item()}
assert "peft" not in sys.modules

from peft import PeftModel
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter_id)
answer["adapter"] = adapted(ids).logits.double().sum().item()
answer["modules"] = [name for name in ("trl", "trl_cmdp") if name in sys.modules]
print(json.dumps(answer))
"""


def test_round_trip_of_the_command_and_of_an_adapter(hub, tmp_path, capsys):
    """`trl-cmdp constrained --push_to_hub`, an adapter's push, and both loaded from the server with an empty cache."""
    base = save_model(tmp_path / "base", make_model(), make_tokenizer())
    save_model(tmp_path / "teacher", make_teacher(), make_tokenizer())
    make_dataset().to_json(tmp_path / "data.jsonl")
    options = {
        **MINUTE_RUN,
        "model_name_or_path": base,
        "teacher_model": tmp_path / "teacher",
        "dataset_name": tmp_path / "data.jsonl",
        "reward_funcs": "helpers.length_reward",
        "output_dir": tmp_path / "student",
        "hub_model_id": f"{USER}/student",
        "hub_token": TOKEN,
        "push_to_hub": True,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "cost_limit": 1.75,
        "disable_tqdm": False,
    }
    assert main(["constrained", *flags(options)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "step 2/2 · reward" in printed
    assert f"Model pushed to {hub.endpoint}/{USER}/student." in printed
    files = hub.files(f"models/{USER}/student")
    assert files["training_curves.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    assert "![Training curves](training_curves.png)" in card
    assert "trl-cmdp constrained" in card
    assert "--hub_token ***" in card
    assert TOKEN not in card
    assert "`teacher` (a local folder)" in card

    adapter_trainer = make_pusher(
        tmp_path / "adapter",
        model=transformers.AutoModelForCausalLM.from_pretrained(base),
        hub_model_id=f"{USER}/adapter",
        learning_rate=1e-1,
        peft_config=make_lora(r=8),
    )
    adapter_trainer.train()
    adapter_trainer.push_to_hub()
    adapter_files = hub.files(f"models/{USER}/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= adapter_files.keys()
    assert "model.safetensors" not in adapter_files
    assert "library_name: peft" in adapter_files["README.md"].decode()

    arguments = [base, f"{USER}/student", f"{USER}/adapter"]
    run = subprocess.run(
        [sys.executable, "-c", LOAD_BACK, *arguments],
        env=environment(hub, tmp_path / "cache"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout.splitlines()[-1])
    ids = torch.tensor([make_tokenizer()("1+2=")["input_ids"]])
    local = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert loaded["model"] == pytest.approx(local(ids).logits.double().sum().item(), rel=1e-5)
    adapted = adapter_trainer.model.eval()
    assert loaded["adapter"] == pytest.approx(adapted(ids).logits.double().sum().item(), rel=1e-5)
    with adapted.disable_adapter():
        assert loaded["adapter"] != pytest.approx(adapted(ids).logits.double().sum().item(), rel=1e-5)
    assert loaded["modules"] == []


def test_the_command_says_why_a_push_failed(hub, tmp_path, capsys, monkeypatch):
    """Training is done by then: the model is saved, and the exit code is 1 without a traceback."""
    from trl_cmdp.cli._train import DistillScriptArguments, _train

    trainer = make_pusher(tmp_path, save_strategy="no")
    hub.fault = FAULTS["500 in the large file"]
    assert _train(trainer, DistillScriptArguments()) == 1
    assert equal(saved(tmp_path / "student"), trainer.model.state_dict())
    error = capsys.readouterr().err
    assert "500" in error
    assert f"hf upload {USER}/student" in error
    assert "Traceback" not in error
