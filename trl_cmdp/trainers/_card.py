"""The model card: what was trained, against which teacher and limit, how well the limit holds, and how to do it again."""

import platform
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, get_token
from transformers import is_wandb_available
from trl import is_conversational
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from ..teachers import AdapterTeacher, LocalTeacher
from ._config import DistillConfig
from ._satisfaction import MeasuredSatisfaction
from ._secrets import shell_command


if TYPE_CHECKING:
    from ._base import DistillTrainer
    from ._teachers import Teacher

# Shown where it lies beside the card.
CURVES_FILE = "training_curves.png"

_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
_PACKAGES = ("trl-cmdp", "trl", "transformers", "torch", "accelerate", "datasets", "tokenizers", "huggingface_hub")
_UNITS = {"mean": "nats per token", "sum": "nats per rollout", "worst_prefix": "nats per token"}
_SCOPES = {"mean": "mean over its tokens", "sum": "sum over its tokens", "worst_prefix": "largest running mean"}
_COSTS = {"log_ratio": "log-ratio of the sampled token", "teacher_nll": "−log μ of the sampled token"}
# docstyle-ignore
CONSTRAINED_CITATION = textwrap.dedent("""\
    @article{zimmer2025rethinking,
        title        = {{Rethinking Large Language Model Distillation: A Constrained Markov Decision Process Perspective}},
        author       = {Matthieu Zimmer and Xiaotong Ji and Tu Nguyen and Haitham Bou Ammar},
        year         = 2025,
        eprint       = {arXiv:2509.22921},
    }""")
# docstyle-ignore
_TRL_CITATION = textwrap.dedent("""\
    @software{vonwerra2020trl,
        title   = {{TRL: Transformers Reinforcement Learning}},
        author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
        license = {Apache-2.0},
        url     = {https://github.com/huggingface/trl},
        year    = {2020}
    }""")


def write_model_card(trainer: "DistillTrainer", dataset_name: str | None, evaluation: Any | None) -> None:
    """
    Write `README.md` into the output folder anew: the metadata that TRL's card there has, and this library's text.

    Args:
        trainer ([`DistillTrainer`]):
            Trainer.
        dataset_name (`str`, *optional*):
            Name of the dataset on the Hub.
        evaluation ([`~trl_cmdp.evaluation.EvaluationSummary`], *optional*):
            Figures of the student on held-out problems.
    """
    args, path = trainer.args, Path(trainer.args.output_dir, "README.md")
    data = ModelCard.load(path).data
    adapter = is_peft_model(trainer.accelerator.unwrap_model(trainer.model))
    if adapter:
        data.library_name = "peft"
    data.pipeline_tag = "text-generation"
    with_teacher = bool(trainer.teachers)
    satisfaction = _measured(trainer) if with_teacher else []
    limit = _limit(trainer) if with_teacher else None
    data.eval_results = [
        *(_evaluation_results(evaluation) if evaluation is not None else []),
        *(_training_result(name, split, value, limit, dataset_name) for name, split, value in satisfaction),
    ] or None
    # Keys of an adapter's own teacher or of a server are in none of this; a token may be in the command.
    known = [args.hub_token, get_token()]
    if isinstance(args, DistillConfig):
        known.append(args.teacher_model_server_api_key)
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        model_name=data.model_name,
        adapter=adapter,
        base_model=data.base_model,
        dataset_name=dataset_name,
        method=trainer._name,
        paper=trainer._paper,
        teachers=[_describe_teacher(name, teacher, trainer) for name, teacher in trainer.teachers.items()],
        cost=_describe_cost(args) if with_teacher else None,
        limit=limit,
        satisfaction=[{"name": name, "text": _describe_satisfaction(value)} for name, _, value in satisfaction],
        step=trainer.state.global_step,
        hub_model_id=trainer.hub_model_id or data.model_name,
        prompt=_example_prompt(trainer),
        max_new_tokens=args.max_completion_length,
        evaluation=None if evaluation is None else _evaluation_table(evaluation),
        curves=CURVES_FILE if Path(args.output_dir, CURVES_FILE).exists() else None,
        badges=_badges(),
        command=shell_command(trainer.command, known) if trainer.command else None,
        versions={"Python": platform.python_version()}
        | {package: version(package) for package in (*_PACKAGES, *(["peft"] if adapter else []))},
        citations=list(dict.fromkeys([CONSTRAINED_CITATION, trainer._paper["citation"], _TRL_CITATION])),
    )
    content = str(card)
    for secret in filter(None, known):
        content = content.replace(secret, "***")
    path.write_text(content, encoding="utf-8")


def _describe_teacher(name: str, teacher: "Teacher", trainer: "DistillTrainer") -> str:
    """A teacher as the card names it. Of a folder on this machine only its last part, of a server not its address."""
    if isinstance(teacher, AdapterTeacher):
        return "the base model itself" if name == "base" else f"adapter `{name}` of the same base model"
    if isinstance(teacher, LocalTeacher):
        config, where = trainer.accelerator.unwrap_model(teacher.module).config, ""
    else:
        config, where = teacher.remote.config, ", on a vLLM server"
    source = get_config_model_id(config)
    if not source:
        text = f"a {config.model_type} model given as an object"
    elif Path(source).exists():
        text = f"`{Path(source).name}` (a local folder)"
    else:
        revision = trainer.args.teacher_model_revision
        revision = f" at revision `{revision}`" if revision else ""
        text = f"[{source}](https://huggingface.co/{source}){revision}"
    prefix = "" if name == "teacher" else f"`{name}`: "
    return prefix + text + where


