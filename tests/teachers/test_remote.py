"""A remote teacher against a server that answers as vLLM does, or as it should not."""

import json
import logging
import random
import socket
import threading
import time
from contextlib import suppress

import pytest
import torch
from fake_server import KEY, answer, in_turn, serving, silence
from fake_vllm import DTYPES, FakeServer
from helpers import make_teacher, save_model
from test_models import MODELS, build
from transformers import PhiConfig, PhiForCausalLM

from trl_cmdp.core import token_divergence
from trl_cmdp.core.lower_bound import top_k_divergence_lower_bound
from trl_cmdp.teachers import _checkpoint as checkpoint
from trl_cmdp.teachers import lm_head
from trl_cmdp.teachers._checkpoint import load_config, load_head
from trl_cmdp.teachers._server import TeacherServer, TeacherServerError
from trl_cmdp.teachers.remote import RemoteTeacher


SEQUENCES = [[2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13, 14, 15, 3, 2], [4, 4, 4]]
NUM_LAST = [3, 1, 8, 0]


@pytest.fixture(scope="module")
def model():
    return make_teacher().eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), model)


@pytest.fixture
def pooling(model, folder):
    with serving(FakeServer(model, folder, key=KEY)) as server:
        yield server


@pytest.fixture
def completions(model, folder):
    with serving(FakeServer(model, folder, "v1/completions")) as server:
        yield server


def connect(server, **kwargs):
    return RemoteTeacher(server.url, server.key, **{"max_wait": 5, "timeout": 5, **kwargs})


@torch.no_grad()
def expected_hidden(model, sequence, count):
    hidden = model.base_model(torch.tensor([sequence])).last_hidden_state[0]
    return hidden[len(sequence) - count - 1 : -1]


def assert_states(hidden, model, **tolerance):
    """They are the model's own, of its shape and dtype."""
    for values, sequence, count in zip(hidden, SEQUENCES, NUM_LAST, strict=True):
        torch.testing.assert_close(values, expected_hidden(model, sequence, count), **tolerance)


