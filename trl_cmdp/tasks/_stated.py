r"""Which answer a completion states: the last `\boxed{...}` or `#### ...`, else the last number or formula."""

import re

from ._spelling import CURRENCY, SCALES


__all__ = ["last_boxed", "stated_answer"]

_LONGEST_TEXT = 20_000  # characters at the end of a completion that are read
_LONGEST_ANSWER = 500  # characters of an answer; the longest of MATH has 159
_MARK = re.compile(
    r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=\S)"
    rf"|####[ \t]*[*_]*[ \t]*(?=[-+−\d.{CURRENCY}¼-¾⅐-⅞√π∞\\(\[{{])"
)
_FORMULA = re.compile(
    # Bounded, or text full of opening signs would take quadratic time.
    rf"\$\$(.{{1,{_LONGEST_ANSWER}}}?)\$\$|(?<!\\)\$((?:\\.|[^$\\\n]){{1,{_LONGEST_ANSWER}}})\$"
    rf"|\\\((.{{1,{_LONGEST_ANSWER}}}?)\\\)|\\\[(.{{1,{_LONGEST_ANSWER}}}?)\\\]",
    re.DOTALL,
)
# What changes the value of a number before it, outside a box or formula too.
_SCALE = rf"(?:{'|'.join(SCALES)}|per\s?cent|squared|cubed|factorial|\\?pi)\b"
_SCALE_AFTER = re.compile(
    rf"(?:[ \t$~]|\\[),;! ]|\\(?:text|mathrm)\{{)*"
    rf"(\\?%|{_SCALE}|\^\{{?\w+\}}?|(?:\\times|\\cdot|×|·)\s?10\s?\^\s?\{{?[-−]?\d+\}}?)",
    re.IGNORECASE,
)
_DIGITS = r"(?:\d{1,3}(?:,(?:\d\d,)*\d{3}|[\u00a0\u2009\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_LAST_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![)\]}}])[-+−–])?\\?[{CURRENCY}]?(?:(?:√|\bsqrt)\s?\(?)?(?:{_DIGITS})"
    r"(?:\s?(?:[x×*·⋅]|\\times|\\cdot)\s?10\s?(?:\^|\*\*)?[\s{(]*[-+−]?[\d⁰¹²³⁴-⁹⁻]+[)}]?"  # 6.63 x 10^-34
    r"|[^\W\d_]+[+-]?\d*"  # 1e-7, 42k, 5cm, 42x, 2π
    r"|\s?[¼-¾⅐-⅞]|\s\d+\s?/\s?\d+|\s?/\s?\d+)?"
    rf"(?:\^\S*[\w)}}]|\*\*\(?-?\w+\)?|[⁰¹²³⁴-⁹⁻]+)?(?:\s?\\?%)?(?:[ \t]{_SCALE})*",
    re.IGNORECASE,
)


def stated_answer(completion: str) -> str | None:
    r"""
    Finds the final answer that a completion states.

    It is what the last `\boxed{}` holds, or follows the last `####` in its line, whichever comes later. A completion
    without either states the last number, or the last formula between `$` signs or the like if that ends later. Marks
    that hold nothing, as in a repeated prompt, do not count. A word that scales a number belongs to it, also after the
    box: `\boxed{42}` million.

    Args:
        completion (`str`):
            Completion, without special tokens.

    Returns:
        `str` or `None`: The answer, `None` if there is none, or it is cut off (a box never closed) or longer than any
        answer (500 characters).
    """
    text = completion[-_LONGEST_TEXT:]
    for mark in reversed(list(_MARK.finditer(text))):
        content, end = _marked(text, mark)
        if content is None:
            return None
        if content:
            minus = "-" if re.search(r"(?<![\w)}-])[-−]\$?$", text[: mark.start()]) else ""
            return _scaled(minus * mark[0].startswith("\\") + content, text, end)
    candidates = [(match.end(), match[match.lastindex or 0].strip()) for match in _FORMULA.finditer(text)][-1:]
    candidates += [(match.end(), match[0].strip()) for match in _LAST_NUMBER.finditer(text)][-1:]
    if not candidates:
        return None
    end, content = max(candidates, key=lambda candidate: candidate[0])
    return _scaled(content, text, end)


def last_boxed(text: str) -> str | None:
    r"""
    What the last `\boxed{}` of a worked solution holds.

    Args:
        text (`str`):
            Solution, also in the older spellings `\fbox{5}` and `\boxed 5`.

    Returns:
        `str` or `None`: The answer, `None` if there is none.
    """
    marks = [mark for mark in _MARK.finditer(text) if mark[0].startswith("\\")]
    return _marked(text, marks[-1])[0] if marks else None


def _marked(text: str, mark: re.Match[str]) -> tuple[str | None, int]:
    """What a mark marks, `None` if it is a box that is never closed, and where that ends."""
    start = mark.end()
    if mark[0].startswith("\\") and text[start] == "{":
        return _braced(text, start)
    line = text[start:].partition("\n")[0]
    content = line.partition("$")[0] if mark[0].startswith("\\") else line
    return content.strip(), start + len(content)


def _braced(text: str, start: int) -> tuple[str | None, int]:
    """What is between the brace at `start` and the one that closes it. Escaped braces, as of sets, do not count."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            return text[start + 1 : start + token.start()].strip(), start + token.end()
    return None, len(text)


def _scaled(content: str, text: str, end: int) -> str | None:
    """The answer with the word after it that scales it."""
    scale = _SCALE_AFTER.match(text, end)
    answer = f"{content} {scale[1]}" if scale else content
    return answer if len(answer) <= _LONGEST_ANSWER else None
