"""The choice of kernel by device, and TRL's kernels (here their operations of torch) behind the core's functions."""

import logging
from dataclasses import asdict, replace

import pytest
import torch
from trl.kernels import chunked_divergence as trl_kernel

from trl_cmdp import core
from trl_cmdp.core import Comparison, Head
from trl_cmdp.core.kernels import choice
from trl_cmdp.core.kernels.choice import kernel_of
from trl_cmdp.teachers.kernels import chunked_divergence, chunked_policy_divergence, chunked_scores


N, V, H_S, H_T = 6, 19, 4, 5
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 0.1])
TOKENS = torch.tensor([3, 0, 18, 9, 9, 1])
ADVANTAGES = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.3, 1.0])
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture
def calls(monkeypatch):
    """TRL's kernels chosen; the number of times that its divergence was asked for."""
    monkeypatch.setenv("TRL_CMDP_KERNEL", "trl")
    seen = []

    class Counted(trl_kernel.ChunkedDivergenceFunction):
        @staticmethod
        def forward(ctx, *inputs):
            seen.append(len(inputs[0]))
            return trl_kernel_forward(ctx, *inputs)

    trl_kernel_forward = trl_kernel.ChunkedDivergenceFunction.forward
    monkeypatch.setattr(trl_kernel, "ChunkedDivergenceFunction", Counted)
    return seen


def make_models(dtype=FLOAT32, vocabularies=(V, V), bias=True, scales=(1.0, 1.0), caps=(None, None)):
    """Student's hidden states and head, which require gradients, and the teacher's."""
    generator = torch.Generator().manual_seed(0)
    models = []
    for width, vocab, scale, cap in zip((H_S, H_T), vocabularies, scales, caps, strict=True):
        draws = (
            torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, width), (vocab, width), (vocab,))
        )
        hidden, weight, vector = draws
        models += [hidden, Head(weight, vector if bias else None, scale, cap)]
    return trained(models)


def trained(models):
    for leaf in leaves(models):
        leaf.requires_grad_()
    return models


def leaves(models):
    return [x for x in (models[0], models[1].weight, models[1].bias) if x is not None]


def widened(models):
    def wide(tensor):
        return None if tensor is None else tensor.detach().double()

    return trained(
        [
            wide(model) if torch.is_tensor(model) else replace(model, weight=wide(model.weight), bias=wide(model.bias))
            for model in models
        ]
    )


def assert_close(actual, expected, tolerance):
    for value, target in zip(actual, expected, strict=True):
        assert (value.double() - target).norm() <= tolerance * target.norm() + 1e-12


CASES = [
    (Comparison(), {}, FLOAT32),
    (Comparison(0.0), {"caps": (3.0, 5.0), "vocabularies": (V + 4, V)}, FLOAT32),
    (Comparison(0.3, temperature=0.7), {"scales": (0.5, 0.25), "vocabularies": (V, V + 4)}, FLOAT32),
    (Comparison(1.0, temperature=1.4), {"bias": False, "caps": (None, 4.0)}, FLOAT32),
    (Comparison(), {"bias": False}, BFLOAT16),
]


@pytest.mark.parametrize(("comparison", "heads", "dtype"), CASES)
def test_trl_gives_what_the_core_does(calls, comparison, heads, dtype):
    """Costs, losses, log-probabilities, entropies and gradients, against the core's in float64."""
    tolerance = 1e-5 if dtype == FLOAT32 else 2e-2
    models, compared = make_models(dtype, **heads), WEIGHTS != 0
    wide = widened(models)
    outputs = chunked_divergence(*models, WEIGHTS, **asdict(comparison))
    expected = core.chunked_divergence(*wide, WEIGHTS, **asdict(comparison))
    assert_close([x.detach() for x in outputs], [x.detach() for x in expected], tolerance)
    for loss, _ in (outputs, expected):
        (3.0 * loss).backward()
    assert_close([leaf.grad for leaf in leaves(models)], [leaf.grad for leaf in leaves(wide)], tolerance)

    models[2], wide[2] = models[2][compared], wide[2][compared]
    for leaf in (*leaves(models), *leaves(wide)):
        leaf.grad = None
    outputs = chunked_policy_divergence(*models, comparison, TOKENS, WEIGHTS)
    expected = core.chunked_policy_divergence(*wide, comparison, TOKENS, WEIGHTS)
    assert_close([x.detach() for x in outputs], [x.detach() for x in expected], tolerance)
    assert not outputs[3].requires_grad
    for log_probs, entropy, loss, _ in (outputs, expected):
        ((ADVANTAGES * log_probs).sum() + 0.1 * entropy.sum() + loss).backward()
    assert_close([leaf.grad for leaf in leaves(models)], [leaf.grad for leaf in leaves(wide)], tolerance)
    assert calls == [4, 2, 4]  # rows with a weight, rows without, and the weighted ones beside log-probabilities