def assert_exact(teacher, model, **tolerance):
    assert_states(teacher.hidden_states(SEQUENCES, NUM_LAST), model, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_hidden_states_of_uneven_sequences(folder, dtype):
    model = make_teacher(dtype=dtype).eval()
    with serving(FakeServer(model, folder)) as server:
        teacher = connect(server)
        assert teacher.exact
        assert teacher.dtype == teacher.head.weight.dtype == dtype
        assert teacher.vocab_size == model.config.vocab_size
        assert teacher.config.name_or_path == folder
        assert_exact(teacher, model, rtol=1e-2, atol=1e-2)
        paths = [path for path, payload, _ in server.requests if payload and payload["encoding_format"] != "float"]
        assert len(paths) == 1 + 3  # the probe, and nothing for the sequence of which nothing is asked


def test_order_is_kept_under_concurrency(pooling, model):
    def slow(handler, payload):
        time.sleep(0.02 * random.random())
        return False

    teacher = connect(pooling, concurrency=8)
    pooling.fault = slow
    sequences = [[2 + index % 14, 2 + index // 14, 5] for index in range(60)]
    for values, sequence in zip(teacher.hidden_states(sequences, [2] * 60), sequences, strict=True):
        torch.testing.assert_close(values, expected_hidden(model, sequence, 2))
    assert teacher.hidden_states([], []) == []


def test_a_sequence_that_just_fits(pooling, model):
    teacher = connect(pooling)
    sequence = [2 + index % 14 for index in range(33)]  # its last token is not sent
    torch.testing.assert_close(teacher.hidden_states([sequence], [32])[0], expected_hidden(model, sequence, 32))
    with pytest.raises(ValueError, match="max_model_len 32"):
        teacher.hidden_states([[*sequence, 2]], [1])
    for count in (-1, 33):
        with pytest.raises(ValueError, match="`num_last`"):
            teacher.hidden_states([sequence], [count])


@torch.no_grad()
def test_log_probs_and_top_k(completions, model):
    teacher = connect(completions)
    assert not teacher.exact
    assert teacher.head is None
    log_probs = teacher.log_probs(SEQUENCES, NUM_LAST)
    top_k = teacher.top_k(SEQUENCES, NUM_LAST, 4)
    student = make_teacher(seed=3)
    for sequence, count, logps, (token_ids, likely) in zip(SEQUENCES, NUM_LAST, log_probs, top_k, strict=True):
        positions = slice(len(sequence) - count - 1, -1)
        teacher_logits = model(torch.tensor([sequence])).logits[0, positions]
        expected = teacher_logits.log_softmax(-1)
        own = torch.tensor(sequence)[len(sequence) - count :, None]
        torch.testing.assert_close(logps, expected.gather(-1, own)[:, 0])
        torch.testing.assert_close(likely, expected.topk(4).values)
        torch.testing.assert_close(likely, expected.gather(-1, token_ids))
        student_logits = student(torch.tensor([sequence])).logits[0, positions]
        bound = top_k_divergence_lower_bound(student_logits.log_softmax(-1).gather(-1, token_ids), likely)
        assert (bound <= token_divergence(student_logits, teacher_logits) + 1e-5).all()


def test_what_a_server_cannot_do_is_said(completions, pooling):
    with pytest.raises(ValueError, match="--runner pooling"):
        connect(completions).hidden_states([[2, 3]], [1])
    with pytest.raises(ValueError, match="temperature 1 only"):
        connect(completions).log_probs([[2, 3]], [1], temperature=0.9)
    with pytest.raises(ValueError, match="`k`"):
        connect(completions).top_k([[2, 3]], [1], 0)
    with pytest.raises(ValueError, match="max_model_len"):
        connect(completions).log_probs([[2] * 32], [1])
    with pytest.raises(ValueError, match="returns hidden states"):
        connect(pooling).log_probs([[2, 3]], [1])


@pytest.mark.parametrize(
    ("position", "match"),
    [
        ({"2": {"logprob": 3.5}}, "raw_logits"),
        ({"99": {"logprob": -1.0}, "2": {"logprob": -1.0}}, "beyond the vocabulary"),
        ({"5": {"logprob": -1.0}}, "the sequence's own"),
        ({"2": {"logprob": None}}, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_log_probs_that_cannot_be_correct(completions, position, match):
    teacher = connect(completions)
    completions.fault = answer(200, {"choices": [{"prompt_logprobs": [None, position]}]})
    with pytest.raises(TeacherServerError, match=match):
        teacher.log_probs([[2, 2]], [1])


def cut_chunks(handler, payload):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"20\r\n" + b"\0" * 10)
    handler.close_connection = True


TROUBLE = {
    "429": answer(429, {}),
    "503": answer(503, {}),
    "body cut": answer(200, b"\0" * 40, length=200),
    "chunks cut": cut_chunks,
    "header cut": lambda handler, payload: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "cut at once": lambda handler, payload: None,
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_tries_again_while_the_server_has_trouble(pooling, model, trouble):
    teacher = connect(pooling, max_wait=20)
    pooling.fault = in_turn([TROUBLE[trouble]] * 4)
    assert_exact(teacher, model)


def test_goes_on_after_a_restart(model, folder, caplog):
    with serving(FakeServer(model, folder)) as server:
        teacher = connect(server, max_wait=20)
        assert_exact(teacher, model)
        port = server.server_port
    results = []
    waiting = threading.Thread(target=lambda: results.append(teacher.hidden_states(SEQUENCES, NUM_LAST)))
    state = random.getstate()
    with caplog.at_level(logging.WARNING):
        waiting.start()
        time.sleep(0.7)
        assert not results
        with serving(FakeServer(model, folder, port=port)):
            waiting.join(timeout=20)
            assert_exact(teacher, model)
    assert_states(results[0], model)
    assert random.getstate() == state  # training must not depend on an outage
    warnings = [record.message for record in caplog.records if "Waiting for the teacher server" in record.message]
    assert len(warnings) == 1  # not one per thread
    assert "All connection attempts failed" in warnings[0]


def test_gives_up_with_one_error_that_says_what_to_do(model, folder):
    with serving(FakeServer(model, folder)) as server:
        teacher = connect(server, max_wait=0.5)
    with pytest.raises(TeacherServerError, match="resume_from_checkpoint") as caught:
        teacher.hidden_states(SEQUENCES, NUM_LAST)
    assert server.url in str(caught.value)
    assert "All connection attempts failed" in str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.__suppress_context__  # not a chain of them


def trickle(handler, payload):
    with suppress(OSError):
        handler.send(200, b"", length=192)
        for _ in range(100):
            handler.wfile.write(b"\0")
            time.sleep(0.05)


@pytest.mark.parametrize("fault", [silence(1), trickle])
def test_a_server_that_is_too_slow(pooling, fault):
    teacher = connect(pooling, timeout=0.3, max_wait=0)
    pooling.fault = fault
    with pytest.raises(TeacherServerError, match=r"no whole answer within 0\.3 s"):
        teacher.hidden_states([[2, 3, 4, 5, 6]], [1])


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (answer(200, b"\0" * 10), "10 bytes where 4 hidden states"),
        (answer(200, b"\0" * 10_000), "more than the 192 bytes"),
        (answer(400, {"error": {"message": "no such thing"}}), "no such thing"),
        (answer(404, b"<html>"), "HTTP 404"),
        (answer(401, b""), "does not accept the API key"),
    ],
)
def test_what_trying_again_would_not_change_is_an_error_at_once(pooling, fault, match):
    teacher = connect(pooling, concurrency=1)
    pooling.fault, before = fault, len(pooling.requests)
    with pytest.raises(TeacherServerError, match=match):
        teacher.hidden_states([[2, 3, 4, 5, 6]] * 30, [1] * 30)
    # Not tried again, and the other sequences are not sent; the thread may have begun with the next one.
    assert len(pooling.requests) <= before + 2


def test_a_redirect_is_not_followed(pooling):
    teacher = connect(pooling)
    with serving(FakeServer(pooling.model, "", key=KEY)) as other:
        for status in (301, 302, 307, 308):
            pooling.fault = answer(status, b"", headers=[("Location", other.url + "/pooling")])
            with pytest.raises(TeacherServerError, match="redirects elsewhere"):
                teacher.hidden_states([[2, 3]], [1])
        assert other.requests == []


def test_proxies_of_the_environment_never_see_a_request(pooling, model, monkeypatch):
    with serving(FakeServer(model, "")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert_exact(connect(pooling), model)
        assert proxy.requests == []


@pytest.mark.parametrize(
    "fault",
    [
        answer(400, {"error": {"message": f"{'x' * 285} {KEY} is not for you"}}),
        answer(503, {"error": f"Bearer {KEY}"}),
        answer(401, KEY.encode()),
        answer(200, {"choices": [{"prompt_logprobs": [None, {KEY: {"logprob": -1.0}}]}]}),
        answer(200, {"choices": [{"prompt_logprobs": [None, {"x" * 190 + KEY: {"logprob": -1.0}}]}]}),
        lambda handler, payload: handler.wfile.write(f"{KEY}\r\n\r\n".encode()),
    ],
)
def test_the_key_is_in_no_text(completions, folder, model, fault, caplog):
    completions.key = KEY
    teacher = connect(completions, max_wait=0.2)
    assert KEY not in repr(teacher)
    completions.fault = fault
    with caplog.at_level(logging.DEBUG), pytest.raises(TeacherServerError) as caught:
        teacher.log_probs([[2, 3]], [1])
    error = caught.value
    while error is not None:
        assert KEY[:9] not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert KEY not in caplog.text


UNUSABLE = ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:65536", "//host"]
UNUSABLE += ["http://host/?a=b", "http://host/a b", "http://host/\n", "http://[::1"]


@pytest.mark.parametrize("url", UNUSABLE)
def test_urls_that_cannot_be_used(url):
    with pytest.raises(ValueError, match="must look like"):
        TeacherServer(url)


@pytest.mark.parametrize(
    ("url", "key", "match"),
    [
        *(
            (f"http://{credentials}", None, "API key")
            for credentials in (f"user:{KEY}@a:80", f"{KEY}@a", f":{KEY}@a:x")
        ),
        *(("http://host:8000", key, "printable ASCII") for key in (f"{KEY}\n", f"{KEY} ", f"{KEY}é", "")),
    ],
)
def test_credentials_in_a_url_and_keys_that_no_header_can_carry_are_not_repeated(url, key, match):
    with pytest.raises(ValueError, match=match) as caught:
        TeacherServer(url, key)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://host:8000/", "http://host:8000"),
        ("https://host/v1/", "https://host"),
        ("http://[::1]:8000/teacher/v1", "http://[::1]:8000/teacher"),
    ],
)
def test_urls_may_end_as_openai_clients_write_them(url, kept):
    assert TeacherServer(url).url == kept


def test_nothing_listening_says_what_to_start():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            TeacherServerError, match=r"All connection attempts failed.*vllm serve MODEL --runner pooling"
        ):
            RemoteTeacher(url)


def only(path, status, content):
    return lambda handler, payload: handler.path == path and handler.send(status, content)


def models(content):
    return only("/v1/models", 200, content), "is not a vLLM server"


def pooled(data):
    return only("/pooling", 200, {"data": data})


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        models({}),
        models([]),
        models(None),
        models({"data": []}),
        models({"data": [{"id": "x"}]}),
        models({"data": [{"id": 1, "root": "r", "max_model_len": 3}]}),
        (answer(404, b"<html>welcome</html>"), "is not a vLLM server: it has no /v1/models"),
        (answer(200, b"<html>welcome</html>"), "not JSON"),
        (answer(401, {"error": "Unauthorized"}), "does not accept the API key"),
        (only("/pooling", 404, {}), "neither hidden states"),
        (only("/pooling", 400, {"error": {"message": "--pooler-config.task embed"}}), "--pooler-config.task embed"),
        (pooled([{"data": [0.1] * 12}]), "shape 12"),
        (pooled([{"data": [[0.1] * 12]}]), "shape 1×12"),
        (pooled([{"data": [[12**-0.5] * 12] * 3}]), "normalised"),
        (pooled([{"data": [[0.7] * 16] * 3}]), "different models"),
        (pooled("nothing"), "shape 0"),
        (pooled([{"data": [[1, 2], [3]]}]), "shape 0"),
    ],
)
def test_a_server_of_another_kind(pooling, fault, match):
    pooling.fault = fault
    with pytest.raises(TeacherServerError, match=match):
        connect(pooling)


