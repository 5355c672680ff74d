"""Both divergences against a float64 formula, with gradients, and the memory that the chunked one takes."""

from dataclasses import asdict

import pytest
import torch
from head_reference import (
    BETAS,
    H_S,
    H_T,
    PROBLEMS,
    SOME,
    WEIGHTS,
    N,
    V,
    assert_gradients,
    error,
    leaves,
    make_heads,
    reference_divergence,
    reference_loss,
)
from helpers import CreatedShapes
from torch.profiler import ProfilerActivity, profile
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_cmdp.core import Comparison, Head, chunked_divergence, default_memory_mb, token_divergence


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("temperature", "floor"), [(0.7, 0.0), (1.3, 0.1)])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_dense_equals_the_formula(beta, temperature, floor, dtype):
    """
    On leading dimensions of any number, the gradients of both logits too. Half precision is compared in float32, and its
    gradients are rounded once.
    """
    student, teacher = (torch.randn(2, 3, V).mul(3).to(dtype).requires_grad_() for _ in range(2))
    costs = token_divergence(student, teacher, beta, temperature, teacher_prob_floor=floor)
    expected = reference_divergence(student, teacher, beta, temperature, floor)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (costs.shape, costs.dtype) == ((2, 3), torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(costs, expected) < tolerance
    weights = torch.rand(2, 3, dtype=torch.float64)
    grads, references = (
        torch.autograd.grad((weights * values).sum(), (student, teacher)) for values in (costs, expected)
    )
    for grad, reference in zip(grads, references, strict=True):
        assert error(grad, reference) < (1e-2 if dtype in HALF else tolerance)


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens(beta):
    """−inf in both models, or where the first distribution is 0, counts nothing and leaves no NaN, gradients included."""
    student, teacher = (torch.randn(4, V, dtype=torch.float64) for _ in range(2))
    student[:, 3], teacher[:, 3] = -torch.inf, -torch.inf
    if beta > 0:
        student[:, 5] = -torch.inf  # finite: the student's 0 has no weight in KL(π‖μ) and in the JSD
    if beta < 1:
        teacher[:, 7] = -torch.inf
    both = (student.requires_grad_(), teacher.requires_grad_())
    costs, expected = token_divergence(*both, beta), reference_divergence(*both, beta)
    assert error(costs, expected) < 1e-12
    for grad, reference in zip(
        torch.autograd.grad(costs.sum(), both), torch.autograd.grad(expected.sum(), both), strict=True
    ):
        assert error(grad, reference) < 1e-12


def test_convention_of_beta():
    """1 is KL(π‖μ), 0 is KL(μ‖π), and the mixture is (1 − beta)·π + beta·μ: numbers worked by hand."""
    student, teacher = torch.tensor([0.9, 0.1]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    reverse = 0.9 * torch.tensor(1.8).double().log() + 0.1 * torch.tensor(0.2).double().log()
    forward = 0.5 * torch.tensor(5 / 9).double().log() + 0.5 * torch.tensor(5.0).double().log()
    assert token_divergence(student, teacher, 1.0).item() == pytest.approx(reverse.item(), rel=1e-6)
    assert token_divergence(student, teacher, 0.0).item() == pytest.approx(forward.item(), rel=1e-6)
    # beta = 0.25: the mixture is 0.75·(0.9, 0.1) + 0.25·(0.5, 0.5) = (0.8, 0.2)
    mixture = torch.tensor([0.8, 0.2]).double().log()
    expected = 0.25 * token_divergence(teacher, mixture) + 0.75 * token_divergence(student, mixture)
    assert token_divergence(student, teacher, 0.25).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("offset", [20.0, 1000.0])
def test_float32_holds_for_close_distributions_of_large_logits(beta, offset):
    """A cost of 5e-3, as of a student inside its budget: 1e-5 relative, dense and chunked, also in the gradient."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(16, 4000, generator=generator) * 3 + offset
    teacher = student + (0.1 if beta in (0.0, 1.0) else 0.25) * torch.randn(16, 4000, generator=generator)
    wide = student.double().requires_grad_()
    expected = reference_divergence(wide, teacher, beta)
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    assert 4e-3 < expected.mean() < 1e-2
    assert error(token_divergence(student, teacher, beta), expected) < 1e-5
    identity, head = torch.eye(16), student.T.clone().requires_grad_()
    loss, costs = chunked_divergence(identity, head, identity, teacher.T, beta=beta)
    loss.backward()
    assert error(costs, expected) < 1e-5
    assert error(head.grad.T, expected_grad) < 1e-5


@pytest.mark.parametrize(("comparison", "heads", "memory_mb"), PROBLEMS)
def test_chunked_equals_the_formula(comparison, heads, memory_mb):
    """Loss, costs and all of the student's gradients in float64, in tiles of one row, of some and of all rows."""
    problem = make_heads(**heads)
    loss, costs = chunked_divergence(**problem, weights=WEIGHTS, **asdict(comparison), memory_mb=memory_mb)
    expected_loss, expected_costs, expected_grads = reference_loss(problem, WEIGHTS, comparison)
    assert error(loss, expected_loss) < 1e-11
    assert error(costs, expected_costs) < 1e-11
    assert not costs.requires_grad
    (3.0 * loss).backward()  # a factor on the loss, as a normaliser puts it, reaches every gradient
    assert_gradients(problem, [3.0 * grad for grad in expected_grads], 1e-11)


def test_a_plain_weight_is_a_head_without_bias():
    problem = make_heads(bias=False)
    plain = problem | {name: problem[name].weight for name in ("student_head", "teacher_head")}
    for value, expected in zip(chunked_divergence(**plain), chunked_divergence(**problem), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("dtype", "head_dtype", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float32, True),
    ],
)
@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_accumulates_in_float32(dtype, head_dtype, autocast, beta):
    """
    On the same rounded inputs costs agree with float64 to 1e-5; gradients are rounded once, to their own dtype. Autocast
    rounds hidden states and weights alone.
    """
    problem, weights = make_heads(dtype), torch.rand(N)
    head = problem["student_head"]
    problem["student_head"] = Head(*(x.detach().to(head_dtype).requires_grad_() for x in (head.weight, head.bias)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, costs = chunked_divergence(**problem, weights=weights, beta=beta, memory_mb=SOME)
    expected_loss, expected_costs, expected_grads = reference_loss(
        problem, weights, Comparison(beta), cast=lambda tensor: tensor.bfloat16() if autocast else tensor
    )
    assert loss.dtype == costs.dtype == torch.float32
    assert error(loss, expected_loss) < 1e-5
    assert error(costs, expected_costs) < 1e-5
    loss.backward()
    for leaf, grad in zip(leaves(problem), expected_grads, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        # Exactly the rounded gradient, save where float32's own error crosses a rounding boundary.
        assert error(leaf.grad, grad) < 1.05 * error(grad.to(leaf.dtype), grad) + 1e-5


@pytest.mark.parametrize(("beta", "caps"), [(0.0, (5.0, 8.0)), (0.4, (None, None)), (1.0, (5.0, 8.0))])
def test_agrees_with_trl(beta, caps):
    """TRL's ChunkedDivergenceFunction: the same divergence of beta, the same gradients, in float32."""
    problem, theirs = (make_heads(torch.float32, scales=(0.5, 1.0), caps=caps) for _ in range(2))
    weights = torch.rand(N)
    loss, costs = chunked_divergence(**problem, weights=weights, beta=beta, temperature=0.8)
    loss.backward()
    teacher = theirs["teacher_head"]
    their_costs, _ = ChunkedDivergenceFunction.apply(
        *leaves(theirs), theirs["teacher_hidden"], teacher.weight, teacher.bias, beta, 0.8, 0.5, caps[0], 1.0, caps[1]
    )
    assert error(costs, their_costs.detach()) < 1e-5
    assert_gradients(problem, torch.autograd.grad((weights * their_costs).sum(), leaves(theirs)), 1e-5)


@pytest.mark.parametrize("frozen", [(1,), (1, 2), (0,)], ids=["weight", "weight-bias", "hidden"])
def test_frozen_part_gets_no_gradient_and_costs_none(frozen):
    """What needs no gradient gets none, no buffer of its shape is made, and the others' gradients do not change."""
    problem, whole = make_heads(), make_heads()
    chunked_divergence(**whole, memory_mb=SOME)[0].backward()
    for index in frozen:
        leaves(problem)[index].requires_grad_(False)
    with CreatedShapes() as created:
        chunked_divergence(**problem, memory_mb=SOME)[0].backward()
    for index, (leaf, trained) in enumerate(zip(leaves(problem), leaves(whole), strict=True)):
        if index in frozen:
            assert leaf.grad is None
            assert tuple(leaf.shape) not in created.shapes or leaf.dim() == 1
        else:
            assert torch.equal(leaf.grad, trained.grad)


def test_gradient_reaches_no_teacher():
    """A teacher that happens to require gradients (the student's own base) gets none."""
    problem = make_heads()
    teacher = [problem["teacher_hidden"], problem["teacher_head"].weight, problem["teacher_head"].bias]
    for tensor in teacher:
        tensor.requires_grad_()
    chunked_divergence(**problem)[0].backward()
    assert all(tensor.grad is None for tensor in teacher)


def test_no_grad_computes_the_costs_alone():
    """Under no_grad: the same costs and loss, bit for bit, no graph, and no gradient buffer."""
    problem = make_heads()
    loss, costs = chunked_divergence(**problem, memory_mb=SOME)
    with torch.no_grad(), CreatedShapes() as created:
        loss_alone, costs_alone = chunked_divergence(**problem, memory_mb=SOME)
    assert torch.equal(costs, costs_alone)
    assert torch.equal(loss, loss_alone)
    assert not loss_alone.requires_grad
    assert not {(N, H_S), (V, H_S)} & created.shapes


@pytest.mark.parametrize(
    ("beta", "cap", "bad"),
    [
        (beta, (None, 5.0)[(i + j) % 2], bad)
        for i, beta in enumerate(BETAS)
        for j, bad in enumerate((torch.nan, torch.inf))
    ],
)
def test_rows_of_weight_zero_poison_nothing(beta, cap, bad):
    """NaN or inf at a position of weight 0, in either model, changes neither loss nor gradients."""
    results = []
    for poison in (False, True):
        problem = make_heads(caps=(cap, None))
        if poison:
            with torch.no_grad():
                problem["student_hidden"][1] = bad
                problem["teacher_hidden"][4] = bad
        loss, costs = chunked_divergence(**problem, weights=WEIGHTS, beta=beta, memory_mb=SOME)
        loss.backward()
        results.append([loss.detach(), costs[WEIGHTS != 0], *(leaf.grad for leaf in leaves(problem))])
    for clean, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=1e-13, atol=1e-13)


def _peak_mb(function):
    """Peak of the allocator's balance while `function` runs, in MiB, buffers inside operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    balance = peak = 0
    for _, nbytes in sorted(events):
        balance += nbytes
        peak = max(peak, balance)
    return peak / 2**20


@pytest.mark.parametrize(
    ("dtype", "grad", "beta", "cap", "floor"),
    [
        (torch.float32, True, 0.0, None, 0.0),
        (torch.float32, True, 1.0, None, 0.1),
        (torch.float32, False, 0.5, 30.0, 0.1),
        (torch.bfloat16, True, 0.5, 30.0, 0.1),
        (torch.bfloat16, True, 1.0, None, 0.0),
        (torch.bfloat16, False, 0.0, None, 0.0),
    ],
)
def test_memory_is_bounded(dtype, grad, beta, cap, floor):
    """
    Tiles, blocks and casts keep to `memory_mb` (here a tenth of one model's logits), no (N, V) tensor is ever made, and
    in float32 no second gradient of the head.
    """
    rows, vocab, width, memory_mb = 640, 8192, 4, 2
    hidden, teacher_hidden = (torch.randn(rows, width, dtype=dtype).requires_grad_(g) for g in (grad, False))
    head, teacher_head = (
        Head(torch.randn(vocab, width, dtype=dtype).requires_grad_(g), softcap=cap) for g in (grad, False)
    )

    def run():
        loss, _ = chunked_divergence(
            hidden, head, teacher_hidden, teacher_head, beta=beta, teacher_prob_floor=floor, memory_mb=memory_mb
        )
        if grad:
            loss.backward()

    with CreatedShapes() as created:
        run()
    assert max(4 * shape[0] * shape[1] for shape in created.shapes if len(shape) == 2) < memory_mb * 2**20
    # Beside it: the gradients in float32, and in half precision what they are rounded to.
    returned = 4 * width * (vocab + rows) * (1 if dtype == torch.float32 else 1.5) if grad else 0
    assert _peak_mb(run) < memory_mb + returned / 2**20 + 0.1


def test_memory_where_none_is_given(monkeypatch):
    """256 MiB on a CPU; on a CUDA device an eighth of what is free, the allocator's cache included, in a power of two."""
    assert default_memory_mb(torch.device("cpu")) == 256
    free, total, cached, used = (gibibytes * 2**30 for gibibytes in (20, 80, 30, 10))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: used)
    assert default_memory_mb(torch.device("cuda")) == 4096  # 40 GiB / 8 = 5 GiB


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 1.5),
        ("beta", -0.1),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("teacher_prob_floor", 1.0),
        ("teacher_prob_floor", -0.1),
    ],
)
def test_bad_settings_are_named(name, value):
    """Every form refuses them, and says which argument it was."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        Comparison(**{name: value})
    with pytest.raises(ValueError, match=f"`{name}`"):
        token_divergence(torch.randn(2, V), torch.randn(2, V), **{name: value})
    with pytest.raises(ValueError, match=f"`{name}`"):
        chunked_divergence(**make_heads(), **{name: value})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teacher_head": torch.randn(V + 1, H_T)}, f"has {V} tokens and the teacher's {V + 1}"),
        ({"teacher_hidden": torch.randn(N - 1, H_T)}, "positions"),
        ({"weights": torch.ones(N, 1)}, "`weights`"),
        ({"weights": torch.ones(N - 1)}, "`weights`"),
        ({"memory_mb": 0}, "`memory_mb`"),
    ],
)
def test_bad_shapes_are_named(changes, match):
    """Unequal vocabularies of plain weights, positions and weights are errors, never a silent broadcast."""
    with pytest.raises(ValueError, match=match):
        chunked_divergence(**(make_heads(bias=False) | changes))


@pytest.mark.parametrize("shape", [(2, V + 1), (1, V)])
def test_dense_refuses_unequal_shapes(shape):
    """A broadcast over the vocabulary or the positions would be a wrong number."""
    with pytest.raises(ValueError, match="differ"):
        token_divergence(torch.randn(2, V), torch.randn(*shape))
