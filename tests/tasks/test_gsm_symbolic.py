import json
import re

import pytest

from trl_cmdp.tasks import gsm_symbolic
from trl_cmdp.tasks.gsm_symbolic import INSTRUCTION, load_hub_problems, load_problems, template_split


pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def splits():
    return {split: load_problems(300, split, seed=0) for split in ("train", "validation", "test")}


def test_columns(splits):
    for problems in splits.values():
        assert problems.column_names == ["prompt", "answer", "solution", "difficulty", "template"]
        for row in problems:
            *steps, last = row["solution"].splitlines()
            assert last == f"#### {row['answer']}"
            assert row["difficulty"] == str(len(steps))
            assert row["prompt"].startswith("Question: ")
            assert row["prompt"].endswith("\nAnswer:")
            assert "final answer" not in row["prompt"]  # reasoning-gym's own instruction


def test_templates_are_held_out_whole(splits):
    for split, problems in splits.items():
        expected = "test" if split == "test" else "train"
        assert {template_split(template) for template in problems["template"]} == {expected}


def test_no_problem_is_in_two_splits_whatever_the_seeds():
    prompts = [set(load_problems(400, split, seed)["prompt"]) for seed in (0, 1) for split in ("train", "validation")]
    assert not (prompts[0] | prompts[2]) & (prompts[1] | prompts[3])


def test_problems_differ_and_a_smaller_draw_is_a_prefix(splits):
    prompts = list(splits["train"]["prompt"])
    assert len(set(prompts)) == 300
    assert list(load_problems(50, "train", 0)["prompt"]) == prompts[:50]


def test_neighbouring_seeds_share_few_problems():
    # The library counts its seeds up, problem by problem.
    first, second = (set(load_problems(300, "train", seed)["prompt"]) for seed in (0, 1))
    assert len(first & second) < 15


def test_max_steps(splits):
    problems = load_problems(100, "train", 0, max_steps=2)
    assert set(problems["difficulty"]) == {"2"}
    assert "7" in splits["train"]["difficulty"]


def test_max_number():
    for row in load_problems(60, "train", 0, max_number=50):
        numbers = re.findall(r"\d+(?:\.\d+)?", (row["prompt"] + row["solution"]).replace(",", ""))
        assert numbers
        assert max(map(float, numbers)) <= 50


def test_templates():
    problems = load_problems(60, "train", 0, templates=(10, 43))
    assert set(problems["template"]) == {10, 43}
    drawn, of_all = (
        [row["prompt"] for row in rows if row["template"] == 43] for rows in (problems, load_problems(300, "train", 0))
    )
    assert of_all
    assert drawn[: len(of_all)] == of_all  # the same draw


@pytest.mark.parametrize(("templates", "named"), [([43, 100], r"\[100\]"), ([], r"\[\]")])
def test_templates_that_the_split_has_not_are_refused(templates, named):
    with pytest.raises(ValueError, match=rf"`templates` must be templates of the split 'train'.* got {named}"):
        load_problems(1, "train", 0, templates=templates)
    with pytest.raises(ValueError, match="of the split 'test'"):
        load_problems(1, "test", 0, templates=[43])


def test_more_problems_than_there_are_is_refused(monkeypatch):
    same = [("How many are 2 and 3?", "2 + 3 = 5\nSo 5.\n#### 5", 0)] * 20_000
    monkeypatch.setattr(gsm_symbolic, "_generate", lambda *_: iter(same))
    with pytest.raises(ValueError, match="Only 1 different problems of 2"):
        load_problems(2, gsm_symbolic._split(same[0][0], 0), 0)


def test_conversational():
    (message,) = load_problems(1, "train", 0, conversational=True)[0]["prompt"]
    question = load_problems(1, "train", 0)[0]["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
    assert message == {"role": "user", "content": f"{question}\n{INSTRUCTION}"}


@pytest.mark.parametrize("asked", [{"n": 0}, {"split": "dev"}, {"max_steps": 1}, {"max_number": 1}])
def test_bad_requests_are_refused(asked):
    (name,) = asked
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        load_problems(**{"n": 10, "split": "train", "seed": 0, **asked})


def test_problems_of_the_hub_are_read(tmp_path):
    row = {"id": 3, "question": "A dog has 4 legs. How many have 3 dogs?", "instance": 0, "original_id": 7}
    row["answer"] = "3 dogs have 3*4=12 legs.\n#### 12"
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test.jsonl\n---\n"
    )
    (problem,) = load_hub_problems(path=str(tmp_path))
    assert problem == {
        "prompt": "Question: A dog has 4 legs. How many have 3 dogs?\nAnswer:",
        "answer": "12",
        "solution": row["answer"],
        "difficulty": "1",
        "template": 3,
    }
