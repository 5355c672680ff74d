r"""One spelling for answers that are written in many ways, and the value of those that are plain numbers."""

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction


__all__ = ["CURRENCY", "SCALES", "Number", "closing_bracket", "number", "one_spelling", "without_unit"]

CURRENCY = "$¢-¥฿\u20a0-\u20cf"  # inside of [...]
SCALES = {
    "hundreds?": 10**2, "thousands?": 10**3, "millions?": 10**6, "billions?": 10**9, "trillions?": 10**12,
    "quadrillions?": 10**15, "dozens?": 12, "gross": 144, "lakhs?|lacs?": 10**5, "crores?": 10**7,
    "mn|mln|mio": 10**6, "bn|bln": 10**9,
}  # fmt: skip
_INITIALS = {"K": "thousand", "M": "million", "B": "billion"}
# Words after a number that are no unit: they change its value, or may.
_NOT_UNITS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    half halve halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth
    eighths ninth ninths tenth tenths twelfth twelfths twentieth twentieths hundredth hundredths thousandth thousandths
    millionth millionths billionth billionths trillionth trillionths
    hundred hundreds thousand thousands million millions billion billions trillion trillions quadrillion quintillion
    sextillion septillion octillion nonillion decillion googol zillion myriad myriads lakh lakhs lac lacs crore crores
    mil mill bil bill tril milliard milliards mrd tens kilo mega giga tera milli micro nano grand dozen dozens score scores gross pair pairs couple couples trio trios twins triplets
    single double doubles doubled triple triples tripled treble quadruple quadrupled quintuple twice thrice once fold
    twofold threefold tenfold halved
    plus minus negative multiplied divided over power raised root factorial choose modulo mod remainder sum difference product
    quotient percentile reciprocal inverse exponent
    or nor not but than point dot comma versus out about approximately
    permille ppm ppb bps basis percent
    pi tau euler infinity infinite inf nan imaginary log exp sqrt cbrt sin cos tan cot csc arcsin arccos arctan sinh
    cosh tanh gcd lcm abs sgn max det lim
    abc xyz pqr
"""
# Words of at most two letters are units or fill-ins, or else products of names: 42 xy.
_SHORT_UNITS = """
    m g s h L l N J W V A K C F mm cm dm km nm um μm µm mg kg μg µg ml mL cl cL dl dL kl kL ms ns μs µs Hz Pa kJ kW kV kN
    mA mV MW GW MJ MB GB TB KB kB mi ft yd oz lb hr pt qt in sq cu st nd rd th US Rs of on at an a Ω kΩ