def _describe_cost(args: DistillConfig) -> str:
    divergence = {1.0: "reverse KL(student‖teacher)", 0.0: "forward KL(teacher‖student)"}.get(
        args.teacher_beta, f"generalised JSD (β = {args.teacher_beta:g})"
    )
    token = _COSTS.get(args.to_dict().get("cost"), f"{divergence} over the full vocabulary")
    return f"{token} at each completion token, at temperature {args.temperature:g}; {_SCOPES[args.cost_scope]}"


def _limit(trainer: "DistillTrainer") -> str:
    """The limit as it was asked for, and where that is no number, the one that was logged last."""
    args = trainer.args
    unit = _UNITS[args.cost_scope]
    if isinstance(args.cost_limit, float | int):
        return f"{args.cost_limit:g} {unit}"
    if isinstance(args.cost_limit, dict):
        return ", ".join(f"{limit:g} for `{name}`" for name, limit in args.cost_limit.items()) + f" ({unit})"
    logged = [entry["constraint/limit"] for entry in trainer.state.log_history if "constraint/limit" in entry]
    return f"{logged[-1]:.4g} {unit}, found from what imitation reaches" if logged else "not found yet"


def _measured(trainer: "DistillTrainer") -> list[tuple[str, str, MeasuredSatisfaction]]:
    """Name, split and value of what was measured, the last evaluation first."""
    measured = []
    if (value := trainer._satisfaction.measured("eval")) is not None:
        measured.append((f"Satisfaction, evaluation at step {value.last_step}", "test", value))
    if (value := trainer._satisfaction.measured("train")) is not None:
        steps = f"{value.logged_steps} logged steps (to step {value.last_step})"
        measured.append((f"Satisfaction, training rollouts of the last {steps}", "train", value))
    return measured


def _describe_satisfaction(value: MeasuredSatisfaction) -> str:
    return (
        f"{100 * value.rate:.1f}% [{100 * value.low:.1f}, {100 * value.high:.1f}] of {value.rollouts} rollouts in "
        f"{value.groups} groups"
    )


def _training_result(
    name: str, split: str, value: MeasuredSatisfaction, limit: str | None, dataset_name: str | None
) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_name or "custom",
        dataset_name=dataset_name or {"train": "training prompts", "test": "evaluation prompts"}[split],
        dataset_split=split,
        metric_type="constraint_satisfaction",
        metric_name=name,
        metric_value=round(value.rate, 4),
        metric_args={
            "limit": limit,
            "interval": [round(value.low, 4), round(value.high, 4)],
            "confidence": 0.95,
            "rollouts": value.rollouts,
        },
    )


def _kinds(evaluation: Any) -> list[tuple[str, Any]]:
    """Rollouts of an evaluation by kind."""
    kinds = [("sampled", evaluation.sampled), ("greedy", evaluation.greedy)]
    return [(name, rollouts) for name, rollouts in kinds if rollouts is not None]


def _evaluation_results(evaluation: Any) -> list[EvalResult]:
    settings, results = evaluation.settings, []
    for kind, rollouts in _kinds(evaluation):
        figures = {"final_answer_accuracy": rollouts.right}
        if rollouts.costs is not None:
            figures["constraint_satisfaction"] = rollouts.costs.satisfaction
        for metric, figure in figures.items():
            details = {
                "rollouts": figure.num_rollouts,
                "interval": [round(figure.low, 4), round(figure.high, 4)],
                "confidence": 0.95,
                "decoding": kind,
            }
            if metric == "constraint_satisfaction":
                details["limit"] = f"{evaluation.cost_limit:g} {_UNITS[evaluation.cost_scope]}"
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=settings.task,
                    dataset_name=settings.task,
                    dataset_split=settings.split,
                    metric_type=metric,
                    metric_name=f"{metric.replace('_', ' ').capitalize()}, {kind}",
                    metric_value=round(figure.value, 4),
                    metric_args=details,
                )
            )
    return results


def _evaluation_table(evaluation: Any) -> dict[str, Any]:
    def number(figure: Any, scale: float = 1, digits: int = 3, unit: str = "") -> str:
        low, value, high = (f"{scale * bound:.{digits}f}" for bound in (figure.low, figure.value, figure.high))
        return f"{value}{unit} [{low}, {high}]"

    settings, rows = evaluation.settings, []
    for kind, rollouts in _kinds(evaluation):
        costs = rollouts.costs
        of_costs = ["–"] * 3 if costs is None else [
            number(costs.satisfaction, 100, 1, "%"), number(costs.mean), number(costs.divergence)
        ]  # fmt: skip
        rows.append(
            [
                kind,
                rollouts.right.num_rollouts,
                rollouts.right.num_problems,
                number(rollouts.right, 100, 1, "%"),
                *of_costs,
                number(rollouts.length, digits=1),
                "–" if costs is None else f"{100 * costs.violation_bound:.1f}%",
            ]
        )
    heading = (
        f"Task `{settings.task}`, split `{settings.split}`, sampled at temperature {settings.temperature:g}; limit "
        f"{evaluation.cost_limit:g} {_UNITS[evaluation.cost_scope]}."
    )
    if evaluation.num_missing:
        heading += f" Not finished: {evaluation.num_missing} rollouts are missing."
    return {"heading": heading, "rows": rows}


def _example_prompt(trainer: "DistillTrainer") -> str:
    """A question as Python, in messages where the student was trained on them. Never the data's own: it may be private."""
    question, dataset = "What is 17 + 25?", trainer.train_dataset
    if isinstance(dataset, Dataset) and is_conversational(dataset[0]):
        return repr([{"role": "user", "content": question}])
    return repr(question)


def _badges() -> list[str]:
    """Links to the run in the trackers that are on."""
    links = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        links["Weights & Biases"] = wandb.run.url if wandb.run is not None else None
    return [f"[Run in {name}]({url})" for name, url in links.items() if url]
