"""
The documentation site builds strictly: no dead internal link, anchor or API reference, nothing loaded from elsewhere.
Its pages are looked at in a browser too, from a folder (`make .venv/.stamp-browser`).
"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slow import screenshots


ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs", reason="needs the extra `docs`: pip install '.[docs]'")


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(root / "mkdocs.yml")]
    return subprocess.run([*command, "--site-dir", str(site)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    result = build(ROOT, site)
    assert result.returncode == 0, result.stderr[-4000:]
    return site


def test_every_page_of_the_navigation_is_there(site: Path):
    for page in (
        "index",
        "quickstart",
        "concepts",
        "troubleshooting",
        "comparison_with_libraries",
        "benchmarks/index",
    ):
        assert (site / f"{page}.html").stat().st_size > 5000
    assert "wilson_interval" in (site / "api" / "core.html").read_text()
    assert "cost_limit_schedule" in (site / "api" / "trainers.html").read_text()


def test_formulas_are_mathml(site: Path):
    page = (site / "concepts.html").read_text()
    assert page.count("<math ") > 5
    assert "arithmatex" not in page


def test_formulas_are_typeset_on_the_page_of_the_mathematics_too(site: Path):
    page = (site / "math.html").read_text()
    assert page.count('display="block"') >= 6
    assert (site / "_site" / "stix-two-math.woff2").stat().st_size > 10_000


def test_pages_load_nothing_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not loaded, f"{page.name} loads {loaded}"


def test_each_cell_names_its_column(site: Path):
    table = re.search(r"<table>.*?</table>", (site / "comparison.html").read_text(), re.DOTALL)
    assert table is not None
    columns = re.findall(r"<th[^>]*>(.*?)</th>", table[0])
    for row in re.findall(r"<tr>\s*<td.*?</tr>", table[0], re.DOTALL):
        assert re.findall(r'<td[^>]*data-column="([^"]*)"', row) == columns


def test_long_names_break_between_their_parts_alone(site: Path):
    page = (site / "constrained.html").read_text()
    assert "<code>teacher_model_server_url</code>" in page
    assert '<code class="long">multi_objective_aggregation=<wbr>' in page


def test_the_dial_shows_what_was_measured(site: Path):
    before, *after = json.loads((ROOT / "benchmarks" / "results" / "limit_dial" / "numbers.json").read_text())
    stops = re.findall(
        r'<label[^>]*>([^<]+)</label><div class="stop">(.*?)</ol></div>', (site / "dial.html").read_text()
    )
    assert [name for name, _ in stops] == [each["stop"] for each in after]
    for (name, shown), measured in zip(stops, after, strict=True):
        assert f"<dd>{100 * measured['satisfaction_rate']:.1f}%</dd>" in shown
        limit = math.inf if name == "no limit" else measured["cost_limit"]
        for strip, costs in zip(
            re.findall(r"<svg.*?</svg>", shown), (before["costs"], measured["costs"]), strict=True
        ):
            assert strip.count("<circle") == len(costs)
            assert strip.count('<circle class="over"') == sum(cost > limit for cost in costs)


class TestInABrowser:
    @pytest.fixture(scope="class")
    def browser(self):
        pytest.importorskip("playwright", reason="needs `make .venv/.stamp-browser`")
        with screenshots.chromium() as browser:
            yield browser

    def test_search_from_a_folder(self, browser, site: Path):
        page = browser.new_page()
        page.goto((site / "index.html").as_uri())
        page.locator("input.md-search__input").fill("tolerated_violation_rate")
        found = page.locator(".md-search-result__link").first
        found.wait_for()
        assert "constrained.html" in found.get_attribute("href")

    def test_turning_the_dial(self, browser, site: Path):
        page = browser.new_page()
        page.goto((site / "dial.html").as_uri())
        shown = page.locator(".dial .stop:visible dd").all_inner_texts()
        page.locator(".dial label").last.click()
        assert page.locator(".dial .stop:visible").count() == 1
        assert page.locator(".dial .stop:visible dd").all_inner_texts() != shown

    def test_no_page_scrolls_sideways_or_breaks_a_word(self, browser, site: Path, tmp_path):
        names = ("index", "comparison", "constrained", "comparison_with_libraries", "dial", "math", "promises")
        pages = {name: (site / f"{name}.html").as_uri() for name in names}
        assert screenshots.take(browser, pages, tmp_path) == []


def test_external_links_are_well_formed(site: Path):
    links = {link for page in site.rglob("*.html") for link in re.findall(r'href="(https?:[^"]*)"', page.read_text())}
    assert links
    for link in links:
        assert re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[^\s<>\"]*)?", link), link


@pytest.mark.parametrize(
    "broken", ["[x](no_such_page.md)", "[x](math.md#no-such-anchor)", "::: trl_cmdp.core.no_such_name"]
)
def test_a_broken_link_fails_the_build(broken: str, tmp_path):
    for name in ("docs", "trl_cmdp", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    for name in ("mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs" / "gkd.md").write_text(f"# Page\n\n{broken}\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    assert broken.split("(")[-1].rstrip(")").removeprefix("::: ") in result.stdout + result.stderr
