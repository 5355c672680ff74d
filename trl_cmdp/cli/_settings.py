"""What one would set for a training: the short help of a training command, and the file that `trl-cmdp init` writes."""

import argparse
import textwrap

import yaml

from .._messages import message
from ._options import Option, training_options
from ._parser import Parser


# What the help of a training command shows first, by topic, beside all settings of this package. The rest is behind
# --help_all.
_TOPICS = {
    "student": (
        *("model_name_or_path", "dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha"),
        *("lora_target_modules", "load_in_4bit"),
    ),
    "teacher": ("teacher_model",),
    "limit": ("cost_limit", "cost_scope"),
    "method": (),
    "problems and rewards": (
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "task", "task_problems"),
        *("task_conversational", "reward_funcs", "reward_weights", "reward_model_name_or_path"),
    ),
    "rollouts": (
        *("num_generations", "max_completion_length", "temperature", "chat_template_kwargs", "use_vllm", "vllm_mode"),
    ),
    "training": (
        *("output_dir", "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "gradient_checkpointing", "beta", "seed", "bf16", "use_cpu", "logging_steps"),
        *("log_completions", "report_to", "eval_strategy", "eval_steps", "save_strategy", "save_steps"),
        *("resume_from_checkpoint", "push_to_hub", "dry_run"),
    ),
    "distillation": (),
}
_LIMIT_PREFIXES = ("cost_limit", "auto_limit_", "tolerated_")
# Values of the file that are no defaults, as YAML: what a user has to name.
_EXAMPLES = {
    "model_name_or_path": "Qwen/Qwen2.5-Math-1.5B",
    "teacher_model": "Qwen/Qwen2.5-Math-7B-Instruct",
    "dataset_name": "data/train.jsonl",
    "reward_funcs": "[my_rewards.final_answer]",
    "output_dir": "out",
}
# What these libraries say of them is for those who know them.
_HELP = {
    "model_name_or_path": "The student: a folder or a Hub id.",
    "teacher_model": "The teacher, a folder or a Hub id. Also: teacher_adapter_name, teacher_model_server_url.",
    "dataset_name": "A JSONL, JSON, Parquet or CSV file, a folder of them, or a Hub id. Rows need a column `prompt`, and the "
    "columns that the rewards take.",
    "reward_funcs": "Rewards: dotted paths (my_rewards.final_answer, of my_rewards.py in the working directory), or "
    "accuracy_reward, reasoning_accuracy_reward, think_format_reward, get_soft_overlong_punishment of TRL.",
    "use_peft": "Train a LoRA adapter, not all weights.",
    "num_generations": "Rollouts of each prompt, which are compared with each other.",
    "per_device_train_batch_size": "Rollouts (not prompts) at a time on each device: a multiple of num_generations, with "
    "gradient_accumulation_steps.",
    "max_completion_length": "Most tokens of a rollout: what is longer is cut.",
    "output_dir": "Folder of the checkpoints and of the trained student.",
}
# What the file shows with its default, commented out.
_SHOWN = {
    *(
        "dtype",
        "use_peft",
        "lora_r",
        "load_in_4bit",
        "teacher_eos_token",
        "cost_limit",
        "cost_scope",
        "cost_limit_schedule",
    ),
    *("auto_limit_steps", "violation_distill_coef", "unrewarded_distill_coef", "credit_assignment", "multiplier"),
    *("multiplier_init", "lmbda"),
    *("seq_kd", "teacher_mixed_alpha", "dataset_train_split", "task", "reward_weights", "num_generations"),
    *("max_completion_length", "temperature", "chat_template_kwargs", "use_vllm", "learning_rate", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "bf16", "use_cpu"),
    *("logging_steps", "report_to", "save_steps", "eval_strategy", "eval_steps"),
}
_WIDTH = 119
_FIRST_SENTENCES = 160  # characters of an option's help that the file shows


def topics(command: str) -> dict[str, list[Option]]:
    """The options that matter most to a training command, by topic."""
    options = training_options(command)
    named = {title: [options[name] for name in names] for title, names in _TOPICS.items()}
    shown = {name for names in _TOPICS.values() for name in names}
    for option in options.values():
        if option.owner and option.name not in shown:
            named[_topic(option)].append(option)
    return {title: found for title, found in named.items() if found}


def _topic(option: Option) -> str:
    if option.name.startswith(_LIMIT_PREFIXES):
        return "limit"
    if option.name.startswith("teacher_") and option.owner == "DistillConfig":
        return "teacher"
    return "distillation" if option.owner in ("DistillConfig", "DistillScriptArguments") else "method"


def print_short_help(command: str, description: str) -> None:
    """Print the options that matter most to a training command."""
    parser = Parser(
        prog=f"trl-cmdp {command}",
        usage=f"trl-cmdp {command} [--config FILE.yaml] [options]",
        description=f"{description[0].upper()}{description[1:]}. Options are written with underscores or dashes, on the "
        "command line or in a YAML file (`trl-cmdp init` writes one).",
        epilog="Any option of `accelerate launch` (--num_processes 4), or --accelerate_config with single_gpu, multi_gpu, "
        "fsdp1, fsdp2, zero1, zero2, zero3 or a path, starts the processes through accelerate.",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=_WIDTH),
    )
    for title, options in topics(command).items():
        group = parser.add_argument_group(title)
        for option in options:
            text = _HELP.get(option.name, option.help).replace("%%", "%").replace("%", "%%") + _default(option)
            group.add_argument(f"--{option.name}", metavar=_metavar(option), nargs=option.nargs, help=text)
    others = parser.add_argument_group("help")
    others.add_argument("--help_all", action="store_true", help="every option, TRL's and transformers' own too")
    parser.print_help()


def _metavar(option: Option) -> str:
    if option.kind == "choice":
        return "{" + ",".join(option.choices) + "}"
    return {"int": "N", "float": "X", "bool": "BOOL"}.get(option.kind, "VALUE")


def _default(option: Option) -> str:
    return "" if option.default in (None, "") else f" (default: {option.default})"


def settings_file(command: str) -> str:
    """A YAML file of what one would set for a training command, commented."""
    lines = [
        f"# Settings of `trl-cmdp {command} --config FILE`. What is commented out is shown with its default.",
        f"# More: `trl-cmdp {command} --help`; everything: --help_all. Before a long run: --dry_run.",
    ]
    for title, options in topics(command).items():
        shown = [option for option in options if option.name in _EXAMPLES or option.name in _SHOWN]
        lines += ["", f"# --- {title[0].upper()}{title[1:]}"] if shown else []
        for option in shown:
            comment = _HELP.get(option.name) or _first_sentences(option.help)
            lines += ["", *textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="# "), _line(option)]
    return message("\n".join(lines)) + "\n"


def _first_sentences(text: str) -> str:
    shown = ""
    for sentence in text.rstrip(".").split(". "):
        if shown and len(shown) + len(sentence) > _FIRST_SENTENCES:
            break
        shown += f"{sentence}. "
    return shown.strip()


def _line(option: Option) -> str:
    if option.name in _EXAMPLES:
        return f"{option.name}: {_EXAMPLES[option.name]}"
    return (
        f"# {option.name}:" if option.default is None else f"# {yaml.safe_dump({option.name: option.default}).strip()}"
    )
