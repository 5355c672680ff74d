"""Servers that answer with broken forms of the truth: a call ends in the truth or in the client's own error."""

import json
import queue
import random
import re
import resource
import time
import tracemalloc
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from fake_openai import FakeOpenAI
from fake_server import KEY, serving
from fake_vllm import FakeServer
from helpers import make_teacher, make_tokenizer, save_model

from trl_cmdp.evaluation.judges import ChatEndpoint, JudgeError, NoReplyError
from trl_cmdp.teachers import RemoteTeacher, TeacherServerError


TIMEOUT = 0.6  # seconds
SEQUENCES, NUM_LAST = [[2, 3, 4, 5, 6]], [3]


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
    numbers = [match.span() for match in re.finditer(rb"(?<=: )-?\d+\.\d+(e-?\d+)?", body)]
    if not numbers:
        return body[: len(body) // 2]
    start, end = generator.choice(numbers)
    other = generator.choice([b"NaN", b"Infinity", b"1e999", b"null", b'"x"', b"[]", b"9" * 5000])
    return body[:start] + other + body[end:]


def random_json(body, generator):
    """JSON of any shape under the names that a client reads; not as long as the truth, which may be numbers in binary."""
    values = [None, True, -1, 1e400, "x", [], {}, [[]], [[1.0] * 12] * 3, 10**400, float("nan")]
    names = ["data", "choices", "prompt_logprobs", "id", "root", "max_model_len", "logprob", "message", "2", "3"]

    def value(depth):
        if depth == 0 or generator.random() < 0.3:
            return generator.choice(values)
        if generator.random() < 0.5:
            return [value(depth - 1) for _ in range(generator.randrange(4))]
        return {generator.choice(names): value(depth - 1) for _ in range(generator.randrange(5))}

    scored = {"choices": [{"prompt_logprobs": [None] * (len(SEQUENCES[0]) - 1) + [value(3)]}]}
    said = json.dumps(generator.choice([value(5), scored])).encode()
    return said + b" " * (len(said) == len(body))


def mutations(body, generator):
    """By name, the parts of an answer that is whole, or broken and at its end sooner or later."""
    whole, whatever = head(b"200 OK", length(len(body))), head(b"200 OK")
    chunks = head(b"200 OK", b"Transfer-Encoding: chunked")
    trailers = chunks + chunked(body, generator, False)[:-2]
    cut = generator.randrange(len(body))
    status = generator.choice([b"204 x", b"301 x", b"401 x", b"404 x", b"418 x", b"500 x", b"999 x", b"-1 x"])
    other_json = [b"null", b"[]", b"{}", b'{"choices": [[]]}', b'{"data": [{"data": [[1e400]]}]}', b"1" * 6000]

    def well_sent(said):
        return [head(b"200 OK", length(len(said))) + said]

    return {
        "whole": [whole + body],
        "whole, in chunks": [chunks + chunked(body, generator, False)],
        "whole, until the end": [whatever + body],
        "whole, called gzip": [head(b"200 OK", length(len(body)), b"Content-Encoding: gzip") + body],
        "cut": [whole + body[:cut]],
        "cut in the headers": [whole[: generator.randrange(1, 40)]],
        "too long": [head(b"200 OK", length(len(body) + 5)) + body + b"\0" * 5],
        "length too small": [head(b"200 OK", length(cut)) + body],
        "length of a terabyte": [head(b"200 OK", length(10**12)) + body],
        "a terabyte": endless(head(b"200 OK", length(10**12)), b"\0" * 2**16),
        "no end": endless(whatever, b"\0" * 2**16),
        "no length": [head(b"200 OK", b"Content-Length: " + generator.choice([b"-5", b"x", b"1e3"])) + body],
        "chunks that lie": [chunks + chunked(body, generator, True)],
        "trailers without end": endless(trailers, b"X: y\r\n" * 500),
        "another dtype": well_sent(generator.choice([2 * body, body[: len(body) // 2]])),
        "noise": [generator.randbytes(generator.randrange(1, 300))],
        "not UTF-8": well_sent(b'"\xff\xfe' + body),
        "NaN": well_sent(nan_in(body, generator)),
        "deep JSON": well_sent(generator.choice([b"[", b'{"a":']) * 10_000),
        "random JSON": well_sent(random_json(body, generator)),
        "other JSON": well_sent(generator.choice(other_json)),
        "status": [head(status, b"Location: http://127.0.0.1:9/") + body],
        "headers without end": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 500),
        "a header without end": endless(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 2**16),
        "a gzip bomb": [head(b"200 OK", length(44), b"Content-Encoding: gzip") + b"\x1f\x8b" + b"\0" * 42],
        "closed": [b""],
    }


def drips(body, generator):
    """By name, answers that come to no end, of which each takes the timeout."""
    chunks = head(b"200 OK", b"Transfer-Encoding: chunked")
    return {
        "body": endless(head(b"200 OK", length(2**20)), b"\0", 0.02),
        "headers": endless(b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.02),
        "chunk size": endless(chunks + b"1;", b"x", 0.02),
        "trailers": endless(chunks + chunked(body, generator, False)[:-2], b"X: y\r\n", 0.02),
        "refusal": endless(head(b"400 x"), b"n", 0.02),
    }


MUTATIONS = [*mutations(b"body", random.Random(0))]
DRIPS = [*drips(b"body", random.Random(0))]


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


class Target:
    """One kind of call, its true answer, what it may raise, and the server that breaks what it says but on one path."""

    def __init__(self, server, call, errors=TeacherServerError, spared=None):
        self.server, self.call, self.errors, self.spared = server, call, errors, spared
        self.truth = call()

    def outcome(self):
        """`"true"` or the name of the error; anything else is an error of this test."""
        try:
            value = self.call()
        except self.errors as error:
            return type(error).__name__
        assert equal(value, self.truth), f"{value} is not {self.truth}"
        return "true"

    def breaking(self, name, generator, ended=None, **limits):
        """Send a mutation from now on, and say in a queue whether the client has left."""

        def fault(handler, payload):
            said = self.server.answer(handler.path, payload)
            if handler.path == self.spared or said is None:
                return False
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            left = send(handler, {**mutations(body, generator), **drips(body, generator)}[name], **limits)
            if ended is not None:
                ended.put(left)
            return True

        self.server.fault = fault


def equal(value, truth):
    if isinstance(truth, torch.Tensor):
        return torch.equal(value, truth)
    if isinstance(truth, (list, tuple)):
        return len(value) == len(truth) and all(map(equal, value, truth))
    return value == truth


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("fuzzed"), make_teacher(), make_tokenizer())


@contextmanager
def targets(folder):
    """The calls to fuzz, by name."""
    model, quick = make_teacher().eval(), {"timeout": TIMEOUT, "max_wait": 0}
    pooling = FakeServer(model, folder, key=KEY)
    completions = FakeServer(model, folder, "v1/completions")
    judge = FakeOpenAI(lambda messages: "Reasons.\nVerdict: A")
    with serving(pooling), serving(completions), serving(judge):

        def connecting(server, spared=None):
            return Target(server, lambda: RemoteTeacher(server.url, server.key, **quick).max_model_len, spared=spared)

        exact, scorer = (RemoteTeacher(server.url, server.key, **quick) for server in (pooling, completions))
        chat = ChatEndpoint(judge.url, "judge", timeout=TIMEOUT, max_retries=0)
        yield {
            "hidden states": Target(pooling, lambda: exact.hidden_states(SEQUENCES, NUM_LAST)),
            "log-probs": Target(completions, lambda: scorer.log_probs(SEQUENCES, NUM_LAST)),
            "top k": Target(completions, lambda: scorer.top_k(SEQUENCES, NUM_LAST, 2)),
            "judge": Target(judge, lambda: chat.complete([])[0], (JudgeError, NoReplyError)),
            "connecting": connecting(pooling),
            "probing hidden states": connecting(pooling, "/v1/models"),
            "probing log-probs": connecting(completions, "/v1/models"),
        }


CALLS = [
    *["hidden states", "log-probs", "top k", "judge"],
    *["connecting", "probing hidden states", "probing log-probs"],
]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_ends_in_the_truth_or_in_one_error(call, folder):
    """Each mutation twice, random JSON more often, 500 answers in all; and the memory that they take."""
    generator, outcomes = random.Random(CALLS.index(call)), Counter()
    with targets(folder) as found:
        target = found[call]
        tracemalloc.start()
        try:
            for name in MUTATIONS * 2 + ["random JSON"] * 20:
                target.breaking(name, generator)
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


@pytest.mark.parametrize("name", DRIPS)
def test_a_server_that_never_comes_to_an_end_is_left(name, folder):
    """The client ends the connection; the server would go on for fifty timeouts."""
    with targets(folder) as found:
        for target in (found["hidden states"], found["judge"]):
            ended = queue.Queue()
            target.breaking(name, random.Random(0), ended, seconds=50 * TIMEOUT)
            assert target.outcome() != "true"
            assert ended.get(timeout=60), "the server came to its end first"


@pytest.mark.slow
def test_two_minutes_of_broken_answers(folder, capsys):
    generator, outcomes, longest = random.Random(0), Counter(), 0.0
    start, seconds = time.monotonic(), 120
    with targets(folder) as found:
        while time.monotonic() - start < seconds:
            # Rounds, so that what is slow comes too and does not take all the time.
            for name in generator.sample(MUTATIONS * 8 + DRIPS, k=8 * len(MUTATIONS) + len(DRIPS)):
                target = generator.choice([*found.values()])
                target.breaking(name, generator)
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
