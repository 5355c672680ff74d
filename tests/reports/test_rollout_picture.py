"""The picture of shaded rollouts: every token at its place, in the colours of the report."""

import math
import re
from importlib.resources import files
from xml.etree import ElementTree

import pytest
from report_runs import rollouts, settings

from trl_cmdp.reports.rollout_picture import _DARK, _LIGHT, _placed, plot_rollouts


def evaluations(*scales):
    return [(settings(f"student {scale}"), rollouts(scale)) for scale in scales]


@pytest.mark.parametrize("stacked", [False, True])
def test_a_picture_is_drawn_of_any_number_of_students(tmp_path, stacked):
    for name, kind in (("a.svg", b"<?xml"), ("a.png", b"\x89PNG")):
        plot_rollouts(evaluations(0.1, 1, 3), tmp_path / name, problems=[0, 2], stacked=stacked)
        assert (tmp_path / name).read_bytes().startswith(kind)
    sizes = [
        float(ElementTree.parse(tmp_path / "a.svg").getroot().get(key).removesuffix("pt"))
        for key in ("width", "height")
    ]
    assert (sizes[0] > sizes[1]) != stacked


@pytest.mark.parametrize("width", [5, 40, 60])
def test_the_legend_is_inside_the_picture(tmp_path, width):
    """Whatever the lines have room for: it has eight boxes, and was cut off beside one column of the default width."""
    plot_rollouts(evaluations(1), tmp_path / "a.svg", problems=[0], width=width)
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    boxes = root.findall(".//{*}g[@id]/{*}path[@d]")
    right = max(float(x) for box in boxes for x in re.findall(r"[ML] (\S+)", box.get("d")))
    assert len(boxes) > 8
    assert right <= float(root.get("width").removesuffix("pt"))


def test_a_student_without_the_problem_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'student 1' has no rollout with costs of problem 7"):
        plot_rollouts(evaluations(1), tmp_path / "a.svg", problems=[7])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["ab", "cd"], [(0, 0, 0, "ab"), (1, 0, 2, "cd")]),
        (
            ["abc", "def", "g"],
            [(0, 0, 0, "abc"), (1, 1, 0, "def"), (2, 1, 3, "g")],
        ),  # no token is cut that fits a line
        (["abcdefgh"], [(0, 0, 0, "abcde"), (0, 1, 0, "fgh")]),
        (["a\n", "b"], [(0, 0, 0, "a↵"), (1, 1, 0, "b")]),
        (["\n\n", "b"], [(0, 0, 0, "↵"), (0, 1, 0, "↵"), (1, 2, 0, "b")]),
        (["", "a"], [(1, 0, 0, "a")]),
        (["你好", "吗"], [(0, 0, 0, "你好"), (1, 1, 0, "吗")]),  # two places each
        (["\x1b[0m"], [(0, 0, 0, "�[0m")]),
    ],
)
def test_tokens_stand_behind_one_another_in_lines_of_five(tokens, expected):
    assert list(_placed(tokens, 5)) == expected


def srgb(lightness, chroma, hue):
    """A colour of CSS's oklch(), as hex."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    cone = [
        (lightness + x * a + y * b) ** 3
        for x, y in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
    ]
    rows = (
        (4.0767416621, -3.3077115913, 0.2309699292),
        (-1.2684380046, 2.6097574011, -0.3413193965),
        (-0.0041960863, -0.7034186147, 1.7076147010),
    )
    linear = [sum(map(math.prod, zip(row, cone, strict=True))) for row in rows]
    parts = [12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in linear]
    return "#" + "".join(f"{min(255, max(0, round(255 * part))):02x}" for part in parts)


def test_the_colours_are_the_reports():
    style = (files("trl_cmdp.reports") / "report.css").read_text()
    numbers = re.findall(r"--shade-\d: oklch\(([\d.]+) ([\d.]+) ([\d.]+)\)", style)
    shades = [srgb(*map(float, shade)) for shade in numbers]
    assert shades == [*_LIGHT.shades, *_DARK.shades]
    for name in ("paper", "ink", "muted", "over"):
        assert re.findall(rf"--{name}: (#\w+)", style) == [getattr(_LIGHT, name), getattr(_DARK, name)]
