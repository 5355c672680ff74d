"""Every config field, with its default, and every metric that the trainers log, is on the page of its trainer."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from fake_server import serving
from fake_vllm import FakeServer
from helpers import make_dataset, make_teacher, make_tokenizer, random_completions, run, save_model, scripted
from trl import GRPOConfig, GRPOTrainer

from trl_cmdp import (
    ConstrainedDistillConfig,
    ConstrainedDistillTrainer,
    GKDDistillConfig,
    GKDDistillTrainer,
    LagrangianDistillConfig,
    LagrangianDistillTrainer,
    MiniLLMDistillConfig,
    MiniLLMDistillTrainer,
)
from trl_cmdp.trainers.engine.config import DistillConfig


ROOT = Path(__file__).parents[2]
PAGES = {
    ConstrainedDistillConfig: "constrained",
    LagrangianDistillConfig: "lagrangian",
    GKDDistillConfig: "gkd",
    MiniLLMDistillConfig: "minillm",
}
# Fields and metrics of all trainers are on this page, and the others link to it.
SHARED_PAGE = "constrained"


def page_text(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def own_fields(config: type) -> dict[str, object]:
    """Fields that a config adds to `GRPOConfig` and, for a sibling, to what all share; with their defaults."""
    inherited = {field.name for field in fields(GRPOConfig)}
    if config is not ConstrainedDistillConfig:
        inherited |= {field.name for field in fields(DistillConfig)}
    return {
        field.name: field.default_factory() if field.default is MISSING else field.default
        for field in fields(config)
        if field.name not in inherited
    }


def documented_defaults(text: str) -> dict[str, str]:
    """Fields and their defaults in the tables of fields: "| `a`, `b` | 1, 2 | ..." gives a: 1 and b: 2."""
    cells: dict[str, str] = {}
    for table in re.findall(r"^\| field \| default \| meaning \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        for names, values in re.findall(r"^\| ([^|]*) \| ([^|]*) \|", table, re.MULTILINE):
            names, values = re.findall(r"`(\w+)`", names), values.split(", ")
            values = values * len(names) if len(values) == 1 else values
            cells |= {name: value.strip("` ") for name, value in zip(names, values, strict=True)}
    return cells


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, set[str]]:
    """Names of the metrics that each trainer logs and GRPO does not, by its page; a teacher's name reads NAME."""
    folder = tmp_path_factory.mktemp("logged")
    env_mask = [[index % 3 != 1 for index, _ in enumerate(ids)] for ids in random_completions(8)]
    evaluated = {"eval_dataset": make_dataset(1), "eval_strategy": "steps", "per_device_eval_batch_size": 4}
    named = make_dataset().add_column("teacher", ["NAME", "other"] * 16)
    teachers = {"NAME": make_teacher(), "other": make_teacher(2)}
    best = {"metric_for_best_model": "constraint/feasible_reward"}
    teacher = save_model(folder / "teacher", make_teacher(), make_tokenizer())

    def names(trainer_class, **kwargs) -> set[str]:
        trainer = run(folder, trainer_class, max_steps=1, **kwargs)
        return {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}

    server = FakeServer(make_teacher().eval(), teacher, "v1/completions")
    with serving(server):
        remote = {"teacher_model_server_url": server.url, "teacher_model_server_top_k": 5, "cost": "log_ratio"}
        constrained = names(ConstrainedDistillTrainer, violation_distill_coef=0.0, **remote)
    several = {"teacher_model": teachers, "train_dataset": named}
    tools = {"teacher_model": make_teacher(), "rollout_func": scripted(random_completions(8), env_mask)}
    constrained |= names(ConstrainedDistillTrainer, **several) | names(ConstrainedDistillTrainer, **tools)
    constrained |= names(ConstrainedDistillTrainer, teacher_model=make_teacher(), **evaluated, **best)
    grpo = names(GRPOTrainer, **evaluated)
    siblings = {
        "lagrangian": names(LagrangianDistillTrainer, teacher_model=make_teacher()),
        "gkd": names(GKDDistillTrainer, teacher_model=make_teacher()),
        "minillm": names(MiniLLMDistillTrainer, teacher_model=make_teacher()),
    }
    return {page: found - grpo for page, found in {SHARED_PAGE: constrained, **siblings}.items()}


@pytest.mark.parametrize("config", PAGES, ids=lambda config: config.__name__)
def test_every_field_is_documented_with_its_default(config):
    defaults = documented_defaults(page_text(PAGES[config]))
    prose = page_text(PAGES[config])
    for name, default in own_fields(config).items():
        if PAGES[config] == "minillm":  # its fields stand in a table of the paper's devices
            assert re.search(rf"`{name}`", prose), f"{name} is not on docs/{PAGES[config]}.md"
            continue
        assert name in defaults, f"{name} has no row on docs/{PAGES[config]}.md"
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        assert defaults[name] in (shown, shown.removesuffix(".0")), (
            f"{name} has the default {shown} and docs/{PAGES[config]}.md says {defaults[name]}"
        )


def test_defaults_of_minillm():
    config = MiniLLMDistillConfig("out", use_cpu=True, bf16=False)
    assert "`teacher_mixed_alpha` = α (0.2)" in page_text("minillm")
    assert (config.single_step_decomposition, config.length_normalization, config.teacher_mixed_alpha) == (
        True,
        True,
        0.2,
    )


def test_a_documented_field_exists():
    shared = own_fields(ConstrainedDistillConfig)
    for config, page in PAGES.items():
        known = {field.name for field in fields(config)} | shared.keys()
        for name in documented_defaults(page_text(page)):
            assert name in known, f"docs/{page}.md documents {name}, which {config.__name__} does not have"


def test_every_metric_is_documented(logged):
    shared = {"constraint/cost", "constraint/satisfaction_rate/NAME", "teacher/divergence_lower_bound"}
    assert shared | {"constraint/feasible_reward", "tools/token_frac", "distill_loss"} <= logged[SHARED_PAGE]
    for page, names in logged.items():
        text = page_text(page) + page_text(SHARED_PAGE)
        for name in names - {"constraint/satisfaction_rate/other"}:
            assert re.search(rf"^\| `{re.escape(name)}` \|", text, re.MULTILINE), (
                f"{name} has no row on docs/{page}.md"
            )


def test_siblings_link_to_what_all_share():
    for page in set(PAGES.values()) - {SHARED_PAGE}:
        assert "constrained.md#fields-of-every-trainer" in page_text(page)
        assert "constrained.md#logged-metrics" in page_text(page)