def test_scores_by_trl(calls):
    models = make_models(caps=(4.0, None))
    scores = chunked_scores(*models, Comparison(0.5, 0.7))
    assert calls == [N]
    assert_close(scores[:1], core.chunked_scores(*widened(models), Comparison(0.5, 0.7))[:1], 1e-5)
    assert scores.student_logps is scores.teacher_logps is None
    with_log_probs = chunked_scores(*models, Comparison(), TOKENS)
    assert calls == [N]
    assert all(
        torch.equal(*pair)
        for pair in zip(with_log_probs, core.chunked_scores(*models, Comparison(), TOKENS), strict=True)
    )


@pytest.mark.parametrize(
    ("comparison", "options"),
    [
        (Comparison(teacher_prob_floor=0.1), {}),
        (Comparison(cross_entropy=True), {}),
        (Comparison(), {"memory_mb": 0.1}),
        (Comparison(), {"impossible": True}),
        (Comparison(), {"dtype": torch.float64}),
        (Comparison(), {"kernel": "torch"}),
    ],
)
def test_what_trl_does_not_cover_is_the_cores(calls, monkeypatch, comparison, options):
    """A floor, a cross-entropy, less memory than its tiles take, an impossible token, sums in float64: bit for bit."""
    models, memory_mb = make_models(options.get("dtype", FLOAT32)), options.get("memory_mb")
    if "kernel" in options:
        monkeypatch.setenv("TRL_CMDP_KERNEL", options["kernel"])
    if "impossible" in options:
        with torch.no_grad():
            for head in (models[1], models[3]):
                head.bias[5] = -torch.inf
    actual = chunked_divergence(*models, WEIGHTS, **asdict(comparison), memory_mb=memory_mb)
    expected = core.chunked_divergence(*models, WEIGHTS, **asdict(comparison), memory_mb=memory_mb)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert actual[1].isfinite().all()
    scores = chunked_scores(*models, comparison, memory_mb=memory_mb)
    assert torch.equal(scores.costs, core.chunked_scores(*models, comparison, memory_mb=memory_mb).costs)
    models[2] = models[2][WEIGHTS != 0]
    actual, expected = (
        of(*models, comparison, TOKENS, WEIGHTS, memory_mb=memory_mb)
        for of in (chunked_policy_divergence, core.chunked_policy_divergence)
    )
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert calls == []


def test_rows_of_weight_zero_poison_nothing(calls):
    """Not by TRL's kernels either: their costs are not finite, the loss and its gradients are."""
    results = []
    for poison in (False, True):
        models = make_models()
        if poison:
            with torch.no_grad():
                models[0][1] = torch.nan
                models[2][4] = torch.inf
        loss, costs = chunked_divergence(*models, WEIGHTS, **asdict(Comparison()))
        loss.backward()
        results.append([loss.detach(), costs[WEIGHTS != 0], *(leaf.grad for leaf in leaves(models))])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("rows", [0, N])
def test_frozen_head_and_no_weights(calls, rows):
    """A head that needs no gradient gets none; without a weighted row the loss is 0, and so is its gradient."""
    models = [model[:rows].detach() if torch.is_tensor(model) else model for model in make_models(bias=False)]
    models[0].requires_grad_()
    models[1].weight.requires_grad_(False)
    loss, costs = chunked_divergence(*models, torch.zeros(rows), **asdict(Comparison()))
    loss.backward()
    assert loss == 0.0
    assert costs.shape == (rows,)
    assert (models[0].grad == 0).all()
    assert models[1].weight.grad is None


def test_the_kernel_of_a_device(monkeypatch):
    """Ours in Triton on CUDA, torch elsewhere; a variable chooses another, and one that is none, or cannot run, is an error."""
    monkeypatch.delenv("TRL_CMDP_KERNEL", raising=False)
    assert [kernel_of(torch.device(name)) for name in ("cuda", "cpu", "mps")] == ["triton", "torch", "torch"]
    for kernel in ("torch", "trl"):
        monkeypatch.setenv("TRL_CMDP_KERNEL", kernel)
        assert [kernel_of(torch.device(name)) for name in ("cuda", "cpu")] == [kernel, kernel]
    monkeypatch.setenv("TRL_CMDP_KERNEL", "cuda")
    with pytest.raises(ValueError, match="torch, trl, triton"):
        kernel_of(torch.device("cpu"))
    monkeypatch.setenv("TRL_CMDP_KERNEL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="Unset TRL_CMDP_KERNEL"):
        kernel_of(torch.device("cpu"))


def test_without_triton_the_other_kernel_serves_and_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("TRL_CMDP_KERNEL", "triton")
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    choice._has_triton.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [kernel_of(torch.device(name)) for name in ("cuda", "cpu", "cuda")] == ["trl", "torch", "trl"]
    choice._has_triton.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Triton is not installed" in caplog.text
