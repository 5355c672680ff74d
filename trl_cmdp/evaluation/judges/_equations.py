"""Reads the equations and numbers that prose about arithmetic writes. Exact, bounded, and without `eval`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple


_MAX_DIGITS = 24  # of one number; longer ones are read as words
_MAX_BITS = 512  # of a value's numerator or denominator
_MAX_DEPTH = 20  # of parentheses
_MAX_EXPONENT = 16
_MAX_TOKENS = 200  # of one expression

NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
} | {
    word: 10 * value
    for value, word in enumerate(["thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=3)
}
_FRACTION_WORDS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_OTHER_WORDS = {"twice": 2, "double": 2, "couple": 2, "pair": 2, "thrice": 3, "triple": 3, "dozen": 12}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}

_SIGNS = {"×": "*", "·": "*", "⋅": "*", "∗": "*", "−": "-", "–": "-", "—": "-", "≅": "≈", "’": "'", "⁄": "/"}
_SIGNS |= {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "²": "^2", "³": "^3"}
_SIGNS |= dict.fromkeys("$€£¥₹", " ")
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"<<[^<>\n]*>>", " "),  # GSM8K's calculator notes repeat the equation beside them
        (r"\\(?:text|mathrm|textbf|mathbf|boxed)\s*\{([^{}\n]*)\}", r" \1 "),
        (r"\\[dt]?frac\s*\{([^{}\n]*)\}\s*\{([^{}\n]*)\}", r"((\1)/(\2))"),
        (r"\\(?:times|cdot)\b", "*"),
        (r"\\div\b", "÷"),
        (r"\\approx\b", "≈"),
        (r"\\(?:left|right|quad|,|;|!|\[|\]|\(|\)|(?=[%$]))", " "),
        (r"(?<![0-9])\*\*|\*\*(?![0-9])", " "),  # bold, and not a power
        (r"\([^()0-9\n]*\)", " "),  # words in parentheses
        # A quotient written as a fraction is one operand of ÷.
        (r"÷\s*([0-9]+/[0-9]+)", r"/ (\1)"),
        (r"÷", "/"),
        (r"\b(?:multiplied by|times)\b(?=\s*[(0-9.])", "*"),
        (r"\bdivided by\b(?=\s*[(0-9.])", "/"),
        (r"\bplus\b(?=\s*[(0-9.])", "+"),
        (r"\bminus\b(?=\s*[(0-9.])", "-"),
        (r"(%|[0-9]/[0-9]+|\b(?:half|third|quarter))\s+of\s+(?:the\s+)?(?=[(0-9])", r"\1 * "),
        (r"\bhalf\b(?=\s*[*/+])|(?<=[*+] )half\b", "(1/2)"),
        (r"\bthird\b(?=\s*[*/+])", "(1/3)"),
        (r"\bquarter\b(?=\s*[*/+])", "(1/4)"),
        (r"\b([0-9]{1,6}) ([0-9]{1,4}/[0-9]{1,4})\b", r"(\1+\2)"),  # a mixed number
    ]
]
_TOKEN = re.compile(
    r"""
    (?P<ordinal>[0-9]+(?:st|nd|rd|th)\b)
    | (?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?P<percent>\s?%)?
    # A hyphen or slash right before a word makes a compound or a unit, as in "5-minute" and "12 km/hour".
    | (?P<word>(?:-|/\s?)?[A-Za-z]{2,}(?:['-][A-Za-z]+)*(?:\^[0-9])?)
    | (?P<times>[xX](?=\s*[(0-9.]))
    | (?P<letter>[A-Za-z])
    | (?P<arrow>[<>!]=|=>|->)
    | (?P<equal>={1,2}|≈)
    | (?P<operator>\*\*|[-+*/^])
    | (?P<open>[(\[{])
    | (?P<close>[)\]}])
    | (?P<space>\s+)
    | (?P<other>.)
    """,
    re.VERBOSE,
)
_PLAIN_LETTERS = frozenset("aAIsmghlL")  # articles and units; any other letter is a variable


class Unreadable(Exception):
    """Something that has no bounded numeric value."""


class Token(NamedTuple):
    """A piece of an expression: `kind` is number, variable, operator, open or close."""

    kind: str
    text: str
    value: Fraction = Fraction(0)
    decimals: int = 0
    percent: bool = False


@dataclass
class Side:
    """
    One side of an equality.

    Args:
        tokens (`list[Token]`):
            Its expression; empty where the text has only words.
        unit (`str`):
            Last word after it, without a plural s, `""` if there is none.
        readable (`bool`):
            Whether the expression is complete and without variables.
        approximate (`bool`):
            Whether `≈` comes before it.
    """

    tokens: list[Token] = field(default_factory=list)
    unit: str = ""
    readable: bool = True
    approximate: bool = False

    @property
    def bare(self) -> bool:
        """Whether it is a number and nothing else."""
        return not any(token.kind == "operator" and i for i, token in enumerate(self.tokens))

    @property
    def numbers(self) -> list[Token]:
        """Its numbers."""
        return [token for token in self.tokens if token.kind == "number"]

    def value(self, percent: Fraction) -> Fraction:
        """
        Value of the expression.

        Args:
            percent (`Fraction`):
                What `%` multiplies by: 1/100, or 1 where it is read as a unit.

        Raises:
            Unreadable: If it has no value, or none of a bounded size.
        """
        return _Parser(self.tokens, percent).parse()


def normalise(text: str) -> str:
    """Text with one sign for each operation, without currency signs, LaTeX and markup."""
    for sign, replacement in _SIGNS.items():
        text = text.replace(sign, replacement)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def read_chains(text: str) -> Iterator[list[Side]]:
    """
    Chained equalities of a normalised text, in its order: the sides of each, at least two.

    Args:
        text (`str`):
            What [`normalise`] returned.

    Yields:
        `list[Side]`: Sides. An expression begins after the last number that no operator connects to it.
    """
    for line in text.splitlines():
        yield from _Reader().read(line)


def read_numbers(text: str) -> Iterator[tuple[Fraction, int, bool]]:
    """
    Numbers of a normalised text that are written in digits.

    Yields:
        `tuple[Fraction, int, bool]`: Value, number of decimals, and whether `%` follows.
    """
    for match in _TOKEN.finditer(text):
        number = match["number"] or (match["ordinal"] or "")[:-2]
        if number and len(number) <= _MAX_DIGITS:
            token = _number(number, bool(match["percent"]))
            yield token.value, token.decimals, token.percent


def read_word_numbers(text: str) -> Iterator[Fraction]:
    """Numbers of a text that are written in words: "twenty-five", "two hundred", "half", "a third", "dozen"."""
    words = re.findall(r"[a-z]+|[0-9]+(?:\.[0-9]+)?", text.lower().replace(",", ""))
    for i, word in enumerate(words):
        word = word if word in NUMBER_WORDS or word in _OTHER_WORDS else word.removesuffix("s")
        before = words[i - 1] if i else ""
        if word in NUMBER_WORDS:
            value = NUMBER_WORDS[word]
            yield Fraction(value)
            if before in NUMBER_WORDS and NUMBER_WORDS[before] >= 20 and value < 10:
                yield Fraction(NUMBER_WORDS[before] + value)
        elif word in _OTHER_WORDS:
            yield Fraction(_OTHER_WORDS[word])
        elif word in _SCALES:
            factor = Fraction(before) if before[:1].isdigit() else Fraction(NUMBER_WORDS.get(before, 1))
            yield factor * _SCALES[word]
        elif word in _FRACTION_WORDS or word == "halve":
            parts = _FRACTION_WORDS.get(word, 2)
            count = NUMBER_WORDS.get(before, 1)
            yield from (Fraction(parts), Fraction(count, parts), 1 - Fraction(count, parts))


def _number(text: str, percent: bool) -> Token:
    digits = text.replace(",", "")
    return Token("number", text, Fraction(digits), len(digits.partition(".")[2]), percent)


class _Reader:
    """The chains of one line."""

    def __init__(self) -> None:
        self.chain: list[Side] = []
        self.side = Side()
        self.depth = 0  # of the side's parentheses
        self.words = False  # since the last token of the side
        self.found: list[list[Side]] = []

    def read(self, line: str) -> list[list[Side]]:
        previous_end, previous_kind = 0, "space"
        for match in _TOKEN.finditer(line):
            kind = str(match.lastgroup if match.lastgroup != "percent" else "number")
            if kind == "space":
                continue
            self.take(kind, match, tight=match.start() == previous_end, before=previous_kind)
            previous_end, previous_kind = match.end(), kind
        self.end_chain()
        return self.found

    def take(self, kind: str, match: re.Match[str], tight: bool, before: str) -> None:
        text = match[0]
        if kind == "times":
            kind, text = ("operator", "*") if self.complete else ("letter", text)
        if kind == "letter" and not (text in _PLAIN_LETTERS and before != "operator"):
            self.operand(Token("variable", text), tight)
        elif kind == "number" and len(text) <= _MAX_DIGITS:
            self.operand(_number(match["number"], bool(match["percent"])), tight)
        elif kind == "open":
            self.operand(Token("open", text), tight)
        elif kind == "operator":
            self.operator("^" if text == "**" else text)
        elif kind == "close":
            self.close()
        elif kind == "equal":
            self.equal(text == "≈")
        elif kind in ("arrow", "other"):
            self.end_chain()
        else:
            self.word(text)

    @property
    def complete(self) -> bool:
        """Whether the side ends with an operand."""
        return bool(self.side.tokens) and self.side.tokens[-1].kind in ("number", "variable", "close")

    def operand(self, token: Token, tight: bool) -> None:
        if self.complete:
            if tight and not self.words and token.kind != "number":
                self.side.tokens.append(Token("operator", "*"))  # 2(3 + 4), 2x
            else:
                self.end_chain()
        if len(self.side.tokens) > _MAX_TOKENS:
            self.end_chain()
        self.side.tokens.append(token)
        self.depth += token.kind == "open"
        self.words, self.side.unit = False, ""

    def operator(self, text: str) -> None:
        # A minus without a left operand is a sign, or a bullet where nothing is before it.
        if self.complete or (text == "-" and (self.side.tokens or self.chain)):
            self.side.tokens.append(Token("operator", text))
            self.words = False

    def close(self) -> None:
        if self.depth and self.complete:
            self.side.tokens.append(Token("close", ")"))
            self.depth -= 1
            self.words = False
        else:
            self.end_chain()

    def word(self, text: str) -> None:
        self.words = True
        if self.complete:
            self.side.unit = text.lower().lstrip("-/ ").removesuffix("s")

    def equal(self, approximate: bool) -> None:
        self.end_side(last=False)
        self.side.approximate = approximate

    def end_side(self, last: bool) -> None:
        side = self.side
        while last and side.tokens and side.tokens[-1].kind in ("operator", "open"):
            self.depth -= side.tokens.pop().kind == "open"
        for _ in range(self.depth):  # "(5 * 3 = 15)"
            side.tokens.pop(next(i for i, token in enumerate(side.tokens) if token.kind == "open"))
        side.readable = bool(side.tokens) and self.complete and all(token.kind != "variable" for token in side.tokens)
        self.chain.append(side)
        self.side, self.depth, self.words = Side(), 0, False

    def end_chain(self) -> None:
        if self.chain:
            self.end_side(last=True)
            self.found.append(self.chain)
        self.chain, self.side, self.depth, self.words = [], Side(), 0, False


class _Parser:
    """Value of an expression by recursive descent."""

    def __init__(self, tokens: Sequence[Token], percent: Fraction):
        self.tokens = [*tokens, Token("end", "")]
        self.place = 0
        self.depth = 0
        self.percent = percent

    def parse(self) -> Fraction:
        value = self.sum()
        if self.tokens[self.place].kind != "end":
            raise Unreadable
        return value

    def accept(self, operators: str) -> str:
        token = self.tokens[self.place]
        if token.kind != "operator" or token.text not in operators:
            return ""
        self.place += 1
        return token.text

    def sum(self) -> Fraction:
        value = self.product()
        while operator := self.accept("+-"):
            term = self.product()
            value = _bounded(value + term if operator == "+" else value - term)
        return value

    def product(self) -> Fraction:
        value = self.power()
        while operator := self.accept("*/"):
            factor = self.power()
            if operator == "/" and factor == 0:
                raise Unreadable
            value = _bounded(value * factor if operator == "*" else value / factor)
        return value

    def power(self) -> Fraction:
        if self.accept("-"):
            self.deeper()
            value = -self.power()
            self.depth -= 1
            return value
        base = self.atom()
        if self.accept("^"):
            exponent = self.atom()
            if exponent.denominator != 1 or not 0 <= exponent <= _MAX_EXPONENT:
                raise Unreadable
            return _bounded(base ** int(exponent))
        return base

    def atom(self) -> Fraction:
        token = self.tokens[self.place]
        self.place += 1
        if token.kind == "number":
            return token.value * self.percent if token.percent else token.value
        if token.kind != "open":
            raise Unreadable
        self.deeper()
        value = self.sum()
        self.depth -= 1
        if self.tokens[self.place].kind != "close":
            raise Unreadable
        self.place += 1
        return value

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise Unreadable
    return value
