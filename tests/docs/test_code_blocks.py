"""
Code in the documentation: every Python block compiles and calls what exists with arguments that exist, every command
parses, and what needs nothing but this package is run.

A Python block is run if the line before it is `<!-- run -->`; the blocks of a page share their names. Any other must
show what it lacks: a name that it does not define, `...`, a model or dataset of the Hub, an address, a file of the
reader's; or say so in a comment before it, `<!-- needs: a GPU -->`.
"""

import ast
import builtins
import importlib
import inspect
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from trl_cmdp import cli


ROOT = Path(__file__).parents[2]
PAGES = [
    *(page for page in sorted((ROOT / "docs").rglob("*.md"))),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>run|needs: [^\n]+) -->\n+)?(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
# What a block that is not run lacks: an id on the Hub, an address, a path.
LACKS = re.compile(r"""\.\.\.|["'][\w.-]+/[\w./-]+["']|https?://""")
OUR_MODULES = ("trl_cmdp", "trl_cmdp.core", "trl_cmdp.teachers", "trl_cmdp.evaluation", "trl_cmdp.reports")
TRAINING = ("constrained", "lagrangian", "gkd", "minillm")
# Commands that a reader types and this test cannot try.
OTHER_COMMANDS = {
    "pip",
    "git",
    "cd",
    "vllm",
    "ssh",
    "hf",
    "trl",
    "tensorboard",
    "wandb",
    "trackio",
    "export",
    "docker",
}


class Block(NamedTuple):
    page: Path
    line: int
    mark: str | None
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    text = page.read_text() if text is None else text
    return [
        Block(
            page,
            text[: match.start("language")].count("\n") + 1,
            match["mark"],
            match["language"],
            inspect.cleandoc("\n" + match["code"]) if match["indent"] else match["code"],
        )
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [block for block in BLOCKS if block.language in ("bash", "console", "sh", "shell")]


def check_python(block: Block, names: dict[str, object]) -> None:
    """
    Check a block against the packages that it imports.

    Args:
        block (`Block`):
            Block.
        names (`dict[str, object]`):
            What the page's blocks before it have imported. Extended.
    """
    tree = ast.parse(block.code, filename=str(block))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = importlib.import_module(
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("my_"):
            for alias in node.names:
                names[alias.asname or alias.name] = _member(importlib.import_module(node.module), alias.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _resolve(node.func, names)
        if called is not None and getattr(called, "__module__", "").startswith(("trl_cmdp", "trl.")):
            _check_call(node, called)


def _member(module: object, name: str) -> object:
    try:
        return getattr(module, name)
    except AttributeError:
        return importlib.import_module(f"{module.__name__}.{name}")  # type: ignore[attr-defined]


def _resolve(node: ast.expr, names: dict[str, object]) -> object | None:
    """What an expression such as `core.rollout_cost` is, `None` for what the block made itself."""
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        for module in map(importlib.import_module, OUR_MODULES):
            if node.id in module.__all__:
                return getattr(module, node.id)
        if node.id.endswith(("DistillTrainer", "DistillConfig")):
            raise AttributeError(f"trl_cmdp has no {node.id}.")
    elif isinstance(node, ast.Attribute) and inspect.ismodule(owner := _resolve(node.value, names)):
        return _member(owner, node.attr)
    return None


def _check_call(node: ast.Call, called: object) -> None:
    signature = inspect.signature(called)
    given = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
    parameters = signature.parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = set(given) - parameters.keys()
        assert not unknown, f"line {node.lineno}: {ast.unparse(node.func)} has no argument {sorted(unknown)}"
    positional = [argument for argument in node.args if not isinstance(argument, (ast.Starred, ast.Constant))]
    positional += [a for a in node.args if isinstance(a, ast.Constant) and a.value is not ...]
    signature.bind_partial(*positional, **{name: None for name in given if name in parameters})


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}), ids=lambda page: page.name)
def test_python_blocks_call_what_exists(page: Path):
    names: dict[str, object] = {}
    for block in (block for block in PYTHON if block.page == page):
        check_python(block, names)


def undefined_names(code: str) -> set[str]:
    """Names that a block uses and neither defines nor imports."""
    used, defined = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    return used - defined


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_are_run_or_show_what_they_lack(block: Block):
    assert block.mark or LACKS.search(block.code) or undefined_names(block.code), (
        f"{block}: put <!-- run --> before it, so that it is run, or <!-- needs: what it needs -->."
    )


@pytest.mark.parametrize(
    "page", sorted({block.page for block in PYTHON if block.mark == "run"}), ids=lambda page: page.name
)
def test_self_contained_python_blocks_run(page: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in (block for block in PYTHON if block.page == page and block.mark == "run"):
        exec(compile(block.code, str(block), "exec"), names)


def commands_in(block: Block) -> list[list[str]]:
    """Arguments of each command, without its environment variables and what is piped on."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        for part in re.split(r" (?:&&|\|) ", line):
            words = shlex.split(part.removeprefix("$ ").removesuffix(" &"), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                commands.append(words)
    return commands


@pytest.fixture
def no_run(monkeypatch):
    """Every command parses its arguments with its own parser, and does nothing."""
    from trl_cmdp.cli import _evaluation, _train, _training_arguments

    for module in vars(cli).values():
        if (
            inspect.ismodule(module)
            and hasattr(module, "add_parser")
            and module.__name__.split(".")[-1] not in TRAINING
        ):
            monkeypatch.setattr(module, "run", lambda arguments: 0)
    monkeypatch.setattr(_train, "_make_trainer", lambda *args: _Trainer())
    monkeypatch.setattr(_train, "_train", lambda *args: 0)
    monkeypatch.setattr(_train, "dry_run", lambda trainer: 0)
    monkeypatch.setattr(_train, "launch_command", lambda args: None)
    # The files that they name are the reader's.
    monkeypatch.setattr(_training_arguments, "_TYPES", {})
    monkeypatch.setattr(_training_arguments, "_check_needed", lambda *args: None)
    monkeypatch.setattr(_train, "check_has_teacher", lambda given: None)
    for name in ("data_source", "known_reward", "model_source"):
        monkeypatch.setattr(_evaluation, name, str)


class _Trainer:
    command: list[str]
    accelerator = SimpleNamespace(is_main_process=False)


def check_command(words: list[str]) -> None:
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "trl-cmdp":
        if len(arguments) == 1:  # a list of commands
            arguments = [*arguments, "--help"]
        elif arguments[0] in TRAINING:
            if "--config" in arguments and not Path(config := arguments[arguments.index("--config") + 1]).exists():
                arguments = [word for word in arguments if word not in ("--config", config)]  # a file of the reader's
            arguments = [*arguments, "--use_cpu"]  # the configs refuse bf16 where there is no GPU
        assert cli.main(arguments) == 0, shlex.join(words)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert targets.issuperset(arguments), f"the Makefile has no target {arguments}"
    elif program in ("python", "accelerate") and (scripts := [word for word in arguments if word.endswith(".py")]):
        assert (ROOT / scripts[0]).exists() or scripts[0] == "train.py", f"there is no {scripts[0]}"
    else:
        assert program in {*OTHER_COMMANDS, "python", "accelerate", "pre-commit"}, f"unknown command: {program}"


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_parse(block: Block, no_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for other in blocks_of(block.page):  # the files that the page shows
        if other.language == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", other.code)):
            (tmp_path / name[1]).write_text(other.code)
    monkeypatch.chdir(tmp_path)
    for words in commands_in(block):
        try:
            check_command(words)
        except SystemExit as ended:  # argparse: --help, or a mistake
            if ended.code:
                pytest.fail(f"{shlex.join(words)}\n{capsys.readouterr().err}")
