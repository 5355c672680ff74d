"""What the training commands share: arguments and YAML as in `trl grpo`, and several processes through accelerate."""

import json
import os
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import transformers
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import constants
from jinja2 import TemplateError
from packaging.version import Version
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import (
    DatasetMixtureConfig,
    GRPOConfig,
    ModelConfig,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts.grpo import GRPOScriptArguments

from .._files import check_yaml
from .._messages import message, say, shell_command
from ..reports import plot_training_curves
from ..tasks.table import load_splits
from ..teachers import TeacherServerError
from ..trainers.engine.config import DistillConfig
from ..trainers.engine.distill_trainer import DistillTrainer
from ..trainers.telemetry.card import CURVES_FILE
from ..trainers.telemetry.hub import describe_error
from ..trainers.telemetry.live_state import LiveState
from ._arguments import Mistake, mistakes, mistakes_of, models_named, refusals
from ._dry_run import dry_run, nothing_kept
from ._evaluation import teacher_server_key
from ._progress import TrainingProgress
from ._results import show_markdown
from ._run_summary import closing, opening
from ._tasks import load_problems, load_reward, load_task
from ._training_arguments import LAUNCHED, check_has_teacher, without_dashes


# Environment variable with the arguments as they were typed, of which these processes see only a part.
_TYPED = "TRL_CMDP_TYPED_ARGUMENTS"


@dataclass
class DistillScriptArguments(GRPOScriptArguments):
    """Script arguments of the training commands: those of `trl grpo`, the task and the teacher."""

    task: str | None = field(
        default=None,
        metadata={
            "help": "Module of `trl_cmdp.tasks` that gives the problems and, unless `reward_funcs` are named, the "
            "reward: gsm8k, math, gsm_symbolic, table. `dataset_name` is then where it reads them from, its own source "
            "by default, and the train and test splits are the task's."
        },
    )
    task_problems: int | None = field(
        default=None,
        metadata={"help": "Problems of each split of the task that is used, drawn by `seed`, all of them by default."},
    )
    task_conversational: bool = field(
        default=False,
        metadata={"help": "Prompts of the task as messages, for a student with a chat template."},
    )
    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "Path or hub id of the teacher. With `teacher_model_server_url`, of the checkpoint that the server "
            "runs."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Load data and models, train one step, say what it found, and throw it away: nothing is saved, logged "
            "or pushed."
        },
    )


class TrainingParser(TrlParser):
    """[`~trl.TrlParser`] with its help grouped by topic. It raises mistakes, where `argparse` prints all options."""

    def __init__(self, command: str, config_class: type[DistillConfig]):
        # Ours come last, where a terminal leaves off.
        types = (DistillScriptArguments, ModelConfig, DatasetMixtureConfig, config_class)
        titles = ("script and dataset", "model", "dataset mixture (YAML)", "distillation")
        self._titles = {
            option.name: title for owner, title in zip(types, titles, strict=True) for option in fields(owner)
        }
        self._titles |= {option.name: "training (GRPOConfig)" for option in fields(GRPOConfig)}
        self._groups: dict[str, Any] = {}
        super().__init__(
            types,
            prog=f"trl-cmdp {command}",
            usage=f"trl-cmdp {command} [--config FILE.yaml] [--accelerate_config NAME] [options]",
            epilog="Any option of `accelerate launch` (--num_processes 4), or --accelerate_config with single_gpu, "
            "multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3 or a path, starts the processes through accelerate.",
            allow_abbrev=False,
        )

    def add_argument(self, *names: str, **kwargs: Any) -> Any:
        title = self._titles.get(kwargs.get("dest") or names[0].lstrip("-"))
        if title is None:  # --help
            return super().add_argument(*names, **kwargs)
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title].add_argument(*names, **kwargs)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        return super().set_defaults_with_config(**without_dashes(kwargs))

    def error(self, message: str):
        raise ValueError(message)


