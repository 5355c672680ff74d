"""`trl-cmdp serve`: a teacher in a vLLM server, started as the trainers need it, checked, and stopped again."""

import argparse
import errno
import ipaddress
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .._defaults import TEACHER_KEY_VARIABLE
from .._messages import say
from . import beside_vllm
from ._arguments import existing_file, mistakes, model_source, positive_int
from ._parser import Mistake
from ._server_process import ServerProcess, ended_by_signals


if TYPE_CHECKING:
    from ..teachers import RemoteTeacher, SentenceScores, TeacherServer

_VLLM_KEY_VARIABLE = "VLLM_API_KEY"  # where vLLM reads its key
_SECONDS_BETWEEN_LINES = 10.0


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "serve",
        help="start a teacher in a vLLM server, and say how to train with it",
        description="Start a vLLM server that gives the exact divergence from a teacher, wait until it answers, compare "
        "what it says of a sentence with the checkpoint, and print what the trainers need. Ctrl-C stops it. The "
        f"server's key, if it is to have one, is taken from the environment: {TEACHER_KEY_VARIABLE}, or vLLM's own "
        f"{_VLLM_KEY_VARIABLE}.",
    )
    parser.add_argument("model", type=_teacher, metavar="MODEL", help="folder or Hub id of the teacher")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--log_probs",
        action="store_true",
        help="start a completion server, which gives log-probabilities of tokens and no exact divergence",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="dtype that the server computes in (default: the checkpoint's)",
    )
    parser.add_argument(
        "--tensor_parallel_size", type=positive_int, default=1, help="GPUs that share the model (default: 1)"
    )
    parser.add_argument(
        "--max_model_len", type=positive_int, help="longest sequence, in tokens (default: the model's own)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument(
        "--log_file",
        type=Path,
        default=Path("teacher_server.log"),
        help="file that the server's output is added to (default: teacher_server.log)",
    )
    parser.add_argument(
        "--vllm_config", type=existing_file, metavar="FILE", help="YAML file of further arguments of `vllm serve`"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until the server ends by itself, or this process is to end."""
    variables = (TEACHER_KEY_VARIABLE, _VLLM_KEY_VARIABLE)
    key_variable = next((name for name in variables if os.environ.get(name)), None)
    key = None if key_variable is None else os.environ[key_variable]
    vllm = _find_vllm()
    _check_address(arguments.host, arguments.port, key)
    with mistakes():
        arguments.log_file.open("ab").close()
    # Imported here: `trl-cmdp --help` should not wait for torch.
    from ..teachers import RemoteTeacher, TeacherServer, TeacherServerError, checkpoint_config, score_sentence

    _check_gpus(arguments.tensor_parallel_size)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is asked for here
    say(f"Reading {arguments.model} ...")
    with mistakes(RuntimeError):
        # Once it answers, no request has to be tried again. A key that no header can carry is refused here.
        server = TeacherServer(_url(arguments.host, arguments.port), key, timeout=5, max_wait=0)
        config = checkpoint_config(arguments.model, arguments.revision, exact=not arguments.log_probs)
        # A quantised model needs the kernels that vLLM has, and a GPU.
        is_quantized = "quantization_config" in config.to_dict()
        scores = None if is_quantized else score_sentence(arguments.model, config, arguments.revision)
    dtype = arguments.dtype or str((config.dtype or "auto") if scores is None else scores.dtype).removeprefix("torch.")
    command, environment = _command(vllm, arguments, dtype, key), _environment(key)
    say(f"Starting vLLM; its log is {arguments.log_file} ...")
    with ended_by_signals():
        process = ServerProcess(command, environment, arguments.log_file)
        try:
            if _is_ready(process, server):
                teacher = RemoteTeacher(
                    server.url, key, model=arguments.model, revision=arguments.revision, max_wait=0
                )
                _announce(teacher, scores, dtype, arguments, key_variable)
                while not process.wait(3600.0):
                    pass
            reason = "The server ended by itself."
        except (TeacherServerError, ValueError) as error:
            reason = str(error)
        finally:
            process.stop()
    say(f"The last lines of {arguments.log_file}:\n{process.log_tail()}\ntrl-cmdp serve: error: {reason}", error=True)
    return 1


def _teacher(text: str) -> str:
    """The folder or Hub id of a whole model, for `argparse`."""
    if Path(text, "adapter_config.json").is_file():
        raise Mistake(
            f"{text!r} is an adapter, not a model. Merge it into its base and serve that: "
            "`AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)`, with the tokenizer "
            "beside it."
        )
    source = model_source(text)
    # The server names it to trainers, whose working directory is another.
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"must lie between 1 and 65535, got {text}")
    return port


def _find_vllm() -> str:
    vllm = shutil.which("vllm") or shutil.which("vllm", path=os.path.dirname(sys.executable))
    if vllm is None:
        raise Mistake(
            "There is no program `vllm` on the PATH. Install vLLM, best in an environment of its own "
            "(`python -m venv vllm-env && vllm-env/bin/pip install vllm`), and put that on the PATH: "
            "`PATH=$PWD/vllm-env/bin:$PATH trl-cmdp serve MODEL`."
        )
    return vllm


def _check_address(host: str, port: int, key: str | None) -> None:
    """Refuse an address that is taken or is not one of this machine, and one that others reach without a key."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise Mistake(f"--port: {port} is taken. Stop what listens there, or give another --port.") from error
        raise Mistake(f"A server cannot listen at --host {host} --port {port}: {error}.") from error
    if key is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise Mistake(
            f"--host: {host} can be reached from other machines, and the server has no key. Set {TEACHER_KEY_VARIABLE} in the "
            "environment, or leave --host out and forward the port (`ssh -N -L 8000:localhost:8000 HOST`)."
        )


def _check_gpus(wanted: int) -> None:
    import torch

    # The torch of this environment may be built for a CPU, beside a vLLM that is not.
    found = torch.cuda.device_count() or len(list(Path("/dev").glob("nvidia[0-9]*")))
    if wanted > max(found, 1):
        raise Mistake(f"--tensor_parallel_size: {wanted} GPUs are wanted, and this machine has {found}.")


def _url(host: str, port: int) -> str:
    """Where this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _command(vllm: str, arguments: argparse.Namespace, dtype: str, key: str | None) -> list[str]:
    from ..teachers import EXACT_SERVER_ARGUMENTS

    command = [vllm, "serve", arguments.model, "--host", arguments.host, "--port", str(arguments.port)]
    # Unless told, vLLM computes a float32 checkpoint in float16.
    command += ["--dtype", dtype, "--tensor-parallel-size", str(arguments.tensor_parallel_size)]
    if not arguments.log_probs:
        command += EXACT_SERVER_ARGUMENTS
    if arguments.revision is not None:
        command += ["--revision", arguments.revision, "--tokenizer-revision", arguments.revision]
    if arguments.max_model_len is not None:
        command += ["--max-model-len", str(arguments.max_model_len)]
    if arguments.vllm_config is not None:
        command += ["--config", str(arguments.vllm_config)]
    if key is not None:
        command += ["--middleware", "trl_cmdp_key.RequireKey"]
    return command


def _environment(key: str | None) -> dict[str, str]:
    """Of the server: it finds its key there, which a command line would show to every user of the machine."""
    environment = dict(os.environ)
    if key is not None:
        environment[_VLLM_KEY_VARIABLE] = key
        folders = [*beside_vllm.__path__, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(folders)
    return environment


def _is_ready(process: ServerProcess, server: "TeacherServer") -> bool:
    """Wait until the server answers, or has ended."""
    from ..teachers import TeacherServerError

    started = said = time.monotonic()
    while not process.wait(0.5):
        try:
            server.probe("/v1/models")
            return not process.has_ended  # what answers is this server
        except TeacherServerError as error:
            if error.status is not None:  # an answer, of which `RemoteTeacher` says what is wrong
                return not process.has_ended
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            say(f"{now - started:.0f} s: {process.log_tail(1)[:200] or 'no output yet'}")
    return False


def _announce(
    teacher: "RemoteTeacher",
    scores: "SentenceScores | None",
    dtype: str,
    arguments: argparse.Namespace,
    key_variable: str | None,
) -> None:
    """Compare the server with its checkpoint, and print what it is and how to train with it."""
    import torch

    from ..teachers import TeacherServerError, check_server

    if teacher.exact == arguments.log_probs:
        kinds = {True: "hidden states", False: "log-probabilities only"}
        raise TeacherServerError(
            f"The server at {teacher.url} gives {kinds[teacher.exact]}, which is not what was asked for. Does "
            "--vllm_config say otherwise?"
        )
    if scores is None:
        compared = "not compared with its checkpoint, which is quantised"
    else:
        apart = check_server(teacher, scores, getattr(torch, dtype))
        compared = f"{apart:.1e} nats at most from its checkpoint, on one sentence"
    kind = "log-probabilities of tokens" if arguments.log_probs else "the exact divergence"
    say(f"\nReady: {kind}, {dtype}, sequences of up to {teacher.max_model_len} tokens; {compared}.")
    settings = {"teacher_model_server_url": _url_for_others(arguments.host, arguments.port)}
    if arguments.revision is not None:
        settings["teacher_model_revision"] = arguments.revision
    # Not by `say`, which would hide the name of the variable behind the key's. No value here is a secret.
    in_python = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    on_the_shell = [f"--{name} {shlex.quote(value)}" for name, value in settings.items()]
    in_a_file = [f"{name}: {value}" for name, value in settings.items()]
    if key_variable is not None:
        in_python.append(f'teacher_model_server_api_key=os.environ["{key_variable}"]')
    print(f"In Python:    {', '.join(in_python)}")
    print(f"On the shell: {' '.join(on_the_shell)}")
    print("In a file:    " + "\n              ".join(in_a_file))
    if key_variable is not None:
        print(f"Its key:      the commands read it from {TEACHER_KEY_VARIABLE} in the environment.")
    if arguments.log_probs:
        print(
            'It serves cost="log_ratio" and "teacher_nll", with violation_distill_coef=0 and unrewarded_distill_coef=0.'
        )
    print("Ctrl-C stops it.", flush=True)


def _url_for_others(host: str, port: int) -> str:
    """Where trainers reach the server: on another machine too, if it listens for all."""
    return _url(socket.getfqdn() if host in ("0.0.0.0", "::") else host, port)
