"""What `evaluate` and `calibrate` share: their arguments, what they load, and a student rolled out with its records."""

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .._defaults import COST_SCOPE, TEACHER_KEY_VARIABLE, CostScope
from .._messages import hide_secrets, without_secrets
from ._arguments import (
    data_source,
    existing_file,
    json_object,
    mistakes,
    model_source,
    models_named,
    positive_float,
    positive_int,
    text_of_file,
    true_or_false,
    writable_folder,
)
from ._images import ADAPTER_FILE, fingerprint_of_problems, load_adapter, load_processor, tokenizer_source
from ._tasks import known_reward, known_task, load_problems, load_problems_up_to, load_reward, load_task, task_name


if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation import EvaluationSettings, RolloutRecord

NUM_PROBLEMS = 200


def teacher_server_key() -> str | None:
    """Key of the teacher's server, from the environment; `None` without one. It goes where the command sends it alone."""
    return os.environ.get(TEACHER_KEY_VARIABLE) or None


def add_evaluation_arguments(parser: argparse.ArgumentParser, records_help: str) -> "argparse._ArgumentGroup":
    """Add student or records, models, problems and rollouts to a command. Returns the group of the rollouts."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--student", type=model_source, metavar="PATH_OR_ID", help="model, or folder of a LoRA adapter")
    what.add_argument("--records", nargs="+", type=Path, metavar="FILE", help=records_help)
    parser.add_argument(
        "--output_dir", type=writable_folder, help="where files are written (default: outputs/COMMAND-TASK-NAME)"
    )
    parser.add_argument(
        "--cost_scope",
        choices=get_args(CostScope),
        help=f"cost of a rollout (default: {COST_SCOPE}, or the records')",
    )

    models = parser.add_argument_group("models")
    models.add_argument("--name", help="the student's name in tables (default: its folder's)")
    models.add_argument(
        "--teacher",
        type=model_source,
        metavar="PATH_OR_ID",
        help="teacher; with --teacher_model_server_url its checkpoint",
    )
    models.add_argument("--teacher_model_revision", metavar="NAME", help="revision of the teacher on the Hub")
    models.add_argument("--teacher_adapter_name", metavar="NAME", help="'base': the student's base is its teacher")
    models.add_argument(
        "--teacher_model_server_url",
        metavar="URL",
        help=f"exact vLLM server that runs the teacher (its key: ${TEACHER_KEY_VARIABLE})",
    )
    models.add_argument("--teacher_beta", type=float, help="divergence: 1 reverse KL (default), 0 forward KL")
    models.add_argument(
        "--teacher_eos_token", metavar="TOKEN", help="what the teacher ends a turn with, if not the EOS"
    )
    models.add_argument("--dtype", default="auto", help="dtype of the models, such as bfloat16 (default: their own)")

    problems = parser.add_argument_group("problems")
    problems.add_argument(
        "--task", type=known_task, metavar="NAME", help="task, a module of trl_cmdp.tasks (default: table)"
    )
    problems.add_argument(
        "--dataset", type=data_source, metavar="FILE_OR_ID", help="where the task reads its problems from"
    )
    problems.add_argument("--prompt_column", help="column of prompts (table)")
    problems.add_argument("--answer_column", help="column of correct final answers (table)")
    problems.add_argument("--difficulty_column", help="column by which results are split (table)")
    problems.add_argument(
        "--reward", type=known_reward, metavar="DOTTED_PATH", help="reward: 1 where correct (default: the task's)"
    )
    problems.add_argument("--split", help="split (default: test, of a single file its rows)")
    problems.add_argument(
        "--num_problems", type=positive_int, help=f"problems (default: {NUM_PROBLEMS}, or as many as there are)"
    )
    problems.add_argument(
        "--conversational",
        type=true_or_false,
        metavar="true|false",
        help="prompts as messages (default: as the student was trained, else where it has a chat template)",
    )

    rollouts = parser.add_argument_group("rollouts")
    rollouts.add_argument("--num_samples", type=int, default=1, help="samples of each problem (default: 1)")
    rollouts.add_argument("--temperature", type=positive_float, help="temperature (default: 1)")
    rollouts.add_argument("--max_new_tokens", type=positive_int, help="longest completion (default: the task's)")
    rollouts.add_argument(
        "--chat_template",
        type=text_of_file,
        metavar="FILE",
        help="Jinja file of the chat template (default: the student's own)",
    )
    rollouts.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        metavar="JSON",
        help="further arguments of the chat template, those of the training: '{\"enable_thinking\": false}'",
    )
    rollouts.add_argument("--seed", type=int, default=0, help="seed of the problems and the samples (default: 0)")
    rollouts.add_argument("--batch_size", type=positive_int, default=32, help="rollouts at a time (default: 32)")
    rollouts.add_argument("--scoring_batch_size", type=positive_int, default=32, help="the same when scored")
    rollouts.add_argument("--backend", choices=["transformers", "vllm"], default="transformers", help="what generates")
    rollouts.add_argument("--vllm_gpu_memory_utilization", type=positive_float, default=0.3, help="share for vLLM")
    return rollouts


def output_folder(command: str, arguments: argparse.Namespace) -> Path:
    """The folder asked for, or one named by the command, the task and the student."""
    task = Path(hide_secrets(arguments.dataset or arguments.task or "")).stem
    name = Path(_student_name(arguments)).name  # a name is text, and no way out of the folder
    return arguments.output_dir or Path("outputs") / f"{command}-{task}-{name}"


def replace_arguments(arguments: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """A copy of the arguments with some of them changed."""
    return argparse.Namespace(**{**vars(arguments), **changes})


def read_evaluation(path: Path) -> "tuple[EvaluationSettings, list[RolloutRecord]]":
    """Records of an evaluation, or an error that names their file."""
    existing_file(str(path))
    from ..evaluation import read_rollout_records

    with mistakes():
        try:
            return read_rollout_records(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def roll_out(arguments: argparse.Namespace, records_path: Path) -> "tuple[EvaluationSettings, list[RolloutRecord]]":
    """Roll the student out as the arguments say, or resume from its records."""
    # Imported here: neither `trl-cmdp --help` nor --records should wait for transformers.
    from datasets.exceptions import DatasetsError
    from filelock import Timeout

    from .._prompts import where_images
    from ..evaluation import evaluate
    from ..evaluation.progress import show_progress
    from ..teachers import TeacherServerError

    models = models_named(student=arguments.student, teacher=arguments.teacher)
    with mistakes(DatasetsError, TeacherServerError), models:
        task = task_of(arguments)
        reward = task.final_answer_reward if arguments.reward is None else load_reward(arguments.reward)
        tokenizer = load_tokenizer(arguments)
        problems = problems_of(task, tokenizer, arguments)
        has_images = where_images(problems, "the dataset of problems") is not None
        processing_class: Any = tokenizer
        if has_images:
            processing_class = load_processor(arguments.student, tokenizer, arguments.chat_template)
        student = load_student(arguments, with_images=has_images)
        teacher = _load_teacher(student, tokenizer, arguments, has_images)
        found = _fingerprints(student, tokenizer, problems, reward, teacher, arguments)
        settings = _settings(task, len(problems), found, arguments)
        with show_progress(settings.name) as progress:
            try:
                records = evaluate(
                    student,
                    processing_class,
                    problems,
                    _with_own_errors(reward),
                    settings=settings,
                    records_path=records_path,
                    teacher=teacher,
                    engine=_engine(student, arguments) if arguments.backend == "vllm" else None,
                    scoring_batch_size=arguments.scoring_batch_size,
                    progress=progress,
                )
            except Timeout as error:
                raise ValueError(
                    f"Another evaluation is writing to {records_path.parent}: wait for it, or take another "
                    "--output_dir."
                ) from error
    return settings, records


def task_of(arguments: argparse.Namespace) -> Any:
    """Module of the task that the arguments name."""
    if arguments.task is None and arguments.dataset is None:
        raise ValueError("--task or --dataset is needed: the problems.")
    return load_task(arguments.task or "table")


def load_tokenizer(arguments: argparse.Namespace) -> "PreTrainedTokenizerBase":
    """Tokenizer of the student, with the chat template that is asked for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(arguments.student), trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.chat_template is not None:
        tokenizer.chat_template = arguments.chat_template
    return tokenizer


