"""Log-probabilities, entropies and the divergence from one projection, against float64 formulas written here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_divergence import BETAS, error, inputs, reference_divergence, student_tensors
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_cmdp.core import _head, chunked_divergence, chunked_log_probs, chunked_policy_divergence, chunked_scores


N, V = 7, 23
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 0.1], dtype=torch.float64)
COMPARED = WEIGHTS != 0
TOKENS = torch.tensor([3, 0, 22, 9, 9, 1, 17])
# Tiles of one row, of some and of all; blocks of one token, of some and of the whole vocabulary.
SIZES = [(1, 1), (3, 5), (128, 2**20)]


@pytest.fixture(params=SIZES, ids=["one", "some", "whole"])
def tile_sizes(request, monkeypatch):
    set_sizes(monkeypatch, *request.param)


def set_sizes(monkeypatch, rows, tokens):
    make = _head.Workspace.__init__

    def workspace(self, num_rows, *arguments):
        make(self, min(num_rows, rows), *arguments)
        self._block_size = min(self._block_size, tokens)

    monkeypatch.setattr(_head.Workspace, "__init__", workspace)


def logits_of(tensors, who, scale=1.0, cap=None, vocab=None):
    """Logits over the first `vocab` tokens, in float64 and differentiable."""
    logits = tensors[f"{who}_hidden"] @ tensors[f"{who}_weight"][:vocab].T
    if tensors[f"{who}_bias"] is not None:
        logits = logits + tensors[f"{who}_bias"][:vocab]
    return scale * logits if cap is None else cap * torch.tanh(scale * logits / cap)


def reference(tensors, weights, token_ids, beta, temperature=1.0, scales=(1.0, 1.0), caps=(None, None), floor=0.0):
    """Log-probabilities, entropies, loss and costs, by softmax over everything at once."""
    shared = min(len(tensors["student_weight"]), len(tensors["teacher_weight"]))
    logps = (logits_of(tensors, "student", scales[0], caps[0]) / temperature).log_softmax(-1)
    compared = weights != 0
    costs = reference_divergence(
        logits_of(tensors, "student", scales[0], caps[0], shared)[compared],
        logits_of(tensors, "teacher", scales[1], caps[1], shared),
        beta,
        temperature,
        floor,
    )
    log_probs = logps.gather(-1, token_ids[:, None]).squeeze(-1)
    return log_probs, -(logps.exp() * logps).sum(-1), (weights[compared] * costs).sum(), costs.detach()


def policy_inputs(student_vocab=V, teacher_vocab=V, bias=True, weights=WEIGHTS, **arguments):
    """As `inputs`, the teacher's hidden states being those of the compared rows, and the vocabularies of any size."""
    tensors = inputs(bias=bias, **arguments)
    generator = torch.Generator().manual_seed(1)
    for who, vocab in (("student", student_vocab), ("teacher", teacher_vocab)):
        for part in ("weight", "bias"):
            tensor = tensors[f"{who}_{part}"]
            if tensor is not None:
                more = torch.randn(vocab, *tensor.shape[1:], generator=generator, dtype=torch.float64).to(tensor.dtype)
                more[: min(V, vocab)] = tensor.detach()[:vocab]
                tensors[f"{who}_{part}"] = more.requires_grad_(tensor.requires_grad)
    return tensors | {"teacher_hidden": tensors["teacher_hidden"][weights != 0]}


def fused(tensors, log_prob_grad=None, token_ids=TOKENS, weights=WEIGHTS, **options):
    return chunked_policy_divergence(
        **tensors, token_ids=token_ids, weights=weights, log_prob_grad=log_prob_grad, **options
    )


