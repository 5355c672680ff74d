"""Log-probabilities, entropies and the divergence from one projection, against float64 formulas."""

from dataclasses import replace

import pytest
import torch
from head_reference import (
    BETAS,
    MEMORY_MB,
    PROBLEMS,
    SOME,
    TOKENS,
    WEIGHTS,
    N,
    V,
    assert_gradients,
    dense_costs,
    error,
    leaves,
    logits_of,
    make_heads,
    widened,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_cmdp.core import Comparison, chunked_divergence, chunked_log_probs, chunked_policy_divergence, chunked_scores


REVERSE_KL = Comparison()
COMPARED = WEIGHTS != 0
ADVANTAGES = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, -0.3, 1.0], dtype=torch.float64)
BONUS = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0, 0.6, 0.7], dtype=torch.float64)


def reference(problem, comparison=REVERSE_KL, token_ids=TOKENS, weights=WEIGHTS):
    """Log-probabilities, entropies, loss and costs, by softmax over everything at once."""
    logits = logits_of(problem["student_hidden"], problem["student_head"]) / comparison.temperature
    logps, compared = logits.log_softmax(-1), weights != 0
    costs = dense_costs(problem, comparison, compared)
    log_probs = logps.gather(-1, token_ids[:, None]).squeeze(-1)
    return log_probs, -(logps.exp() * logps).sum(-1), (weights[compared] * costs).sum(), costs.detach()


def fused(problem, comparison=REVERSE_KL, token_ids=TOKENS, weights=WEIGHTS, **options):
    return chunked_policy_divergence(**problem, comparison=comparison, token_ids=token_ids, weights=weights, **options)


def backward(outputs, advantages=ADVANTAGES, bonus=BONUS, factor=1.0):
    """Of Σ advantages·log_probs + Σ bonus·entropy + factor·loss; a part is left out where its factor is `None`."""
    log_probs, entropy, loss, _ = outputs
    parts = [(advantages, log_probs), (bonus, entropy), (factor, loss)]
    sum((of * values).sum() for of, values in parts if of is not None).backward()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_weights_and_any_part_of_the_loss(data):
    """
    Weights and derivatives of any sparsity, in tiles and blocks of any size. Each part of the loss has a factor, 0 among
    others, or is not in it at all.
    """
    numbers = st.lists(st.sampled_from([0.0, 1.0, -0.5, 3.0]), min_size=N, max_size=N)
    vectors = numbers.map(lambda values: torch.tensor(values, dtype=torch.float64))
    weights, memory_mb = data.draw(vectors), data.draw(st.integers(1, 2000)) * 8 / 2**20
    parts = [data.draw(st.none() | of) for of in (vectors, vectors, st.sampled_from([0.0, 1.0, 3.0]))]
    assume(any(part is not None for part in parts))
    problem, wide = make_heads(weights=weights), make_heads(weights=weights)
    backward(fused(problem, Comparison(0.5), weights=weights, memory_mb=memory_mb), *parts)
    backward(reference(wide, Comparison(0.5), weights=weights), *parts)
    for leaf, target in zip(leaves(problem), leaves(wide), strict=True):
        torch.testing.assert_close(leaf.grad, target.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("comparison", "heads", "memory_mb"), PROBLEMS)
