"""Log-probabilities of sampled tokens, the cross-entropy form of the kernel, MiniLLM's advantages, limits."""

import pytest
import torch
from head_reference import TOKENS, V, logits_of, make_heads, widened
from hypothesis import given
from hypothesis import strategies as st

from trl_cmdp.core import AutoLimit, Head, chunked_divergence, chunked_log_probs, minillm_advantages, scheduled_limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_mb", [1e-9, 256])
def test_log_probs_equal_dense(dtype, memory_mb):
    problem = make_heads(dtype, scales=(0.7, 1.0), caps=(5.0, None))
    wide = widened(problem)
    probs = (logits_of(wide["student_hidden"], wide["student_head"]) / 0.6).softmax(-1)
    expected = (0.9 * probs + 0.1 / V).gather(-1, TOKENS[:, None]).squeeze(-1).log()
    result = chunked_log_probs(
        problem["student_hidden"], problem["student_head"], TOKENS, 0.6, prob_floor=0.1, memory_mb=memory_mb
    )
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert not result.requires_grad


def test_cross_entropy_where_neither_has_probability():
    """A token that both models exclude costs nothing and does not make NaN."""
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    student_bias = bias.clone().requires_grad_()
    heads = Head(weight, student_bias), Head(weight, bias)
    loss, costs = chunked_divergence(hidden, heads[0], hidden, heads[1], cross_entropy=True)
    loss.backward()
    torch.testing.assert_close(costs, torch.tensor([2.0], dtype=torch.float64).log())
    assert student_bias.grad.isfinite().all()


MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])


@given(st.floats(0.0, 0.9), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_minillm_does_not_see_what_is_masked(alpha, single_step, length_norm, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = -torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) * 5
    switches = (single_step, length_norm, alpha)
    expected = minillm_advantages(student, teacher, MASK, *switches)
    spoilt = [values.masked_fill(MASK == 0, torch.nan) for values in (student, teacher)]
    for value, target in zip(minillm_advantages(*spoilt, MASK, *switches), expected, strict=True):
        assert torch.equal(value, target)
        assert (value[MASK == 0] == 0).all()
        assert value.isfinite().all()


def test_minillm_by_hand():
    student = torch.tensor([[-1.0, -2.0, -3.0]])
    teacher = torch.tensor([[-1.5, -1.0, -5.0]])  # r = −0.5, 1, −2
    mask = torch.ones(1, 3)
    advantages, importance = minillm_advantages(student, teacher, mask)
    torch.testing.assert_close(advantages, torch.tensor([[-0.5, -2.0, 0.0]]))  # (1 − 2)/2, −2, nothing to come
    assert torch.equal(importance, torch.ones(1, 3))
    advantages, _ = minillm_advantages(student, teacher, mask, single_step_decomposition=False)
    torch.testing.assert_close(advantages, torch.tensor([[-0.5, -0.5, -2.0]]))
    advantages, _ = minillm_advantages(student, teacher, mask, False, False)
    torch.testing.assert_close(advantages, torch.tensor([[-1.5, -1.0, -2.0]]))


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(-1, 2), st.sampled_from(["linear", "cosine"]))
def test_schedule_stays_between_its_ends(start, end, progress, schedule):
    limit = scheduled_limit(start, end, progress, schedule)
    assert min(start, end) - 1e-9 <= limit <= max(start, end) + 1e-9
    if progress <= 0:
        assert limit == pytest.approx(start)
    if progress >= 1:
        assert limit == pytest.approx(end)


def test_constant_schedule_and_unknown_ones():
    assert scheduled_limit(3.0, 1.0, 0.0, "constant") == 1.0
    with pytest.raises(ValueError, match="'constant', 'linear' or 'cosine'"):
        scheduled_limit(3.0, 1.0, 0.0, "exponential")


def test_auto_limit_uses_the_last_quarter():
    auto = AutoLimit(steps=8, quantile=0.5, margin=2.0)
    for step in range(8):
        auto.record(step, [float(step), float(step) + 1])
    assert auto.costs == [6.0, 7.0, 7.0, 8.0]
    assert auto.settle() == auto.limit == 14.0


def test_auto_limit_without_costs_or_divergence_is_an_error():
    with pytest.raises(ValueError, match="no rollout costs"):
        AutoLimit(4, 0.9, 2.0).settle()
    with pytest.raises(ValueError, match="Set `cost_limit` to a number"):
        AutoLimit(4, 0.9, 2.0, costs=[0.0, 0.0]).settle()
