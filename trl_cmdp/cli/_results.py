"""What a command shows of its results: tables in a terminal, Markdown where it is piped, JSON for a machine."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from .._messages import say


Show = Callable[[str, Any], None]


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json to a command."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and all else to stderr")


@contextmanager
def results(as_json: bool) -> Iterator[Show]:
    """
    A function by which a command shows its results, given as Markdown and as what JSON has. With `as_json` whatever else
    is printed meanwhile goes to stderr.
    """
    stdout = sys.stdout

    def show(markdown: str, content: Any) -> None:
        if as_json:
            print(json.dumps(content, indent=2, allow_nan=False), file=stdout, flush=True)
        else:
            show_markdown(markdown)

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield show


def show_markdown(text: str) -> None:
    """Print Markdown, its tables drawn where stdout is a terminal."""
    if not sys.stdout.isatty():
        say(text)
        return
    from ._tables import draw_markdown  # `trl-cmdp --help` should not wait for rich

    draw_markdown(text)