def test_values_and_gradients_equal_the_formula(comparison, heads, memory_mb):
    """All four outputs, and each of the three gradients, over equal and unequal vocabularies."""
    problem, wide = make_heads(weights=WEIGHTS, **heads), make_heads(weights=WEIGHTS, **heads)
    token_ids = TOKENS.clone()
    token_ids[1] = problem["student_head"].vocab_size - 1  # padding of the student's vocabulary, where it has any
    actual = fused(problem, comparison, token_ids, memory_mb=memory_mb)
    expected = reference(wide, comparison, token_ids)
    assert not actual[3].requires_grad
    for value, target in zip(actual, expected, strict=True):
        assert error(value, target) < 1e-12
    for outputs in (expected, actual):
        backward(outputs)
    assert_gradients(problem, [leaf.grad for leaf in leaves(wide)], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_of_float32_accumulation(dtype):
    """
    Against float64 on the same inputs: 1e-5, and gradients no worse than their own rounding. TRL's fused head gives the
    same log-probabilities and entropies.
    """
    problem = make_heads(dtype, scales=(0.5, 1.0), weights=WEIGHTS)
    wide, comparison = widened(problem), Comparison(temperature=0.8)
    actual, expected = fused(problem, comparison), reference(wide, comparison)
    for value, target in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        assert error(value, target) < 1e-5
    their = ChunkedLogProbFunction.apply(*leaves(problem), TOKENS, 0.8, 8, None, 0.5, ("entropy",))
    for value, target in zip(actual[:2], their[:2], strict=True):
        assert error(value, target.detach()) < (1e-5 if dtype == torch.float32 else 3e-2)
    for outputs in (expected, actual):
        backward(outputs)
    for leaf, target in zip(leaves(problem), leaves(wide), strict=True):
        assert leaf.grad.dtype == dtype
        assert error(leaf.grad, target.grad) < 1.05 * error(target.grad.to(dtype), target.grad) + 1e-5


@pytest.mark.parametrize("retain_graph", [True, False])
def test_second_backward_is_an_error(retain_graph):
    log_probs, _, loss, _ = fused(make_heads(weights=WEIGHTS))
    (log_probs.sum() + loss).backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="second time"):
        log_probs.sum().backward()


def test_a_head_that_changed_before_backward_is_an_error():
    """Log-probabilities are projected again in backward: with another weight their gradient would be wrong."""
    problem = make_heads(weights=WEIGHTS)
    outputs = fused(problem)
    with torch.no_grad():
        problem["student_head"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(outputs)


@pytest.mark.parametrize("beta", BETAS)
def test_nan_of_the_student_is_not_hidden(beta):
    """Values and gradient of a row that is not finite, compared or not, are NaN, never 0, and of the others are not."""
    problem, broken = make_heads(weights=WEIGHTS), torch.isin(torch.arange(N), torch.tensor([1, 2]))
    with torch.no_grad():
        problem["student_hidden"][broken] = torch.nan
    outputs = log_probs, entropy, _, costs = fused(problem, Comparison(beta))
    assert torch.equal(log_probs.isnan(), broken)
    assert torch.equal(entropy.isnan(), broken)
    assert torch.equal(costs.isnan(), broken[COMPARED])
    backward(outputs)
    assert torch.equal(problem["student_hidden"].grad.isnan().any(-1), broken)


def test_nan_of_the_teacher_reaches_its_own_row_alone():
    """No row mixes with another's values; the gradient of a row that is not finite is not, and does not look like 0."""
    problem, clean = make_heads(weights=WEIGHTS), make_heads(weights=WEIGHTS)
    problem["teacher_hidden"][1] = torch.nan  # of row 2
    outputs, expected = fused(problem), fused(clean)
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[1], expected[1])
    assert outputs[2].isnan()
    assert outputs[3].isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(outputs[3][[0, 2, 3, 4]], expected[3][[0, 2, 3, 4]])
    backward(outputs)
    assert problem["student_hidden"].grad.isnan().any(-1).tolist() == [row == 2 for row in range(N)]


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens(beta):
    """−inf in the biases of both models: as the smaller vocabulary, with zero gradient there."""
    problem = make_heads(weights=WEIGHTS)
    with torch.no_grad():
        for who in ("student", "teacher"):
            problem[f"{who}_head"].bias[5] = -torch.inf
    kept = [token for token in range(V) if token != 5]
    small = widened(problem)
    for name in ("student_head", "teacher_head"):
        weight, bias = (x.detach()[kept] for x in (small[name].weight, small[name].bias))
        small[name] = replace(small[name], weight=weight.requires_grad_(), bias=bias.requires_grad_())
    token_ids = torch.where(TOKENS == 5, 6, TOKENS)
    results = [
        fused(problem, Comparison(beta), token_ids),
        fused(small, Comparison(beta), token_ids - (token_ids > 5).long()),
    ]
    for value, target in zip(*results, strict=True):
        assert error(value, target) < 1e-12
    for outputs in results:
        backward(outputs)
    hidden, weight, _ = leaves(problem)
    assert error(hidden.grad, leaves(small)[0].grad) < 1e-12
    assert error(weight.grad[kept], leaves(small)[1].grad) < 1e-12
    assert (weight.grad[5] == 0).all()


