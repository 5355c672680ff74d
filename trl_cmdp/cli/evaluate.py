"""`trl-cmdp evaluate`: roll a student out on a task, and tell how right and how far from its teacher it is."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import positive_float, positive_int
from ._judge import add_judge_arguments, check_judge_arguments, judge_evaluations, win_rate_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation import EvaluationSettings, RolloutRecord

COST_LIMIT, COST_SCOPE = 0.35, "mean"
RECORDS_FILE = "records.jsonl"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a student against its teacher on a task, or compare evaluations",
        description="Roll a student out on the problems of a task, and write records.jsonl, summary.json and table.md: "
        "right final answers, satisfaction of the limit, costs, divergence and length, each with its interval. The "
        "same command goes on where it stopped. With --records, compute everything again from records, without a "
        "model, and the differences to the first of them.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--student", metavar="PATH_OR_ID", help="model, or folder of a LoRA adapter")
    what.add_argument("--records", nargs="+", type=Path, metavar="FILE", help="records of finished evaluations")
    parser.add_argument(
        "--output_dir", type=Path, help="where files are written (default: outputs/evaluate-TASK-NAME)"
    )
    parser.add_argument("--cost_limit", type=positive_float, help=f"limit (default: {COST_LIMIT}, or the records')")
    parser.add_argument(
        "--cost_scope",
        choices=["mean", "sum", "worst_prefix"],
        help=f"cost of a rollout (default: {COST_SCOPE}, or the records')",
    )

    models = parser.add_argument_group("models")
    models.add_argument("--name", help="the student's name in tables (default: its folder's)")
    models.add_argument(
        "--teacher", metavar="PATH_OR_ID", help="teacher; with --teacher_model_server_url its checkpoint"
    )
    models.add_argument("--teacher_adapter_name", metavar="NAME", help="'base': the student's base is its teacher")
    models.add_argument("--teacher_model_server_url", metavar="URL", help="exact vLLM server that runs the teacher")
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
    rollouts.add_argument("--greedy", action="store_true", help="a greedy rollout of each problem too")
    rollouts.add_argument("--temperature", type=positive_float, default=1.0, help="temperature (default: 1)")
    rollouts.add_argument("--max_new_tokens", type=positive_int, help="longest completion (default: the task's)")
    rollouts.add_argument("--seed", type=int, default=0, help="seed of the problems and the samples (default: 0)")
    rollouts.add_argument("--batch_size", type=positive_int, default=32, help="rollouts at a time (default: 32)")
    rollouts.add_argument("--scoring_batch_size", type=positive_int, default=32, help="the same when scored")
    rollouts.add_argument("--backend", choices=["transformers", "vllm"], default="transformers", help="what generates")
    rollouts.add_argument("--vllm_gpu_memory_utilization", type=positive_float, default=0.3, help="share for vLLM")
    add_judge_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns 0, 2 for a mistake in what was asked for, 130 if stopped."""
    try:
        check_judge_arguments(arguments)
        if arguments.records:
            evaluations = [_read(path) for path in arguments.records]
            _report(evaluations, arguments, arguments.output_dir)
            return 0
        return _evaluate_and_report(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"trl-cmdp evaluate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. What is recorded stays: the same command goes on from there.", file=sys.stderr)
        return 130