def test_a_key_that_is_missing(pooling):
    with pytest.raises(TeacherServerError, match="needs an API key"):
        RemoteTeacher(pooling.url)


HEADS = {
    **MODELS,
    "phi bias": lambda: PhiForCausalLM(
        PhiConfig(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ),
}


@pytest.mark.parametrize("shard_size", ["1GB", "2KB"])
@pytest.mark.parametrize("name", HEADS)
def test_head_alone_is_the_loaded_models_head(name, shard_size, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, name, HEADS[name])
    model = build(name).to(torch.bfloat16)
    if model.get_output_embeddings().bias is not None:
        model.get_output_embeddings().bias.data.normal_()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "2KB")
    head, expected = load_head(str(tmp_path), load_config(str(tmp_path))), lm_head(model)
    assert head.weight.dtype == torch.bfloat16
    assert torch.equal(head.weight, expected.weight)
    assert (head.bias is None) == (expected.bias is None)
    assert head.bias is None or torch.equal(head.bias, expected.bias)
    assert head.logit_scale == expected.logit_scale
    assert head.softcap == expected.softcap


def test_only_the_heads_shard_is_fetched(tmp_path, monkeypatch):
    model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    fetched = []

    def download(repo, name, revision):
        assert (repo, revision) == ("org/teacher", "abc")
        fetched.append(name)
        if not (tmp_path / name).exists():
            raise checkpoint.EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    head = load_head("org/teacher", model.config, "abc")
    assert torch.equal(head.weight, model.lm_head.weight)
    assert set(fetched) == {"model.safetensors.index.json", weight_map["lm_head.weight"]}
    assert len(set(weight_map.values())) > 2


def test_pickled_weights_and_remote_code_are_refused(tmp_path):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors"):
        load_head(str(tmp_path), model.config)
    settings = {"model_type": "novel", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="config cannot be read"):
        load_config(str(tmp_path))


def test_a_checkpoint_without_a_head_that_fits(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    model.config.vocab_size += 1
    with pytest.raises(ValueError, match=r"of shape \(12, 16\)"):
        load_head(str(tmp_path), model.config)
