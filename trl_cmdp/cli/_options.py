"""
The options of the training commands, read from the sources of the dataclasses that make them. Importing those takes
seconds, and what was mistyped should be said at once.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._docstrings import help_of_fields
from ._parser import Mistake, did_you_mean


# Module and class, the configs by command; `_train.TrainingParser` is made of the same.
_SHARED = (
    ("trl_cmdp.cli._train", "DistillScriptArguments"),
    ("trl", "ModelConfig"),
    ("trl", "DatasetMixtureConfig"),
)
_CONFIGS = {
    "constrained": "ConstrainedDistillConfig",
    "lagrangian": "LagrangianDistillConfig",
    "gkd": "GKDDistillConfig",
    "minillm": "MiniLLMDistillConfig",
}
_ONE_VALUE = ("str", "int", "float", "bool", "dict")
_NUMBERS = {"int": (int, "an integer"), "float": (float, "a number")}


class SourceNotFoundError(Exception):
    """A definition that is not in the sources where it should be: nothing is known without importing it."""


@dataclass(frozen=True)
class Option:
    """
    An option of a training command.

    Args:
        name (`str`):
            Its name, with underscores.
        kind (`str`):
            Of a value: `"int"`, `"float"`, `"bool"`, `"choice"` or `"text"`, which is everything else.
        several (`bool`):
            Whether it may take several values.
        choices (`tuple[str, ...]`):
            The values of a `"choice"`.
        nullable (`bool`):
            Whether there may be no value.
        default (`Any`):
            Its default, `None` also where the source computes it.
        help (`str`):
            What its dataclass says of it.
        owner (`str`):
            Name of the class that defines it, of this package; empty for those of other libraries.
    """

    name: str
    kind: str
    several: bool
    choices: tuple[str, ...]
    nullable: bool
    default: Any
    help: str
    owner: str

    @property
    def nargs(self) -> str | None:
        """How many values `argparse` takes."""
        return "+" if self.several else "?" if self.kind == "bool" else None

    def check(self, text: str) -> str:
        """A value as it is written, or a `Mistake`, for `argparse`."""
        if self.nullable and text.lower() in ("none", "null"):
            return text
        if self.kind in _NUMBERS:
            number, called = _NUMBERS[self.kind]
            try:
                number(text)
            except ValueError:
                raise Mistake(f"must be {called}, got {text!r}.") from None
        if self.kind == "choice" and text not in self.choices:
            listed = ", ".join(self.choices)
            raise Mistake(f"must be one of {listed}, got {text!r}.{did_you_mean(text, self.choices)}")
        return text


@cache
def training_options(command: str) -> dict[str, Option]:
    """
    The options of a training command by their names.

    Raises:
        SourceNotFoundError: If a class is not where the imports of its users say.
    """
    classes = (*_SHARED, ("trl_cmdp.trainers", _CONFIGS[command]))
    return {name: option for module, owner in classes for name, option in _fields(module, owner).items()}


@cache
def launch_options() -> frozenset[str]:
    """Names of the options of `accelerate launch`."""
    return frozenset(
        node.value[2:].replace("-", "_")
        for call in ast.walk(_parse("accelerate.commands.launch")[0])
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for node in call.args
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--")
    )


def _fields(module: str, name: str) -> dict[str, Option]:
    """Fields of a dataclass and of those that it extends, in their order."""
    module, node = _definition(module, name)
    if not isinstance(node, ast.ClassDef):
        raise SourceNotFoundError(f"{module}.{name} is no class.")
    found: dict[str, Option] = {}
    for base in reversed(node.bases):
        if not isinstance(base, ast.Name):
            raise SourceNotFoundError(f"A base of {module}.{name} cannot be read.")
        found |= _fields(module, base.id)
    described = help_of_fields(ast.get_docstring(node, clean=False))
    owner = name if module.startswith("trl_cmdp.") else ""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            arguments = _field_arguments(line.value)
            if "ClassVar" in ast.unparse(line.annotation) or _constant(module, arguments.get("init")) is False:
                continue
            text = described.get(line.target.id) if owner else None
            found[line.target.id] = _option(module, line, arguments, text, owner)
    return found


def _field_arguments(value: ast.expr | None) -> dict[str | None, ast.expr]:
    """The arguments of `dataclasses.field`, or a plain default as its only one."""
    if isinstance(value, ast.Call):
        return {keyword.arg: keyword.value for keyword in value.keywords}
    return {} if value is None else {"default": value}


def _option(
    module: str, line: ast.AnnAssign, arguments: dict[str | None, ast.expr], described: str | None, owner: str
) -> Option:
    metadata = arguments.get("metadata")
    if described is None and isinstance(metadata, ast.Dict):
        keys = [_constant(module, key) for key in metadata.keys]
        described = dict(zip(keys, (_constant(module, value) for value in metadata.values), strict=True)).get("help")
    kinds = list(_kinds(module, line.annotation))
    given = [kind for kind in kinds if kind != "None"]
    kind, choices = "text", ()
    # What is not known to be one value may be several.
    several = not all(kind in _ONE_VALUE or kind.startswith(("Literal[", "dict[")) for kind in given)
    if len(given) == 1:
        given = [given[0].removeprefix("list[").removesuffix("]") if given[0].startswith("list[") else given[0]]
    if len(given) == 1 and given[0] in ("int", "float", "bool"):
        kind = given[0]
    elif len(given) == 1 and given[0].startswith("Literal["):
        kind = "choice"
        choices = tuple(map(str, ast.literal_eval(f"({given[0][8:-1]},)")))
    return Option(
        name=line.target.id,
        kind=kind,
        several=several,
        choices=choices,
        nullable="None" in kinds,
        default=_constant(module, arguments.get("default")),
        help=" ".join(str(described or "").split()),
        owner=owner,
    )


def _kinds(module: str, annotation: ast.expr) -> Iterator[str]:
    """The types of a union, as text."""
    if isinstance(annotation, ast.BinOp):
        yield from _kinds(module, annotation.left)
        yield from _kinds(module, annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("Optional", "Union"):
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        for part in parts:
            yield from _kinds(module, part)
        if ast.unparse(annotation.value) == "Optional":
            yield "None"
    elif isinstance(annotation, ast.Name) and annotation.id not in _ONE_VALUE:
        try:
            where, node = _definition(module, annotation.id)
        except SourceNotFoundError:
            yield annotation.id
            return
        if isinstance(node, ast.Assign):  # an alias
            yield from _kinds(where, node.value)
        else:
            yield annotation.id
    else:
        yield ast.unparse(annotation)


def _constant(module: str, node: ast.expr | None) -> Any:
    """The value of an expression that is a constant or the name of one, else `None`."""
    if isinstance(node, ast.Name):
        try:
            module, node = _definition(module, node.id)
        except SourceNotFoundError:
            return None
        node = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


@cache
def _definition(module: str, name: str) -> tuple[str, ast.stmt]:
    """Where a name is defined, following the imports, those for type checkers too, and how."""
    tree, is_package = _parse(module)
    for line in _statements(tree.body):
        if isinstance(line, ast.ClassDef) and line.name == name:
            return module, line
        targets = (
            line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return module, line
        if isinstance(line, ast.ImportFrom):
            for alias in line.names:
                if (alias.asname or alias.name) == name:
                    parts = module.split(".")
                    package = parts[: len(parts) - line.level + is_package] if line.level else []
                    return _definition(".".join([*package, *filter(None, [line.module])]), alias.name)
    raise SourceNotFoundError(f"{module} does not define {name}.")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under conditions too."""
    for line in body:
        yield line
        if isinstance(line, ast.If | ast.Try):
            yield from _statements([*line.body, *line.orelse])


@cache
def _parse(module: str) -> tuple[ast.Module, bool]:
    """The source of a module that is not imported, and whether it is a package's."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise SourceNotFoundError(f"There is no module {module}.")
    path = Path(spec.origin).parent.joinpath(*rest)
    is_package = not rest or not path.with_suffix(".py").is_file()
    path = path / "__init__.py" if is_package else path.with_suffix(".py")
    try:
        return ast.parse(path.read_text(encoding="utf-8")), is_package
    except (OSError, ValueError, SyntaxError) as error:
        raise SourceNotFoundError(f"The source of {module} cannot be read.") from error
