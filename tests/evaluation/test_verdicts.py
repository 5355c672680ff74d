"""Verdicts are read as models spell them, and never by a guess."""

import pytest

from trl_cmdp.evaluation.judges.llm import parse_verdict


# With A, B or tie in place of the braces, in either case.
SPELLINGS = [
    *(
        "Verdict: {}",
        "verdict: {}",
        "VERDICT: {}",
        "Verdict:{}",
        "Verdict : {}",
        "  Verdict: {}  ",
        "Both add.\n\nVerdict: {}",
    ),
    *("Verdict: {}.", "Verdict: {}!", "Verdict: {};", "Verdict:\u00a0{}", "Verdict: {}\u200b", "Verdict: {}\r\n"),
    *("**Verdict: {}**", "**Verdict:** {}", "Verdict: **{}**", "__Verdict: {}__", "_Verdict_: *{}*.", "`Verdict: {}`"),
    *("### Verdict: {}", "> Verdict: {}", "- Verdict: {}", "* Verdict: {}", "3. Verdict: {}", "| Verdict: {} |"),
    *(
        "Verdict - {}",
        "Verdict \u2013 {}",
        "Verdict \u2014 {}",
        "Verdict = {}",
        "Verdict -> {}",
        "Verdict \u2192 {}",
        "Verdict\uff1a{}",
    ),
    *(
        "Verdict {}",
        "Verdict is {}",
        "The verdict is: {}",
        "So, the final verdict is {}.",
        "Final verdict: {}",
        "My verdict: {}",
    ),
    *(
        'Verdict: "{}"',
        "Verdict: '{}'",
        "Verdict: \u201c{}\u201d",
        "Verdict: ({})",
        "Verdict: [[{}]]",
        "Verdict: <{}>",
    ),
    *(
        "Verdict: \\boxed{{}}",
        "Verdict: $\\boxed{\\text{{}}}$",
        '{"verdict": "{}"}',
        "<answer>Verdict: {}</answer>",
    ),
    *("Verdict:\n{}", "## Verdict\n\n{}", "**Verdict:**\n\n**{}**", "My verdict:\n\nVerdict: {}"),
    *("Verdict: {}\n\n---", "```\nVerdict: {}\n```", "Verdict: {}</s>", "Verdict: {}<|im_end|>"),
    *(
        "Verdict: {}\nIn short:\nVerdict: {}",
        "I give my verdict now:\nVerdict: {}",
        "The verdict is clear.\nVerdict: {}",
    ),
    # Reasoning is no reply, whatever verdict it weighs.
    *("<think>Verdict: A? Verdict: B?</think>Verdict: {}", "<think>\nVerdict: C\n</think>\n\n**Verdict: {}**"),
    *("As the template opens it, Verdict: B\n</think>\nVerdict: {}", "<thinking>x</thinking>\nVerdict: {}"),
    *("[THINK]Verdict: B[/THINK]Verdict: {}", "<THINK>x</THINK>Verdict: {}", "<think></think>Verdict: {}"),
]
OTHERS = {
    "A": ["Verdict: Solution A", "Verdict: solution A is better.", "Verdict: A wins", "Verdict: answer a"],
    "tie": ["Verdict: a tie", "Verdict: draw", "Verdict: A draw."],
}
MALFORMED = [
    *(
        "",
        "A",
        "A is better.",
        "Verdict:",
        "Verdict: C",
        "Verdict: both",
        "Verdict: neither",
        "Verdicts: A",
        "Verdict: AB",
    ),
    *(
        "Verdict: A or B",
        "Verdict: A/B",
        "Verdict: A, B",
        "Verdict: A and B",
        "Verdict: A B",
        "Verdict: A > B",
        "Verdict: A (tie)",
    ),
    *(
        "Verdict: A?",
        "Verdict: not A",
        "Verdict != A",
        "Verdict: ~~A~~",
        "Verdict: A is not better",
        "Verdict: not a tie",
    ),
    *("No verdict: A", "I think Verdict: A", "Verdict: a bit unclear", "Verdict: tie or A"),
    # Several verdicts, or not the last line.
    *("Verdict: A\nVerdict: B", "Verdict: B\nSo the last line is\nVerdict: A", "Verdict: A or B\nVerdict: A"),
    *("My verdict: B wins.\nVerdict: A", "The verdict is B.\nVerdict: A", "Verdict: A\nas it is right"),
    *("<think>x</think>Verdict: B<think>y</think>\nVerdict: A", "Verdict: tie\n\n**Verdict:**\nA"),
    # Reasoning that did not come to its end, or that nothing follows.
    *("<think>Verdict: A", "<think>x</think><think>\nVerdict: A", "<think>Verdict: A</think>", "Verdict: A<think>"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_verdict_as_models_spell_it(spelling):
    for verdict in ("A", "B", "tie"):
        assert parse_verdict(spelling.replace("{}", verdict)) == verdict
        assert parse_verdict(spelling.replace("{}", verdict.swapcase())) == verdict


@pytest.mark.parametrize(("verdict", "reply"), [(verdict, reply) for verdict in OTHERS for reply in OTHERS[verdict]])
def test_a_verdict_in_more_words(verdict, reply):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize("reply", MALFORMED)
def test_what_is_ambiguous_is_malformed(reply):
    assert parse_verdict(reply) is None