ADVANTAGES = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, -0.3, 1.0], dtype=torch.float64)
OTHERS = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0, 0.6, 0.7], dtype=torch.float64)
EXPECTATIONS = {
    "right": ADVANTAGES,
    "absent": None,
    "wrong": OTHERS,
    "partly wrong": torch.where(torch.arange(N) < 3, ADVANTAGES, OTHERS),
}


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("expectation", EXPECTATIONS)
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0, None])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_gradient_is_exact_whatever_was_expected(expectation, factor, entropy_coef):
    """The loss factor·loss + ADVANTAGES·log_probs + entropies', its parts absent or 0 too, from every expectation."""
    expected = policy_inputs()
    log_probs, entropy, loss, _ = reference(expected, WEIGHTS, TOKENS, 1.0)
    total = (ADVANTAGES * log_probs).sum() + (factor or 0.0) * loss + entropy_coef * entropy.sum()
    total.backward()
    tensors = policy_inputs()
    log_probs, entropy, loss, _ = fused(tensors, EXPECTATIONS[expectation])
    total = (ADVANTAGES * log_probs).sum()
    if factor is not None:
        total = total + factor * loss
    if entropy_coef:
        total = total + entropy_coef * entropy.sum()
    total.backward()
    for tensor, target in zip(student_tensors(tensors), student_tensors(expected), strict=True):
        assert error(tensor.grad, target.grad) < 1e-12


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"caps": (3.0, 5.0)},
        {"temperature": 1.4, "scales": (0.5, 0.25), "caps": (2.0, 30.0), "floor": 0.2},
    ],
    ids=["plain", "temperature", "softcap", "all"],
)
@pytest.mark.parametrize("vocabularies", [(V, V), (V + 4, V), (V, V + 4)])
def test_values_and_gradients_equal_the_formula(beta, options, vocabularies):
    """All four outputs, and each of the three gradients, over equal and unequal vocabularies."""
    tensors, wide = policy_inputs(*vocabularies), policy_inputs(*vocabularies)
    token_ids = TOKENS.clone()
    token_ids[1] = vocabularies[0] - 1  # padding of the student's vocabulary, where it has any
    expected = reference(wide, WEIGHTS, token_ids, beta, **options)
    scales, caps = options.get("scales", (1.0, 1.0)), options.get("caps", (None, None))
    actual = fused(
        tensors,
        OTHERS,
        token_ids,
        beta=beta,
        temperature=options.get("temperature", 1.0),
        student_logit_scale=scales[0],
        teacher_logit_scale=scales[1],
        student_final_logit_softcapping=caps[0],
        teacher_final_logit_softcapping=caps[1],
        teacher_prob_floor=options.get("floor", 0.0),
    )
    assert not actual[3].requires_grad
    for value, target in zip(actual, expected, strict=True):
        assert error(value, target) < 1e-12
    for log_probs, entropy, loss, _ in (expected, actual):
        ((OTHERS + 0.1 * ADVANTAGES) * log_probs - 0.3 * ADVANTAGES * entropy).sum().add(loss).backward()
    for tensor, target in zip(student_tensors(tensors), student_tensors(wide), strict=True):
        assert error(tensor.grad, target.grad) < 1e-12


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_weights_and_expectations(data):
    """Weights and derivatives of any sparsity, in tiles and blocks of any size."""
    numbers = st.lists(st.sampled_from([0.0, 1.0, -0.5, 3.0]), min_size=N, max_size=N)
    weights, expectation, derivative, of_entropy = (
        torch.tensor(data.draw(numbers), dtype=torch.float64) for _ in range(4)
    )
    tensors, wide = policy_inputs(weights=weights), policy_inputs(weights=weights)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_sizes(monkeypatch, data.draw(st.integers(1, N)), data.draw(st.integers(1, V)))
        actual = fused(tensors, expectation, weights=weights, beta=0.5)
        expected = reference(wide, weights, TOKENS, 0.5)
        for log_probs, entropy, loss, _ in (expected, actual):
            ((derivative * log_probs + of_entropy * entropy).sum() + loss).backward()
    for tensor, target in zip(student_tensors(tensors), student_tensors(wide), strict=True):
        torch.testing.assert_close(tensor.grad, target.grad, rtol=1e-10, atol=1e-12)


def projections(monkeypatch):
    """Rows of each projection from here on, by model."""
    counts = {"student": 0, "teacher": 0}
    project = _head.Head.project

    def counted(self, rows, tokens, out):
        if tokens.start == 0:
            counts["student" if rows.shape[1] == 5 else "teacher"] += len(rows)
        return project(self, rows, tokens, out)

    monkeypatch.setattr(_head.Head, "project", counted)
    return counts


