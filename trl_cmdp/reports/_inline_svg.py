"""A figure as SVG inside a page: in the page's colours, light and dark, and without styles, which its policy forbids."""

import io
import re
import warnings
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from .._messages import printable
from ._figures import COLOURS


_HEX = re.compile(r"#[0-9a-f]{6}")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_FONT_SIZE = re.compile(r"([\d.]+)px")
# Matplotlib's names and values, each of which is a presentation attribute too. `font` alone is not.
_STYLE_PROPERTIES = {
    *("fill", "fill-opacity", "fill-rule", "font-size", "opacity", "text-anchor"),
    *("stroke", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap", "stroke-linejoin", "stroke-miterlimit"),
    *("stroke-opacity", "stroke-width"),
}


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """
    Write a figure as an SVG element for an HTML page.

    Colours become the page's: grey levels mixtures of its `--ink` and `--paper`, those of the palette `--series-0` and
    so on. There is no `style` attribute and no `<style>`. The name is unique in the page: ids begin with it. The
    description is for those who do not see the figure.
    """
    buffer = io.StringIO()
    # Text stays text, in the page's font; the salt makes the same figure the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has other fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
        _style_to_attributes(element)
        for key, value in element.attrib.items():
            element.attrib[key] = _rewritten(key, value, name)
    view_box = root.attrib["viewBox"]
    # What matplotlib leaves black it leaves without a colour.
    root.attrib = {"viewBox": view_box, "role": "img", "aria-labelledby": f"{name}-title", "fill": "var(--ink)"}
    title = ElementTree.Element("title", {"id": f"{name}-title"})
    title.text = printable(description)
    root.insert(0, title)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    """A name without its namespace: inside a page it is known."""
    return name.rpartition("}")[2]


def _style_to_attributes(element: ElementTree.Element) -> None:
    for declaration in filter(None, map(str.strip, element.attrib.pop("style", "").split(";"))):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (size := _FONT_SIZE.search(value)):
            element.set("font-size", size[1])
        elif key in _STYLE_PROPERTIES:
            element.set(key, value)


def _rewritten(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key in ("fill", "stroke") and _HEX.fullmatch(value):
        return _page_colour(value)
    if key in ("d", "x", "y", "points", "transform"):
        return _NUMBER.sub(lambda number: f"{float(number[0]):.2f}", value)
    return value


def _page_colour(colour: str) -> str:
    if colour in COLOURS:
        return f"var(--series-{COLOURS.index(colour)})"
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    if red == green == blue:
        return f"color-mix(in srgb, var(--ink) {100 - red / 2.55:.0f}%, var(--paper))"
    return colour
