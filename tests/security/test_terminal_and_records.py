"""What stands in records, names and answers of servers: it is shown as text, and no number or nesting ends a command."""

import json

import pytest
from fake_openai import FakeOpenAI
from fake_server import answer, serving
from helpers import (
    error_line,
    make_cell,
    make_model,
    make_rollout,
    make_settings,
    make_tokenizer,
    save_model,
    write_records,
)

from trl_cmdp._files import write_whole
from trl_cmdp._messages import hide_secrets, message
from trl_cmdp.cli import main
from trl_cmdp.evaluation.judges import ChatEndpoint, LLMJudge, Pair
from trl_cmdp.reports import plot_training_curves


RED, BELL, TITLE = "\x1b[31m", "\x07", "\x1b]0;owned\x07"
# A terminal's orders, half a character, a formula that is none, another direction, a table's marks, a page's.
NAMES = [
    f"{RED}{BELL}{TITLE}a",
    "b\ud800",
    r"c$\frac{$",
    "d\u202e\u2028",
    "e\r|\n| f",
    "<b>g</b>",
    "[red]h[/link]",
    "_i",
]


def evaluation(path, name, **changes):
    """Two problems; the name stands wherever a text may."""
    settings = make_settings(name=name, student=name, task=name, greedy=False, num_samples=1)
    rollouts = [
        make_rollout(
            problem,
            costs=[0.1, 0.2],
            prompt=name,
            answer=name,
            difficulty=f"{problem} {name}",
            tokens=[name, "x"],
            **changes,
        )
        for problem in range(2)
    ]
    return str(write_records(path, settings, rollouts))


def shown(capfd):
    """What was printed; no terminal obeys it."""
    printed = capfd.readouterr()
    for text in printed:
        assert all(letter.isprintable() or letter in "\n\t" for letter in text), repr(text)
    return printed


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_is_text_in_terminal_tables_plots_and_page(tmp_path, capfd, name):
    records = evaluation(tmp_path / "records.jsonl", name)
    assert main(["evaluate", "--records", records, "--output_dir", str(tmp_path / "out")]) == 0
    assert main(["report", records, "--output_dir", str(tmp_path / "out")]) == 0
    shown(capfd)
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(letter.isprintable() or letter in "\n\t" for letter in table)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in rows} == {10, 11}  # the table's, and that of difficulties
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["evaluations"][0]["settings"]["name"] == name


@pytest.mark.parametrize("name", NAMES[:4], ids=range(4))
def test_a_calibration_and_a_judge_show_names_as_text(tmp_path, capfd, name):
    files = [evaluation(tmp_path / f"{index}.jsonl", name, sample=0) for index in range(2)]
    assert main(["calibrate", "--records", *files, "--output_dir", str(tmp_path / "out")]) == 0
    assert main(["evaluate", "--records", *files, "--judge", "process", "--output_dir", str(tmp_path / "out")]) == 0
    shown(capfd)


