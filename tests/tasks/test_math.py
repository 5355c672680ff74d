"""MATH and MATH-500 from files with the columns of the Hub's datasets."""

import json

import pytest

from trl_cmdp.tasks.math import INSTRUCTION, final_answer_reward, load_problems


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
MATH_500 = [
    {
        "problem": "Convert $(0,3)$.",
        "solution": r"It is $\boxed{\left( 3, \frac{\pi}{2} \right)}.$",
        "answer": r"\left( 3, \frac{\pi}{2} \right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
]


@pytest.fixture
def folders(tmp_path):
    for name, files in (("math", {"train": MATH, "test": MATH[:1]}), ("math500", {"test": MATH_500})):
        (tmp_path / name).mkdir()
        for split, rows in files.items():
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_columns_and_gold_answers(folders):
    problems = load_problems(None, "train", 0, path=str(folders / "math"))
    assert problems.column_names == ["prompt", "answer", "difficulty", "subject", "solution"]
    rows = {row["subject"]: row for row in problems}
    assert {row["answer"] for row in rows.values()} == {r"\frac{3}{4}", "2", r"\left\{x \mid x^{2} < 1\right\}"}
    assert rows["Prealgebra"] == {
        "prompt": f"Problem: {MATH[0]['problem']}\n{INSTRUCTION}\nSolution:",
        "answer": r"\frac{3}{4}",
        "difficulty": "2",
        "subject": "Prealgebra",
        "solution": MATH[0]["solution"],
    }
    assert rows["Geometry"]["difficulty"] == "?"


def test_math_500(folders):
    (row,) = load_problems(None, "test500", 0, path=str(folders / "math500"), conversational=True)
    assert row["answer"] == MATH_500[0]["answer"]
    assert (row["difficulty"], row["subject"]) == ("2", "Precalculus")
    assert row["prompt"] == [{"role": "user", "content": f"Convert $(0,3)$.\n{INSTRUCTION}"}]


def test_worked_solutions_are_right(folders):
    problems = load_problems(None, "train", 0, path=str(folders / "math"))
    assert final_answer_reward(list(problems["solution"]), list(problems["answer"])) == [1.0] * 3


def test_seed_and_prefix(folders):
    order = list(load_problems(None, "train", 3, path=str(folders / "math"))["answer"])
    assert list(load_problems(2, "train", 3, path=str(folders / "math"))["answer"]) == order[:2]


def test_unknown_split(folders):
    with pytest.raises(ValueError, match="must be one of 'train', 'test', 'test500', got 'validation'"):
        load_problems(None, "validation", 0, path=str(folders / "math"))


@pytest.mark.parametrize("solution", ["It is 5.", r"It is \boxed{}.", None])
def test_a_solution_without_a_box(tmp_path, solution):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**MATH[0], "solution": solution}) + "\n")
    with pytest.raises(ValueError, match=r"no \\boxed"):
        load_problems(None, "train", 0, path=str(tmp_path / "rows.jsonl"))
