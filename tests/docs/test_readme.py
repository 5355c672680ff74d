"""The README: what its first screen holds, where its links lead, the extras, and its figures."""

import json
import re
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIRST_SCREEN = README.split("\n## ")[0]
LINKS = dict(re.findall(r"^\[(\w+)\]: (\S+)$", README, re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_first_screen():
    """What it is, a picture, two commands, three changed lines, and why, in forty lines."""
    assert len(FIRST_SCREEN.splitlines()) <= 40
    assert re.search(r"<img alt=\"[^\"]+\" src=\"docs/images/[\w-]+\.svg\">", FIRST_SCREEN)
    commands, diff = re.findall(r"```(?:bash|diff)\n(.*?)```", FIRST_SCREEN, re.DOTALL)
    assert len(commands.splitlines()) == 2
    assert len(re.findall(r"^\+", diff, re.MULTILINE)) == 3
    assert len(re.findall(r"^\| (?!rather than)", FIRST_SCREEN, re.MULTILINE)) == 6


def test_each_link_is_defined_and_used():
    used = set(re.findall(r"\]\[(\w+)\]", README))
    assert used == LINKS.keys()
    assert not re.findall(r"\]\((?!https://)", README), "links stand at the end of the file, in one place"


@pytest.mark.parametrize("target", [*LINKS.values(), *re.findall(r"(?:src|srcset)=\"([^\"]+)\"", README)])
def test_links_lead_somewhere(target: str):
    """Within the repository by path, or by the address that the package's metadata give it."""
    target = target.removeprefix(f"{PROJECT.get('urls', {}).get('Repository')}/blob/main/")
    if target.startswith("https://"):
        return
    path, _, anchor = target.partition("#")
    assert (ROOT / path).is_file()
    assert not anchor or anchor in anchors(ROOT / path)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_extras_are_those_of_the_metadata(page: str):
    section = re.search(r"^(?:### )?Extras\b.*?(?=\n## |\n#|\Z)", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    listed = section[0] if page.startswith("docs") else section[0].split("\n\n")[0]
    names = set(re.findall(r"`([a-z][a-z-]*)`", listed))
    assert names == PROJECT["optional-dependencies"].keys()


def test_figures_of_the_demo_task():
    """Those beside GRPO and GKD are of the comparison's summary."""
    methods = json.loads((ROOT / "benchmarks/results/arithmetic/summary.json").read_text())["methods"]
    rate = {
        (row["method"], name): f"{100 * row[name]['value']:.1f}%" for row in methods for name in ("right", "valid")
    }
    rows = [line for line in FIRST_SCREEN.splitlines() if line.startswith("| ")]
    grpo = [rate[method, name] for method in ("grpo", "constrained") for name in ("right", "valid")]
    assert re.findall(r"\d+\.\d%", rows[1]) == grpo
    assert re.findall(r"\d+\.\d%", rows[2]) == [rate["gkd", "right"], rate["teacher", "right"]]


def test_figures_of_the_language_model():
    """Those of the committed run on GSM-Symbolic."""
    summary = json.loads((ROOT / "benchmarks/results/gsm_symbolic_gpu/validation/summary.json").read_text())
    sampled = {each["settings"]["name"]: each["sampled"] for each in summary["evaluations"]}

    def within(name: str) -> str:
        return f"{100 * sampled[name]['costs']['satisfaction']['value']:.1f}%"

    def correct(name: str) -> str:
        return f"{100 * sampled[name]['right']['value']:.1f}%"

    line = next(line for line in FIRST_SCREEN.splitlines() if "GSM-Symbolic" in line)
    assert re.findall(r"\d+\.\d%", line) == [
        *map(within, ("constrained", "grpo", "gkd")),
        *map(correct, ("gkd", "constrained", "student", "teacher", "lambda")),
        within("lambda"),
    ]
    difference = next(each for each in summary["differences"] if each["name"] == "gkd")["right"]
    assert f"{-100 * difference['value']:.1f} points fewer correct answers" in line
    assert difference["high"] < 0
