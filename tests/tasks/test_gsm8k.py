"""GSM8K from files with the columns of the Hub's dataset."""

import json

import pytest
from datasets import Dataset

from trl_cmdp.tasks.gsm8k import INSTRUCTION, final_answer_reward, load_problems
from trl_cmdp.tasks.math import load_problems as load_math
from trl_cmdp.tasks.table import load_problems as load_table


ROWS = [
    {
        "question": "Tom has 1,000 eggs and buys half as many. How many has he?",
        "answer": "He buys 1000/2=<<1000/2=500>>500 eggs.\nHe has 1000+500=<<1000+500=1500>>1500.\n#### 1,500",
    },
    *(
        {"question": f"What is {n} + 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
        for n in range(1, 20)
    ),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    return tmp_path


def test_columns(folder):
    problems = load_problems(None, "train", 0, path=str(folder))
    assert problems.column_names == ["prompt", "answer", "difficulty", "solution"]
    assert len(problems) == 20
    (row,) = [row for row in problems if "Tom" in row["prompt"]]
    assert row == {
        "prompt": f"Question: {ROWS[0]['question']}\n{INSTRUCTION}\nAnswer:",
        "answer": "1,500",
        "difficulty": "2",
        "solution": "He buys 1000/2=500 eggs.\nHe has 1000+500=1500.\n#### 1,500",
    }


def test_worked_solutions_are_right(folder):
    problems = load_problems(None, "train", 0, path=str(folder))
    assert final_answer_reward(list(problems["solution"]), list(problems["answer"])) == [1.0] * 20


def test_conversational(folder):
    problems = load_problems(3, "test", 0, conversational=True, path=str(folder))
    contents = [message["content"] for prompt in problems["prompt"] for message in prompt]
    assert sorted(contents) == sorted(f"{row['question']}\n{INSTRUCTION}" for row in ROWS[:3])
    assert {message["role"] for prompt in problems["prompt"] for message in prompt} == {"user"}


def test_seed_and_prefix(folder):
    order = load_problems(None, "train", 1, path=str(folder))["prompt"]
    assert list(load_problems(7, "train", 1, path=str(folder))["prompt"]) == list(order)[:7]
    assert list(load_problems(None, "train", 2, path=str(folder))["prompt"]) != list(order)


def test_parquet(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert len(load_problems(None, "train", 0, path=str(tmp_path / "rows.parquet"))) == 20


@pytest.mark.parametrize("load", [load_problems, load_math, load_table])
def test_what_is_not_there(load, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(ValueError, match=r"no column '\w+', it has 'text', 'label'"):
        load(None, "train", 0, path=str(file))
    with pytest.raises(ValueError, match=r"no split 'test', it has 'train'"):
        load(None, "test", 0, path=str(file))


@pytest.mark.parametrize("n", [0, -1, 4])
def test_n_out_of_range(folder, n):
    with pytest.raises(ValueError, match="from 1 to the 3 problems"):
        load_problems(n, "test", 0, path=str(folder))


@pytest.mark.parametrize("solution", ['"It is 5."', '"It is 5.\\n#### "', "null"])
def test_a_solution_without_its_answer(tmp_path, solution):
    (tmp_path / "rows.jsonl").write_text(f'{{"question": "a", "answer": {solution}}}\n')
    with pytest.raises(ValueError, match="no '####'"):
        load_problems(None, "train", 0, path=str(tmp_path / "rows.jsonl"))