@pytest.mark.parametrize("name", NAMES[:4], ids=range(4))
def test_a_folders_and_a_methods_name_are_text_in_plots(tmp_path, name):
    plot_training_curves([{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}], tmp_path / "curves.png", name)
    cells = [make_cell(method=name, seed=seed, history=[{"step": 1, "reward": 0.5, "cost": 0.1}]) for seed in (0, 1)]
    (tmp_path / "cells.jsonl").write_text("".join(f"{cell.to_json()}\n" for cell in cells))
    assert main(["report", str(tmp_path / "cells.jsonl"), "--output_dir", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("status", [300, 302, 400, 401, 404])
def test_a_servers_refusal_is_shown_as_text_with_its_reason(tmp_path, capfd, status):
    files = [evaluation(tmp_path / f"{name}.jsonl", "student", completion=name) for name in ("1 + 1 = 2", "1 = 2")]
    refusal = answer(status, {"error": {"message": f"{RED}because{BELL} of \ud800 that"}})
    with serving(FakeOpenAI(lambda messages: "Verdict: A", [refusal] * 99)) as server:
        main(["evaluate", "--records", *files, "--judge", server.url, "--judge_model", "m"])
    error = shown(capfd).err
    if status != 400:  # about the one question, in today's judge
        assert f"HTTP {status}" in error
        assert "because� of � that" in error


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("costs", "[1e999, 0.1]"),
        ("costs", "[1e39, 0.1]"),
        ("costs", f"[1{400 * '0'}, 0.1]"),
        ("costs", "[NaN, 0.1]"),
        ("completion_ids", f"[1{5000 * '0'}, 1]"),
        ("prompt", "[" * 100_000),
        ("answer", '{"a":' * 100_000),
        ("sample", f"1{400 * '0'}"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_numbers_and_nesting_that_are_no_records_are_one_line(tmp_path, capsys, command, field, text):
    path = tmp_path / "records.jsonl"
    first, record, *_ = evaluation_lines(tmp_path)
    values = ",".join(f'"{key}":{text if key == field else json.dumps(value)}' for key, value in record.items())
    path.write_text(f"{first}\n{{{values}}}\n")
    paths = ["--records", str(path)] if command == "evaluate" else [str(path)]
    assert main([command, *paths, "--output_dir", str(tmp_path / "out")]) == 2
    assert "Line 2" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def evaluation_lines(folder):
    settings, *records = (folder / "whole.jsonl", evaluation(folder / "whole.jsonl", "a"))[0].read_text().splitlines()
    return [settings, *map(json.loads, records)]


@pytest.mark.parametrize("limit", ["1e999", '"a"', "[0.1]", f"1{400 * '0'}", "null"])
def test_a_cells_limit_is_a_number(tmp_path, capsys, limit):
    line = make_cell().to_json().replace('"cost_limit":0.25', f'"cost_limit":{limit}')
    (tmp_path / "cells.jsonl").write_text(f"{line}\n")
    assert main(["report", str(tmp_path / "cells.jsonl"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "Line 1 is not a record" in error_line(capsys)


def test_a_cells_settings_are_not_deep(tmp_path, capsys):
    deep = "[" * 400 + "]" * 400
    line = make_cell().to_json().replace('"config":{}', f'"config":{{"a":{deep}}}')
    (tmp_path / "cells.jsonl").write_text(f"{line}\n")
    assert main(["report", str(tmp_path / "cells.jsonl"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "Line 1 is not a record" in error_line(capsys)


@pytest.mark.parametrize("value", [f"1{400 * '0'}", "1e999", "-1e308", "1e308", "NaN", "true", '"a"', "1e30"])
def test_a_trainers_log_with_any_number_is_reported(tmp_path, value):
    """In each of its columns, in runs that are reported beside one another."""
    log = {"step": 1, "reward": 0.5, "constraint/satisfaction_rate": 0.5, "constraint/cost": 0.2}
    for index, metric in enumerate(log):
        entry = ",".join(f'"{key}":{value if key == metric else number}' for key, number in log.items())
        state = f'{{"log_history":[{json.dumps(log)},{{{entry}}}],"train_batch_size":4,"global_step":2}}'
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    folders = [str(tmp_path / str(index)) for index in range(len(log))]
    assert main(["report", *folders, "--output_dir", str(tmp_path / "out")]) == 0


def test_a_template_that_fails_is_one_line(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    student = save_model(tmp_path / "student", make_model(), tokenizer)
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    options = ["--dataset", str(tmp_path / "data.jsonl"), "--split", "train", "--num_problems", "1"]
    assert main(["evaluate", "--student", student, *options, "--output_dir", str(tmp_path / "out")]) == 2
    assert "roles must alternate" in error_line(capsys)


def test_a_cached_reply_is_of_its_server(tmp_path):
    pair = Pair(0, False, 0, "1 + 1?", "1 + 1 = 2", "1 = 2")
    outcomes = []
    for verdict in ("A", "tie"):
        with serving(FakeOpenAI(lambda messages, verdict=verdict: f"Verdict: {verdict}")) as server:
            judge = LLMJudge(ChatEndpoint(server.url, "m"), tmp_path / "replies.jsonl")
            outcomes += [judged.orders for judged in judge.judge([pair])]
            assert len(server.requests) == 2
    assert outcomes == [["win", "loss"], ["tie", "tie"]]


def test_what_cannot_be_written_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "table.md"
    write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")
    assert [file.name for file in tmp_path.iterdir()] == ["table.md"]
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--hub_tokn x --teacher_api_key planted", "--hub_tokn x --teacher_api_key ***"),
        ("--hub-token=planted --max_tokens 5", "--hub-token=*** --max_tokens 5"),
        ("{'hub_token': 'planted', 'eos_token': '</s>'}", "{'hub_token': '***', 'eos_token': '</s>'}"),
        ("Config(password='planted one', beta=1)", "Config(password='***', beta=1)"),
        ("https://me:planted@host/data?sig=planted", "https://***@host/data?***"),
        ("Authorization: Bearer planted.one", "Authorization: Bearer ***"),
        ("argument --hub_token: expected one argument", "argument --hub_token: expected one argument"),
        ("nothing to hide, and no secret", "nothing to hide, and no secret"),
    ],
)
def test_secrets_are_known_by_their_names_and_forms(text, expected):
    assert hide_secrets(text) == expected


def test_secrets_of_the_environment_are_in_no_message(monkeypatch, capsys):
    monkeypatch.setenv("MY_API_KEY", "planted-in-the-environment")
    assert message("a planted-in-the-environment b") == "a *** b"
    with pytest.raises(SystemExit):
        main(["report", "x", f"--nothing{RED}", "planted-in-the-environment", "--hub_token", "planted-too"])
    assert main(["report", f"planted-in-the-environment{RED}"]) == 2
    error = capsys.readouterr().err
    assert "planted" not in error
    assert "\x1b" not in error
