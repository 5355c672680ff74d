"""The bound from k tokens never exceeds the divergence over the full vocabulary."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_cmdp.core import token_divergence
from trl_cmdp.core.lower_bound import top_k_divergence_lower_bound


def distributions(seed, rows=6, vocab=12, spread=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    return logits[0].to(dtype), logits[1].to(dtype)


def bound(student, teacher, k, by="teacher"):
    student_logps, teacher_logps = student.log_softmax(-1), teacher.log_softmax(-1)
    tokens = (teacher if by == "teacher" else student).topk(k).indices
    return top_k_divergence_lower_bound(student_logps.gather(-1, tokens), teacher_logps.gather(-1, tokens))


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 12),
    spread=st.sampled_from([0.1, 1.0, 5.0, 30.0, 300.0]),
    by=st.sampled_from(["teacher", "student"]),
)
def test_never_above_the_divergence(seed, k, spread, by):
    student, teacher = distributions(seed, spread=spread)
    exact = token_divergence(student, teacher)
    value = bound(student, teacher, k, by)
    assert value.dtype == torch.float64
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert (value <= exact * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_equals_the_divergence_of_the_merged_distributions(spread):
    """And with every token known, the divergence itself."""
    student, teacher = distributions(1, spread=spread)
    torch.testing.assert_close(bound(student, teacher, 12), token_divergence(student, teacher), rtol=1e-9, atol=1e-12)
    tokens = teacher.topk(3).indices
    merged = []
    for logits in (student, teacher):
        known = logits.softmax(-1).gather(-1, tokens)
        merged.append(torch.cat([known, 1 - known.sum(-1, keepdim=True)], dim=-1).log())
    torch.testing.assert_close(bound(student, teacher, 3), token_divergence(*merged))


def test_more_tokens_never_lower_it():
    student, teacher = distributions(2)
    values = torch.stack([bound(student, teacher, k) for k in range(1, 13)])
    assert (values.diff(dim=0) >= -1e-12).all()


def test_gradient_is_that_of_the_merged_divergence_and_finite_at_the_edges():
    student, teacher = distributions(4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: bound(logits, teacher, 5), student)
    edges = torch.tensor([[0.0, -torch.inf, -torch.inf], [-1e-17, -40.0, -800.0], [-1.0, -torch.inf, -5.0]])
    for student_logps in edges.double():
        for teacher_logps in edges.double():
            logps = student_logps.clone().requires_grad_()
            value = top_k_divergence_lower_bound(logps, teacher_logps)
            (gradient,) = torch.autograd.grad(value, logps)
            assert value.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_students_dtype(dtype):
    student, teacher = distributions(5, dtype=dtype)
    value = bound(student, teacher, 4)
    assert value.dtype == dtype
    assert (value.double() <= token_divergence(student.double(), teacher.double()) * 1.02 + 1e-3).all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same tokens"):
        top_k_divergence_lower_bound(torch.zeros(2, 3), torch.zeros(2, 4))
