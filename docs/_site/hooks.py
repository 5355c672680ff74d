"""
What `mkdocs build` does besides: files outside docs/ that pages link to become part of the site, so that the same
relative links hold on GitHub and here; formulas become MathML, which browsers draw without a script; long names in
code break between their parts alone; and each cell of a table carries its column's name, which a phone shows.
"""

import re
from pathlib import Path

from dial import dial
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


_BENCHMARKS = "benchmarks/README.md"  # the one of them with a place in the navigation
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)")  # target of a Markdown link or image, without its anchor
_DIAL = re.compile(r"<!-- dial: [^\n]*-->\n.*?<!-- /dial -->", re.DOTALL)  # and the picture that GitHub shows
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_HEADING = re.compile(r"<th[^>]*>(.*?)</th>", re.DOTALL)
_CELL = re.compile(r"<td([^>]*)>(.*?)</td>", re.DOTALL)
_CODE = re.compile(r"(?<!</span>)<code>([^<]*)</code>")  # within a line
_TAG = re.compile(r"<[^>]+>")
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page, or an added page, links to outside docs/."""
    root = Path(config.docs_dir).parent
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while waiting:
        source = waiting.pop()
        for target in _LINK.findall(source.read_text()):
            path = (source.parent / target).resolve()
            uri = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
            if not path.is_file() or path.is_relative_to(config.docs_dir) or uri in files.src_uris:
                continue  # what does not exist, mkdocs itself complains of
            files.append(
                File.generated(
                    config,
                    uri,
                    abs_src_path=str(path),
                    inclusion=InclusionLevel.INCLUDED if uri == _BENCHMARKS else InclusionLevel.NOT_IN_NAV,
                )
            )
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the place that a file has on the site, where docs/ is the root; and set in the dial."""
    root = Path(config.docs_dir).parent
    source = root / page.file.src_uri if page.file.generated_by else Path(page.file.abs_src_path)
    here = Path(page.file.src_uri).parent

    def on_site(match: re.Match[str]) -> str:
        path = (source.parent / match[1]).resolve()
        if not path.exists() or not path.is_relative_to(root):
            return match[1]
        inside = path.is_relative_to(config.docs_dir)
        uri = path.relative_to(config.docs_dir if inside else root)
        return "../" * len(here.parts) + uri.as_posix()

    if "\n## " not in markdown:
        page.meta["hide"] = ["toc"]  # nothing to list: its place is the page's
    markdown = _LINK.sub(on_site, markdown)
    return _DIAL.sub(lambda _: dial(root / "benchmarks" / "results" / "limit_dial"), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, and prepare code and tables for narrow screens."""

    def to_mathml(match: re.Match[str]) -> str:
        latex = match[2]
        for entity, character in _ENTITIES.items():
            latex = latex.replace(entity, character)
        if match[1] == "span":
            return convert(latex)
        return f'<div class="formula">{convert(latex, display="block")}</div>'

    return _TABLE.sub(_label_cells, _CODE.sub(_breakable, _FORMULA.sub(to_mathml, html)))


def _label_cells(table: re.Match[str]) -> str:
    """Give each cell its column's name."""
    columns = [_TAG.sub("", heading).strip().replace('"', "&quot;") for heading in _HEADING.findall(table[0])]

    def label_row(row: re.Match[str]) -> str:
        names = iter(columns)
        return _CELL.sub(lambda cell: _labelled(cell, next(names, "")), row[0])

    return _ROW.sub(label_row, table[0])


def _labelled(cell: re.Match[str], column: str) -> str:
    attributes, content = cell.groups()
    if content:
        content = f'<div class="cell">{content}</div>'
    name = f' data-column="{column}"' if column else ""
    return f"<td{attributes}{name}>{content}</td>"


def _breakable(code: re.Match[str]) -> str:
    """Let a path or a command break between its parts. A short name, or one without parts, stays on its line."""
    if len(code[1]) <= 26:
        return code[0]
    return f'<code class="long">{re.sub("(?<=[/=.:])", "<wbr>", code[1])}</code>'
