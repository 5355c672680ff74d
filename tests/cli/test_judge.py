"""`trl-cmdp evaluate --judge`: win rates from records, by the process judge and by an endpoint."""

import json

import pytest
from fake_openai import FakeOpenAI
from fake_server import KEY, answer, serving
from helpers import error_line, make_rollout, make_settings, run_without_models, write_records

from trl_cmdp.cli import main
from trl_cmdp.evaluation.judges import read_judgements


GOOD, WRONG = "3 + 4 = 7, good\n#### 7", "3 + 4 = 8\n#### 8"
SETTINGS = {"teacher": None, "task": "gsm8k", "num_problems": 4, "num_samples": 1}


def write(path, name, completions):
    """Records of one sampled and one greedy rollout of each problem; sampled ones have a word more."""
    rollouts = [
        make_rollout(i, greedy=greedy, prompt=f"{i}: 3 and 4?", completion=text + " so" * (not greedy))
        for i, text in enumerate(completions)
        for greedy in (False, True)
    ]
    return write_records(path, make_settings(name=name, **SETTINGS), rollouts)


@pytest.fixture
def files(tmp_path):
    first = write(tmp_path / "first.jsonl", "first", [WRONG, WRONG, GOOD, GOOD])
    second = write(tmp_path / "second.jsonl", "second", [GOOD, GOOD, GOOD, WRONG])
    third = write(tmp_path / "third.jsonl", "third", [WRONG, WRONG, GOOD, WRONG])
    return [first, second, third]


def judge(files, *options):
    return main(["evaluate", "--records", *map(str, (*files, *options))])


def counts(row):
    return [row[name]["k"] for name in ("win", "tie", "loss")]


def prefers_good(messages):
    first, second = messages[1]["content"].split("<<<solution B")
    return "Verdict: " + ("tie" if ("good" in first) == ("good" in second) else "AB"["good" in second])