def run_training(command: str, trainer_class: type[DistillTrainer], arguments: list[str]) -> int:
    """
    Run a training command, given what follows it. Returns 0, or 1 if the trained model could not be pushed.

    Raises:
        Mistake: For what is found before training begins, and for a model that could not be saved. Errors of the training
            itself are raised as they are.
    """
    launched = arguments[:1] == [LAUNCHED]
    if launched:
        arguments = arguments[1:]
    typed = json.loads(os.environ[_TYPED]) if launched and _TYPED in os.environ else arguments
    with _mistakes():
        *parsed, of_config, of_command_line = _parse(command, trainer_class._config_class, arguments)
        check_has_teacher(vars(parsed[0]) | vars(parsed[-1]))
        # Several GPUs take one process each, as in `trl grpo`: in one, transformers would use `nn.DataParallel`.
        if of_command_line or (not launched and (of_config or parsed[-1].n_gpu > 1)):
            _launch(command, of_config, of_command_line, arguments)
            return 0
    script_args, model_args, _, training_args = parsed
    models = {"model_name_or_path": model_args.model_name_or_path, "teacher_model": script_args.teacher_model}
    with nothing_kept(training_args) if script_args.dry_run else nullcontext():
        with _mistakes(), models_named(**models, reward_model_name_or_path=script_args.reward_model_name_or_path):
            trainer = _make_trainer(trainer_class, *parsed)
        if trainer.accelerator.is_main_process:
            show_markdown(opening(trainer, script_args, model_args))
        if script_args.dry_run:
            return dry_run(trainer)
    trainer.command = ["trl-cmdp", command, *typed]
    trainer.how_to_resume = _resuming(trainer.command)
    return _train(trainer, script_args)


def _mistakes() -> AbstractContextManager[None]:
    return mistakes(NotImplementedError, DatasetsError, TeacherServerError, yaml.YAMLError)


def _parse(command: str, config_class: type[DistillConfig], arguments: list[str]) -> tuple[Any, ...]:
    """Script, model, dataset and training arguments, and what is none of them, of the file and of the command line."""
    try:
        return TrainingParser(command, config_class).parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except TypeError as error:  # YAML of another type than the field
        raise ValueError(str(error)) from error


def _resuming(command: list[str]) -> str:
    """The command that continues the run of a training command."""
    words, kept = iter(command), []
    for word in words:
        option, equals, _ = word.partition("=")
        if option == "--resume_from_checkpoint":
            if not equals:
                next(words, None)
        else:
            kept.append(word)
    return shell_command([*kept, "--resume_from_checkpoint", "true"])


