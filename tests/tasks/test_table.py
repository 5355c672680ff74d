"""Any dataset by the names of its columns."""

import re
from datetime import date
from decimal import Decimal

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from trl_cmdp.tasks.table import final_answer_reward, load_problems, load_splits


ROWS = [{"q": f"What is {n} + 1?", "a": n + 1, "steps": n % 3, "other": None} for n in range(1, 9)]
COLUMNS = {"prompt_column": "q", "answer_column": "a"}


@pytest.fixture(params=["jsonl", "parquet", "csv"])
def path(request, tmp_path):
    file = tmp_path / f"rows.{request.param}"
    dataset = Dataset.from_list(ROWS).remove_columns("other")
    {"jsonl": dataset.to_json, "parquet": dataset.to_parquet, "csv": dataset.to_csv}[request.param](file)
    return str(file)


def test_columns_by_name(path):
    problems = load_problems(None, "train", 0, path=path, **COLUMNS, difficulty_column="steps")
    assert problems.column_names == ["prompt", "answer", "difficulty"]
    expected = {row["q"]: (str(row["a"]), str(row["steps"])) for row in ROWS}
    assert {row["prompt"]: (row["answer"], row["difficulty"]) for row in problems} == expected
    assert final_answer_reward([f"#### {row['answer']}" for row in problems], problems["answer"]) == [1.0] * 8


def test_seed_and_prefix(path):
    order = list(load_problems(None, "train", 1, path=path, **COLUMNS)["prompt"])
    assert list(load_problems(5, "train", 1, path=path, **COLUMNS)["prompt"]) == order[:5]
    assert list(load_problems(None, "train", 2, path=path, **COLUMNS)["prompt"]) != order


def test_prompts_of_the_teachers_own(tmp_path):
    """They are kept as they are, and become messages where the prompts beside them do."""
    message = [{"role": "user", "content": "p"}]
    found = {}
    for prompt in ("p", message):
        file = str(tmp_path / "rows.jsonl")
        Dataset.from_list([{"prompt": prompt, "answer": "3", "teacher_prompt": "hint"}]).to_json(file)
        for conversational in (False, True):
            (row,) = load_problems(None, "train", 0, path=file, conversational=conversational)
            found[isinstance(prompt, str), conversational] = (row["prompt"], row["teacher_prompt"])
    hint = [{"role": "user", "content": "hint"}]
    assert found[True, False] == ("p", "hint")
    assert found[True, True] == (message, hint)
    assert found[False, False] == found[False, True] == (message, "hint")


def test_conversational_and_system_prompt(path):
    problems = load_problems(1, "train", 0, path=path, **COLUMNS, conversational=True, system_prompt="Be brief.")
    (system, user) = problems[0]["prompt"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["role"] == "user"
    assert user["content"] in {row["q"] for row in ROWS}
    with pytest.raises(ValueError, match="set `conversational`"):
        load_problems(1, "train", 0, path=path, **COLUMNS, system_prompt="Be brief.")


@pytest.mark.parametrize("conversational", [False, True])
def test_messages_stay_what_they_are(tmp_path, conversational):
    messages = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4?"},
    ]
    Dataset.from_list([{"prompt": messages, "answer": "5"}]).to_json(tmp_path / "rows.jsonl")
    path = str(tmp_path / "rows.jsonl")
    (row,) = load_problems(None, "train", 0, path=path, conversational=conversational)
    assert row == {"prompt": messages, "answer": "5"}
    (row,) = load_problems(None, "train", 0, path=path, system_prompt="Be brief.")
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, *messages]


def test_missing_column(path):
    with pytest.raises(ValueError, match="no column 'question', it has 'q', 'a', 'steps'"):
        load_problems(None, "train", 0, path=path, prompt_column="question", answer_column="a")
    with pytest.raises(ValueError, match="no column 'level', it has 'q', 'a', 'steps'"):
        load_problems(None, "train", 0, path=path, **COLUMNS, difficulty_column="level")


def test_a_prompt_that_is_none_is_named_by_its_row(path):
    with pytest.raises(
        ValueError, match=rf"Row 0 of the dataset '{path}': the prompt \(column 'steps'\) is of type `int`"
    ):
        load_problems(None, "train", 0, path=path, prompt_column="steps", answer_column="a")


