"""`core` needs torch and scipy alone, and imports between the packages run one way (DESIGN, section 3)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_cmdp


ROOT = Path(trl_cmdp.__file__).parent
ALLOWED = {
    "core": set(),
    "teachers": {"core"},
    "tasks": set(),
    "trainers": {"teachers", "core"},
    "evaluation": {"teachers", "core", "tasks"},
    "reports": {"evaluation", "core"},
    # `cli` stands above everything, and nothing imports it.
    "cli": {"core", "teachers", "tasks", "trainers", "evaluation", "reports"},
}


def imported_modules(path):
    """Absolute names of everything that a file imports, in functions too."""
    package = ["trl_cmdp", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def files_of(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package):
    """A package imports itself and what DESIGN puts below it."""
    for path in files_of(package):
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] != "trl_cmdp" or len(parts) < 2 or parts[1] not in ALLOWED:
                continue
            assert parts[1] in ALLOWED[package] | {package}, f"{path.relative_to(ROOT)} imports {module}"


def test_every_package_is_listed():
    """A new package must say what it may import."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(ALLOWED)


def test_core_imports_torch_scipy_and_the_standard_library_alone():
    """By its source: nothing else, not even inside a function."""
    assert files_of("core")
    for path in files_of("core"):
        for module in imported_modules(path):
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names | {"scipy", "torch", "trl_cmdp"}, f"{path.name} imports {module}"


HEAVY = {"accelerate", "datasets", "matplotlib", "peft", "tokenizers", "transformers", "trl", "vllm", "wandb"}


def loaded_by(statement):
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    script = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


def test_core_leaves_trl_and_transformers_unimported():
    """By running it: a fresh interpreter that imported `trl_cmdp.core` has loaded none of the training stack."""
    loaded = loaded_by("import trl_cmdp.core")
    assert "torch" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "statement",
    [
        "import trl_cmdp",
        "import trl_cmdp.cli\ntry: trl_cmdp.cli.main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["package", "help"],
)
def test_package_and_help_wait_for_nothing(statement):
    """Neither the package nor the command line's help loads a library that takes seconds."""
    loaded = loaded_by(statement)
    assert "trl_cmdp" in loaded
    assert not loaded & {*HEAVY, "numpy", "scipy", "torch"}
