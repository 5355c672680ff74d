"""The house: what may import what, without a circle, and how large a file or a function may grow (DESIGN, section 3)."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trl_cmdp


ROOT = Path(trl_cmdp.__file__).parent
# Each room, what it is for, and the rooms whose modules it may import. What lies beside the rooms
# (`_http.py`, `_defaults.py`, `_docstrings.py`, `_files.py`, `_messages.py`, `_prompts.py`) all may import.
ROOMS = {
    "core": ("mathematics on plain tensors", set()),
    "teachers": ("how a model is read: teachers, heads, hidden states", {"core"}),
    "tasks": ("datasets and their verifiers", set()),
    "trainers/telemetry": ("what a run says of itself: metrics, cards, pushes", {"core", "teachers"}),
    "trainers/engine": ("how a signal becomes an optimizer step", {"core", "teachers", "trainers/telemetry"}),
    "trainers": ("the methods: <method>_config.py and <method>_trainer.py", {"core", "trainers/engine", "trainers/telemetry"}),
    "evaluation": ("rollouts, their records, and figures from them", {"core", "teachers", "tasks"}),
    "reports": ("plots and pages, from records alone", {"core", "evaluation"}),
    "cli": (
        "the commands, one file each",
        {"core", "teachers", "tasks", "trainers", "trainers/engine", "trainers/telemetry", "evaluation", "reports"},
    ),
}  # fmt: skip
# What `core` may import: with scipy for statistics, and Triton where a kernel needs it.
CORE_LIBRARIES = sys.stdlib_module_names | {"torch", "scipy", "triton", "trl_cmdp"}
HEAVY = {
    "accelerate",
    "datasets",
    "matplotlib",
    "numpy",
    "peft",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
}
MAX_LINES, MAX_PARAMETERS = 400, 12

FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str | None:
    """The room that a file of the package lies in, `None` for what lies beside the rooms."""
    folders = path.relative_to(ROOT).parts[:-1]
    return next((room for room in ("/".join(folders[:2]), *folders[:1]) if room in ROOMS), None)


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports: in functions and for types too."""
    package = ["trl_cmdp", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] != "trl_cmdp":
                continue
            # `from .a import b` is the module b of the package a, or a name in a.
            for candidate in (ROOT.joinpath(*name[1:]), ROOT.joinpath(*name[1:-1])):
                if candidate.with_suffix(".py").is_file():
                    found.add(candidate.with_suffix(".py"))
                    break
                if (candidate / "__init__.py").is_file():
                    found.add(candidate / "__init__.py")
                    break
    return found - {path}


def where_it_belongs() -> str:
    return "A new file belongs into:\n" + "\n".join(f"  trl_cmdp/{room}: {what}" for room, (what, _) in ROOMS.items())


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    """A room imports itself and what lies below it."""
    files = [path for path in FILES if room_of(path) == room]
    assert files, f"trl_cmdp/{room} is gone: change the table of rooms, and DESIGN's section 3"
    for path in files:
        for imported in imported_files(path):
            other = room_of(imported)
            assert other in {None, room} | ROOMS[room][1], (
                f"{path.relative_to(ROOT)} imports {imported.relative_to(ROOT)}, and {room} stands below {other}. Move "
                f"what both need to a room below both.\n{where_it_belongs()}"
            )


def test_every_file_is_in_a_room():
    beside = {path.name for path in FILES if room_of(path) is None}
    expected = {"_defaults.py", "_docstrings.py", "_files.py", "_http.py", "_messages.py", "_prompts.py"}
    assert beside == {"__init__.py", "__main__.py"} | expected, where_it_belongs()


def test_no_file_imports_one_that_imports_it():
    """Also not through others, in functions, or for types."""
    graph = {path: imported_files(path) for path in FILES if path.name != "__init__.py"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(str(path.relative_to(ROOT)) for path in error.args[1])
        pytest.fail(f"An import circle: {circle}. Move what both need to a file below both.")


def test_core_needs_few_libraries():
    for path in (path for path in FILES if room_of(path) == "core"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for module in modules:
                assert module.split(".")[0] in CORE_LIBRARIES, (
                    f"{path.name} imports {module}: core is mathematics alone"
                )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    """A file that passes 400 lines is two; a function with more than twelve parameters wants a record."""
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES, (
        f"{path.relative_to(ROOT)} has more than {MAX_LINES} lines: what is its second topic?"
    )
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if "teacher_model" in names and node.name == "__init__":
                continue  # the signature of `GRPOTrainer`, in its order
            count = len([name for name in names if name not in ("self", "cls", "ctx")])
            assert count <= MAX_PARAMETERS, (
                f"{node.name} in {path.name} has {count} parameters: make what belongs together a record"
            )


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    script = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import trl_cmdp.core", HEAVY - {"torch", "numpy", "scipy"}),
        ("import trl_cmdp", HEAVY),
        ("import trl_cmdp.cli\ntry: trl_cmdp.cli.main(['--help'])\nexcept SystemExit: pass", HEAVY),
    ],
    ids=["core", "package", "help"],
)
def test_an_import_loads_no_more_than_it_needs(statement, light):
    """`core` none of the training stack; the package and the command line's help nothing that takes seconds."""
    loaded = loaded_by(statement)
    assert "trl_cmdp" in loaded
    assert not loaded & light
