"""GSM8K, MATH and MATH-500 from files with the columns of the Hub's datasets."""

import json

import pytest
from datasets import Dataset

from trl_cmdp.tasks import gsm8k, math, table


GSM8K = [
    {
        "question": "Tom has 1,000 eggs and buys half as many. How many has he?",
        "answer": "He buys 1000/2=<<1000/2=500>>500 eggs.\nHe has 1000+500=<<1000+500=1500>>1500.\n#### 1,500",
    },
    *(
        {"question": f"What is {n} + 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(1, 20)
    ),
]
MATH = [
    {
        "problem": r"What is $\frac{1}{2}+\frac{1}{4}$?",
        "level": "Level 2",
        "type": "Prealgebra",
        "solution": r"Half is $\boxed{\frac{2}{4}}$ of it, so $\frac{1}{2}+\frac{1}{4}=\boxed{\frac{3}{4}}$.",
    },
    {"problem": "What is $2$?", "level": "Level ?", "type": "Geometry", "solution": r"It is $\boxed 2$."},
    {
        "problem": "Solve.",
        "level": "Level 5",
        "type": "Algebra",
        "solution": r"$\boxed{\left\{x \mid x^{2} < 1\right\}}$",
    },
]
MATH_500 = {
    "problem": "Convert $(0,3)$.",
    "solution": r"It is $\boxed{\left( 3, \frac{\pi}{2} \right)}.$",
    "answer": r"\left( 3, \frac{\pi}{2} \right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
BOTH = pytest.mark.parametrize(("task", "rows"), [(gsm8k, GSM8K), (math, MATH)], ids=["gsm8k", "math"])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_of_gsm8k(tmp_path):
    problems = gsm8k.load_problems(None, "train", 0, path=write(tmp_path / "rows.jsonl", GSM8K))
    assert problems.column_names == ["prompt", "answer", "difficulty", "solution"]
    assert len(problems) == 20
    (row,) = [row for row in problems if "Tom" in row["prompt"]]
    assert row == {
        "prompt": f"Question: {GSM8K[0]['question']}\n{gsm8k.INSTRUCTION}\nAnswer:",
        "answer": "1,500",
        "difficulty": "2",
        "solution": "He buys 1000/2=500 eggs.\nHe has 1000+500=1500.\n#### 1,500",
    }


def test_columns_of_math(tmp_path):
    problems = math.load_problems(None, "train", 0, path=write(tmp_path / "rows.jsonl", MATH))
    assert problems.column_names == ["prompt", "answer", "difficulty", "subject", "solution"]
    rows = {row["subject"]: row for row in problems}
    assert {row["answer"] for row in rows.values()} == {r"\frac{3}{4}", "2", r"\left\{x \mid x^{2} < 1\right\}"}
    assert rows["Prealgebra"] == {
        "prompt": f"Problem: {MATH[0]['problem']}\n{math.INSTRUCTION}\nSolution:",
        "answer": r"\frac{3}{4}",
        "difficulty": "2",
        "subject": "Prealgebra",
        "solution": MATH[0]["solution"],
    }
    assert rows["Geometry"]["difficulty"] == "?"


def test_messages_and_columns_of_math_500(tmp_path):
    write(tmp_path / "test.jsonl", [MATH_500])
    (row,) = math.load_problems(None, "test500", 0, path=str(tmp_path), conversational=True)
    assert row["answer"] == MATH_500["answer"]
    assert (row["difficulty"], row["subject"]) == ("2", "Precalculus")
    assert row["prompt"] == [{"role": "user", "content": f"Convert $(0,3)$.\n{math.INSTRUCTION}"}]


def test_messages_of_gsm8k(tmp_path):
    path = write(tmp_path / "rows.jsonl", GSM8K[:3])
    ((message,), *_) = gsm8k.load_problems(None, "train", 0, conversational=True, path=path)["prompt"]
    assert message["role"] == "user"
    assert message["content"] in [f"{row['question']}\n{gsm8k.INSTRUCTION}" for row in GSM8K[:3]]


@BOTH
def test_worked_solutions_are_correct_in_the_order_of_the_seed(task, rows, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows)
    problems = task.load_problems(None, "train", 1, path=path)
    assert task.final_answer_reward(list(problems["solution"]), list(problems["answer"])) == [1.0] * len(rows)
    assert list(task.load_problems(2, "train", 1, path=path)["prompt"]) == list(problems["prompt"])[:2]
    assert any(
        list(task.load_problems(None, "train", s, path=path)["prompt"]) != list(problems["prompt"]) for s in (2, 3)
    )


def test_parquet(tmp_path):
    Dataset.from_list(GSM8K).to_parquet(tmp_path / "rows.parquet")
    assert len(gsm8k.load_problems(None, "train", 0, path=str(tmp_path / "rows.parquet"))) == 20


@pytest.mark.parametrize("task", [gsm8k, math, table])
def test_what_is_not_there(task, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(ValueError, match=r"no column '\w+', it has 'text', 'label'"):
        task.load_problems(None, "train", 0, path=path)
    with pytest.raises(ValueError, match=r"no split 'test', it has 'train'"):
        task.load_problems(None, "test", 0, path=path)


@pytest.mark.parametrize(
    ("task", "rows", "n", "split", "message"),
    [
        (gsm8k, GSM8K[:3], 0, "train", "from 1 to the 3 problems"),
        (gsm8k, GSM8K[:3], -1, "train", "from 1 to the 3 problems"),
        (gsm8k, GSM8K[:3], 4, "train", "from 1 to the 3 problems"),
        *(
            (gsm8k, [{"question": "a", "answer": answer}], None, "train", "no '####'")
            for answer in ("It is 5.", "It is 5.\n#### ", None)
        ),
        *(
            (math, [{**MATH[0], "solution": solution}], None, "train", r"no \\boxed")
            for solution in ("It is 5.", r"It is \boxed{}.", None)
        ),
        (math, MATH, None, "validation", "must be one of 'train', 'test', 'test500', got 'validation'"),
    ],
)
def test_bad_requests_and_rows_are_refused(task, rows, n, split, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        task.load_problems(n, split, 0, path=write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("value", [None, 3, " "])
@pytest.mark.parametrize(
    ("task", "rows", "column"),
    [(gsm8k, GSM8K, "question"), (math, MATH, "problem")],
)
def test_a_row_without_text_is_named(task, rows, column, value, tmp_path):
    path = write(
        tmp_path / "rows.jsonl", [{**rows[0], column: value}] if value == 3 else [*rows, {**rows[0], column: value}]
    )
    row = 0 if value == 3 else len(rows)
    with pytest.raises(ValueError, match=rf"Row {row} of the dataset .*: its '{column}' must be text, got {value!r}"):
        task.load_problems(None, "train", 0, path=path)