def load_student(
    arguments: argparse.Namespace, trainable: bool = False, with_images: bool = False
) -> "PreTrainedModel":
    """
    Student, a model or an adapter on its base. An adapter is frozen unless it is `trainable`. With images a
    vision-language model is loaded whole.
    """
    import torch
    from transformers.utils import logging

    from ..teachers import load_model

    logging.disable_progress_bar()
    # `None`, the default of transformers, asks on the terminal whether to run remote code.
    options = {"dtype": arguments.dtype, "trust_remote_code": False, "use_safetensors": True}
    if (Path(arguments.student) / ADAPTER_FILE).exists():
        if arguments.backend == "vllm":
            raise ValueError(
                "vLLM takes whole models: merge the adapter (`merge_and_unload`), save it, and name that."
            )
        from peft import AutoPeftModelForCausalLM  # an optional dependency

        load = load_adapter if with_images else AutoPeftModelForCausalLM.from_pretrained
        student = load(arguments.student, is_trainable=trainable, **options)
    else:
        student = load_model(arguments.student, with_images, **options)
    return student.to("cuda" if torch.cuda.is_available() else "cpu")


def problems_of(task: Any, tokenizer: "PreTrainedTokenizerBase", arguments: argparse.Namespace) -> "Dataset":
    """Problems of the task, as many and of the split that the arguments say, with prompts that the tokenizer takes."""
    from .._prompts import check_chat_template, check_prompts_of_teacher, where_images

    conversational = arguments.conversational
    if conversational is None:
        conversational = tokenizer.chat_template is not None
    asked = {
        "path": arguments.dataset,
        "prompt_column": arguments.prompt_column,
        "answer_column": arguments.answer_column,
        "difficulty_column": arguments.difficulty_column,
        "conversational": True if conversational else None,
    }
    options = {name: value for name, value in asked.items() if value is not None}
    if arguments.num_problems is None:
        problems = load_problems_up_to(task, NUM_PROBLEMS, arguments.split, arguments.seed, **options)
    else:
        problems = load_problems(task, arguments.num_problems, arguments.split, arguments.seed, **options)
    has_teacher = arguments.teacher or arguments.teacher_model_server_url or arguments.teacher_adapter_name
    if has_teacher and "teacher_prompt" in problems.column_names:
        check_prompts_of_teacher(problems, "the dataset of problems")
    # With images it is the processor's template that counts, and `evaluate` looks at it.
    if isinstance(prompt := problems[0]["prompt"], list) and where_images(problems, "the problems") is None:
        kwargs = arguments.chat_template_kwargs
        check_chat_template(tokenizer, prompt, "the dataset of problems", chat_template_kwargs=kwargs)
    return problems


