"""Reading the verdict of a reply: as models spell it, and never by a guess."""

import re
import unicodedata


# Reasoning that a model shows before its reply. Some chat templates open the block, so that the reply only closes it.
_THOUGHT = r"(?:think|thinking|thought|thoughts|reasoning|reflection)"
_TAG = re.compile(rf"(</?{_THOUGHT}>|\[/?think\])")
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]*\|>|</?(?!tie|draw)[a-z_]{2,}>|</s>")
_TEX = re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm)(?=\s*\{)")

_MARKUP = r"[ \t\r*_`#<>|\"'\u201c\u201d\u2018\u2019\u200b$\\{}\[\]()]"
_BEFORE = rf"(?:{_MARKUP}|[-\u2022]|\d+[.)])*(?:(?:so|thus|therefore|hence|my|the|our|final|overall|conclusion)\b[,:]?{_MARKUP}*)*"
_SEPARATOR = rf"(?:{_MARKUP}|[:=\u2013\u2014\u2192-]|->|\bis\b)*"
_CHOICE = r"(?:(?:solution|answer|option|response)\s+)?(?P<choice>a|b|(?:an?\s+)?(?:tie|draw))"
_AFTER = rf"(?:\s+(?:is\s+better|wins))?(?:{_MARKUP}|[.!,;])*"
_VERDICT = re.compile(rf"{_BEFORE}verdict{_SEPARATOR}{_CHOICE}{_AFTER}")
# A line that states a verdict, whether or not it can be read; and one that is the heading of the next.
_STATES = re.compile(
    rf"\bverdict{_MARKUP}*(?:[:=\u2013\u2014\u2192-](?=.*\w)|is{_MARKUP}+{_CHOICE}(?:{_MARKUP}*$|[.,;!]))"
)
_HEADING = re.compile(rf"^({_BEFORE}verdict(?:{_MARKUP}|[:=-])*)\n\s*+(?!.*verdict)", re.MULTILINE)


def parse_verdict(reply: str) -> str | None:
    """
    The verdict that the last line of a reply states, unless another line states another one.

    Markup, case, what stands between "verdict" and the choice, and a closed block of reasoning before the reply do not
    matter.

    Args:
        reply (`str`):
            Reply of a model.

    Returns:
        `str`, *optional*: `"A"`, `"B"` or `"tie"`; `None` if the reply is malformed: it states none, not as its last
        line, several, or one that can be read in more than one way.
    """
    text = _without_thought(unicodedata.normalize("NFKC", reply).lower())
    text = _HEADING.sub(r"\1 ", _TEX.sub("", _SPECIAL_TOKEN.sub("", text)))
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    if not lines or _VERDICT.fullmatch(lines[-1]) is None:
        return None
    stated = [_VERDICT.fullmatch(line) for line in lines if _STATES.search(line) or line is lines[-1]]
    choices = {None if match is None else match["choice"].split()[-1] for match in stated}
    if len(choices) != 1:
        return None
    return {"a": "A", "b": "B", "tie": "tie", "draw": "tie"}.get(str(choices.pop()))


def _without_thought(text: str) -> str:
    """What a reply says outside blocks of reasoning: nothing if the last one is not closed."""
    said, thinking = "", False
    for part in _TAG.split(text):
        if _TAG.fullmatch(part):
            closes = "/" in part
            if closes and not thinking:  # all before it was reasoning
                said = ""
            thinking = not closes
        elif not thinking:
            said += part
    return "" if thinking else said
