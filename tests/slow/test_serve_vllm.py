"""`trl-cmdp serve` with vLLM itself, on the CPU: from its start to a training step to its end, and killed in between."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import history, make_trainer
from transformers import TrainerCallback
from vllm_server import SETTINGS, START_TIMEOUT, free_port, vllm_python


pytestmark = pytest.mark.slow
KEY = "secret-key-0123456789"


class Serve:
    """The command with what it starts; a variable of the environment marks them all."""

    def __init__(self, folder, model, port, *arguments):
        self.mark = f"SERVE_TEST={folder.name}-{time.monotonic()}"
        (folder / "more.yaml").write_text("enforce-eager: true\n")
        self.output = folder / "serve.out"
        command = [sys.executable, "-m", "trl_cmdp", "serve", model, "--port", str(port), "--max_model_len", "2048"]
        environment = {**os.environ, **SETTINGS, **dict([self.mark.split("=")]), "TRL_CMDP_TEACHER_API_KEY": KEY}
        environment["PATH"] = f"{vllm_python().parent}{os.pathsep}{environment['PATH']}"
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--vllm_config", "more.yaml", *arguments],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while "Ctrl-C stops it." not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.5)

    def end(self, number):
        """Exit code after a signal, when nothing is left."""
        assert len(self.left()) > 3  # the command, the one that keeps vLLM, vLLM and its engine
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        deadline = time.monotonic() + 60
        while self.left():
            assert time.monotonic() < deadline, self.left()
            time.sleep(0.2)
        return code

    def left(self):
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                found += [path] if self.mark.encode() in path.read_bytes() else []
            except OSError:  # it has ended
                continue
        return found


class Restart(TrainerCallback):
    """After the first step."""

    def __init__(self, restart):
        self.restart = restart

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.restart()


def test_training_with_a_teacher_that_is_killed_and_served_again(llamas, tmp_path):
    port = free_port()
    servers = [Serve(tmp_path, llamas[0], port)]
    said = servers[0].output.read_text()
    assert "Ready: the exact divergence, float32, sequences of up to 2048 tokens; " in said

    def restart():
        assert servers[0].end(signal.SIGKILL) == -signal.SIGKILL
        servers.append(Serve(tmp_path, llamas[0], port))

    trainer = make_trainer(
        tmp_path / "out",
        teacher_model_server_url=f"http://127.0.0.1:{port}",
        teacher_model_server_api_key=KEY,
        callbacks=[Restart(restart)],
    )
    trainer.train()
    assert len(history(trainer, "teacher/divergence")) == 2
    assert min(history(trainer, "teacher/divergence")) > 0
    assert servers[1].end(signal.SIGINT) == 130
    log = (tmp_path / "teacher_server.log").read_text()
    assert "EngineCore" in log
    assert KEY not in log + said


def test_log_probabilities(llamas, tmp_path):
    server = Serve(tmp_path, llamas[0], free_port(), "--log_probs", "--dtype", "bfloat16")
    assert "Ready: log-probabilities of tokens, bfloat16" in server.output.read_text()
    assert server.end(signal.SIGTERM) == 143
