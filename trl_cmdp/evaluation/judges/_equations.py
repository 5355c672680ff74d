"""Reads the equations and numbers that prose about arithmetic writes. Exact, bounded, and without `eval`."""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple


_MAX_DIGITS = 24  # of one number; longer ones are read as words
_MAX_BITS = 512  # of a value's numerator or denominator
_MAX_EXPONENT = 16
_MAX_TOKENS = 200  # of one expression, which bounds how deep it is nested as well

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: value for value, word in enumerate(_ONES.split())}
NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), start=3)}
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
    | (?P<number>
        (?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?P<percent>\s?%)?
    )
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


class Token(NamedTuple):
    """A piece of an expression: `kind` is number, variable, operator, open or close."""

    kind: str
    text: str
    value: Fraction = Fraction(0)
    decimals: int = 0
    percent: bool = False


@dataclass
class Side:
    """One side of an equality."""

    tokens: list[Token] = field(default_factory=list)  # its expression; none where the text has only words
    unit: str = ""  # the last word after it, without a plural s
    approximate: bool = False  # whether ≈ comes before it
    depth: int = 0  # parentheses that are open, while it is read
    interrupted: bool = False  # whether words follow the last token, while it is read

    @property
    def complete(self) -> bool:
        """Whether it ends with an operand."""
        return bool(self.tokens) and self.tokens[-1].kind in ("number", "variable", "close")

    @property
    def readable(self) -> bool:
        """Whether its expression is complete and without variables."""
        return self.complete and all(token.kind != "variable" for token in self.tokens)

    @property
    def bare(self) -> bool:
        """Whether it is a number and nothing else."""
        return not any(token.kind == "operator" for token in self.tokens[1:])

    def value(self, percent: Fraction) -> Fraction | None:
        """Value with `%` as a factor; `None` if the expression has none, or none of a bounded size."""
        try:
            return self._evaluate(self._tree, percent)
        except (ArithmeticError, SyntaxError):
            return None

    @cached_property
    def _tree(self) -> ast.expr:
        """The expression as Python reads it, each number as its index in `tokens`."""
        parts = (str(i) if token.kind == "number" else token.text for i, token in enumerate(self.tokens))
        return ast.parse("".join(parts), mode="eval").body

    def _evaluate(self, node: ast.expr, percent: Fraction) -> Fraction:
        match node:
            case ast.Constant(value=int(index)):
                number = self.tokens[index]
                return number.value * percent if number.percent else number.value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._evaluate(operand, percent)
            case ast.BinOp(left=left, op=operation, right=right):
                value = _OPERATIONS[type(operation)](self._evaluate(left, percent), self._evaluate(right, percent))
                if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
                    raise OverflowError
                return value
        raise SyntaxError


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or not 0 <= exponent <= _MAX_EXPONENT:
        raise OverflowError
    return base ** int(exponent)


_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: _power,
}


def normalise(text: str) -> str:
    """Text with one sign for each operation, without currency signs, LaTeX and markup."""
    for sign, replacement in _SIGNS.items():
        text = text.replace(sign, replacement)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def read_chains(text: str) -> Iterator[list[Side]]:
    """
    Chained equalities of a normalised text, in its order: the sides of each, at least two. An expression begins after
    the last number that no operator connects to it.
    """
    for line in text.splitlines():
        yield from _Reader().read(line)


def read_numbers(text: str) -> Iterator[Token]:
    """Numbers of a normalised text that are written in digits."""
    for match in _TOKEN.finditer(text):
        digits = match["digits"] or (match["ordinal"] or "")[:-2]
        if digits and len(digits) <= _MAX_DIGITS:
            yield _number(digits, bool(match["percent"]))


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
        self.found: list[list[Side]] = []
        self.chain: list[Side] = []
        self.side = Side()

    def read(self, line: str) -> list[list[Side]]:
        end, before = 0, "space"
        for match in _TOKEN.finditer(line):
            kind = str(match.lastgroup)
            if kind != "space":
                self.take(kind, match, tight=match.start() == end, before=before)
                end, before = match.end(), kind
        self.end_chain()
        return self.found

    def take(self, kind: str, match: re.Match[str], tight: bool, before: str) -> None:
        text = match[0]
        if kind == "times":
            kind, text = ("operator", "*") if self.side.complete else ("letter", text)
        match kind:
            case "letter" if text not in _PLAIN_LETTERS or before == "operator":
                self.operand(Token("variable", text), tight)
            case "number" if len(text) <= _MAX_DIGITS:
                self.operand(_number(match["digits"], bool(match["percent"])), tight)
            case "open":
                self.operand(Token("open", "("), tight)
                self.side.depth += 1
            case "operator":
                # A minus without a left operand is a sign, or a bullet where nothing is before it.
                sign = text == "-" and bool(self.side.tokens or self.chain)
                if (self.side.complete or sign) and len(self.side.tokens) <= _MAX_TOKENS:
                    self.add(Token("operator", "**" if text == "^" else text))
            case "close" if self.side.depth and self.side.complete:
                self.add(Token("close", ")"))
                self.side.depth -= 1
            case "equal":
                self.end_side()
                self.side.approximate = text == "≈"
            case "close" | "arrow" | "other":
                self.end_chain()
            case _:
                self.side.interrupted = True
                if self.side.complete:
                    self.side.unit = text.lower().lstrip("-/ ").removesuffix("s")

    def operand(self, token: Token, tight: bool) -> None:
        if self.side.complete:
            if tight and not self.side.interrupted and token.kind != "number":
                self.add(Token("operator", "*"))  # 2(3 + 4), 2x
            else:
                self.end_chain()
        if len(self.side.tokens) > _MAX_TOKENS:
            self.end_chain()
        self.add(token)
        self.side.unit = ""

    def add(self, token: Token) -> None:
        self.side.tokens.append(token)
        self.side.interrupted = False

    def end_side(self) -> None:
        for _ in range(self.side.depth):  # "(5 * 3 = 15)"
            self.side.tokens.remove(Token("open", "("))
        self.chain.append(self.side)
        self.side = Side()

    def end_chain(self) -> None:
        if self.chain:
            while self.side.tokens and self.side.tokens[-1].kind in ("operator", "open"):
                self.side.depth -= self.side.tokens.pop().kind == "open"
            self.end_side()
            self.found.append(self.chain)
        self.chain, self.side = [], Side()
