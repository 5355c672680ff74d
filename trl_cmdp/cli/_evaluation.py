"""What `evaluate` and `calibrate` share: their arguments, what they load, and a student rolled out with its records."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import positive_float, positive_int


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation import EvaluationSettings, RolloutRecord

COST_LIMIT, COST_SCOPE = 0.35, "mean"
TEACHER_KEY_VARIABLE = "TRL_CMDP_TEACHER_API_KEY"  # an argument would be in the shell's history


def add_rollout_arguments(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """Add models, problems and rollouts to a command. Returns the group of the rollouts."""
    models = parser.add_argument_group("models")
    models.add_argument("--name", help="the student's name in tables (default: its folder's)")
    models.add_argument(
        "--teacher", metavar="PATH_OR_ID", help="teacher; with --teacher_model_server_url its checkpoint"
    )
    models.add_argument("--teacher_adapter_name", metavar="NAME", help="'base': the student's base is its teacher")
    models.add_argument(
        "--teacher_model_server_url",
        metavar="URL",
        help=f"exact vLLM server that runs the teacher (its key: ${TEACHER_KEY_VARIABLE})",
    )
    models.add_argument("--teacher_beta", type=float, default=1.0, help="divergence: 1 reverse KL, 0 forward KL")
    models.add_argument("--dtype", default="auto", help="dtype of the models, such as bfloat16 (default: their own)")

    problems = parser.add_argument_group("problems")
    problems.add_argument("--task", metavar="NAME", help="task, a module of trl_cmdp.tasks (default: table)")
    problems.add_argument("--dataset", metavar="FILE_OR_ID", help="where the task reads its problems from")
    problems.add_argument("--prompt_column", help="column of prompts (table)")
    problems.add_argument("--answer_column", help="column of right final answers (table)")
    problems.add_argument("--difficulty_column", help="column by which results are split (table)")
    problems.add_argument("--reward", metavar="DOTTED_PATH", help="reward that is 1 where right (default: the task's)")
    problems.add_argument("--split", default="test", help="split (default: test)")
    problems.add_argument("--num_problems", type=positive_int, default=200, help="problems (default: 200)")

    rollouts = parser.add_argument_group("rollouts")
    rollouts.add_argument("--num_samples", type=int, default=1, help="samples of each problem (default: 1)")
    rollouts.add_argument("--temperature", type=positive_float, default=1.0, help="temperature (default: 1)")
    rollouts.add_argument("--max_new_tokens", type=positive_int, help="longest completion (default: the task's)")
    rollouts.add_argument("--seed", type=int, default=0, help="seed of the problems and the samples (default: 0)")
    rollouts.add_argument("--batch_size", type=positive_int, default=32, help="rollouts at a time (default: 32)")
    rollouts.add_argument("--scoring_batch_size", type=positive_int, default=32, help="the same when scored")
    rollouts.add_argument("--backend", choices=["transformers", "vllm"], default="transformers", help="what generates")
    rollouts.add_argument("--vllm_gpu_memory_utilization", type=positive_float, default=0.3, help="share for vLLM")
    return rollouts


def output_folder(command: str, arguments: argparse.Namespace) -> Path:
    """The folder asked for, or one named by the command, the task and the student."""
    task = Path(arguments.dataset or arguments.task or "").stem
    name = Path(_student_name(arguments)).name  # a name is text, and no way out of the folder
    return arguments.output_dir or Path("outputs") / f"{command}-{task}-{name}"


def replace_arguments(arguments: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """A copy of the arguments with some of them changed."""
    return argparse.Namespace(**{**vars(arguments), **changes})


def read_evaluation(path: Path) -> "tuple[EvaluationSettings, list[RolloutRecord]]":
    """Records of an evaluation, or an error that names their file."""
    from ..evaluation import read_rollout_records

    try:
        return read_rollout_records(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def roll_out(arguments: argparse.Namespace, records_path: Path) -> "tuple[EvaluationSettings, list[RolloutRecord]]":
    """
    Roll the student out as the arguments say, or go on with its records.

    Raises:
        ValueError, OSError, ImportError: For a mistake in what was asked for.
    """
    # Imported here: neither `trl-cmdp --help` nor --records should wait for transformers.
    from datasets.exceptions import DatasetsError
    from filelock import Timeout

    from ..evaluation import evaluate
    from ..evaluation.progress import show_progress
    from ..teachers import TeacherServerError

    try:
        task = load_task(arguments)
        reward = _reward(task, arguments)
        student, tokenizer = load_student(arguments)
        problems = load_problems(task, tokenizer, arguments)
        settings = _settings(task, len(problems), arguments)
        teacher = _load_teacher(student, tokenizer, arguments)
        with show_progress(settings.name) as progress:
            records = evaluate(
                student,
                tokenizer,
                problems,
                reward,
                settings=settings,
                records_path=records_path,
                teacher=teacher,
                engine=_engine(student, arguments) if arguments.backend == "vllm" else None,
                scoring_batch_size=arguments.scoring_batch_size,
                progress=progress,
            )
    except Timeout:
        raise ValueError(
            f"Another evaluation is writing to {records_path.parent}: wait for it, or take another --output_dir."
        ) from None
    except (DatasetsError, TeacherServerError) as error:
        raise ValueError(str(error)) from error
    return settings, records


def load_task(arguments: argparse.Namespace) -> Any:
    """Module of the task, or an error that lists those there are."""
    from importlib import import_module
    from pkgutil import iter_modules

    if arguments.task is None and arguments.dataset is None:
        raise ValueError("--task or --dataset is needed: the problems.")
    name = arguments.task or "table"
    names = [module.name for module in iter_modules(import_module("trl_cmdp.tasks").__path__)]
    names = [module for module in names if not module.startswith("_")]
    if name not in names:
        raise ValueError(f"There is no task {name!r}; there are {', '.join(names)}.")
    return import_module(f"trl_cmdp.tasks.{name}")


def load_student(
    arguments: argparse.Namespace, trainable: bool = False
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Student, a model or an adapter on its base, and its tokenizer. An adapter is frozen unless it is `trainable`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(arguments.student)
    source = arguments.student
    # `None`, the default of transformers, asks on the terminal whether to run remote code.
    options = {"dtype": arguments.dtype, "trust_remote_code": False, "use_safetensors": True}
    if (folder / "adapter_config.json").exists():
        if arguments.backend == "vllm":
            raise ValueError(
                "vLLM takes whole models: merge the adapter (`merge_and_unload`), save it, and name that."
            )
        from peft import AutoPeftModelForCausalLM  # an optional dependency

        student = AutoPeftModelForCausalLM.from_pretrained(arguments.student, is_trainable=trainable, **options)
        if not (folder / "tokenizer_config.json").exists():
            source = student.peft_config[student.active_adapter].base_model_name_or_path
    else:
        student = AutoModelForCausalLM.from_pretrained(arguments.student, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return student.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_problems(task: Any, tokenizer: "PreTrainedTokenizerBase", arguments: argparse.Namespace) -> "Dataset":
    """Problems of the task, as many and of the split that the arguments say."""
    options: dict[str, Any] = {"path": arguments.dataset}
    for name in ("prompt_column", "answer_column", "difficulty_column"):
        options[name] = getattr(arguments, name)
    options["conversational"] = True if tokenizer.chat_template is not None else None
    options = {name: value for name, value in options.items() if value is not None}
    try:
        return task.load_problems(arguments.num_problems, arguments.split, arguments.seed, **options)
    except TypeError as error:  # an option that this task does not have, or one that it needs
        raise ValueError(f"The task {_short_name(task)}: {error}") from error


def _settings(task: Any, num_problems: int, arguments: argparse.Namespace) -> "EvaluationSettings":
    from ..evaluation import EvaluationSettings
    from ..evaluation.provenance import weights_fingerprint

    adapter = f"{arguments.student}, adapter {arguments.teacher_adapter_name}"
    teacher = arguments.teacher or arguments.teacher_model_server_url
    return EvaluationSettings(
        name=_student_name(arguments),
        student=arguments.student,
        student_fingerprint=weights_fingerprint(arguments.student),
        teacher=adapter if arguments.teacher_adapter_name else teacher,
        task=arguments.dataset or _short_name(task),
        split=arguments.split,
        num_problems=num_problems,
        num_samples=arguments.num_samples,
        greedy=arguments.greedy,
        seed=arguments.seed,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens or task.MAX_COMPLETION_LENGTH,
        batch_size=arguments.batch_size,
        backend=arguments.backend,
        teacher_beta=arguments.teacher_beta,
        cost_limit=COST_LIMIT if arguments.cost_limit is None else arguments.cost_limit,
        cost_scope=COST_SCOPE if arguments.cost_scope is None else arguments.cost_scope,
    )


def _load_teacher(
    student: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", arguments: argparse.Namespace
) -> Any:
    from ..teachers import AdapterTeacher, RemoteTeacher, base_model, check_vocabulary, load_teacher

    if arguments.teacher_adapter_name:
        if arguments.teacher or arguments.teacher_model_server_url:
            raise ValueError("--teacher_adapter_name is a teacher by itself: leave the other one out.")
        from accelerate import Accelerator

        return AdapterTeacher(student, Accelerator(), arguments.teacher_adapter_name)
    if arguments.teacher_model_server_url:
        key = os.environ.get(TEACHER_KEY_VARIABLE)
        teacher: Any = RemoteTeacher(arguments.teacher_model_server_url, key, model=arguments.teacher)
    elif arguments.teacher:
        teacher = load_teacher(arguments.teacher, init_kwargs={"dtype": arguments.dtype}).to(student.device)
    else:
        return None
    check_vocabulary(base_model(student), tokenizer, teacher.config)
    return teacher


def _reward(task: Any, arguments: argparse.Namespace) -> Any:
    if arguments.reward is None:
        return task.final_answer_reward
    from ._train import load_reward

    return load_reward(arguments.reward)


def _engine(student: "PreTrainedModel", arguments: argparse.Namespace) -> Any:
    from ..evaluation.vllm import load_engine

    return load_engine(
        arguments.student,
        dtype=str(student.dtype).removeprefix("torch."),
        gpu_memory_utilization=arguments.vllm_gpu_memory_utilization,
    )


def _short_name(task: Any) -> str:
    return task.__name__.rpartition(".")[2]


def _student_name(arguments: argparse.Namespace) -> str:
    return arguments.name or Path(arguments.student).name
