"""Every config field, with its default, and every metric that the trainers log, is on the page of its trainer."""

import ast
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from trl import GRPOConfig

from trl_cmdp import ConstrainedDistillConfig, GKDDistillConfig, LagrangianDistillConfig, MiniLLMDistillConfig
from trl_cmdp.trainers.engine.config import DistillConfig


ROOT = Path(__file__).parents[2]
TRAINERS = ROOT / "trl_cmdp" / "trainers"
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


def logged_metrics() -> dict[str, set[str]]:
    """Names of metrics by the module that logs them; a value inside a name reads NAME."""
    logged: dict[str, set[str]] = {}
    for path in TRAINERS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("_count", "_maximum")
            ):
                logged.setdefault(path.stem, set()).add(_text(node.args[0]))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                value = node.value.value  # a name as a constant, which another module logs
                if isinstance(value, str) and re.fullmatch(r"(constraint|teacher)/\w+", value):
                    logged.setdefault(path.stem, set()).add(value)
    return logged


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value
    assert isinstance(node, ast.JoinedStr), f"a metric's name must be a literal: {ast.unparse(node)}"
    return "".join(part.value if isinstance(part, ast.Constant) else "NAME" for part in node.values)


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


def test_every_metric_is_documented():
    logged = logged_metrics()
    assert {"constraint/cost", "constraint/satisfaction_rate/NAME", "distill_loss"} <= logged["_base"]
    for module, names in logged.items():
        page = module.removesuffix("_trainer") if module.endswith("_trainer") else SHARED_PAGE
        for name in names:
            assert re.search(rf"^\| `{re.escape(name)}` \|", page_text(page), re.MULTILINE), (
                f"{name}, logged in {module}.py, has no row on docs/{page}.md"
            )


def test_siblings_link_to_what_all_share():
    for page in set(PAGES.values()) - {SHARED_PAGE}:
        assert "constrained.md#fields-of-every-trainer" in page_text(page)
        assert "constrained.md#logged-metrics" in page_text(page)


def test_a_missing_row_is_found():
    table = "| field | default | meaning |\n|---|---|---|\n| `a`, `b` | 1, 2.0 | x |\n| `c` | `None` | y |\n"
    assert documented_defaults(table) == {"a": "1", "b": "2.0", "c": "None"}
    assert "violation_penalty" in own_fields(ConstrainedDistillConfig)
    assert "lmbda" in own_fields(GKDDistillConfig)
    assert "cost_limit" not in own_fields(GKDDistillConfig)