def _check_accelerate_files(arguments: list[str]) -> None:
    """Check the YAML files of accelerate that arguments name, before it reads them."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for option, path in pairwise(words):
        if option in ("--accelerate_config", "--config_file") and Path(path).is_file():
            with mistakes_of(path):
                check_yaml(path)


def _launch(command: str, of_config: list[str], of_command_line: list[str], arguments: list[str]) -> None:
    """Run the command in the processes that accelerate starts."""
    _check_accelerate_files(of_config + of_command_line)
    launch_args = resolve_accelerate_config_argument(of_config + of_command_line)
    left_over = iter([*of_command_line, None])  # in the order of `arguments`
    current = next(left_over)
    own = []
    for argument in arguments:
        if argument == current:
            current = next(left_over)
        else:
            own.append(argument)
    # Quiet: the process has said what was wrong.
    options = ["--quiet", "--module", *launch_args]
    args, unknown = launch_command_parser().parse_known_args([*options, "trl_cmdp", command, LAUNCHED, *own])
    if args.training_script != "trl_cmdp":  # something before it was taken for the script
        unknown.append(args.training_script)
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
    os.environ[_TYPED] = json.dumps(arguments)  # for the model card
    # Ctrl-C reaches the processes themselves, which save a checkpoint. torch's launcher would pass it on once more, and
    # leave them half a minute.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGHUP,SIGQUIT")
    stopped: list[bool] = []
    previous = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    try:
        launch_command(args)
    except (Exception, SystemExit) as error:
        if stopped:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


def _make_trainer(
    trainer_class: type[DistillTrainer],
    script_args: DistillScriptArguments,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    training_args: DistillConfig,
) -> DistillTrainer:
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is needed: the student.")
    checkpoint = training_args.resume_from_checkpoint
    checkpoint = {"true": True, "false": None}.get(
        str(checkpoint).lower(), checkpoint
    )  # on the command line it is text
    training_args.resume_from_checkpoint = checkpoint
    if isinstance(checkpoint, str) and not Path(checkpoint).is_dir():
        raise ValueError(f"--resume_from_checkpoint: there is no folder {checkpoint!r}.")
    if training_args.teacher_model_server_url and training_args.teacher_model_server_api_key is None:
        training_args.teacher_model_server_api_key = teacher_server_key()
    reward_funcs: list[Any] = [load_reward(name) for name in script_args.reward_funcs or []]
    if script_args.reward_model_name_or_path:
        reward_funcs.insert(0, script_args.reward_model_name_or_path)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "use_safetensors": True,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    if script_args.task:
        task = load_task(script_args.task)
        reward_funcs = reward_funcs or [task.final_answer_reward]
        asked = {"path": script_args.dataset_name, "conversational": script_args.task_conversational}
        options = {name: value for name, value in asked.items() if value}
        draw = partial(load_problems, task, script_args.task_problems, seed=training_args.seed, **options)
        dataset = {split: draw(split) for split in splits}
    else:
        dataset = _load_dataset(script_args, dataset_args)
    for split in splits:
        if split not in dataset:
            raise ValueError(f"The dataset has no split {split!r}, it has {', '.join(map(repr, dataset))}.")
    return trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs or None,
        args=training_args,
        train_dataset=dataset[splits[0]],
        eval_dataset=dataset[splits[1]] if len(splits) > 1 else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        teacher_model=script_args.teacher_model,
    )


def _load_dataset(script_args: DistillScriptArguments, dataset_args: DatasetMixtureConfig) -> Any:
    if dataset_args.datasets:
        try:
            return get_dataset(dataset_args)
        except (DatasetGenerationError, StopIteration) as error:  # which hide what they are about
            cause = error.__cause__ or "a file is empty."
            raise ValueError(f"The `datasets` of the YAML file cannot be read: {cause}") from error
    if not script_args.dataset_name:
        raise ValueError("Either --dataset_name, or `datasets` in the YAML file, is needed.")
    return load_splits(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)


class CurvesOnPush(TrainerCallback):
    """Draws the training curves beside the model card, which shows them from then on, before anything is pushed."""

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        logged = any(entry.get("reward") is not None for entry in state.log_history)
        if state.is_world_process_zero and logged:
            plot_training_curves(state.log_history, Path(args.output_dir, CURVES_FILE), Path(args.output_dir).name)


def _train(trainer: DistillTrainer, script_args: DistillScriptArguments) -> int:
    args, progress, start = trainer.args, TrainingProgress(), time.monotonic()
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
    trainer.add_callback(LiveState())
    if args.push_to_hub:
        trainer.add_callback(CurvesOnPush())
    try:
        with refusals():
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except TemplateError as error:  # of the student's chat template, which is not this program's
        raise Mistake(f"The chat template cannot render a prompt: {type(error).__name__}: {error}.") from error
    finally:
        progress.stop()
    with mistakes(RuntimeError):
        trainer.save_model(args.output_dir, _internal_call=True)  # not pushed yet
    trainer.accelerator.print(message(f"\nModel saved to {args.output_dir}."))
    trainer.accelerator.print(message(closing(trainer, script_args, time.monotonic() - start)))
    pushed = _push(trainer, script_args.dataset_name) if args.push_to_hub else True
    # Finish the trackers and destroy the process group, as TRL's scripts do.
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()
    return 0 if pushed else 1


def _push(trainer: DistillTrainer, dataset_name: str | None) -> bool:
    """Push the saved model. A failure is reported, and leaves training done."""
    try:
        trainer.push_to_hub(dataset_name=dataset_name)
    except Exception as error:  # of many kinds, from the Hub's client
        say(
            f"The push to the Hub failed: {describe_error(error)}.\nTraining is done and the model is in "
            f"{trainer.args.output_dir}. Push it later with: hf upload {trainer.hub_model_id} {trainer.args.output_dir} "
            "--exclude 'checkpoint-*' --exclude '_*'",
            error=True,
        )
        return False
    trainer.accelerator.print(f"Model pushed to {constants.ENDPOINT}/{trainer.hub_model_id}.")
    return True
