"""A remote teacher against vLLM itself, on the CPU. Makes `.venv-vllm` on its first run; a server takes a minute to start."""

import threading
import time

import pytest
import torch
from helpers import make_model
from transformers import AutoModelForCausalLM
from vllm_server import free_port, vllm_server

from trl_cmdp.core import chunked_divergence, token_divergence
from trl_cmdp.core.lower_bound import top_k_divergence_lower_bound
from trl_cmdp.teachers import lm_head
from trl_cmdp.teachers.remote import RemoteTeacher


pytestmark = pytest.mark.slow

# vLLM computes a float32 checkpoint in half precision unless told.
EXACTLY = ("--dtype", "float32", "--max-model-len", "2048")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_sequences(vocab_size, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    sequences[-1] = sequences[0] + sequences[-1]  # a prefix that the server has in its cache
    return sequences, [max(1, length // 2) for length in lengths]


@torch.no_grad()
def assert_exact(teacher, model, lengths, tolerance):
    """Hidden states and divergence equal those of the model in this process."""
    sequences, num_last = random_sequences(teacher.vocab_size, lengths)
    local = [
        model.base_model(torch.tensor([sequence])).last_hidden_state[0, -count - 1 : -1]
        for sequence, count in zip(sequences, num_last, strict=True)
    ]
    for _ in range(2):  # the second time from the server's prefix cache
        remote = teacher.hidden_states(sequences, num_last)
        error = max((a - b).abs().max().item() for a, b in zip(remote, local, strict=True))
        assert error < tolerance
    student = make_model(seed=5, vocab_size=teacher.vocab_size, hidden_size=16, spread=0.5)
    student_hidden = torch.randn(sum(num_last), 16, generator=torch.Generator().manual_seed(1))
    costs = [
        chunked_divergence(student_hidden, lm_head(student), torch.cat(hidden), head, temperature=0.8)[1]
        for hidden, head in ((remote, teacher.head), (local, lm_head(model)))
    ]
    assert costs[1].mean() > 0.1
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-4, atol=1e-4)
    print(f"largest error: {error:.1e} in hidden states, {(costs[0] - costs[1]).abs().max():.1e} nats")


def test_exact_teacher_and_its_restart(llamas):
    model, port = load(llamas[0]), free_port()
    # Long sequences are prefilled in chunks.
    arguments = (*EXACTLY, "--api-key", "key", "--max-num-batched-tokens", "256")
    with vllm_server("pooling", llamas[0], *arguments, port=port) as url:
        teacher = RemoteTeacher(url, "key")
        assert teacher.exact
        assert teacher.dtype == torch.float32
        assert_exact(teacher, model, [5, 16, 200, 1500, 40], tolerance=1e-3)
        sequences, num_last = random_sequences(teacher.vocab_size, [1000] * 100, seed=1)
        results = []
        client = threading.Thread(target=lambda: results.extend(teacher.hidden_states(sequences, num_last)))
        client.start()
        time.sleep(0.5)
    assert not results  # killed under way
    with vllm_server("pooling", llamas[0], *arguments, port=port):
        client.join(timeout=120)
        assert len(results) == 100
        torch.testing.assert_close(results[7], teacher.hidden_states([sequences[7]], [num_last[7]])[0])


def test_a_half_precision_server_says_so(llamas):
    model = load(llamas[0])
    with vllm_server("pooling", llamas[0], "--dtype", "bfloat16") as url:
        teacher = RemoteTeacher(url)
        assert teacher.dtype == teacher.head.weight.dtype == torch.bfloat16
        sequences, num_last = random_sequences(teacher.vocab_size, [30, 50])
        remote = teacher.hidden_states(sequences, num_last)[0].float()
        with torch.no_grad():
            local = model.base_model(torch.tensor(sequences[:1])).last_hidden_state[0, -num_last[0] - 1 : -1]
        assert (remote - local).norm() < 0.05 * local.norm()


def test_exact_language_model(smollm2):
    with vllm_server("pooling", smollm2, *EXACTLY) as url:
        assert_exact(RemoteTeacher(url), load(smollm2), [15, 64, 128], tolerance=1e-2)


@torch.no_grad()
def test_log_probabilities(llamas):
    model = load(llamas[0])
    with vllm_server("completion", llamas[0], *EXACTLY) as url:
        teacher = RemoteTeacher(url)
        assert not teacher.exact
        sequences, num_last = random_sequences(teacher.vocab_size, [5, 40, 200, 30])
        log_probs, top_k = teacher.log_probs(sequences, num_last), teacher.top_k(sequences, num_last, 5)
    for sequence, count, logps, (token_ids, likely) in zip(sequences, num_last, log_probs, top_k, strict=True):
        positions = slice(len(sequence) - count - 1, -1)
        logits = model(torch.tensor([sequence])).logits[0, positions]
        own = torch.tensor(sequence[-count:])[:, None]
        torch.testing.assert_close(logps, logits.log_softmax(-1).gather(-1, own)[:, 0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(likely, logits.log_softmax(-1).topk(5).values, rtol=1e-3, atol=1e-3)
        assert token_ids.shape == likely.shape == (count, 5)
        student_logits = logits.roll(1, -1)
        bound = top_k_divergence_lower_bound(student_logits.log_softmax(-1).gather(-1, token_ids), likely)
        assert (bound <= token_divergence(student_logits, logits) + 1e-3).all()
