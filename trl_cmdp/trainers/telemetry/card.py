"""The model card: what was trained, against which teacher and limit, how well the limit holds, and how to do it again."""

import logging
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, get_token
from transformers import ProcessorMixin, is_wandb_available
from trl import GRPOTrainer, is_conversational
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from ... import __version__
from ..._defaults import COST_UNITS
from ..._messages import shell_command
from ...teachers import AdapterTeacher, LocalTeacher
from .satisfaction import MeasuredSatisfaction


# Shown where it lies beside the card.
CURVES_FILE = "training_curves.png"

_logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
_PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers", "huggingface_hub")
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


@dataclass(frozen=True)
class DistillationFacts:
    """What a card says of distillation, as text: see the functions that describe it."""

    teachers: list[str]  # the teachers
    cost: str  # cost of a rollout
    limit: str  # limit on it
    # Satisfaction that was measured in training and evaluation, the last evaluation first
    satisfaction: list[MeasuredSatisfaction]
    secrets: list[str | None] = field(default_factory=list)  # what must not be on the card


def write_model_card(
    trainer: GRPOTrainer,
    command: Sequence[str],
    facts: DistillationFacts | None,
    dataset_name: str | None,
    evaluation: Any | None,
    licence: str | None,
) -> None:
    """
    Write `README.md` into the output folder anew: the metadata that TRL's card there has, and this library's text.
    Without a `licence` the card names that of the model which the student began as.
    """
    args, path = trainer.args, Path(trainer.args.output_dir, "README.md")
    data = ModelCard.load(path).data
    adapter = is_peft_model(trainer.accelerator.unwrap_model(trainer.model))
    if adapter:
        data.library_name = "peft"
    sees = isinstance(trainer.processing_class, ProcessorMixin)
    data.pipeline_tag = "image-text-to-text" if sees else "text-generation"
    vars(data).pop("licence", None)  # TRL's card says "license" there
    base = get_config_model_id(trainer.model.config)
    vars(data).update({"license": licence} if licence else _licence_of(base))
    satisfaction = [] if facts is None else facts.satisfaction
    data.eval_results = [
        *([] if evaluation is None else _evaluation_results(evaluation)),
        *(_satisfaction_result(value, facts.limit, dataset_name) for value in satisfaction),
    ] or None
    # A token may be in the command.
    known = [args.hub_token, get_token(), *([] if facts is None else facts.secrets)]
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        model_name=data.model_name,
        adapter=adapter,
        base_model=data.base_model,
        dataset_name=dataset_name,
        method=trainer._name,
        paper=trainer._paper,
        teachers=[] if facts is None else facts.teachers,
        cost=None if facts is None else facts.cost,
        limit=None if facts is None else facts.limit,
        satisfaction=[
            {"name": _satisfaction_name(value), "text": describe_satisfaction(value)} for value in satisfaction
        ],
        step=trainer.state.global_step,
        hub_model_id=trainer.hub_model_id or data.model_name,
        task=data.pipeline_tag,
        prompt=_example_prompt(trainer, sees),
        max_new_tokens=args.max_completion_length,
        evaluation=None if evaluation is None else _evaluation_table(evaluation),
        curves=CURVES_FILE if Path(args.output_dir, CURVES_FILE).exists() else None,
        badges=_badges(),
        command=shell_command(command, known) if command else None,
        versions={"Python": platform.python_version(), "trl-cmdp": __version__}
        | {package: version(package) for package in (*_PACKAGES, *(["peft"] if adapter else []))},
        citations=list(dict.fromkeys([CONSTRAINED_CITATION, trainer._paper["citation"], _TRL_CITATION])),
    )
    content = str(card)
    for secret in filter(None, known):
        content = content.replace(secret, "***")
    path.write_text(content, encoding="utf-8")


def distillation_facts(trainer: Any) -> DistillationFacts | None:
    """What a [`~engine.DistillTrainer`] can say of distillation, `None` without a teacher."""
    if not trainer.teachers:
        return None
    args = trainer.args
    return DistillationFacts(
        teachers=[
            describe_teacher(name, teacher, trainer.accelerator, args.teacher_model_revision)
            + ", behind prompts of its own (`teacher_prompt`)" * trainer._teacher_prompts.used
            for name, teacher in trainer.teachers.items()
        ],
        cost=describe_cost(trainer._token_cost, args.teacher_beta, args.temperature, args.cost_scope),
        limit=describe_limit(args.cost_limit, args.cost_scope, trainer.state.log_history),
        satisfaction=trainer._distill_metrics.satisfaction.all_measured(),
        secrets=[args.teacher_model_server_api_key],
    )


