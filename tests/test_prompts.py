"""Prompts are checked before models are loaded, as a whole where that is cheap, and become the tokens of the trainers."""

import pytest
import trl
from datasets import Dataset, IterableDataset
from helpers import make_tokenizer, make_trainer

from trl_cmdp._prompts import check_chat_template, check_prompts, encode_prompt


USER = {"role": "user", "content": "1+2="}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
# Renders its argument `sign` after the digits of the messages.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ sign }}"
BAD = {
    "null": (None, "is null"),
    "empty": ("", "is empty"),
    "integer": (3, r"of type `int` \(3\)"),
    "float": (1.5, r"of type `float` \(1.5\)"),
    "bool": (True, "of type `bool`"),
    "bytes": (b"1+2=", "of type `bytes`"),
    "one message": (USER, "of type `dict`"),
    "no message": ([], "an empty list"),
    "texts": (["1+2="], "element 0 is of type `str`"),
    "tokens": ([3, 4], "element 0 is of type `int`"),
    "conversations": ([[USER]], "element 0 is of type `list`"),
    "ShareGPT": ([{"from": "human", "value": "1+2="}], "ShareGPT.*maybe_convert_to_chatml"),
    "no role": ([{"content": "1+2="}], "no `role` in its message 0"),
    "null role": ([USER, {"role": None, "content": "1"}], "no `role` in its message 1"),
    "no content": ([{"role": "user"}], "no `content` in its message 0"),
    "null content": ([USER, {"role": "assistant", "content": None}], "no `content` in its message 1"),
    "no tool call": ([{**CALL, "tool_calls": []}], "no `content`"),
    "numbers in a message": ([{"role": "user", "content": 3}], "`content` in its message 0 that is of type `int`"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "must be text or a list of parts"),
    "texts in a message": ([{"role": "user", "content": ["1+2="]}], "must be text or a list of parts"),
}
GOOD = {
    "text": "1+2=",
    "blank text": "\n",
    "messages": [{"role": "system", "content": ""}, USER],
    "a tool's turn": [USER, CALL, {"role": "tool", "name": "add", "content": "3"}],
    "parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}],
}


def rows_of(prompt, stream):
    """The prompt as the last of three rows; the others are of its kind."""
    first = "1+2=" if not isinstance(prompt, list) else [USER]
    rows = [{"prompt": value, "answer": "3"} for value in (first, first, prompt)]
    if stream:
        return IterableDataset.from_generator(lambda: iter(rows))
    return Dataset.from_list(rows, on_mixed_types="use_json")


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("kind", BAD)
def test_a_prompt_that_is_none(kind, stream):
    prompt, message = BAD[kind]
    if kind == "bytes" and not stream:  # no JSON, so a column of its own
        dataset, row = Dataset.from_list([{"prompt": prompt}]), 0
    else:
        dataset, row = rows_of(prompt, stream), 2
    with pytest.raises(ValueError, match=rf"Row {row} of the data: the prompt \(column 'prompt'\).*{message}"):
        check_prompts(dataset, "the data")


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("kind", GOOD)
def test_a_prompt_that_is_one(kind, stream):
    assert check_prompts(rows_of(GOOD[kind], stream), "the data") == (
        [USER] if isinstance(GOOD[kind], list) else "1+2="
    )


def test_columns_of_one_type():
    """Where Arrow has a type for the column, in which a null stands for what a message lacks."""
    messages = [{**USER, "tool_calls": None}, {**CALL, "tool_calls": [{"type": "function"}]}]
    assert check_prompts(Dataset.from_list([{"prompt": messages}]), "the data") == messages
    for values in ([None], ["1+2=", None], ["1+2=", ""], [[USER], []], [[USER], None], [3, 4]):
        with pytest.raises(ValueError, match=f"Row {len(values) - 1 if values[0] not in (None, 3) else 0} of"):
            check_prompts(Dataset.from_dict({"prompt": values}), "the data")


def test_a_late_row_is_found_whatever_the_order_and_the_format():
    dataset = Dataset.from_dict({"prompt": ["1+2="] * 2500 + [None], "n": range(2501)})
    for variant in (dataset, dataset.with_format("torch"), dataset.select(range(2500, -1, -1))):
        row = next(index for index, prompt in enumerate(variant["prompt"]) if prompt is None)
        with pytest.raises(ValueError, match=f"Row {row} of"):
            check_prompts(variant, "the data")


def test_rows_that_are_made_when_they_are_read():
    made = Dataset.from_dict({"n": [1, 2]}).with_transform(lambda batch: {"prompt": [f"{n}+1=" for n in batch["n"]]})
    assert check_prompts(made, "the data") == "1+1="
    with pytest.raises(ValueError, match="no column 'prompt', it has 'm'"):
        check_prompts(made.with_transform(lambda batch: {"m": batch["n"]}), "the data")


def test_two_kinds_of_prompt_and_no_prompt():
    rows = [{"prompt": prompt} for prompt in ("1+", "2+", [USER])]
    mixed = Dataset.from_list(rows, on_mixed_types="use_json")
    with pytest.raises(ValueError, match=r"Row 2 of it: .* is messages, and that of row 0 is text"):
        check_prompts(mixed, "it")
    assert check_prompts(mixed, "it", one_kind=False) == "1+"
    for nothing in (Dataset.from_dict({"prompt": []}), IterableDataset.from_generator(lambda: iter(()))):
        with pytest.raises(ValueError, match="The data has no rows"):
            check_prompts(nothing, "the data")


def test_what_the_message_about_sharegpt_says_helps():
    dataset = Dataset.from_list([{"prompt": [{"from": "user", "value": "1+2="}]}])
    assert check_prompts(dataset.map(trl.maybe_convert_to_chatml), "the data") == [USER]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "messages, and the tokenizer has no chat template"),
        ("{{ raise_exception('no system') }}", "cannot render the first prompt of the data: no system"),
        ("{% for message in %}", "cannot render the first prompt"),
        ({"tool_use": TEMPLATE}, "cannot render the first prompt.*no default"),
        ("{{ messages[0]['content'] / 2 }}", "cannot render the first prompt.*unsupported operand"),
    ],
)
def test_messages_that_cannot_be_rendered(template, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        check_chat_template(tokenizer, [USER], "the data")
    check_chat_template(tokenizer, [USER], "the data", TEMPLATE)


@pytest.mark.parametrize("kwargs", [{}, {"sign": "+"}, {"sign": ","}])
def test_tokens_are_those_of_the_trainer(kwargs, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    dataset = Dataset.from_list([{"prompt": [USER]}])
    trainer = make_trainer(tmp_path, train_dataset=dataset, tokenizer=tokenizer, chat_template_kwargs=kwargs)
    for prompt in ("3+4=", [USER], [{"role": "system", "content": "5,"}, USER]):
        (expected,), *_ = trainer._tokenize_prompts([prompt])
        assert encode_prompt(tokenizer, prompt, chat_template_kwargs=kwargs) == expected
    tokenizer.chat_template = None
    assert (
        encode_prompt(tokenizer, [USER], TEMPLATE, kwargs) == tokenizer(f"1+2={kwargs.get('sign', '')}")["input_ids"]
    )
