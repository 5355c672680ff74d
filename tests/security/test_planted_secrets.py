"""Secrets of a whole run, planted wherever one may stand: nowhere on disk, nor in what is printed."""

import json
import zipfile
import zlib

import fake_openai
import fake_vllm
import yaml
from fake_server import serving
from helpers import MINUTE_RUN, make_dataset, make_model, make_teacher, make_tokenizer, save_model

from trl_cmdp.cli import main


ENVIRONMENT, JUDGE, TEACHER = "hf_plantedInTheEnvironment", "sk-planted-for-the-judge", "planted-teacher-key-0123"
HUB, USER, PASSWORD = "hf_plantedForTheHub", "plantedUser", "plantedPassword"
SECRETS = [ENVIRONMENT, JUDGE, TEACHER, HUB, USER, PASSWORD]


def contents(path):
    """The bytes of a file, and of what it packs."""
    content = path.read_bytes()
    yield content
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name.encode() + archive.read(name)
    if content.startswith(b"\x1f\x8b"):
        yield zlib.decompress(content, wbits=31)


def found(folder):
    """Files that hold a secret, and which."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [(str(path), s) for path in files for s in SECRETS if any(s.encode() in part for part in contents(path))]


def says_it_again(messages):
    return f"Your key is {JUDGE}.\nVerdict: A"


def test_no_secret_is_written_or_printed(tmp_path, monkeypatch, capfd):
    """
    Train against a teacher server with a checkpoint and a card, evaluate twice, judge by an endpoint that repeats its
    key, report; and the mistakes: credentials in addresses, keys that are refused.
    """
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT)
    monkeypatch.setenv("TRL_CMDP_JUDGE_API_KEY", JUDGE)
    out = tmp_path / "out"
    student = save_model(tmp_path / "student", make_model(), make_tokenizer())
    teacher = save_model(tmp_path / "teacher", make_teacher(), make_tokenizer())
    make_dataset(1).to_json(tmp_path / "data.jsonl")
    config = tmp_path / "run.yaml"  # the user's own file: the one place where a key may stand
    settings = {
        **MINUTE_RUN,
        "model_name_or_path": student,
        "dataset_name": str(tmp_path / "data.jsonl"),
        "reward_funcs": ["helpers.length_reward"],
        "teacher_model_server_api_key": TEACHER,
        "save_strategy": "steps",
        "save_steps": 1,
        "log_completions": True,
    }
    config.write_text(yaml.safe_dump(settings))
    pooling = fake_vllm.FakeServer(make_teacher().eval(), teacher, key=TEACHER)
    judge = fake_openai.FakeOpenAI(says_it_again, key=JUDGE)
    with serving(pooling), serving(judge):

        def train(*arguments, url=pooling.url):
            server = ["--teacher_model_server_url", url, "--hub_token", HUB, "--output_dir", str(out / "run")]
            return main(["constrained", "--config", str(config), *server, *arguments])

        def evaluate(name, *arguments):
            sizes = ["--dataset", str(tmp_path / "data.jsonl"), "--split", "train", "--num_problems", "2"]
            folder = ["--max_new_tokens", "4", "--output_dir", str(out / name)]
            return main(["evaluate", *sizes, *folder, *arguments])

        assert train("--max_steps", "1") == 0
        for name, model in (("trained", out / "run"), ("teacher", teacher)):
            assert evaluate(name, "--student", str(model), "--teacher", teacher) == 0
        records = ["--records", *(str(out / name / "records.jsonl") for name in ("trained", "teacher"))]
        asked = ["--judge", judge.url, "--judge_model", "judge", "--output_dir", str(out / "judged")]
        assert main(["evaluate", *records, *asked]) == 0
        assert main(["report", str(out / "run"), str(out / "trained"), "--output_dir", str(out / "report")]) == 0
        assert main(["env"]) == 0

        hidden = f"http://{USER}:{PASSWORD}@127.0.0.1:{pooling.server_port}"
        assert train("--max_steps", "1", url=hidden) != 0
        assert evaluate("url", "--student", student, "--teacher_model_server_url", hidden) == 2
        asked[1] = f"http://{USER}:{PASSWORD}@127.0.0.1/v1"
        assert main(["evaluate", *records, *asked]) == 2
        pooling.key = judge.key = "another"
        asked[1] = judge.url
        assert train("--max_steps", "1") != 0
        assert main(["evaluate", *records, *asked, "--judge_cache", str(out / "new.jsonl")]) == 2

    sent = {headers.get("Authorization") for _, _, headers in pooling.requests}
    assert sent == {f"Bearer {TEACHER}"}
    assert {headers.get("Authorization") for _, _, headers in judge.requests} == {f"Bearer {JUDGE}"}
    names = {path.name for path in out.rglob("*")}
    written = {"training_args.bin", "README.md", "trainer_state.json", "optimizer.pt", "report.html"}
    assert written | {"judgements.jsonl", "judge_replies.jsonl", "completions"} <= names
    replies = (out / "judged" / "judge_replies.jsonl").read_text().splitlines()
    assert "***" in json.loads(replies[0])["reply"]
    assert found(out) == []
    printed = capfd.readouterr()
    assert [secret for secret in SECRETS for text in printed if secret in text] == []
    assert found(tmp_path) == [(str(config), TEACHER)]
