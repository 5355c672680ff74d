"""What the code imports is what the project's metadata promise: always, or with an extra that its messages name."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from helpers import error_line, make_model
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trl_cmdp.cli import main
from trl_cmdp.reports.wandb_panels import wandb_workspace
from trl_cmdp.teachers import AdapterTeacher


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALL = re.compile(r"""(?:trl-cmdp|(?<=[\s'"])\.)\[([a-z][a-z0-9,-]*)\]""")
DISTRIBUTIONS = packages_distributions()


def installed_with(requirements):
    """Names of the distributions that come with requirements, directly or through one another."""
    names, queue, done = set(), [Requirement(text) for text in requirements], set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in done:
            continue
        done.add((name, *sorted(requirement.extras)))
        if name == PROJECT["name"]:
            queue += [Requirement(text) for extra in requirement.extras for text in EXTRAS[extra]]
            continue
        names.add(name)
        try:
            needed = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # of an extra that is not installed here
            continue
        extras = ["", *requirement.extras]
        queue += [
            need for need in needed if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras)
        ]
    return names


ALWAYS = installed_with(PROJECT["dependencies"])
WITH_EXTRA = {extra: installed_with(requirements) for extra, requirements in EXTRAS.items()}


class Imports(ast.NodeVisitor):
    """Third-party modules that a file imports: when it is imported itself, and later."""

    def __init__(self, path):
        self.first, self.later = set(), set()
        self.depth = 0
        self.visit(ast.parse(path.read_text()))

    def _inside(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = _inside

    def visit_If(self, node):
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            self._inside(node)
        else:
            self.generic_visit(node)

    def _add(self, module):
        top = module.split(".")[0]
        if top not in sys.stdlib_module_names | {"trl_cmdp"}:
            (self.later if self.depth else self.first).add(top)

    def visit_Import(self, node):
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node):
        if not node.level:
            self._add(node.module)


def comes_with(module, names):
    return any(canonicalize_name(name) in names for name in DISTRIBUTIONS.get(module, [module]))


def test_imports_are_declared():
    """What a module imports at its top is a dependency; what a function imports is one, or comes with an extra."""
    undeclared = []
    for path in sorted((ROOT / "trl_cmdp").rglob("*.py")):
        imports = Imports(path)
        undeclared += [(path.name, module) for module in imports.first if not comes_with(module, ALWAYS)]
        anywhere = set.union(ALWAYS, *WITH_EXTRA.values())
        undeclared += [(path.name, module) for module in imports.later if not comes_with(module, anywhere)]
    assert not undeclared


def test_extras_that_are_named_exist():
    """In messages, documentation, examples and the Makefile."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    for folder, suffix in (("trl_cmdp", "py"), ("examples", "py"), ("docs", "md"), ("benchmarks", "md")):
        pages += sorted((ROOT / folder).rglob(f"*.{suffix}"))
    named = {
        (extra, str(page.relative_to(ROOT)))
        for page in pages
        for group in INSTALL.findall(page.read_text())
        for extra in group.split(",")
    }
    assert ("vllm", "trl_cmdp/evaluation/vllm.py") in named
    assert {"math", "wandb", "tracking", "demo-llm", "dev"} <= {extra for extra, _ in named}
    assert not {(extra, page) for extra, page in named if extra not in EXTRAS}


@pytest.mark.parametrize(
    ("extra", "module"),
    [
        ("peft", "peft"),
        ("quantization", "bitsandbytes"),
        ("vllm", "vllm"),
        ("eval", "math_verify"),
        ("math", "reasoning_gym"),
        ("tracking", "wandb"),
    ],
)
def test_an_extra_brings(extra, module):
    """What its name says, which is no dependency of everyone's."""
    assert comes_with(module, WITH_EXTRA[extra])
    assert not comes_with(module, ALWAYS)


def test_a_report_needs_no_extra():
    for path in sorted((ROOT / "trl_cmdp" / "reports").rglob("*.py")):
        assert all(comes_with(module, ALWAYS) for module in Imports(path).first)


MISSING = {  # what an error says of a package, and the extra that brings it
    "import of peft halted; None in sys.modules": "peft",
    "Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U bitsandbytes>=0.46.1`": "quantization",
    "No module named 'math_verify'": "math",
    "No module named 'reasoning_gym'": "math",
    "vLLM is not available and `use_vllm` is set to True. Please install vLLM with `pip install trl[vllm]`.": "vllm",
    "No module named 'sentencepiece'": "demo-llm",
}


@pytest.mark.parametrize(("text", "extra"), MISSING.items(), ids=list(MISSING.values()))
def test_a_missing_package_is_one_line_that_names_its_extra(text, extra, tmp_path, monkeypatch, capsys):
    """Whoever says that it is missing, and only where it is."""
    for module in ("peft", "bitsandbytes", "math_verify", "reasoning_gym", "vllm", "sentencepiece"):
        monkeypatch.setitem(sys.modules, module, None)

    def unavailable(*args):
        raise ImportError(text)

    monkeypatch.setattr("trl_cmdp.cli._evaluation.load_task", unavailable)
    (tmp_path / "config.json").write_text("{}")
    command = ["evaluate", "--student", str(tmp_path), "--task", "table", "--output_dir", str(tmp_path)]
    assert main(command) == 2
    assert error_line(capsys).endswith(f'pip install "trl-cmdp[{extra}]"')
    monkeypatch.undo()
    monkeypatch.setattr("trl_cmdp.cli._evaluation.load_task", unavailable)
    if extra in ("peft", "math"):  # installed here
        assert main(command) == 2
        assert "trl-cmdp[" not in error_line(capsys)


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("peft", lambda: AdapterTeacher(make_model(), None, "base"), "peft"),
        ("wandb_workspaces", lambda: wandb_workspace("me", "mine"), "tracking"),
    ],
)
def test_in_python_too(module, call, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "trl-cmdp\[{extra}\]"'):
        call()
