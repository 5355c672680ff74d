"""Servers that answer with broken forms of what is right: a call ends in the truth or in the client's own error."""

import json
import queue
import random
import re
import resource
import time
import tracemalloc
from collections import Counter
from contextlib import contextmanager

import fake_openai
import fake_vllm
import pytest
import torch
from helpers import make_teacher, make_tokenizer

from trl_cmdp.evaluation.judges._client import ChatEndpoint, JudgeError, NoReplyError
from trl_cmdp.teachers import RemoteTeacher, TeacherServerError


TIMEOUT = 0.4  # seconds
SEQUENCES, NUM_LAST = [[2, 3, 4, 5, 6]], [3]


# ------------------------------------------------------------------------------------------------------ what is sent


def head(status=b"200 OK", *headers):
    return b"\r\n".join([b"HTTP/1.1 " + status, b"Content-Type: application/json", *headers, b"", b""])


def length(count):
    return b"Content-Length: %d" % count


def endless(first, part, pause=0.0):
    """Bytes without end, for as long as somebody listens."""
    yield first
    while True:
        yield part
        time.sleep(pause)


def chunked(body, generator, broken):
    """A body in chunks, one of whose sizes may be a lie."""
    parts, start = [], 0
    while start < len(body):
        size = generator.randint(1, max(1, len(body) // 3))
        part = body[start : start + size]
        said = b"%x" % len(part)
        if broken and generator.random() < 0.5:
            said = generator.choice([b"-1", b"zz", b"", b"%x" % (len(part) + 9), b"f" * 40, b"1;" + b"x" * 70_000])
        parts.append(said + b"\r\n" + part + b"\r\n")
        start += size
    return b"".join(parts) + (b"" if broken and generator.random() < 0.3 else b"0\r\n\r\n")


def nan_in(body, generator):
    """JSON with one number that is none."""
    places = [match.span() for match in re.finditer(rb"(?<=: )-?\d+\.\d+(e-?\d+)?", body)]
    if not places:
        return body[: len(body) // 2]
    start, end = generator.choice(places)
    return (
        body[:start]
        + generator.choice([b"NaN", b"Infinity", b"1e999", b"null", b'"x"', b"[]", b"9" * 5000])
        + body[end:]
    )


def well_sent(body):
    return [head(b"200 OK", length(len(body))) + body]


MUTATIONS = {
    "right": lambda body, generator: well_sent(body),
    "right, in chunks": lambda body, generator: [
        head(b"200 OK", b"Transfer-Encoding: chunked") + chunked(body, generator, False)
    ],
    "right, until the end": lambda body, generator: [head() + body],
    "right, called gzip": lambda body, generator: [
        head(b"200 OK", length(len(body)), b"Content-Encoding: gzip") + body
    ],
    "cut": lambda body, generator: [head(b"200 OK", length(len(body))) + body[: generator.randrange(len(body))]],
    "cut in the headers": lambda body, generator: [head(b"200 OK", length(len(body)))[: generator.randrange(1, 40)]],
    "too long": lambda body, generator: [head(b"200 OK", length(len(body) + 5)) + body + b"\0" * 5],
    "length too small": lambda body, generator: [head(b"200 OK", length(generator.randrange(len(body)))) + body],
    "length of a terabyte": lambda body, generator: [head(b"200 OK", length(10**12)) + body],
    "a terabyte": lambda body, generator: endless(head(b"200 OK", length(10**12)), b"\0" * 2**16),
    "no end": lambda body, generator: endless(head(), b"\0" * 2**16),
    "no length": lambda body, generator: [
        head(b"200 OK", b"Content-Length: " + generator.choice([b"-5", b"x", b"1e3"])) + body
    ],
    "chunks that lie": lambda body, generator: [
        head(b"200 OK", b"Transfer-Encoding: chunked") + chunked(body, generator, True)
    ],
    "trailers without end": lambda body, generator: endless(
        head(b"200 OK", b"Transfer-Encoding: chunked") + chunked(body, generator, False)[:-2], b"X: y\r\n" * 500
    ),
    "another dtype": lambda body, generator: well_sent(
        body + body if generator.random() < 0.5 else body[: len(body) // 2]
    ),
    "noise": lambda body, generator: [generator.randbytes(generator.randrange(1, 300))],
    "not UTF-8": lambda body, generator: well_sent(b'"\xff\xfe' + body),
    "NaN": lambda body, generator: well_sent(nan_in(body, generator)),
    "deep JSON": lambda body, generator: well_sent(generator.choice([b"[", b'{"a":']) * 10_000),
    "other JSON": lambda body, generator: well_sent(
        generator.choice(
            [b"null", b"[]", b"{}", b'{"choices": [[]]}', b'{"data": [{"data": [[1e400]]}]}', b"1" * 6000]
        )
    ),
    "status": lambda body, generator: [
        head(
            generator.choice([b"204 x", b"301 x", b"401 x", b"404 x", b"418 x", b"500 x", b"999 x", b"-1 x"]),
            b"Location: http://127.0.0.1:9/",
        )
        + body
    ],
    "headers without end": lambda body, generator: endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 500),
    "a header without end": lambda body, generator: endless(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 2**16),
    "a gzip bomb": lambda body, generator: [
        head(b"200 OK", length(44), b"Content-Encoding: gzip") + b"\x1f\x8b" + b"\0" * 42
    ],
    "closed": lambda body, generator: [b""],
}
SLOW = {  # each takes the timeout
    "dripping body": lambda body, generator: endless(head(b"200 OK", length(2**20)), b"\0", 0.02),
    "dripping headers": lambda body, generator: endless(b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.02),
    "dripping chunk size": lambda body, generator: endless(
        head(b"200 OK", b"Transfer-Encoding: chunked") + b"1;", b"x", 0.02
    ),
    "dripping trailers": lambda body, generator: endless(
        head(b"200 OK", b"Transfer-Encoding: chunked") + chunked(body, generator, False)[:-2], b"X: y\r\n", 0.02
    ),
    "dripping refusal": lambda body, generator: endless(head(b"400 x"), b"n", 0.02),
}


def send(handler, parts, seconds=10 * TIMEOUT):
    """Sends until the client has gone, a while at most. Whether it has."""
    end = time.monotonic() + seconds
    handler.close_connection = True
    try:
        for part in parts:
            handler.wfile.write(part)
            if time.monotonic() > end:
                return False
    except OSError:
        return True
    return False


# ------------------------------------------------------------------------------------------------------------- calls


class Target:
    """One kind of call: its true answer, what it may raise, and the server that breaks what it says."""

    def __init__(self, server, call, errors):
        self.server, self.call, self.errors = server, call, errors
        self.truth = call()

    def outcome(self):
        """`"true"` or the name of the error; anything else is an error of this test."""
        try:
            value = self.call()
        except self.errors as error:
            return type(error).__name__
        assert equal(value, self.truth), f"{value} is not {self.truth}"
        return "true"


def equal(value, truth):
    if isinstance(truth, torch.Tensor):
        return torch.equal(value, truth)
    if isinstance(truth, (list, tuple)):
        return len(value) == len(truth) and all(map(equal, value, truth))
    return value == truth


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzzed")
    make_teacher().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@contextmanager
def targets(folder):
    """The calls to fuzz: hidden states, log-probabilities, the likeliest tokens, and a judge's reply."""
    model = make_teacher().eval()
    pooling = fake_vllm.FakeServer(model, folder, key=fake_vllm.KEY)
    completions = fake_vllm.FakeServer(model, folder, "v1/completions")
    judge = fake_openai.FakeOpenAI(lambda messages: "Reasons.\nVerdict: A")
    with fake_vllm.serving(pooling), fake_vllm.serving(completions), fake_openai.serving(judge):
        quick = {"timeout": TIMEOUT, "max_wait": 0}
        exact = RemoteTeacher(pooling.url, pooling.key, timeout=30)
        scorer = RemoteTeacher(completions.url, timeout=30)
        chat = ChatEndpoint(judge.url, "judge", timeout=30, max_retries=0)
        found = [
            Target(pooling, lambda: exact.hidden_states(SEQUENCES, NUM_LAST), TeacherServerError),
            Target(completions, lambda: scorer.log_probs(SEQUENCES, NUM_LAST), TeacherServerError),
            Target(completions, lambda: scorer.top_k(SEQUENCES, NUM_LAST, 2), TeacherServerError),
            Target(judge, lambda: chat.complete([])[0], (JudgeError, NoReplyError)),
            Target(
                pooling, lambda: RemoteTeacher(pooling.url, pooling.key, **quick).max_model_len, TeacherServerError
            ),
        ]
        # The truths are known: from here on nobody waits.
        for teacher in (exact, scorer):
            teacher._server._timeout, teacher._server._max_wait = TIMEOUT, 0
        chat._timeout = TIMEOUT
        yield found


def breaking(target, mutate, generator, ended=None, **limits):
    """Makes the target's server send mutations from now on, and say in a queue whether the client has left."""

    def answer(handler, payload):
        if handler.path == "/v1/models":
            return target.server.models
        if isinstance(target.server, fake_openai.FakeOpenAI):
            return fake_openai.completion(target.server.say([]))
        return target.server.answer(payload)

    def fault(handler, payload=None):
        said = answer(handler, payload)
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        left = send(handler, mutate(body, generator), **limits)
        if ended is not None:
            ended.put(left)
        return True

    if isinstance(target.server, fake_openai.FakeOpenAI):
        target.server.faults = iter(lambda: fault, None)
    else:
        target.server.fault = fault


@pytest.mark.parametrize("kind", range(5), ids=["hidden states", "log-probs", "top k", "judge", "connecting"])
def test_every_call_ends_in_the_truth_or_in_one_error(kind, folder):
    """Each mutation twice, 250 answers in all; and the memory that they take."""
    generator, outcomes = random.Random(kind), Counter()
    with targets(folder) as found:
        target = found[kind]
        tracemalloc.start()
        try:
            for name, mutate in [*MUTATIONS.items()] * 2:
                breaking(target, mutate, generator)
                outcome = target.outcome()
                outcomes[outcome] += 1
                if name in ("closed", "a terabyte", "headers without end", "deep JSON", "noise", "cut in the headers"):
                    assert outcome != "true", name
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert outcomes["true"] > 0
    assert outcomes.total() - outcomes["true"] >= len(MUTATIONS)
    assert peak < 2**27


@pytest.mark.parametrize("name", SLOW)
def test_a_server_that_never_comes_to_an_end_is_left(name, folder):
    """The client ends the connection; the server would go on for fifty timeouts."""
    with targets(folder) as found:
        for target in (found[0], found[3]):
            ended = queue.Queue()
            breaking(target, SLOW[name], random.Random(0), ended, seconds=50 * TIMEOUT)
            assert target.outcome() != "true"
            assert ended.get(timeout=60), "the server came to its end first"


@pytest.mark.slow
def test_two_minutes_of_broken_answers(folder, capsys):
    generator, outcomes, longest = random.Random(0), Counter(), 0.0
    start, seconds = time.monotonic(), 120
    everything = {**MUTATIONS, **SLOW}
    with targets(folder) as found:
        while time.monotonic() - start < seconds:
            # Rounds, so that what is slow comes too and does not take all the time.
            for name in generator.sample([*MUTATIONS] * 8 + [*SLOW], k=8 * len(MUTATIONS) + len(SLOW)):
                target = generator.choice(found)
                breaking(target, everything[name], generator)
                began = time.monotonic()
                outcomes[target.outcome()] += 1
                longest = max(longest, time.monotonic() - began)
    assert outcomes["true"] > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with capsys.disabled():
        print(
            f"\nfuzzed {outcomes.total()} responses in {time.monotonic() - start:.0f} s: {outcomes['true']} true, "
            + ", ".join(f"{count} {name}" for name, count in outcomes.items() if name != "true")
            + f", nothing else; longest call {longest:.1f} s, peak memory {peak:.0f} MiB"
        )