def test_the_process_judge_against_the_first_records(files, tmp_path, capsys):
    assert judge(files, "--judge", "process", "--output_dir", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["win_rates"]
    assert [(row["student"], row["reference"], row["greedy"], *counts(row)) for row in rows] == [
        ("second", "first", False, 2, 1, 1),
        ("third", "first", False, 0, 3, 1),
        ("second", "first", True, 2, 1, 1),
        ("third", "first", True, 0, 3, 1),
    ]
    assert rows[0]["win"]["low"] < rows[0]["win"]["value"] == 0.5 < rows[0]["win"]["high"]
    assert "agreement_with_process" not in rows[0]
    judgements = read_judgements((tmp_path / "out" / "judgements.jsonl").read_text())
    assert len(judgements) == 16
    assert [judgements[i].students for i in (0, 4)] == [["second", "first"], ["third", "first"]]
    output = capsys.readouterr().out
    assert "| second against first | process | 4 / 4 | 50.0 [" in output
    assert "| third against first, greedy | process | 4 / 4 | 0.0 [" in output
    assert (tmp_path / "out" / "table.md").read_text() in output


def test_an_endpoint_and_its_agreement_with_the_process_judge(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRL_CMDP_JUDGE_API_KEY", KEY)
    # It prefers what stands first if the problem's solutions are both of two kinds and sampled: there, orders disagree.
    with serving(
        FakeOpenAI(lambda m: "Verdict: A" if " so" in m[1]["content"] else prefers_good(m), key=KEY)
    ) as server:
        options = ["--judge", server.url, "--judge_model", "m", "--output_dir", tmp_path / "out"]
        options += ["--judgements", tmp_path / "mine.jsonl", "--judge_cache", tmp_path / "replies.jsonl"]
        assert judge(files[:2], *options) == 0
        asked = len(server.requests)
        summary = (tmp_path / "out" / "summary.json").read_bytes()
        assert judge(files[:2], *options) == 0
        assert len(server.requests) == asked  # the cache answers
    assert asked == 2 * (4 + 4) - 2 * 2  # both orders, but not where both wrote the same
    assert (tmp_path / "out" / "summary.json").read_bytes() == summary
    rows = json.loads(summary)["win_rates"]
    assert [(row["judge"], row["greedy"]) for row in rows] == [
        (judge, greedy) for greedy in (False, True) for judge in ("process", "m")
    ]
    sampled, greedy = rows[1], rows[3]
    assert (counts(sampled), counts(greedy)) == ([0, 4, 0], [2, 1, 1])
    assert sampled["position_consistency"]["value"] == 0
    assert greedy["position_consistency"]["value"] == 1
    assert (sampled["agreement_with_process"]["rate"]["k"], greedy["agreement_with_process"]["rate"]["k"]) == (1, 4)
    assert greedy["agreement_with_process"]["kappa"] == pytest.approx(1)
    assert len(read_judgements((tmp_path / "mine.jsonl").read_text())) == 16
    written = capsys.readouterr().out + "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written


def test_malformed_replies_are_failures_and_no_ties(files, tmp_path, capsys):
    with serving(FakeOpenAI(lambda messages: "I like both.")) as server:
        assert judge(files[:2], "--judge", server.url, "--judge_model", "m", "--output_dir", tmp_path / "out") == 0
    row = json.loads((tmp_path / "out" / "summary.json").read_text())["win_rates"][1]
    assert (row["num_pairs"], row["num_judged"], counts(row)) == (4, 1, [0, 1, 0])
    assert row["failures"] == {"malformed": 18, "no_verdict": 6}
    assert "| 1 / 4 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "judge_replies.jsonl").exists()


def test_a_judge_that_refuses_everything_is_one_line_with_its_reason(files, tmp_path, capsys):
    reason = {"error": {"message": "Unsupported value: 'reasoning_effort'."}}
    with serving(FakeOpenAI(prefers_good, faults=[answer(400, reason)] * 100)) as server:
        options = ["--judge", server.url, "--judge_model", "m", "--output_dir", tmp_path / "out"]
        assert judge(files[:2], *options) == 2
    assert "no reply to any pair: HTTP 400 (Unsupported value: 'reasoning_effort'.)" in error_line(capsys)


def test_a_refusal_among_replies_is_shown(files, tmp_path, capsys):
    with serving(FakeOpenAI(prefers_good, faults=[answer(400, {"error": {"message": "too long"}})])) as server:
        assert judge(files[:2], "--judge", server.url, "--judge_model", "m", "--output_dir", tmp_path / "out") == 0
    assert "m left questions unanswered (1): HTTP 400 (too long)" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["arithmetic", "chains"])
def test_the_tasks_own_steps_judge_an_embedded_task(task, tmp_path, capsys):
    def records(name, completion):
        settings = make_settings(name=name, **{**SETTINGS, "task": task, "num_problems": 1, "greedy": False})
        return write_records(
            tmp_path / f"{name}.jsonl", settings, [make_rollout(prompt="7+5=", completion=completion)]
        )

    # Without every step in its order, equations that hold are not enough there.
    assert judge([records("a", "5+7=12#12"), records("b", "7+5=12#12")], "--judge", "process") == 0
    assert "| b against a | process | 1 / 1 | 100.0 [" in capsys.readouterr().out


def test_the_process_judge_needs_no_transformers(files):
    assert "second against first" in run_without_models("evaluate", "--records", *files, "--judge", "process")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge_model", "m"], "--judge_model needs --judge"),
        (["--judge", "process", "--judge_model", "m"], "asks no model"),
        (["--judge", "http://127.0.0.1:9"], "--judge_model is needed"),
        (["--judge", "gpt", "--judge_model", "m"], "URL must look like"),
    ],
)
def test_a_mistake_is_one_line(files, options, message, capsys):
    assert judge(files, *options) == 2
    assert message in error_line(capsys)


def test_one_evaluation_alone_or_another_task_cannot_be_judged(files, tmp_path, capsys):
    assert judge(files[:1], "--judge", "process") == 2
    assert main(["evaluate", "--student", "s", "--task", "gsm8k", "--judge", "process"]) == 2
    assert capsys.readouterr().err.count("two or more") == 2
    fewer = write(tmp_path / "fewer.jsonl", "fewer", [GOOD])
    assert judge([*files[:1], fewer], "--judge", "process", "--output_dir", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_a_refused_key_is_one_line_without_it(files, capsys, monkeypatch):
    monkeypatch.setenv("TRL_CMDP_JUDGE_API_KEY", "another-key-1234")
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-host")
    with serving(FakeOpenAI(prefers_good, key=KEY)) as server:
        assert judge(files[:2], "--judge", server.url, "--judge_model", "m") == 2
        assert "not-for-this-host" not in str(server.requests)
    error = error_line(capsys)
    assert "does not accept the API key" in error
    assert "another-key-1234" not in error