def _fingerprints(
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: "Dataset",
    reward: "Callable[..., Any]",
    teacher: Any,
    arguments: argparse.Namespace,
) -> dict[str, str | None]:
    """What decides the records beside the arguments themselves: an evaluation of anything else is another one."""
    from transformers import PreTrainedModel

    from ..core.fingerprint import fingerprint_of_weights
    from ..evaluation.provenance import (
        dotted_name,
        source_fingerprint,
        tokenizer_fingerprint,
        weights_fingerprint,
    )

    # The files of an adapter say nothing of its base.
    of_files = weights_fingerprint(arguments.student) if isinstance(student, PreTrainedModel) else None
    if isinstance(teacher, PreTrainedModel):
        of_teacher = fingerprint_of_weights(teacher.named_parameters())
    else:
        of_teacher = None if teacher is None else teacher.fingerprint()
    return {
        "student_fingerprint": of_files or fingerprint_of_weights(student.named_parameters()),
        "teacher_fingerprint": of_teacher,
        "reward": dotted_name(reward),
        "reward_fingerprint": source_fingerprint(reward),
        "problems_fingerprint": fingerprint_of_problems(problems),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "student_dtype": str(student.dtype).removeprefix("torch."),
    }


def _settings(
    task: Any, num_problems: int, fingerprints: dict[str, str | None], arguments: argparse.Namespace
) -> "EvaluationSettings":
    from ..evaluation import EvaluationSettings

    asked = {field.name: vars(arguments).get(field.name) for field in fields(EvaluationSettings)}
    teacher = arguments.teacher or arguments.teacher_model_server_url
    if arguments.teacher_adapter_name:
        teacher = f"{arguments.student}, adapter {arguments.teacher_adapter_name}"
    found = {
        **fingerprints,
        "name": _student_name(arguments),
        "teacher": teacher,
        "task": arguments.dataset or task_name(task),
        "num_problems": num_problems,
        "max_new_tokens": arguments.max_new_tokens or task.MAX_COMPLETION_LENGTH,
    }
    given = {name: value for name, value in (asked | found).items() if value is not None}
    return EvaluationSettings(**without_secrets(given))