def describe_teacher(name: str, teacher: Any, accelerator: Accelerator, revision: str | None) -> str:
    """A teacher as the card names it. Of a folder on this machine only its last part, of a server not its address."""
    if isinstance(teacher, AdapterTeacher):
        return "the base model itself" if name == "base" else f"adapter `{name}` of the same base model"
    if isinstance(teacher, LocalTeacher):
        config, where = accelerator.unwrap_model(teacher.module).config, ""
    else:
        config, where = teacher.remote.config, ", on a vLLM server"
    source = get_config_model_id(config)
    if not source:
        text = f"a {config.model_type} model given as an object"
    elif Path(source).exists():
        text = f"`{Path(source).name}` (a local folder)"
    else:
        revision = f" at revision `{revision}`" if revision else ""
        text = f"[{source}](https://huggingface.co/{source}){revision}"
    return ("" if name == "teacher" else f"`{name}`: ") + text + where


def describe_cost(token_cost: str, beta: float, temperature: float, cost_scope: str) -> str:
    """The cost of a rollout as the card defines it, from the names that the config gives its parts."""
    divergence = {1.0: "reverse KL(student‖teacher)", 0.0: "forward KL(teacher‖student)"}.get(
        beta, f"generalised JSD (β = {beta:g})"
    )
    token = _COSTS.get(token_cost, f"{divergence} over the full vocabulary")
    return f"{token} at each completion token, at temperature {temperature:g}; {_SCOPES[cost_scope]}"


def describe_limit(
    cost_limit: float | str | Mapping[str, float], cost_scope: str, log_history: Sequence[Mapping[str, Any]]
) -> str:
    """The limit as it was asked for, and where that is no number, the one that was logged last."""
    unit = COST_UNITS[cost_scope]
    if isinstance(cost_limit, float | int):
        return f"{cost_limit:g} {unit}"
    if isinstance(cost_limit, Mapping):
        return ", ".join(f"{limit:g} for `{name}`" for name, limit in cost_limit.items()) + f" ({unit})"
    logged = [entry["constraint/limit"] for entry in log_history if "constraint/limit" in entry]
    return f"{logged[-1]:.4g} {unit}, found from what imitation reaches" if logged else "not found yet"


@cache
def _licence_of(source: str | None) -> dict[str, str]:
    """What the card of a model says of its licence. Without a card, or out of reach of it, nothing."""
    path = Path(source or "", "README.md")
    if not source or (Path(source).exists() and not path.is_file()):
        return {}
    try:
        data = vars(ModelCard.load(path if path.is_file() else source).data)
    except Exception as error:  # of many kinds, from the Hub's client
        _logger.warning(f"The model card names no licence, as that of {source} could not be read ({error}).")
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name)}


def _satisfaction_name(value: MeasuredSatisfaction) -> str:
    if value.mode == "eval":
        return f"Satisfaction, evaluation at step {value.last_step}"
    steps = f"{value.logged_steps} logged steps (to step {value.last_step})"
    return f"Satisfaction, training rollouts of the last {steps}"


def describe_satisfaction(value: MeasuredSatisfaction) -> str:
    """A satisfaction with its interval, and of what it is."""
    return (
        f"{100 * value.rate:.1f}% [{100 * value.low:.1f}, {100 * value.high:.1f}] of {value.rollouts} rollouts in "
        f"{value.groups} groups"
    )


def _satisfaction_result(value: MeasuredSatisfaction, limit: str, dataset_name: str | None) -> EvalResult:
    split, prompts = {"train": ("train", "training prompts"), "eval": ("test", "evaluation prompts")}[value.mode]
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_name or "custom",
        dataset_name=dataset_name or prompts,
        dataset_split=split,
        metric_type="constraint_satisfaction",
        metric_name=_satisfaction_name(value),
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
                details["limit"] = f"{evaluation.cost_limit:g} {COST_UNITS[evaluation.cost_scope]}"
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
        f"{evaluation.cost_limit:g} {COST_UNITS[evaluation.cost_scope]}."
    )
    if evaluation.num_missing:
        heading += f" Not finished: {evaluation.num_missing} rollouts are missing."
    return {"heading": heading, "rows": rows}


def _example_prompt(trainer: GRPOTrainer, sees: bool) -> str:
    """
    A question as Python, in messages where the student was trained on them, with an image if it `sees`. Never the data's
    own: it may be private.
    """
    question, dataset = "What is 17 + 25?", trainer.train_dataset
    if sees:
        parts = [{"type": "image", "url": "picture.png"}, {"type": "text", "text": "What does the picture show?"}]
        return f"text={[{'role': 'user', 'content': parts}]!r}"
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
