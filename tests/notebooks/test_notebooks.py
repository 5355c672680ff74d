"""
The notebooks: what is committed is of the sources beside it and clean, and every source runs.

The slow part needs `pip install --group notebooks`, and one notebook what `demo_llm.py` needs (`make test-slow`).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trl_cmdp.evaluation import read_rollout_records, summarize
from trl_cmdp.reports import evaluation_table


ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples" / "notebooks"
LARGEST = 400_000  # bytes
# Figures that each claims, and values of its parameters with which it runs in a minute.
FIGURES = {
    "quickstart": 2,
    "reward_hacking_by_eye": 3,
    "qlora_quantised_teacher": 3,
    "choosing_the_limit": 2,
    "custom_rewards_and_tasks": 2,
    "reading_an_evaluation": 4,
    "teacher_that_sees_more": 2,
}
SMALL = {
    "quickstart": {"STEPS": 2, "HELD_OUT": 16},
    "reward_hacking_by_eye": {"STEPS": 1, "HELD_OUT": 16},
    "qlora_quantised_teacher": {"STEPS": 1, "HELD_OUT": 2, "TOKENS": 8},
    "choosing_the_limit": {"IMITATION_STEPS": 1, "LIMITS": [0.1, 1.0], "STEPS": 1, "HELD_OUT": 16},
    "custom_rewards_and_tasks": {"STEPS": 1, "HELD_OUT": 16},
    "reading_an_evaluation": {"SIMULATIONS": 100},
    "teacher_that_sees_more": {"STEPS": 1, "PROMPT_STEPS": 1, "HELD_OUT": 2, "TOKENS": 6},
}
# Of any machine: where files lie, and what opens an account.
PRIVATE = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|work|workspace|Users|var|mnt|content)/"
    r"|[A-Z]:\\|\bhf_[A-Za-z0-9]{8}|\bsk-[A-Za-z0-9-]{8}|\bgh[pousr]_[A-Za-z0-9]{8}|\bBearer "
)


def source_cells(text: str) -> list[tuple[str, str]]:
    """Kind and text of the cells of a source in percent format."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:  # before the first one stands the header
        mark, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in mark else "code"
        lines = body.strip("\n").split("\n")
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append((kind, "\n".join(lines)))
    return cells


def load(name: str) -> dict:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def outputs(notebook: dict) -> Iterator[dict]:
    for cell in notebook["cells"]:
        yield from cell.get("outputs", [])


def texts(output: dict) -> Iterator[str]:
    """Everything that an output shows but pictures."""
    if output["output_type"] == "stream":
        yield "".join(output["text"])
    for kind, content in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield "".join(content)


def count_figures(notebook: dict) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == FIGURES.keys() == SMALL.keys()
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert [name for name in FIGURES if f"(../examples/notebooks/{name}.ipynb)" not in page] == []


@pytest.mark.parametrize("name", FIGURES)
def test_outputs_are_of_this_source(name):
    made = [(cell["cell_type"], "".join(cell["source"])) for cell in load(name)["cells"]]
    assert made == source_cells((NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")), "run: make notebooks"


@pytest.mark.parametrize("name", FIGURES)
def test_outputs_are_whole_and_clean(name):
    notebook = load(name)
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < LARGEST
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code) == 1
    assert count_figures(notebook) == FIGURES[name]
    for output in outputs(notebook):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", "".join(output["text"])  # warnings, progress bars
        for text in texts(output):
            assert not PRIVATE.search(text), text


@pytest.mark.parametrize("name", FIGURES)
def test_links_lead_somewhere(name):
    text = "\n".join(text for kind, text in source_cells((NOTEBOOKS / f"{name}.py").read_text()) if kind == "markdown")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert [target for target in targets if "://" not in target and not (NOTEBOOKS / target).exists()] == []


def test_evaluation_that_is_read_is_the_committed_one():
    """The notebook's first table, computed from the records again."""
    names = ("teacher", "student", "grpo", "gkd", "lambda", "constrained")
    records = ROOT / "benchmarks" / "results" / "gsm_symbolic" / "records"
    summaries = [summarize(*read_rollout_records(records / f"{name}-validation.jsonl")) for name in names]
    shown = [
        "".join(output["data"]["text/markdown"])
        for output in outputs(load("reading_an_evaluation"))
        if "text/markdown" in output.get("data", {})
    ]
    assert evaluation_table(summaries) in shown, "run: make notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_source_runs(name, tmp_path, monkeypatch):
    """In a real kernel, at a small scale: no cell fails, and the figures are there."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "scripts")
    from make_notebooks import execute

    parameters = dict(SMALL[name])
    source = NOTEBOOKS / f"{name}.py"
    if "\nOUTPUT_DIR = " in source.read_text():
        parameters["OUTPUT_DIR"] = str(tmp_path)
    assert count_figures(execute(source, parameters)) == FIGURES[name]


@pytest.mark.slow
def test_a_parameter_that_is_none_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "scripts")
    from make_notebooks import execute

    with pytest.raises(ValueError, match="has no parameter STEP"):
        execute(NOTEBOOKS / "quickstart.py", {"STEP": 1})