def _read(path: Path) -> "tuple[EvaluationSettings, list[RolloutRecord]]":
    from ..evaluation import read_rollout_records

    try:
        return read_rollout_records(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _report(
    evaluations: "Sequence[tuple[EvaluationSettings, list[RolloutRecord]]]",
    arguments: argparse.Namespace,
    output_dir: Path | None,
) -> None:
    """Print the tables, and write them where there is a folder."""
    from ..evaluation import compare_evaluations, summarize
    from ..reports.evaluation_table import difference_table, evaluation_table, strata_table

    asked = {"cost_limit": arguments.cost_limit, "cost_scope": arguments.cost_scope}
    summaries = [summarize(*evaluation, **asked) for evaluation in evaluations]
    if len({(summary.cost_limit, summary.cost_scope) for summary in summaries}) > 1:
        raise ValueError("The records have more than one limit or scope: give --cost_limit and --cost_scope.")
    differences = [
        compare_evaluations(evaluation, evaluations[0], greedy=greedy, **asked)
        for greedy in (False, True)
        for evaluation, summary in zip(evaluations[1:], summaries[1:], strict=True)
        # Both have rollouts of the kind.
        if None not in ((one.greedy if greedy else one.sampled) for one in (summaries[0], summary))
    ]
    win_rates = judge_evaluations(evaluations, arguments, output_dir) if arguments.judge else []
    parts = [evaluation_table(summaries), strata_table(summaries), difference_table(differences)]
    parts.append(win_rate_table(win_rates))
    table = "\n".join(part for part in parts if part)
    print(f"\n{table}")
    if output_dir is None:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    summary = {"evaluations": list(map(asdict, summaries)), "differences": list(map(asdict, differences))}
    if win_rates:
        summary["win_rates"] = win_rates
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    (output_dir / "table.md").write_text(table, encoding="utf-8")
    print(f"summary.json and table.md are in {output_dir}/.")


def _evaluate_and_report(arguments: argparse.Namespace) -> int:
    # Imported here: neither `trl-cmdp --help` nor --records should wait for transformers.
    from datasets.exceptions import DatasetsError
    from filelock import Timeout

    from ..evaluation import evaluate
    from ..evaluation.progress import show_progress
    from ..teachers import TeacherServerError

    try:
        task = _task(arguments)
        reward = _reward(task, arguments)
        student, tokenizer = _load_student(arguments)
        problems = _load_problems(task, tokenizer, arguments)
        settings = _settings(task, len(problems), arguments)
        teacher = _load_teacher(student, tokenizer, arguments)
        output_dir = arguments.output_dir or Path("outputs") / f"evaluate-{Path(settings.task).stem}-{settings.name}"
        with show_progress(settings.name) as progress:
            records = evaluate(
                student,
                tokenizer,
                problems,
                reward,
                settings=settings,
                records_path=output_dir / RECORDS_FILE,
                teacher=teacher,
                engine=_engine(student, arguments) if arguments.backend == "vllm" else None,
                scoring_batch_size=arguments.scoring_batch_size,
                progress=progress,
            )
    except Timeout:
        raise ValueError(
            f"Another evaluation is writing to {output_dir}: wait for it, or take another --output_dir."
        ) from None
    except (DatasetsError, TeacherServerError) as error:
        raise ValueError(str(error)) from error
    _report([(settings, records)], arguments, output_dir)
    return 0


def _task(arguments: argparse.Namespace) -> Any:
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


def _load_student(arguments: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(arguments.student)
    source = arguments.student
    if (folder / "adapter_config.json").exists():
        if arguments.backend == "vllm":
            raise ValueError(
                "vLLM takes whole models: merge the adapter (`merge_and_unload`), save it, and name that."
            )
        from peft import AutoPeftModelForCausalLM  # an optional dependency

        student = AutoPeftModelForCausalLM.from_pretrained(arguments.student, dtype=arguments.dtype)
        if not (folder / "tokenizer_config.json").exists():
            source = student.peft_config[student.active_adapter].base_model_name_or_path
    else:
        student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return student.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _load_problems(task: Any, tokenizer: "PreTrainedTokenizerBase", arguments: argparse.Namespace) -> "Dataset":
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
    from ..evaluation.provenance import git_state, library_versions, weights_fingerprint

    adapter = f"{arguments.student}, adapter {arguments.teacher_adapter_name}"
    teacher = arguments.teacher or arguments.teacher_model_server_url
    return EvaluationSettings(
        name=arguments.name or Path(arguments.student).name,
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
        versions=library_versions(),
        git_commit=git_state()[0],
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
        teacher: Any = RemoteTeacher(arguments.teacher_model_server_url, model=arguments.teacher)
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
