r"""What an answer consists of: `x = (1, 2)` is named `x` and has the elements `1` and `2` in round brackets."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ._spelling import closing_bracket, number


__all__ = ["Answer", "read", "without_spaces"]

# Left of `=`: words and letters with subscripts or arguments, and commands that name something.
_NAME = re.compile(r"(?:[A-Za-z\s'.,()°?]|\|[A-Z]{2}\||(?<=[A-Za-z])-(?=[A-Za-z]{3}))*")
_PARTS_OF_NAMES = re.compile(
    r"_\{[^{}]*\}|_\w"
    r"|(?<=[fghuvA-Z'}])(?:\([^()]*\)|\[[^\[\]]*\])|(?<=[A-Za-z]{2})(?:\([^()]*\)|\[[^\[\]]*\])"
    r"|\\(?:sin|cos|tan|cot|sec|csc)(?=\s?(?:\\angle|[A-Z](?![a-z])))"
    r"|\\(?:angle|triangle|measuredangle|over(?:line|rightarrow)|vec|(?:wide)?hat|bar|tilde|math(?:bb|cal)|ell|prime"
    r"|square|bigcirc|Box|gcd|det|deg|dim|Pr|(?:var)?(?:[Aa]lpha|[Bb]eta|[Gg]amma|[Dd]elta|epsilon|zeta|eta|[Tt]heta"
    r"|iota|kappa|[Ll]ambda|mu|nu|[Xx]i|rho|[Ss]igma|tau|[Pp]hi|chi|[Pp]si|[Oo]mega))(?![A-Za-z])(?:\{\\?[A-Za-z]*\})?"
)
_RELATION = r"[<>]|\\(?:le|ge|neq)(?![A-Za-z])"
_EQUALITY = r"=|\\in(?![A-Za-z])|(?<=[A-Za-z]):(?=\s)"  # "Answer: 42" among them
_CONJUNCTION = r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])"


@dataclass(frozen=True)
class Answer:
    """
    An answer taken apart.

    Attributes:
        text (`str`):
            The answer whole.
        value (`str`):
            What it is without its name.
        parts (`list[str]`):
            Elements of the value; a single one where it is no list. Plus-minus is two where their order does not count.
        brackets (`str`):
            Brackets around the elements, `"()"`, `"[)"` or `"{}"`; empty without.
        name (`str`):
            Name of the value, empty without.
        equals (`list[str]`):
            What it says that its value equals, in `x = 6 * 7 = 42` the product.
        is_relation (`bool`):
            Whether it is an inequality, which has no value.
    """

    text: str
    value: str
    parts: list[str]
    brackets: str = ""
    name: str = ""
    equals: list[str] = field(default_factory=list)
    is_relation: bool = False

    @property
    def in_any_order(self) -> bool:
        """Whether the elements are a set."""
        return self.brackets in ("", "{}")


def read(text: str) -> Answer:
    """
    Takes an answer apart.

    Args:
        text (`str`):
            Answer in [`_spelling.one_spelling`].

    Returns:
        [`Answer`]: Its name, brackets and elements.
    """
    if number(text) is not None:
        return Answer(text, text, [text])
    if len(parts := list(_split(text, rf"[,;]|{_CONJUNCTION}"))) > 1:
        return Answer(text, text, _both_signs(parts))
    if len(list(_split(text, _RELATION))) > 1:
        return Answer(text, text, [text], is_relation=True)
    name, equals, value = _named(text)
    opening = re.match(r"\\\{|[(\[]", value)
    if opening is None or closing_bracket(value) != len(value) - 1:
        return Answer(text, value, _both_signs(list(_split(value, "[,;]")) or [""]), "", name, equals)
    parts = list(_split(value[opening.end() : -1].removesuffix("\\"), "[,;]"))
    brackets = opening[0][-1] + value[-1]
    return Answer(text, value, _both_signs(parts) if brackets == "{}" else parts, brackets, name, equals)


def without_spaces(text: str) -> str:
    """The text without the spaces that separate no numbers."""
    return re.sub(r"(?<![\d,]) | (?!\d)", "", text)


def _named(text: str) -> tuple[str, list[str], str]:
    """Name, what else the value is said to equal, and value of `x = 6 * 7 = 42`. Of approximations the exact one."""
    exact, _, rounded = text.rpartition(r"\approx")
    if exact.strip():
        return (exact, [], rounded.strip()) if _is_name(exact) else _named(exact)
    *others, value = list(_split(rounded, _EQUALITY)) or [""]
    name = ""
    while others and _is_name(others[0]):
        name = others.pop(0)
    return name, others, value


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(_PARTS_OF_NAMES.sub("", re.sub(r"\s+(?=[(\[])", "", text))))


def _both_signs(parts: list[str]) -> list[str]:
    return [part.replace(r"\pm", sign) for part in parts for sign in ("+-" if part.count(r"\pm") == 1 else "+")]


def _split(text: str, separators: str) -> Iterator[str]:
    """The parts between separators that are in no brackets. In `1,000, 2,000` commas between digits are none."""
    if re.search(r",\s", text) and not re.search(r"(?<!\d),(?!\s)|,(?!\s|\d{3}(?!\d))", text):
        separators = separators.replace("[,;]", r"(?<!\d),|,(?!\d{3}(?!\d))|;")
    depth = start = 0
    for match in re.finditer(rf"[(\[{{]|[)\]}}]|{separators}", text):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        elif depth == 0:
            if text[start : match.start()].strip():
                yield text[start : match.start()].strip()
            start = match.end()
    if text[start:].strip():
        yield text[start:].strip()