def test_infinite_where_the_teacher_alone_is_impossible():
    """The chunked reverse KL and cross-entropy are +inf, as the dense ones."""
    problem = make_heads()
    problem["teacher_head"].bias[4] = -torch.inf
    for options in ({}, {"cross_entropy": True}):
        assert torch.equal(chunked_divergence(**problem, **options)[1], torch.full((N,), torch.inf).double())
    assert chunked_divergence(**problem, beta=0.5)[1].isfinite().all()


@pytest.mark.parametrize("rows", [0, N])
def test_nothing_compared(rows):
    """Without a teacher row this is the fused head alone, and without any row nothing."""
    problem = make_heads(weights=torch.zeros(N))
    problem["student_hidden"] = problem["student_hidden"].detach()[:rows].requires_grad_()
    outputs = log_probs, entropy, loss, costs = fused(problem, token_ids=TOKENS[:rows], weights=torch.zeros(rows))
    assert loss == 0.0
    assert costs.shape == (0,)
    assert log_probs.shape == entropy.shape == (rows,)
    backward(outputs, ADVANTAGES[:rows], BONUS[:rows])
    assert (problem["student_head"].weight.grad != 0).any() == (rows > 0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"token_ids": TOKENS[1:]}, "`token_ids`"),
        ({"weights": WEIGHTS[1:]}, "`weights`"),
        ({"weights": torch.ones(N)}, "teacher positions"),
        ({"teacher_head": torch.randn(V + 1, 6)}, "tokens"),
        ({"memory_mb": 0}, "`memory_mb`"),
    ],
)
def test_bad_arguments_are_named(changes, match):
    arguments = {"comparison": REVERSE_KL, "token_ids": TOKENS, "weights": WEIGHTS}
    with pytest.raises(ValueError, match=match):
        chunked_policy_divergence(**(make_heads(bias=False, weights=WEIGHTS) | arguments | changes))


@pytest.mark.parametrize(
    ("beta", "memory_mb"), [(beta, MEMORY_MB[index % 3]) for index, beta in enumerate([*BETAS, 1.0, 0.5])]
)
def test_scores_are_the_costs_and_both_log_probs(beta, memory_mb):
    problem = make_heads(caps=(4.0, None))
    comparison = Comparison(beta, temperature=0.7, teacher_prob_floor=0.1)
    scores = chunked_scores(**problem, comparison=comparison, token_ids=TOKENS, memory_mb=memory_mb)
    _, costs = chunked_divergence(**problem, beta=beta, temperature=0.7, teacher_prob_floor=0.1)
    student, teacher = (
        chunked_log_probs(problem[f"{who}_hidden"], problem[f"{who}_head"], TOKENS, 0.7, prob_floor=floor)
        for who, floor in (("student", 0.0), ("teacher", 0.1))
    )
    for value, target in zip(scores, (costs, student, teacher), strict=True):
        assert not value.requires_grad
        assert error(value, target) < 1e-13
    costs_alone = chunked_scores(**problem, comparison=comparison, memory_mb=memory_mb)
    assert torch.equal(costs_alone.costs, scores.costs)
    assert costs_alone.student_logps is costs_alone.teacher_logps is None


@pytest.mark.parametrize("memory_mb", [1e-9, SOME])
def test_log_probs_of_several_tokens_at_each_position(memory_mb):
    problem = make_heads(bias=False)
    token_ids = torch.arange(3 * N).view(N, 3) % V

    def log_probs(token_ids):
        hidden, weight = problem["student_hidden"], problem["student_head"].weight
        return chunked_log_probs(hidden, weight, token_ids, prob_floor=0.1, memory_mb=memory_mb)

    several = log_probs(token_ids)
    assert several.shape == (N, 3)
    for column in range(3):
        assert torch.equal(several[:, column], log_probs(token_ids[:, column]))
