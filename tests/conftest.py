import ast
import gc
import os
import signal
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import settings


settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined

torch.set_num_threads(1)  # tiny models: threads only wait for one another


def pytest_collection_finish(session):
    """
    What is imported stays: the garbage collector need not walk through it again. Accelerate collects all garbage before
    every training run, which was a quarter of the time of the tests that train.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    """At the end everything is freed as ever: an extension module says what it thinks is leaked."""
    gc.unfreeze()


@pytest.fixture
def in_foreground():
    """Ctrl-C stops this process, as one that a terminal waits for. Tests that a script runs in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def pytest_terminal_summary(terminalreporter, config):
    """`make test-slow` ends with a line for each promise: a file's first sentence, and what became of its tests."""
    if config.option.markexpr != "slow":
        return
    outcomes = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            outcomes[report.nodeid.partition("::")[0]][outcome] += 1
    terminalreporter.section("promises")
    for name, counts in sorted(outcomes.items()):
        docstring = ast.get_docstring(ast.parse((config.rootpath / name).read_text()))
        promise = " ".join(docstring.split("\n\n")[0].split())
        terminalreporter.line(f"{', '.join(f'{count} {outcome}' for outcome, count in counts.items())}: {promise}")