@pytest.mark.parametrize(("expectation", "again"), [("right", 0), ("absent", 5), ("partly wrong", 3)])
def test_rows_that_were_expected_are_projected_once(expectation, again, monkeypatch):
    """The student projects every row once and those rows again whose derivative is another; the teacher M, once."""
    counts = projections(monkeypatch)
    log_probs, _, loss, _ = fused(policy_inputs(), EXPECTATIONS[expectation])
    # As GRPO's ratio gives it, and over the normaliser of an accumulation: equal but for rounding.
    ((ADVANTAGES * (log_probs - log_probs.detach()).exp()).sum() / 3 + loss / 3).backward()
    assert counts == {"student": N + again, "teacher": int(COMPARED.sum())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_trl_on_log_probs_and_entropy(dtype):
    """TRL's fused head: the same values and gradients."""
    tensors, theirs = policy_inputs(dtype=dtype), policy_inputs(dtype=dtype)
    log_probs, entropy, _, _ = fused(tensors, temperature=0.8, student_logit_scale=0.5)
    assert log_probs.dtype == entropy.dtype == torch.float32
    student = (theirs["student_hidden"], theirs["student_weight"], theirs["student_bias"])
    their_log_probs, their_entropy, *_ = ChunkedLogProbFunction.apply(
        *student, TOKENS, 0.8, 8, None, 0.5, ("entropy",)
    )
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert error(log_probs, their_log_probs.detach()) < tolerance
    assert error(entropy, their_entropy.detach()) < tolerance
    advantages = ADVANTAGES.float()
    for ours, entropies in ((log_probs, entropy), (their_log_probs, their_entropy)):
        (advantages * ours - 0.1 * entropies).sum().backward()
    for tensor, their in zip(student_tensors(tensors), student, strict=True):
        assert tensor.grad.dtype == dtype
        assert error(tensor.grad, their.grad) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_of_float32_accumulation(dtype):
    """Against float64 on the same inputs: 1e-5, and gradients no worse than their own rounding."""
    tensors = policy_inputs(dtype=dtype)
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    expected = reference(wide, WEIGHTS, TOKENS, 1.0)
    actual = fused(tensors, ADVANTAGES)
    for value, target in zip(actual, expected, strict=True):
        assert error(value, target) < 1e-5
    for log_probs, entropy, loss, _ in (expected, actual):
        ((ADVANTAGES * log_probs + 0.1 * entropy).sum() + loss).backward()
    for tensor, target in zip(student_tensors(tensors), student_tensors(wide), strict=True):
        assert error(tensor.grad, target.grad) < 1.05 * error(target.grad.to(dtype), target.grad) + 1e-5


@pytest.mark.parametrize("frozen", [("student_weight", "student_bias"), ("student_hidden",)])
@pytest.mark.parametrize("expectation", ["right", "absent"])
def test_frozen_part_gets_no_gradient(frozen, expectation):
    tensors, whole = policy_inputs(), policy_inputs()
    for name in frozen:
        tensors[name].requires_grad_(False)
    for each in (tensors, whole):
        log_probs, _, loss, _ = fused(each, EXPECTATIONS[expectation])
        ((ADVANTAGES * log_probs).sum() + loss).backward()
    for name in ("student_hidden", "student_weight", "student_bias"):
        if name in frozen:
            assert tensors[name].grad is None
        else:
            assert torch.equal(tensors[name].grad, whole[name].grad)


def test_no_grad_gives_values_alone():
    tensors = policy_inputs()
    expected = fused(tensors, ADVANTAGES)
    with torch.no_grad():
        actual = fused(tensors, ADVANTAGES)
    for value, target in zip(actual, expected, strict=True):
        assert not value.requires_grad
        assert error(value, target.detach()) < 1e-14


@pytest.mark.parametrize("retain_graph", [True, False])
def test_second_backward_is_an_error(retain_graph):
    log_probs, _, loss, _ = fused(policy_inputs(), ADVANTAGES)
    ((ADVANTAGES * log_probs).sum() + loss).backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="second time"):
        log_probs.sum().backward()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("expectation", ["right", "absent"])
def test_nan_of_the_student_is_not_hidden(beta, expectation):
    """Values and gradient of a row that is not finite are NaN, never 0."""
    tensors = policy_inputs()
    with torch.no_grad():
        tensors["student_hidden"][2] = torch.nan
    log_probs, entropy, loss, costs = fused(tensors, EXPECTATIONS[expectation], beta=beta)
    for values in (log_probs, entropy, tensors["student_hidden"].new_zeros(N).masked_scatter(COMPARED, costs)):
        assert values.isnan().tolist() == [row == 2 for row in range(N)]
    ((ADVANTAGES * log_probs).sum() + loss).backward()
    assert tensors["student_hidden"].grad.isnan().any(-1).tolist() == [row == 2 for row in range(N)]


