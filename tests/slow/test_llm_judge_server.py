"""The LLM judge against a real server: `transformers serve` with SmolLM2-135M-Instruct, on this machine's CPU."""

import json
import sys
from contextlib import contextmanager

import pytest
from vllm_server import free_port, running

from trl_cmdp.evaluation import win_rate
from trl_cmdp.evaluation.judges import ChatEndpoint, LLMJudge, Pair, read_judgements, write_judgements
from trl_cmdp.evaluation.judges.llm import parse_verdict


pytestmark = pytest.mark.slow

PAIRS = [
    Pair(i, True, 0, f"What is {i} + 3?", f"{i} + 3 = {i + 3}\n#### {i + 3}", f"{i} + 3 = {i + 4}\n#### {i + 4}")
    for i in range(4)
]


@contextmanager
def transformers_server(model):
    """URL of the server."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port)]
    with running(
        [*command, "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"], f"http://127.0.0.1:{port}"
    ):
        yield f"http://127.0.0.1:{port}/v1"


def test_every_pair_is_judged_in_both_orders_or_counted(smollm2, tmp_path):
    cache = tmp_path / "replies.jsonl"
    with transformers_server(smollm2) as url:
        chat = ChatEndpoint(
            url,
            str(smollm2),
            sampling_params={"temperature": 0, "max_tokens": 24},
            concurrency=1,  # an answer may take long on a busy machine; several at a time only longer
            timeout=600,
        )
        judgements = list(LLMJudge(chat, cache, max_malformed=1).judge(PAIRS))
    replies = [json.loads(line)["reply"] for line in cache.read_text().splitlines()]
    rates = win_rate(judgements)
    print(f"{rates.num_judged} of {rates.num_pairs} pairs judged, {rates.failures}; replies: {replies}")

    assert [judgement.key for judgement in judgements] == [(pair.problem, True, 0) for pair in PAIRS]
    for judgement in judgements:
        first, second = judgement.orders
        if None in (first, second):
            assert judgement.outcome is None
        else:
            assert judgement.outcome == (first if first == second else "tie")
        assert judgement.failures.get("no_verdict", 0) == judgement.orders.count(None)
        assert judgement.failures.keys() <= {"malformed", "no_verdict"}  # the server itself answered everything
    # Nothing is guessed: as many outcomes as replies with a verdict, and all other replies are counted as malformed.
    verdicts = [parse_verdict(reply) for reply in replies]
    orders = [order for judgement in judgements for order in judgement.orders]
    assert len(replies) - verdicts.count(None) == len(orders) - orders.count(None)
    assert verdicts.count(None) == rates.failures.get("malformed", 0)
    assert all(reply.strip() for reply in replies)
    assert read_judgements(write_judgements(judgements)) == judgements

    # The server is gone: the second run has only the replies on disk.
    assert list(LLMJudge(chat, cache, max_malformed=1).judge(PAIRS)) == judgements