def _load_teacher(
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    arguments: argparse.Namespace,
    with_images: bool,
) -> Any:
    from ..evaluation.rollouts import eos_ids
    from ..teachers import (
        AdapterTeacher,
        RemoteTeacher,
        base_model,
        check_vocabulary,
        load_teacher,
        teacher_generation_config,
        warn_of_another_end,
    )

    if arguments.teacher_adapter_name:
        if arguments.teacher or arguments.teacher_model_server_url:
            raise ValueError("--teacher_adapter_name is a teacher by itself: leave the other one out.")
        from accelerate import Accelerator

        return AdapterTeacher(student, Accelerator(), arguments.teacher_adapter_name)
    if arguments.teacher_model_server_url:
        teacher: Any = RemoteTeacher(
            arguments.teacher_model_server_url,
            teacher_server_key(),
            model=arguments.teacher,
            revision=arguments.teacher_model_revision,
        )
        generation_config = teacher_generation_config(teacher.config.name_or_path)
    elif arguments.teacher:
        dtype = {"dtype": arguments.dtype}
        teacher = load_teacher(arguments.teacher, arguments.teacher_model_revision, dtype, with_images)
        teacher = teacher.to(student.device)
        generation_config = teacher.generation_config
    else:
        return None
    teacher_tokenizer = check_vocabulary(base_model(student), tokenizer, teacher.config)
    if arguments.teacher_eos_token is None:
        warn_of_another_end(tokenizer, eos_ids(student, tokenizer), teacher_tokenizer, generation_config)
    return teacher


def _with_own_errors(reward: "Callable[..., Any]") -> "Callable[..., Any]":
    """The reward function, whose errors are its own and no mistakes in what was asked for."""

    def checked(**kwargs: Any) -> Any:
        try:
            return reward(**kwargs)
        except Exception as error:
            raise RuntimeError(f"The reward function raised an error: {error!r}.") from error

    return checked


def _engine(student: "PreTrainedModel", arguments: argparse.Namespace) -> Any:
    from ..evaluation.vllm import load_engine

    return load_engine(
        arguments.student,
        dtype=str(student.dtype).removeprefix("torch."),
        gpu_memory_utilization=arguments.vllm_gpu_memory_utilization,
    )


def _student_name(arguments: argparse.Namespace) -> str:
    return arguments.name or Path(arguments.student).name