def test_a_row_with_nan_reaches_its_own_results_alone():
    """No row mixes with another's values; the gradient of a row that is not finite is not, and does not look like 0."""
    tensors, clean = policy_inputs(), policy_inputs()
    with torch.no_grad():
        tensors["teacher_hidden"][1] = torch.nan  # of row 2
    (log_probs, entropy, loss, costs), (clean_log_probs, clean_entropy, _, clean_costs) = (
        fused(each, ADVANTAGES) for each in (tensors, clean)
    )
    assert torch.equal(log_probs, clean_log_probs)
    assert torch.equal(entropy, clean_entropy)
    assert costs.isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(costs[[0, 2, 3, 4]], clean_costs[[0, 2, 3, 4]])
    assert loss.isnan()
    (log_probs.sum() + loss).backward()
    assert tensors["student_hidden"].grad.isnan().any(-1).tolist() == [row == 2 for row in range(N)]


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens(beta):
    """−inf in the biases, of both models or where it costs nothing: as the smaller vocabulary, with zero gradient there."""
    tensors = policy_inputs()
    with torch.no_grad():
        tensors["student_bias"][5] = tensors["teacher_bias"][5] = -torch.inf
    token_ids = torch.where(TOKENS == 5, 6, TOKENS)
    kept = [token for token in range(V) if token != 5]
    small = {
        name: x.detach()[kept].requires_grad_(x.requires_grad) if "weight" in name or "bias" in name else x.detach()
        for name, x in tensors.items()
    }
    small["student_hidden"].requires_grad_()
    results = [
        fused(tensors, ADVANTAGES, token_ids, beta=beta),
        fused(small, ADVANTAGES, token_ids - (token_ids > 5).long(), beta=beta),
    ]
    for value, target in zip(*results, strict=True):
        assert error(value, target) < 1e-12
    for log_probs, entropy, loss, _ in results:
        ((ADVANTAGES * log_probs + 0.1 * entropy).sum() + loss).backward()
    assert error(tensors["student_hidden"].grad, small["student_hidden"].grad) < 1e-12
    assert error(tensors["student_weight"].grad[kept], small["student_weight"].grad) < 1e-12
    assert torch.equal(tensors["student_weight"].grad[5], torch.zeros(5, dtype=torch.float64))


def test_infinite_where_the_teacher_alone_is_impossible():
    """The chunked reverse KL and cross-entropy are +inf, as the dense ones."""
    tensors = inputs()
    with torch.no_grad():
        tensors["teacher_bias"][4] = -torch.inf
    for options in ({}, {"cross_entropy": True}):
        assert torch.equal(chunked_divergence(**tensors, **options)[1], torch.full((N,), torch.inf).double())
    assert chunked_divergence(**tensors, beta=0.5)[1].isfinite().all()


@pytest.mark.parametrize("rows", [0, N])
def test_nothing_compared(rows):
    """Without a teacher row this is the fused head alone, and without any row nothing."""
    tensors = policy_inputs(weights=torch.zeros(N))
    tensors["student_hidden"] = tensors["student_hidden"].detach()[:rows].requires_grad_()
    log_probs, entropy, loss, costs = fused(tensors, ADVANTAGES[:rows], TOKENS[:rows], torch.zeros(rows))
    assert loss == 0.0
    assert costs.shape == (0,)
    assert log_probs.shape == entropy.shape == (rows,)
    ((ADVANTAGES[:rows] * log_probs).sum() + loss).backward()
    assert (tensors["student_weight"].grad != 0).any() == (rows > 0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"token_ids": TOKENS[1:]}, "`token_ids`"),
        ({"weights": WEIGHTS[1:]}, "`weights`"),
        ({"log_prob_grad": ADVANTAGES[:, None]}, "`log_prob_grad`"),
        ({"weights": torch.ones(N)}, "teacher positions"),
        ({"memory_mb": 0}, "`memory_mb`"),
        ({"beta": 2.0}, "`beta`"),
    ],
)
def test_bad_arguments_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        chunked_policy_divergence(**(policy_inputs() | {"token_ids": TOKENS, "weights": WEIGHTS} | changes))


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("beta", BETAS)
def test_scores_are_the_costs_and_both_log_probs(beta):
    tensors = inputs()
    options = {"temperature": 0.7, "teacher_prob_floor": 0.1, "student_final_logit_softcapping": 4.0}
    scores = chunked_scores(**tensors, token_ids=TOKENS, beta=beta, **options)
    _, costs = chunked_divergence(**tensors, beta=beta, **options)
    student, teacher = (
        chunked_log_probs(
            tensors[f"{who}_hidden"], tensors[f"{who}_weight"], TOKENS, 0.7, tensors[f"{who}_bias"], **settings
        )
        for who, settings in (("student", {"final_logit_softcapping": 4.0}), ("teacher", {"prob_floor": 0.1}))
    )
    for value, target in zip(scores, (costs, student, teacher), strict=True):
        assert not value.requires_grad
        assert error(value, target) < 1e-13


@pytest.mark.usefixtures("tile_sizes")
def test_log_probs_of_several_tokens_at_each_position():
    tensors = inputs()
    token_ids = torch.arange(3 * N).view(N, 3) % V
    arguments = tensors["student_hidden"], tensors["student_weight"]
    several = chunked_log_probs(*arguments, token_ids, prob_floor=0.1)
    assert several.shape == (N, 3)
    for column in range(3):
        assert torch.equal(several[:, column], chunked_log_probs(*arguments, token_ids[:, column], prob_floor=0.1))
