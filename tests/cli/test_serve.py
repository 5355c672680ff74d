"""`trl-cmdp serve` with a stand-in for vLLM: what it starts, what it says of it, and that nothing is left of it."""

import asyncio
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_server import KEY
from helpers import error_line, make_teacher, make_tokenizer, save_model

from trl_cmdp.cli import main, serve
from trl_cmdp.cli._server_process import ended_by_signals
from trl_cmdp.cli.beside_vllm.trl_cmdp_key import RequireKey
from trl_cmdp.teachers import score_sentence
from trl_cmdp.teachers._checkpoint import load_config


STAND_IN = Path(__file__).with_name("vllm_stand_in.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "teacher", make_teacher(), make_tokenizer())


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


class Stage:
    """A folder to work in, with the stand-in on the PATH."""

    def __init__(self, folder, model):
        self.folder, self.model, self.port = folder, model, free_port()
        self.sentence = score_sentence(model, load_config(model)).token_ids

    @torch.no_grad()
    def plan(self, teacher=None, dtype=torch.float32, **changes):
        """What the stand-in does: it answers as a teacher does, and ends after the sentence."""
        teacher = (make_teacher() if teacher is None else teacher).to(dtype).eval()
        hidden, log_probs = {}, {}
        for tokens in ([0, 1, 2], [0, 1], self.sentence[:-1], self.sentence):
            values = teacher.base_model(torch.tensor([tokens])).last_hidden_state[0]
            content = base64.b64encode(values.view(torch.uint8).numpy().tobytes()).decode()
            hidden[json.dumps(tokens)] = {"values": values.tolist(), "bytes": content}
            logps = teacher(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
            own = [0.0, *logps[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()]
            log_probs[json.dumps(tokens)] = own
        ends_after = self.sentence if changes.pop("log_probs_only", False) else self.sentence[:-1]
        plan = {"hidden": hidden, "log_probs": log_probs, "ends_after": ends_after, "dies": False}
        (self.folder / "plan.json").write_text(json.dumps({**plan, "seconds_to_start": 0, **changes}))

    def serve(self, *arguments):
        return main(["serve", self.model, "--port", str(self.port), *arguments])

    @property
    def called(self):
        return json.loads((self.folder / "called.json").read_text())

    def is_over(self):
        """Nothing that the stand-in started is left, nor itself."""
        deadline = time.monotonic() + 5
        while any(map(is_running, self.called["pids"])):
            assert time.monotonic() < deadline, self.called["pids"]
            time.sleep(0.02)
        return True


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def stage(folder, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path / "plan.json"))
    for name in ("VLLM_API_KEY", "TRL_CMDP_TEACHER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Stage(tmp_path, folder)


def test_an_exact_teacher_from_start_to_end(stage, monkeypatch, capfd):
    """What vLLM is told, what is printed for the trainers, the log, and the key, which stands in neither."""
    monkeypatch.setenv("TRL_CMDP_TEACHER_API_KEY", KEY)
    monkeypatch.setattr(serve, "_SECONDS_BETWEEN_LINES", 0.3)
    stage.plan(seconds_to_start=0.7)
    (stage.folder / "teacher_server.log").write_text("of an earlier server\n")
    (stage.folder / "more.yaml").write_text("enforce-eager: true\n")
    assert stage.serve("--max-model-len", "128", "--vllm_config", "more.yaml") == 1  # as the server ended
    said = capfd.readouterr()
    url = f"http://127.0.0.1:{stage.port}"
    assert "s: loading" in said.out
    assert "Ready: the exact divergence, float32, sequences of up to 128 tokens; " in said.out
    assert (
        f'In Python:    teacher_model_server_url="{url}", teacher_model_server_api_key=os.environ["TRL_CMDP_TEACHER_API_KEY"]'
        in said.out
    )
    assert f"On the shell: --teacher_model_server_url {url}\n" in said.out
    assert f"In a file:    teacher_model_server_url: {url}\n" in said.out
    assert "read it from TRL_CMDP_TEACHER_API_KEY in the environment" in said.out
    assert "ended by itself" in said.err
    assert "of an earlier server" not in said.err
    assert "answered /pooling" in said.err
    log = (stage.folder / "teacher_server.log").read_text()
    assert log.startswith("of an earlier server\nloading\n")
    assert "exit code 3" in log
    called = stage.called
    assert called["arguments"] == [
        *("serve", stage.model, "--host", "127.0.0.1", "--port", str(stage.port)),
        *("--dtype", "float32", "--tensor-parallel-size", "1", "--runner", "pooling", "--convert", "embed"),
        *("--pooler-config", '{"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": false}'),
        *("--max-model-len", "128", "--config", "more.yaml", "--middleware", "trl_cmdp_key.RequireKey"),
    ]
    assert called["key"] == KEY
    assert KEY not in said.out + said.err + log
    assert stage.is_over()


def test_log_probabilities(stage, capfd):
    stage.plan(log_probs_only=True)
    assert stage.serve("--log_probs") == 1
    said = capfd.readouterr()
    assert "Ready: log-probabilities of tokens, float32" in said.out
    assert f"On the shell: --teacher_model_server_url http://127.0.0.1:{stage.port}\n" in said.out
    assert "api_key" not in said.out
    assert "--runner" not in stage.called["arguments"]


def test_half_precision(stage, capfd):
    stage.plan(dtype=torch.bfloat16)
    assert stage.serve("--dtype", "bfloat16") == 1
    assert "Ready: the exact divergence, bfloat16" in capfd.readouterr().out


def test_a_quantised_checkpoint_is_not_compared_and_that_is_said(stage, capfd):
    stage.plan(ends_after=[0, 1])
    stage.model = str(shutil.copytree(stage.model, stage.folder / "quantised"))
    config = Path(stage.model, "config.json")
    quantised = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantised}))
    assert stage.serve() == 1
    assert "; not compared with its checkpoint, which is quantised.\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "plan", "said"),
    [
        ([], {"teacher": make_teacher(seed=2)}, "does not say what its checkpoint says"),
        (["--log_probs"], {"teacher": make_teacher(seed=2)}, "does not say what its checkpoint says"),
        ([], {"teacher": make_teacher(hidden_size=16)}, "different models"),
        ([], {"dies": True}, "ended by itself"),
    ],
    ids=["other weights", "other log-probabilities", "another size", "dies at once"],
)
def test_a_server_that_is_of_no_use(stage, monkeypatch, capfd, arguments, plan, said):
    """It is stopped, and the error comes after the last lines of its log."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    stage.plan(**plan, ends_after="never")
    assert stage.serve(*arguments) == 1
    out, err = capfd.readouterr()
    assert "Ready" not in out
    assert said in err.splitlines()[-1]
    assert "The last lines of teacher_server.log:\nloading\n" in err
    assert ("no memory, key ***" in err) == bool(plan.get("dies"))
    assert KEY not in err
    assert stage.is_over()


@pytest.mark.parametrize("ready", [True, False], ids=["ready", "starting"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_it(stage, in_foreground, number, code, ready):
    stage.plan(ends_after="never", seconds_to_start=0 if ready else 600)
    awaited = "answered /pooling\n" * 3 if ready else "loading\n"
    log, deadline = Path("teacher_server.log"), time.monotonic() + 20

    def send():
        while time.monotonic() < deadline and not (log.exists() and awaited in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        ended = stage.serve()
    except SystemExit as error:
        ended = error.code
    sender.join()
    assert ended == code
    assert stage.is_over()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_hangup_that_is_ignored_stays_ignored():
    """As `nohup` has it."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_nothing_is_left_of_it_when_it_is_killed(stage):
    """SIGKILL of the process that holds the server, also while that does not end by itself."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom trl_cmdp.cli._server_process import ServerProcess\n"
        "ServerProcess(sys.argv[1:], dict(os.environ), Path('log'))\nprint('started', flush=True)\ntime.sleep(600)"
    )
    worker = "sleep 600 & echo $! $$ > pids; exec sleep 600"
    command = [sys.executable, "-c", script, "sh", "-c", worker]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        while not (pids := Path("pids")).exists() or not pids.read_text().strip():
            time.sleep(0.02)
        holder.kill()
    (stage.folder / "called.json").write_text(json.dumps({"pids": [*map(int, pids.read_text().split())]}))
    assert stage.is_over()


class TestBadInput:
    """One line, before anything is started."""

    @pytest.fixture(autouse=True)
    def nothing_is_started(self, stage):
        yield
        assert not (stage.folder / "called.json").exists()

    def test_vllm_is_missing(self, stage, monkeypatch, capsys):
        monkeypatch.setenv("PATH", str(stage.folder / "nothing"))
        assert stage.serve() == 2
        assert "pip install vllm" in error_line(capsys)

    def test_the_port_is_taken(self, stage, capsys):
        with socket.socket() as other:
            other.bind(("127.0.0.1", stage.port))
            other.listen()
            assert stage.serve() == 2
        assert f"--port: {stage.port} is taken" in error_line(capsys)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--host", "0.0.0.0"], "Set TRL_CMDP_TEACHER_API_KEY"),
            (["--host", "::"], "Set TRL_CMDP_TEACHER_API_KEY"),
            (["--host", "no.such.host.invalid"], "cannot listen at --host no.such.host.invalid"),
            (["--host", f"{'long' * 20}.name"], "cannot listen at --host long"),
            (["--host", "192.0.2.1"], "cannot listen at --host 192.0.2.1"),  # of documentation, no machine's
            (["--tensor_parallel_size", "64"], "64 GPUs are wanted"),
            (["--log_file", "no/such/folder.log"], "No such file"),
            (["--vllm_config", "more.yml"], "there is no file 'more.yml'"),
        ],
    )
    def test_options(self, stage, capsys, arguments, said):
        assert stage.serve(*arguments) == 2
        assert said in error_line(capsys)

    @pytest.mark.parametrize("port", ["0", "65536", "http"])
    def test_ports(self, stage, capsys, port):
        with pytest.raises(SystemExit):
            main(["serve", stage.model, "--port", port])
        assert "--port" in error_line(capsys)

    def test_models(self, stage, capsys):
        adapter, empty, pickled = (stage.folder / name for name in ("adapter", "empty", "pickled"))
        for made in (adapter, empty, pickled):
            made.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        load_config(stage.model).save_pretrained(pickled)
        for model, said in {
            adapter: "is an adapter, not a model. Merge it",
            empty: "is a folder without a model",
            pickled: "has no safetensors",
            f"{stage.folder}/missing": "is neither a folder nor a Hub id",
        }.items():
            assert main(["serve", str(model), "--port", str(stage.port)]) == 2
            assert said in error_line(capsys)

    def test_a_key_that_no_header_can_carry(self, stage, monkeypatch, capsys):
        monkeypatch.setenv("VLLM_API_KEY", f"{KEY} ")
        assert stage.serve() == 2
        line = error_line(capsys)
        assert "printable ASCII" in line
        assert KEY not in line

    def test_weights_that_are_not_finite(self, stage, tmp_path, capsys):
        model = make_teacher()
        model.lm_head.weight.data[3] = torch.nan
        broken = save_model(tmp_path / "broken", model, make_tokenizer())
        assert main(["serve", broken, "--port", str(stage.port)]) == 2
        assert "NaN or infinite logits" in error_line(capsys)


@pytest.mark.parametrize(
    ("path", "headers", "passes"),
    [
        ("/pooling", [(b"authorization", f"Bearer {KEY}".encode())], True),
        ("/pooling", [(b"authorization", f"Bearer {KEY}x".encode())], False),
        ("/pooling", [(b"authorization", KEY.encode())], False),
        ("/pooling", [], False),
        ("/v1/models", [], False),
        ("/health", [], True),
    ],
)
def test_the_key_is_asked_for_on_every_path(monkeypatch, path, headers, passes):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    asyncio.run(RequireKey(app)({"type": "http", "path": path, "headers": headers}, None, send))
    assert reached == ([path] if passes else [])
    assert passes or sent[0]["status"] == 401