"""
_WRAPPER = re.compile(
    r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|normal|cal)|mbox|hbox|emph|underline|boxed|fbox|bm|pmb"
    r"|boldsymbol|ensuremath)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
)
_NO_MEANING = re.compile(
    r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])"
    r"|\\!\s*|(?<=,)\\[,;:]\s*(?=\d{3}(?!\d))"
    r"|\\(?:(?:display|text|script|scriptscript)style|rm|bf|it|sf|tt|large|Large|huge|normalsize)(?![A-Za-z])"
    r"|\\(?:math(?:rm|bf|it|sf|tt)|text)\s+(?=[\d.-])|\\(?:text)?color(?:box)?\s*\{[^{}]*\}"
    r"|\\(?:begin|end)\{(?:align(?:ed)?|split|gathered|equation)\*?\}|\\limits(?![A-Za-z])|&(?=\s*=)"
)
_SPACE = re.compile(
    r"(?:~|\s|(?<!\\)\\(?:[,;:>\s]|(?:quad|qquad|thinspace|enspace|medspace|thickspace|nobreakspace)(?![A-Za-z])"
    r"|hspace\*?\{[^{}]*\}))+"
)
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_CURRENCY_NAME = re.compile(
    r"(?<![A-Za-z])(?:(?:US|AU?|CA?|NZ|HK|R|S)\s?(?=\\?\$\s?[\d.])"
    r"|(?:USD|EUR|GBP|INR|JPY|CNY|RMB|CAD|AUD|CHF|Rs\.?)\s?(?=[$\d.]))"
)
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "‐": "-", "‒": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ",
    "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ",
    "⟨": "(", "⟩": ")", "’": "'", "‘": "'", "′": "'", "“": '"', "”": '"', "ℝ": r"\mathbb{R}", "º": "°", "ʼ": "'",
    "、": ", ",
})  # fmt: skip
# What is written in several ways, and its one spelling, in this order.
_COMMANDS = [
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:circ|degree|textdegree)(?![A-Za-z])"), "°"),
    (re.compile(r"\\%|(?<=[\d}\)])\s*(?:percent(?:age)?|per cent|pct)(?![A-Za-z])(?: points?)?"), "%"),
    (re.compile(r"\\Omega(?![A-Za-z])"), "Ω"),
    (re.compile(r"\\mu\s?(?=[mgsLFAVW](?![A-Za-z]))"), "μ"),
    (re.compile(r"\\(?:minus|textminus)(?![A-Za-z])"), "-"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:langle|lparen)(?![A-Za-z])|\\bigl?\("), "("),
    (re.compile(r"\\(?:rangle|rparen)(?![A-Za-z])|\\bigr?\)"), ")"),
    (re.compile(r"\\l(?:brace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\r(?:brace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\ne(?![A-Za-z])|!="), r"\\neq "),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\(\s*-\\infty\s*,\s*\+?\\infty\s*\)"), r"\\mathbb{R}"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:simeq|thickapprox)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r":="), "="),
    (re.compile(r"\\(begin|end)\{(?:[bpB]|small)?(?:matrix|array)\}(?:\{[lcr|\s]*\})?"), r"\\\1{pmatrix}"),
    (re.compile(r"[(\[]\s*(\\begin\{pmatrix\}(?:(?!\\end).)*\\end\{pmatrix\})\s*[)\]]", re.DOTALL), r"\1"),
    (re.compile(r"(?<=\d)\{\s*\}(?=\d)"), " "),
    (re.compile(r"(?<![A-Za-z\\])(?:pi|PI|Pi)(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|infty)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?:√|\\?\bsqrt)\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<=[\w)}])\s?\*\*\s?(?=[\w({-])"), "^"),
    (re.compile(r"\*\*"), ""),
    (re.compile(r"\\operatorname\*?\s*\{\s*([A-Za-z]+)\s*\}"), r"\\\1 "),
    (re.compile(r"\s+\^"), "^"),
    (re.compile(r"(\\[A-Za-z]+|\}|[\^_])\s+\{"), r"\1{"),
    (re.compile(r"\^\s*([-+]?\d+)|\^\s*\(\s*([-+]?\d+)\s*\)"), r"^{\1\2}"),
    (re.compile(r"\\(?:ldots|cdots|dots[a-z]?|textellipsis)(?![A-Za-z])|\.{2,}"), "…"),
]


def one_spelling(answer: str) -> str:
    """
    Spells an answer in one way: typefaces, spaces, signs, currency, delimiters and emphasis carry no meaning.

    Args:
        answer (`str`):
            Answer as it is written.

    Returns:
        `str`: The answer in LaTeX of ASCII letters, with `°` for degrees, `%`, and `…` for an ellipsis.
    """
    if not answer.isascii():
        answer = _ascii(answer)
    answer = re.sub(
        r"\\(?:pounds|euro|yen|rupee|textdollar|texteuro|\$)", "$", re.sub(r"(?<![A-Za-z])\{,\}", ",", answer)
    )
    answer = re.sub(r"\$\s*([\d.,]+)\s?([mMbBkK])(?![A-Za-z$^])", _spelt_out, _CURRENCY_NAME.sub("", answer))
    answer = re.sub(r"(?<!\\)\\[()\[\]]|\$", " ", answer)
    answer = _SPACE.sub(" ", _NO_MEANING.sub("", _without_emphasis(answer)))
    while (unwrapped := _WRAPPER.sub(_unwrapped, answer)) != answer:
        answer = unwrapped
    for pattern, spelling in _COMMANDS:
        answer = pattern.sub(spelling, answer)
    while (unwrapped := re.sub(r"(?<![\w^}\]\\])\{([^{}\\]*)\}", r"\1", answer)) != answer:
        answer = unwrapped
    answer = _without_emphasis(_SPACE.sub(" ", answer)).rstrip(" .,;:\\").removesuffix("/-")
    answer = re.sub(r"^([\"'])(.*)\1$", r"\2", answer)
    answer = re.sub(r"^(?:minus|negative) (?=[\d.])", "-", answer)
    answer = re.sub(r"^([-+])\s+", r"\1", answer)
    while answer[:1] in ("{", "(") and closing_bracket(answer) == len(answer) - 1 and not re.search("[,;]", answer):
        answer = answer[1:-1].strip()
    return answer


def closing_bracket(text: str) -> int:
    """Index of the bracket that closes the first one, -1 if none does. Of whatever kind: intervals mix them."""
    depth = 0
    for match in re.finditer(r"[()\[\]{}]", text):
        depth += 1 if match[0] in "([{" else -1
        if depth == 0:
            return match.start()
    return -1


def _ascii(answer: str) -> str:
    answer = re.sub("([⁰¹²³⁴-⁹⁺⁻]+)", lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", answer)
    answer = re.sub("([₀-₉]+)", lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", answer)
    answer = re.sub("([¼-¾⅐-⅞])", r" \1", _INVISIBLE.sub("", answer)).translate(_SYMBOLS)
    answer = re.sub(f"[{CURRENCY}]", "$", unicodedata.normalize("NFKC", answer)).translate(_SYMBOLS)
    return re.sub(r"\d", lambda match: str(int(match[0])), answer)


def _without_emphasis(answer: str) -> str:
    inside = answer.strip("*_` ")
    is_conjugate = inside[-1:].isalpha() and answer.rstrip(" ") == f"{inside}*"
    return f"{inside}*" if is_conjugate else inside


def _spelt_out(match: re.Match[str]) -> str:
    return f"{match[1]} {_INITIALS[match[2].upper()]}"


def _unwrapped(match: re.Match[str]) -> str:
    """What stands in a typeface; words and commands are kept apart from what is before and after them."""
    after_letter = match.string[: match.start()][-1:].isalpha()
    return f" {match[1]} " if after_letter or re.search("[A-Za-z]{2}|^[A-Za-z] | [A-Za-z]$", match[1]) else match[1]


_DIGITS = (
    r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)|[1-9]\d?(?:,\d\d)+,\d{3}(?!\d)|[1-9]\d{0,2}(?: \d{3})+(?![\d/])"
    r"|[1-9]\d{0,2}(?:'\d{3})+(?!\d)|\d+"
)
_INTEGER = rf"(?:{_DIGITS})"
_POWER_OF_TEN = (
    r"[eE](?P<e>[-+]?\d{1,4})|\s?(?:\\times|\\cdot|\*|[xX])\s?\{?10\}?\s?\^\s?\{\s?(?P<ten>[-+]?\s?\d{1,4})\s?\}"
)
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?(?:"
    rf"(?:(?P<whole>{_INTEGER})(?:\s?and\s?|\s)?)??"
    rf"(?:\\frac\s?(?:\{{\s?(?P<a>-?{_INTEGER})\s?\}}|(?P<a1>\d))\s?(?:\{{\s?(?P<b>-?{_INTEGER})\s?\}}|(?P<b1>\d))"
    rf"|(?<![\d,.])(?P<a2>{_INTEGER})\s?/\s?(?P<b2>{_INTEGER}))"
    rf"|10\s?\^\{{\s?(?P<tiny>-\s?\d{{1,4}})\s?\}}"
    rf"|(?P<repeating>\d*\.\d*)\\(?:overline|bar|dot)\s?\{{(?P<period>\d+)\}}"
    rf"|(?P<decimal>{_INTEGER}?\.\d{{3}}(?: \d{{3}})*(?: \d{{1,3}})|{_INTEGER}(?:\.\d*)?|\.\d+)(?:{_POWER_OF_TEN})?"
    rf")(?P<rest>.*)"
)
_SCALE = re.compile(
    rf"(?:{'|'.join(f'(?P<s{i}>{word})' for i, word in enumerate(SCALES))})(?![A-Za-z])", re.IGNORECASE
)
_WORD = r"°?[A-Za-zμΩ]+\.?(?:\^\{-?\d\})?"
_UNIT = re.compile(
    rf"(?:\s?|\s?/(?=[A-Za-z]{{2}})|-(?=[A-Za-z]{{3}}))(?:°|{_WORD})(?:\s?(?:/|\\cdot|-|\s)\s?{_WORD})*\s?"
)
_SCALING_FIRST = re.compile(r"\s?(?:and|squared|cubed)\b", re.IGNORECASE)  # "5 cm squared" is a unit


@dataclass(frozen=True)
class Number:
    """
    A plain number.

    Attributes:
        value (`fractions.Fraction`):
            Its value; of a percentage what stands before the sign.
        percent (`bool`, *optional*, defaults to `False`):
            Whether it is a percentage.
        precision (`fractions.Fraction`, *optional*):
            Unit of the last digit of a decimal fraction with at least six significant digits, which may be rounded.
    """

    value: Fraction
    percent: bool = False
    precision: Fraction | None = None

    def equals(self, other: "Number") -> bool:
        """Whether two numbers are equal, or one is the other, which has no finite decimal fraction, rounded."""
        if self.percent and other.percent:
            return self._equals(other)
        return any(a._equals(b) for a in self.readings() for b in other.readings())

    def _equals(self, other: "Number") -> bool:
        return self.value == other.value or self.rounds(other.value) or other.rounds(self.value)

    def readings(self) -> list["Number"]:
        """What it may mean: of 25%, 25 and 0.25."""
        return [self, self.scaled(Fraction(1, 100))] if self.percent else [self]

    def rounds(self, value: Fraction, exact: bool = True) -> bool:
        """
        Whether this is a value rounded, by a program to about 16 digits. What is known to be `exact` and has a finite
        decimal fraction must not be.
        """
        if self.precision is None or abs(self.value - value) * 2 > max(self.precision, abs(value) / 10**15):
            return False
        denominator = value.denominator
        for prime in (2, 5):
            while denominator % prime == 0:
                denominator //= prime
        return denominator > 1 or not exact

    def scaled(self, factor: Fraction | int) -> "Number":
        """The number times a factor."""
        return replace(
            self, value=self.value * factor, precision=None if self.precision is None else self.precision * factor
        )


def number(answer: str) -> Number | None:
    """
    Reads a plain number: integer, decimal or repeating fraction, scientific notation, fraction, mixed number, with a
    unit, a percent sign or a word that scales it (42 million).

    Args:
        answer (`str`):
            Answer in [`one_spelling`].

    Returns:
        `Number` or `None`: The number, `None` if the answer is not a plain one.
    """
    match = _NUMBER.fullmatch(answer)
    result = _magnitude(match) if match else None
    if match is None or result is None:
        return None
    rest = match["rest"]
    if re.match("[kKMB](?![A-Za-z/])", rest):
        rest = _INITIALS[rest[0].upper()] + rest[1:]
    while scale := _SCALE.match(rest.strip()):
        result = result.scaled(list(SCALES.values())[int(str(scale.lastgroup)[1:])])
        rest = rest.strip()[scale.end() :]
    if rest.strip().startswith("%"):
        result = replace(result, percent=True)
        rest = rest.strip()[1:]
    if rest.strip() and not _is_unit(rest):
        return None
    return result.scaled(-1) if match["sign"] == "-" else result


def without_unit(answer: str) -> str:
    r"""
    Takes the unit from an expression without letters: `3\sqrt{2} cm` is `3\sqrt{2}`.

    Args:
        answer (`str`):
            Answer in [`one_spelling`].

    Returns:
        `str`: The answer without its unit; as it is where there is none or the letters may be names of unknowns.
    """
    match = re.fullmatch(r"((?:\\[A-Za-z]+|[^A-Za-z\\])*?(?:[\d)}]|\\pi|(?=°)))(°?\s?[A-Za-z°].*|°)", answer)
    if match and _is_unit(match[2]) and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", match[1]):
        return match[1].strip()
    return answer


def _magnitude(match: re.Match[str]) -> Number | None:
    """The absolute value of a match of `_NUMBER`."""
    if match["decimal"] is not None:
        return _decimal(
            re.sub("[, ']", "", match["decimal"]), int((match["e"] or match["ten"] or "0").replace(" ", ""))
        )
    if match["tiny"] is not None:
        return _decimal("1", int(match["tiny"].replace(" ", "")))
    if match["repeating"] is not None:
        before, period = match["repeating"], match["period"]
        unit = Fraction(1, 10 ** len(before.partition(".")[2]))
        return Number(Fraction(before + "0") + unit * Fraction(int(period), 10 ** len(period) - 1))
    numerator, denominator = (
        int(re.sub("[, ']", "", next(match[name] for name in names if match[name] is not None)))
        for names in (("a", "a1", "a2"), ("b", "b1", "b2"))
    )
    if denominator == 0:
        return None
    value = Fraction(numerator, denominator)
    if match["whole"] is None:
        return Number(value)
    if not 0 < numerator < denominator:  # 2 5/3 is no mixed number
        return None
    return Number(int(re.sub("[, ']", "", match["whole"])) + value)


def _decimal(digits: str, exponent: int) -> Number:
    unit = Fraction(10) ** (exponent - len(digits.partition(".")[2]))
    significant = digits.replace(".", "").strip("0")
    may_be_rounded = ("." in digits or exponent) and len(significant) >= 6
    return Number(Fraction(digits) * Fraction(10) ** exponent, precision=unit if may_be_rounded else None)


def _is_unit(text: str) -> bool:
    """Whether what follows a number is a unit, and scales nothing."""
    text = re.sub(r"\(([A-Za-z ]+)\.?\)$", r"\1", text)  # 42 (apples)
    if not _UNIT.fullmatch(text) or re.fullmatch(r"[^mgshL °]\.?|.*\ba", text) or _SCALING_FIRST.match(text):
        return False  # neither 42C nor 42x
    words = re.findall("[A-Za-zμΩ]+", text.replace(r"\cdot", " "))
    return all(
        word in _SHORT_UNITS.split() or (len(word) > 2 and word.lower() not in _NOT_UNITS.split()) for word in words
    )
