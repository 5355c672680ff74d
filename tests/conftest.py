import ast
import os
from collections import Counter, defaultdict

import torch
from hypothesis import settings


settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined

torch.set_num_threads(1)  # tiny models: threads only wait for one another


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