GOOD = '{"prompt": "1+2=", "answer": "3"}\n'
UNREADABLE = [
    ("empty.jsonl", "", "empty.jsonl has no rows"),
    ("blank.jsonl", "\n\n", "blank.jsonl has no rows"),
    ("empty.json", "[]", "empty.json, which is an empty list"),
    ("empty.csv", "", "empty.csv has no rows"),
    ("header.csv", "prompt,answer\n", "header.csv has no rows"),
    ("empty.parquet", "", "empty.parquet has no rows"),
    ("cut.jsonl", GOOD * 2 + GOOD[:12], "cut.jsonl, line 3 is not JSON: Unterminated string"),
    ("words.jsonl", GOOD + "words\n" + GOOD, "words.jsonl, line 2 is not JSON: Expecting value"),
    ("lines.json", GOOD + "words\n" + GOOD, "lines.json, line 2 is not JSON: Expecting value"),
    ("open.jsonl", GOOD + '{"prompt": \n' + GOOD, "open.jsonl, line 2 is not JSON: Expecting value"),
    ("list.jsonl", GOOD + "[1]\n", "list.jsonl, line 2 is no JSON object but list"),
    ("document.json", '[\n{"prompt": "1+2="},\n{"prompt": }\n]', "document.json, .*line 3 column 12"),
    ("other.parquet", "words", "other.parquet' cannot be read: .*Parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE, ids=[name for name, *_ in UNREADABLE])
def test_a_file_that_cannot_be_read(name, content, message, tmp_path):
    """The error names the line and the cause."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / name))


@pytest.mark.parametrize("case", [case for case in UNREADABLE if "line" in case[2]], ids=lambda case: case[0])
def test_a_damaged_file_that_is_streamed(case, tmp_path):
    name, content, message = case
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / name), streaming=True)


def test_a_damaged_file_of_a_folder_is_named(tmp_path):
    (tmp_path / "test.jsonl").write_text(GOOD)
    (tmp_path / "train.jsonl").write_text(GOOD + "words\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2"):
        load_splits(str(tmp_path))


def written(tmp_path, answers, feature=None):
    """A file of problems with these answers, in order."""
    columns = {"prompt": [f"Problem {index}" for index in range(len(answers))], "answer": answers}
    features = None if feature is None else Features({"prompt": Value("string"), "answer": feature})
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("answers", "feature", "texts"),
    [
        ([1, -2], None, ["1", "-2"]),
        ([1e-07, 1e22, 0.1 + 0.2], None, ["0.0000001", "1" + "0" * 22, "0.3"]),
        ([0.1, 2.5, 1234.567], Value("float32"), ["0.1", "2.5", "1234.567"]),
        ([0.1, 2.5], Value("float16"), ["0.1", "2.5"]),
        ([True, False], None, ["True", "False"]),
        ([Decimal("1.50"), Decimal("1000.00")], Value("decimal128(8, 2)"), ["1.50", "1000.00"]),
        (["B", "A"], ClassLabel(names=["A", "B"]), ["B", "A"]),
    ],
)
def test_answers_that_are_numbers_become_text(tmp_path, answers, feature, texts):
    problems = load_problems(None, "train", 0, path=written(tmp_path, answers, feature))
    by_prompt = {row["prompt"]: row["answer"] for row in problems}
    assert [by_prompt[f"Problem {index}"] for index in range(len(answers))] == texts
    assert final_answer_reward([rf"\boxed{{{text}}}" for text in texts], answers) == [1.0] * len(answers)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{"ground_truth": "2"}], "got dict: {'ground_truth': '2'}"),
        ([["2"]], "got list: ['2']"),
        (["1", None], "got NoneType: None"),
        ([1.0, None], "got NoneType: None"),
        ([1.0, float("nan")], "a finite number, got nan"),
        (["1", " "], "not empty, or a finite number, got ' '"),
        ([b"1"], "got bytes: b'1'"),
        ([date(2024, 5, 1)], "got date: datetime.date(2024, 5, 1)"),
    ],
)
def test_answers_that_no_completion_can_state_are_refused(tmp_path, answers, said):
    path = written(tmp_path, answers)
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        load_problems(None, "train", 0, path=path)
    assert f"Row {len(answers) - 1} of {path!r} has no final answer in its column 'answer'." in str(refusal.value)
