"""Markdown in a terminal: its tables drawn, in the form that fits."""

import re
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .._messages import message


_BORDER = re.compile(r"\s*\|\s*")
_ENDLESS = 10_000  # width in which no table has to break


def draw_markdown(text: str) -> None:
    """Print Markdown with its tables drawn."""
    console = Console()
    for is_table, lines in groupby(message(text).rstrip("\n").split("\n"), lambda line: line.startswith("|")):
        if not is_table:
            console.print("\n".join(lines), markup=False, highlight=False)
            continue
        columns, rule, *rows = (_BORDER.split(line)[1:-1] for line in lines)
        for table in _fitting(columns, rows, [cell.startswith(":") for cell in rule], console):
            console.print(table)


def _fitting(columns: list[str], rows: list[list[str]], left: list[bool], console: Console) -> list[Table]:
    """The table, where it is too wide a row for each column of it, and where that is too wide too a table for each row."""
    name = left.index(True) if True in left else 0
    metrics = [index for index in range(len(columns)) if index != name]

    def turned(of: Sequence[list[str]]) -> Table:
        values = [[columns[index], *(row[index] for row in of)] for index in metrics]
        return _table([columns[name], *(row[name] for row in of)], values, [True] + [False] * len(of))

    for table in (_table(columns, rows, left), turned(rows)):
        width = Measurement.get(console, console.options.update_width(_ENDLESS), table).maximum
        if width <= console.width:
            return [table]
    return [turned([row]) for row in rows]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[bool]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column, is_left in zip(columns, left, strict=True):
        table.add_column(Text(column), justify="left" if is_left else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # as they are: no cell is markup
    return table
