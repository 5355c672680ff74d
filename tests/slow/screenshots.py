"""
Screenshots of pages at the widths of a desktop and a phone, light and dark, each checked: nothing scrolls sideways, and
no word is broken.

    python tests/slow/screenshots.py                                    # two reports, and pages of the site if built
    python tests/slow/screenshots.py demo=outputs/demo/report/report.html dial=site/limit/index.html

Needs `make .venv/.stamp-browser`. The exit code is 1 if a page has a fault, which is printed.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_cmdp.cli import main as trl_cmdp


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# What the reports are of: a single student, and everything that there is.
REPORTS = {
    "report-small": [RESULTS / "shaded_rollouts" / "constrained.jsonl"],
    "report-large": [
        *sorted((RESULTS / "gsm_symbolic_cpu" / "records").glob("*-test.jsonl")),
        *sorted((RESULTS / "gsm_symbolic_cpu" / "training").glob("*.json")),
        RESULTS / "nested",
    ],
}
SITE = {"landing": "index.html", "comparison": "comparison.html", "trainer": "constrained.html"}
VIEWPORTS = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
SCHEMES = ("light", "dark")

# Code may scroll within its box, and what a model wrote may break anywhere: it has words of any length.
FAULTS = r"""
() => {
  const faults = [];
  const page = document.scrollingElement;
  if (page.scrollWidth > page.clientWidth) faults.push(`the page is ${page.scrollWidth} px wide, ${page.clientWidth} px are shown`);
  const shown = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  for (const element of document.body.querySelectorAll("*")) {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
    if (!scrolls || element.closest("pre, code, .completion, svg") || element.querySelector(":scope > pre, :scope > code")) continue;
    if (element.scrollWidth > element.clientWidth + 1 && shown(element))
      faults.push(`${element.tagName.toLowerCase()}.${element.className} is ${element.scrollWidth} px wide, ${element.clientWidth} px are shown: ${element.textContent.trim().slice(0, 60)}`);
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (parent.closest("script, style, noscript, pre, .completion, svg") || !shown(parent)) continue;
    for (const word of node.data.matchAll(/[\p{L}\p{N}_]{2,}/gu)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = [...range.getClientRects()].filter((box) => box.width > 0).map((box) => Math.round(box.bottom / 4));
      if (new Set(lines).size > 1) faults.push(`the word ${word[0]} is broken: ${node.data.trim().slice(0, 60)}`);
    }
  }
  return [...new Set(faults)];
}
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's: the Chromium that `make .venv/.stamp-browser` installs, or `TRL_CMDP_BROWSER`."""
    from playwright.sync_api import sync_playwright

    names = ("chromium-headless-shell", "chromium", "google-chrome")
    executable = os.environ.get("TRL_CMDP_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        raise RuntimeError(
            "There is no Chromium: run `make .venv/.stamp-browser`, or set TRL_CMDP_BROWSER to its path."
        )
    with sync_playwright() as playwright:
        # Its sandbox needs a user other than root, which a container has not.
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])


def take(browser: Any, pages: dict[str, str], output_dir: Path) -> list[str]:
    """Write NAME-desktop-light.png and so on of each page, given its address. Returns the faults."""
    output_dir.mkdir(parents=True, exist_ok=True)
    found = []
    for name, address in pages.items():
        for device, viewport in VIEWPORTS.items():
            for scheme in SCHEMES:
                page = browser.new_page(viewport=viewport, color_scheme=scheme)
                page.goto(address)
                page.wait_for_timeout(300)  # fonts, and what scripts do at the start
                page.screenshot(path=output_dir / f"{name}-{device}-{scheme}.png", full_page=True)
                found += [f"{name}, {device}, {scheme}: {fault}" for fault in page.evaluate(FAULTS)]
                page.close()
    return found


def default_pages(output_dir: Path) -> dict[str, str]:
    """Two reports, made now, and the site's pages, if it has been built."""
    pages = {}
    for name, runs in REPORTS.items():
        folder = output_dir / name
        if trl_cmdp(["report", *map(str, runs), "--output-dir", str(folder)]):
            raise RuntimeError(f"{name} could not be made.")
        pages[name] = folder / "report.html"
    pages |= {name: ROOT / "site" / path for name, path in SITE.items() if (ROOT / "site" / path).is_file()}
    return {name: path.resolve().as_uri() for name, path in pages.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="NAME=PATH_OR_URL", help="pages, instead of the default ones")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/screenshots"))
    arguments = parser.parse_args(argv)
    pages = dict(page.split("=", 1) for page in arguments.pages)
    pages = {name: url if "://" in url else Path(url).resolve().as_uri() for name, url in pages.items()}
    pages = pages or default_pages(arguments.output_dir)
    with chromium() as browser:
        faults = take(browser, pages, arguments.output_dir)
    print(*faults, f"{len(faults)} faults; pictures in {arguments.output_dir}/", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
