"""The documentation site builds strictly: no dead internal link, anchor or API reference, nothing loaded from elsewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


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


def test_pages_load_nothing_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not loaded, f"{page.name} loads {loaded}"


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
