"""The calculator example runs, and what it is made of fits together."""

import random
import runpy
import sys
from pathlib import Path

import pytest
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response, supports_tool_calling


SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "calculator_tool.py"


def test_a_written_out_call_is_parsed_and_answered():
    """What the models are pre-trained on is what TRL's tool loop reads."""
    script = runpy.run_path(str(SCRIPT))
    tokenizer, row = script["make_tokenizer"](), script["make_dataset"]()[0]
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    messages = script["conversation"](row, 1.0, random.Random(0))
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    start, end = ids.index(tokenizer.convert_tokens_to_ids("<assistant>")) + 1, ids.index(tokenizer.eos_token_id) + 1
    parsed = parse_response(tokenizer, ids[start:end], prefix=ids[:start])
    (call,) = parsed["tool_calls"]
    assert call["function"] == {"name": "calculate", "arguments": {"expression": messages[0]["content"]}}
    assert script["calculate"](**call["function"]["arguments"]) == row["answer"]
    assert script["final_answer_reward"]([messages[1:]], [row["answer"]]) == [1.0]
    assert script["final_answer_reward"]([messages[1:3]], [row["answer"]]) == [0.0]


@pytest.mark.parametrize("expression", ["", "7", "7/8", "a*b", "7*88", "__import__('os')"])
def test_calculate_refuses_what_is_no_expression(expression):
    assert runpy.run_path(str(SCRIPT))["calculate"](expression) == "?"


def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = capsys.readouterr().out
    assert "satisfied" in out
    assert "\n   2 " in out
