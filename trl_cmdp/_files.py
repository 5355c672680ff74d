"""Files that are whole or not there, and YAML that cannot grow."""

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


# In the output folder of a training. The Hub's uploads leave out what begins with an underscore.
RUN_FILE = "_run.json"  # beside a saved student: what its run was
LIVE_STATE = "_trainer_state.json"  # the trainer's state while it trains
# Files that a dataset is read from, and what `datasets` calls their formats.
DATA_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
MAX_YAML_CHARACTERS, MAX_YAML_NODES = 2**18, 20_000  # parsing takes seconds for a megabyte


def is_data_file(path: str | Path) -> bool:
    """Whether the path of a dataset is one of a single file, whose rows are the split `"train"`."""
    return Path(path).suffix in DATA_FORMATS


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it: what goes wrong leaves the earlier file, or none."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class _BoundedLoader(yaml.SafeLoader):
    """YAML whose aliases cannot stand for millions of values."""

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        _check_size(node, {})
        return node


class _Loader(_BoundedLoader):
    """YAML without two other traps: a key that is given twice, and 3e-4 read as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = None if key_node.tag.endswith(":merge") else self.construct_object(key_node, deep=True)
            if key is not None and isinstance(key, Hashable):
                if key in seen:
                    raise ValueError(f"{key!r} is given twice: give each name once.")
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """
    Read a YAML file. What is no YAML, or too large with its aliases written out, is a `ValueError`. It quotes no more
    than a character of the file, where a key may stand.
    """
    return _read_yaml(path, _Loader)


def check_yaml(path: str | Path) -> Any:
    """Check a YAML file that another library reads, as [`read_yaml`] does, and return what that library finds in it."""
    return _read_yaml(path, _BoundedLoader)


def _read_yaml(path: str | Path, loader: type[_BoundedLoader]) -> Any:
    with Path(path).open(encoding="utf-8") as file:
        text = file.read(MAX_YAML_CHARACTERS + 1)
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"it has more than {MAX_YAML_CHARACTERS} characters, which no settings need.")
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:
        raise ValueError("it is nested too deeply.") from None
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        place = "" if where is None else f" at line {where.line + 1}, column {where.column + 1}"
        # The others quote names.
        kinds = (yaml.scanner.ScannerError, yaml.parser.ParserError)
        reason = f": {error.problem}" if isinstance(error, kinds) and error.problem else ""
        raise ValueError(f"it is not valid YAML{place}{reason}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {type(error).__name__}.") from None


def _check_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of nodes below and with one, aliases written out."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError("an alias stands inside what it stands for.")
        return sizes[id(node)]
    sizes[id(node)] = 0  # under way
    size = 1
    if isinstance(node, yaml.CollectionNode):
        for part in node.value:
            size += sum(_check_size(one, sizes) for one in (part if isinstance(part, tuple) else (part,)))
            if size > MAX_YAML_NODES:
                raise ValueError(f"with its aliases written out it has more than {MAX_YAML_NODES} values.")
    sizes[id(node)] = size
    return size
