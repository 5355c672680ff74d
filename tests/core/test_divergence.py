"""Both divergences against a float64 formula written here, with gradients, and the memory that the chunked one takes."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from trl_cmdp.core import chunked_divergence, token_divergence


N, V, H_S, H_T = 7, 23, 5, 6
BETAS = [0.0, 0.3, 0.5, 1.0]
ROW_MB = 5 * V * 8 / 2**20  # what one float64 row takes
MEMORY_MB = [1e-9, 2.5 * ROW_MB, 256]  # tiles of one row, of two with a rest, and of all rows


def kl(p, q):
    """KL(p‖q) by its definition, 0·log 0 being 0, gradients included."""
    support = p > 0
    ratio = torch.where(support, p, 1.0).log() - torch.where(support, q, 1.0).log()
    return torch.where(support, p * ratio, 0.0).sum(-1)


def reference_divergence(student_logits, teacher_logits, beta, temperature=1.0, floor=0.0):
    student = (student_logits.double() / temperature).softmax(-1)
    teacher = (teacher_logits.double() / temperature).softmax(-1)
    teacher = (1 - floor) * teacher + floor / teacher.shape[-1]
    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    mixture = (1 - beta) * student + beta * teacher
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def inputs(dtype=torch.float64, seed=0, scale=1.0, bias=True):
    """Hidden states, heads and biases; the student's require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    tensors = {
        "student_hidden": draw(N, H_S),
        "student_weight": draw(V, H_S),
        "student_bias": draw(V) if bias else None,
        "teacher_hidden": draw(N, H_T),
        "teacher_weight": draw(V, H_T),
        "teacher_bias": draw(V) if bias else None,
    }
    for name in ("student_hidden", "student_weight", "student_bias"):
        if tensors[name] is not None:
            tensors[name].requires_grad_()
    return tensors


def student_tensors(tensors):
    names = ("student_hidden", "student_weight", "student_bias")
    return [tensors[name] for name in names if tensors[name] is not None]


def reference_loss(tensors, weights, beta, temperature=1.0, scales=(1.0, 1.0), caps=(None, None), floor=0.0):
    """The loss, the costs and the gradients (in float64) of everything of the student's."""
    wide = {name: None if x is None else x.detach().double() for name, x in tensors.items()}
    leaves = [x.requires_grad_() for x in student_tensors(wide)]
    logits = []
    for who, scale, cap in zip(("student", "teacher"), scales, caps, strict=True):
        z = wide[f"{who}_hidden"] @ wide[f"{who}_weight"].T
        if wide[f"{who}_bias"] is not None:
            z = z + wide[f"{who}_bias"]
        z = scale * z
        logits.append(z if cap is None else cap * torch.tanh(z / cap))
    costs = reference_divergence(*logits, beta, temperature, floor)
    loss = (weights.double() * costs).sum()
    return loss.detach(), costs.detach(), torch.autograd.grad(loss, leaves)


def error(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


# ----------------------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("temperature", "floor"), [(1.0, 0.0), (0.7, 0.0), (1.3, 0.1)])
def test_dense_equals_the_formula(beta, temperature, floor):
    """Value and the gradients of both logits, in float64, on leading dimensions of any number."""
    student, teacher = (torch.randn(2, 3, V, dtype=torch.float64).mul(3).requires_grad_() for _ in range(2))
    costs = token_divergence(student, teacher, beta, temperature, teacher_prob_floor=floor)
    expected = reference_divergence(student, teacher, beta, temperature, floor)
    assert costs.shape == (2, 3)
    assert error(costs, expected) < 1e-12
    weights = torch.rand(2, 3, dtype=torch.float64)
    grads = torch.autograd.grad((weights * costs).sum(), (student, teacher))
    for grad, reference in zip(
        grads, torch.autograd.grad((weights * expected).sum(), (student, teacher)), strict=True
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dense_accumulates_wide(dtype):
    """Half-precision logits are compared in float32, float64 in float64."""
    student, teacher = torch.randn(9, V).mul(4).to(dtype), torch.randn(9, V).mul(4).to(dtype)
    for beta in BETAS:
        costs = token_divergence(student, teacher, beta)
        assert costs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(costs, reference_divergence(student, teacher, beta)) < (1e-12 if dtype == torch.float64 else 1e-5)


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


@pytest.mark.parametrize("beta", BETAS)
def test_costs_are_not_negative(beta):
    """c_t ≥ 0 up to rounding, and exactly 0 for equal logits."""
    logits = torch.randn(50, V)
    assert torch.equal(token_divergence(logits, logits, beta), torch.zeros(50)) or 0 < beta < 1
    assert token_divergence(logits, logits, beta).abs().max() < 1e-6
    assert token_divergence(logits, logits + 1e-4 * torch.randn(50, V), beta).min() > -1e-7


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens(beta):
    """−inf in both models, or where the first distribution is 0, counts nothing and leaves no NaN, gradients included."""
    student = torch.randn(4, V, dtype=torch.float64)
    teacher = torch.randn(4, V, dtype=torch.float64)
    student[:, 3], teacher[:, 3] = -torch.inf, -torch.inf
    if beta > 0:
        student[:, 5] = -torch.inf  # finite: the student's 0 has no weight in KL(π‖μ) and in the JSD
    if beta < 1:
        teacher[:, 7] = -torch.inf
    student.requires_grad_()
    teacher.requires_grad_()
    costs = token_divergence(student, teacher, beta)
    assert error(costs, reference_divergence(student, teacher, beta)) < 1e-12
    costs.sum().backward()
    kept = torch.ones(V, dtype=torch.bool)
    kept[[3, *([5] if beta > 0 else []), *([7] if beta < 1 else [])]] = False
    part = [x.detach()[:, kept].requires_grad_() for x in (student, teacher)]
    if 0 < beta < 1:
        assert student.grad.isfinite().all()
        assert teacher.grad.isfinite().all()
    else:
        first, second = (student, teacher) if beta == 1 else (teacher, student)
        assert first.grad.isfinite().all()
        assert second.grad.isfinite().all()
    # With one shared impossible token alone, the gradient is that of the smaller vocabulary.
    shared = [x.detach().clone() for x in (student, teacher)]
    for x in shared:
        x[:, ~kept] = -torch.inf
        x.requires_grad_()
    token_divergence(*shared, beta).sum().backward()
    token_divergence(*part, beta).sum().backward()
    for whole, small in zip(shared, part, strict=True):
        assert error(whole.grad[:, kept], small.grad) < 1e-12
        assert torch.equal(whole.grad[:, ~kept], torch.zeros_like(whole.grad[:, ~kept]))


def test_infinite_where_only_the_second_is_impossible():
    """KL is +inf where the second distribution is 0 and the first is not; the probability floor bounds it by log(V/ε)."""
    student, teacher = torch.zeros(V), torch.zeros(V)
    teacher[0] = -torch.inf
    assert token_divergence(student, teacher, 1.0) == torch.inf
    assert token_divergence(teacher, student, 0.0) == torch.inf
    assert token_divergence(student, teacher, 0.5).isfinite()
    student = torch.full((V,), -torch.inf)
    student[0] = 0.0
    bounded = token_divergence(student, teacher, 1.0, teacher_prob_floor=0.01)
    assert bounded.item() == pytest.approx(torch.tensor(V / 0.01).log().item(), rel=1e-6)


# --------------------------------------------------------------------------------------------------------- chunked


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("memory_mb", MEMORY_MB)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"scales": (0.3, 2.0)},
        {"caps": (3.0, 5.0)},
        {"caps": (None, 2.0), "floor": 0.05},
        {"temperature": 1.4, "scales": (0.5, 0.25), "caps": (2.0, 30.0), "floor": 0.2},
    ],
    ids=["plain", "temperature", "scale", "softcap", "floor", "all"],
)
def test_chunked_equals_the_formula(beta, memory_mb, options):
    """Loss, costs and all of the student's gradients in float64, in tiles of one row, of some and of all rows."""
    tensors = inputs()
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 0.1], dtype=torch.float64)
    scales, caps = options.get("scales", (1.0, 1.0)), options.get("caps", (None, None))
    loss, costs = chunked_divergence(
        **tensors,
        weights=weights,
        beta=beta,
        temperature=options.get("temperature", 1.0),
        memory_mb=memory_mb,
        student_logit_scale=scales[0],
        teacher_logit_scale=scales[1],
        student_final_logit_softcapping=caps[0],
        teacher_final_logit_softcapping=caps[1],
        teacher_prob_floor=options.get("floor", 0.0),
    )
    expected_loss, expected_costs, expected_grads = reference_loss(tensors, weights, beta, **options)
    assert error(loss, expected_loss) < 1e-11
    assert error(costs, expected_costs) < 1e-11
    assert not costs.requires_grad
    (3.0 * loss).backward()  # a factor on the loss, as a normaliser puts it, reaches every gradient
    for tensor, grad in zip(student_tensors(tensors), expected_grads, strict=True):
        assert error(tensor.grad, 3.0 * grad) < 1e-11


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradient_is_the_slope_of_the_loss(beta):
    """Finite differences along a direction in each of the student's tensors."""
    tensors = inputs()
    weights = torch.rand(N, dtype=torch.float64)

    def loss(student):
        return chunked_divergence(
            **(tensors | student),
            weights=weights,
            beta=beta,
            temperature=1.2,
            memory_mb=2.5 * ROW_MB,
            student_final_logit_softcapping=4.0,
            student_logit_scale=0.8,
        )[0]

    names = ("student_hidden", "student_weight", "student_bias")
    loss({}).backward()
    for name in names:
        direction = torch.randn_like(tensors[name])
        step = 1e-5 * direction
        slope = (loss({name: tensors[name] + step}) - loss({name: tensors[name] - step})) / 2e-5
        assert slope.item() == pytest.approx((tensors[name].grad * direction).sum().item(), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("memory_mb", [1e-9, 256])
def test_half_precision_accumulates_in_float32(dtype, beta, memory_mb):
    """On the same rounded inputs costs agree with float64 to 1e-5; gradients are rounded once, to their own dtype."""
    tensors = inputs(dtype)
    weights = torch.rand(N)
    loss, costs = chunked_divergence(**tensors, weights=weights, beta=beta, memory_mb=memory_mb)
    expected_loss, expected_costs, expected_grads = reference_loss(tensors, weights, beta)
    assert loss.dtype == costs.dtype == torch.float32
    assert error(loss, expected_loss) < 1e-5
    assert error(costs, expected_costs) < 1e-5
    loss.backward()
    for tensor, grad in zip(student_tensors(tensors), expected_grads, strict=True):
        assert tensor.grad.dtype == dtype
        # Exactly the rounded gradient, save where float32's own error crosses a rounding boundary.
        assert error(tensor.grad, grad) < 1.05 * error(grad.to(dtype), grad) + 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_half_precision_backbone_with_float32_gradient(beta):
    """A float32 head over bfloat16 hidden states: its gradient, accumulated in float32, holds to 1e-5 unrounded."""
    tensors = inputs(torch.bfloat16)
    for name in ("student_weight", "student_bias"):
        tensors[name] = tensors[name].detach().float().requires_grad_()
    weights = torch.rand(N)
    loss, _ = chunked_divergence(**tensors, weights=weights, beta=beta)
    loss.backward()
    _, _, expected = reference_loss(tensors, weights, beta)
    assert error(tensors["student_weight"].grad, expected[1]) < 1e-5
    assert error(tensors["student_bias"].grad, expected[2]) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_autocast_rounds_the_inputs_of_the_heads_alone(beta):
    """Under autocast hidden states and heads take bfloat16's rounding, as in the model; everything after is float32."""
    tensors = inputs(torch.float32)
    weights = torch.rand(N)
    with torch.autocast("cpu", torch.bfloat16):
        loss, costs = chunked_divergence(**tensors, weights=weights, beta=beta, memory_mb=2.5 * ROW_MB)
    loss.backward()
    rounded = {
        name: x if x is None or "bias" in name else x.detach().bfloat16().float() for name, x in tensors.items()
    }
    expected_loss, expected_costs, expected_grads = reference_loss(rounded, weights, beta)
    assert costs.dtype == torch.float32
    assert error(loss, expected_loss) < 1e-5
    assert error(costs, expected_costs) < 1e-5
    for tensor, grad in zip(student_tensors(tensors), expected_grads, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert error(tensor.grad, grad) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("caps", [(None, None), (5.0, 8.0)])
def test_agrees_with_trl(beta, caps):
    """TRL's ChunkedDivergenceFunction: the same divergence of beta, the same gradients, in float32."""
    tensors = inputs(torch.float32)
    weights = torch.rand(N)
    loss, costs = chunked_divergence(
        **tensors,
        weights=weights,
        beta=beta,
        temperature=0.8,
        student_logit_scale=0.5,
        student_final_logit_softcapping=caps[0],
        teacher_final_logit_softcapping=caps[1],
    )
    loss.backward()
    theirs = {name: x.detach().clone() for name, x in tensors.items()}
    leaves = [x.requires_grad_() for x in student_tensors(theirs)]
    their_costs, _ = ChunkedDivergenceFunction.apply(
        theirs["student_hidden"],
        theirs["student_weight"],
        theirs["student_bias"],
        theirs["teacher_hidden"],
        theirs["teacher_weight"],
        theirs["teacher_bias"],
        beta,
        0.8,
        0.5,
        caps[0],
        1.0,
        caps[1],
    )
    assert error(costs, their_costs.detach()) < 1e-5
    their_grads = torch.autograd.grad((weights * their_costs).sum(), leaves)
    for tensor, grad in zip(student_tensors(tensors), their_grads, strict=True):
        assert error(tensor.grad, grad) < 1e-5


@pytest.mark.parametrize("frozen", [("student_weight",), ("student_weight", "student_bias"), ("student_hidden",)])
def test_frozen_part_gets_no_gradient_and_costs_none(frozen):
    """What needs no gradient gets none, no buffer of its shape is made, and the others' gradients do not change."""
    tensors, whole = inputs(), inputs()
    chunked_divergence(**whole, memory_mb=2.5 * ROW_MB)[0].backward()
    for name in frozen:
        tensors[name].requires_grad_(False)
    with _Created() as created:
        loss, _ = chunked_divergence(**tensors, memory_mb=2.5 * ROW_MB)
        loss.backward()
    for name in ("student_hidden", "student_weight", "student_bias"):
        if name in frozen:
            assert tensors[name].grad is None
            assert tuple(tensors[name].shape) not in created.shapes or name == "student_bias"
        else:
            assert torch.equal(tensors[name].grad, whole[name].grad)


def test_gradient_reaches_no_teacher():
    """A teacher that happens to require gradients (the student's own base) gets none."""
    tensors = inputs()
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        tensors[name].requires_grad_()
    chunked_divergence(**tensors)[0].backward()
    assert all(tensors[name].grad is None for name in ("teacher_hidden", "teacher_weight", "teacher_bias"))


def test_no_grad_computes_the_costs_alone():
    """Under no_grad: the same costs and loss, bit for bit, no graph, and no gradient buffer."""
    tensors = inputs()
    loss, costs = chunked_divergence(**tensors, memory_mb=2.5 * ROW_MB)
    with torch.no_grad(), _Created() as created:
        loss_alone, costs_alone = chunked_divergence(**tensors, memory_mb=2.5 * ROW_MB)
    assert torch.equal(costs, costs_alone)
    assert torch.equal(loss, loss_alone)
    assert not loss_alone.requires_grad
    assert not {(N, H_S), (V, H_S)} & created.shapes


@pytest.mark.parametrize("grad", [True, False])
def test_no_positions(grad):
    """N = 0 gives loss 0, no costs and zero gradients."""
    tensors = inputs()
    tensors["student_hidden"] = tensors["student_hidden"].detach()[:0].requires_grad_(grad)
    tensors["teacher_hidden"] = tensors["teacher_hidden"][:0]
    loss, costs = chunked_divergence(**tensors)
    assert loss == 0.0
    assert costs.shape == (0,)
    loss.backward()
    assert torch.equal(tensors["student_weight"].grad, torch.zeros(V, H_S, dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_weight_zero_poison_nothing(beta, cap, bad):
    """NaN or inf at a position of weight 0, in either model, changes neither loss nor gradients."""
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 0.1], dtype=torch.float64)
    results = []
    for poison in (False, True):
        tensors = inputs()
        if poison:
            with torch.no_grad():
                tensors["student_hidden"][1] = bad
                tensors["teacher_hidden"][4] = bad
        loss, costs = chunked_divergence(
            **tensors, weights=weights, beta=beta, student_final_logit_softcapping=cap, memory_mb=2.5 * ROW_MB
        )
        loss.backward()
        kept = weights != 0
        results.append([loss.detach(), costs[kept], *(x.grad for x in student_tensors(tensors))])
    for clean, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_student_that_is_its_teacher(beta, dtype):
    """A shared head over the same hidden states costs 0 with gradient 0."""
    tensors = inputs(dtype)
    for part in ("hidden", "weight", "bias"):
        tensors[f"teacher_{part}"] = tensors[f"student_{part}"]
    loss, costs = chunked_divergence(**tensors, beta=beta)
    loss.backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert costs.abs().max() < tolerance
    assert all(x.grad.abs().max() < 20 * tolerance for x in student_tensors(tensors))


def test_rows_are_independent_of_their_tile_and_order():
    """Costs and gradients follow their rows when the rows are permuted; halves add up to the whole."""
    tensors = inputs()
    weights = torch.rand(N, dtype=torch.float64)
    order = torch.randperm(N)
    loss, costs = chunked_divergence(**tensors, weights=weights)
    permuted = tensors | {name: tensors[name][order] for name in ("student_hidden", "teacher_hidden")}
    loss_permuted, costs_permuted = chunked_divergence(**permuted, weights=weights[order], memory_mb=2.5 * ROW_MB)
    torch.testing.assert_close(costs_permuted, costs[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_permuted, loss, rtol=1e-12, atol=0)
    halves = [
        chunked_divergence(
            **(tensors | {name: tensors[name][part] for name in ("student_hidden", "teacher_hidden")}),
            weights=weights[part],
        )[0]
        for part in (slice(0, 3), slice(3, N))
    ]
    grads = torch.autograd.grad(loss, student_tensors(tensors))
    for whole, parts in zip(grads, torch.autograd.grad(sum(halves), student_tensors(tensors)), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("retain_graph", [True, False])
def test_second_backward_is_an_error(retain_graph):
    """The gradients are handed over, not copied: like any freed graph, also where it is retained."""
    loss, _ = chunked_divergence(**inputs())
    loss.backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------------- memory


class _Created(TorchDispatchMode):
    """Records the shape of every tensor that an operator makes, views of its arguments left out."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(tensor.shape))
        return out


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


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("beta", "cap", "floor"), [(0.0, None, 0.0), (1.0, None, 0.0), (1.0, None, 0.1), (0.5, 30.0, 0.1)]
)
def test_memory_is_bounded(grad, dtype, beta, cap, floor):
    """
    Tiles, blocks and casts keep to `memory_mb` (here a tenth of one model's logits), no (N, V) tensor is ever made, and
    in float32 no second gradient of the head.
    """
    rows, vocab, width, memory_mb = 640, 8192, 4, 2
    tensors = {
        "student_hidden": torch.randn(rows, width, dtype=dtype).requires_grad_(grad),
        "student_weight": torch.randn(vocab, width, dtype=dtype).requires_grad_(grad),
        "teacher_hidden": torch.randn(rows, width, dtype=dtype),
        "teacher_weight": torch.randn(vocab, width, dtype=dtype),
    }

    def run():
        loss, _ = chunked_divergence(
            **tensors,
            beta=beta,
            memory_mb=memory_mb,
            student_final_logit_softcapping=cap,
            teacher_final_logit_softcapping=cap,
            teacher_prob_floor=floor,
        )
        if grad:
            loss.backward()

    with _Created() as created:
        run()
    assert max(4 * shape[0] * shape[1] for shape in created.shapes if len(shape) == 2) < memory_mb * 2**20
    # Beside it: the gradients in float32, and in half precision what they are rounded to.
    returned = 4 * width * (vocab + rows) * (1 if dtype == torch.float32 else 1.5) if grad else 0
    assert _peak_mb(run) < memory_mb + returned / 2**20 + 0.1


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("beta", 1.5, "`beta`"),
        ("beta", -0.1, "`beta`"),
        ("temperature", 0.0, "`temperature`"),
        ("temperature", float("nan"), "`temperature`"),
        ("teacher_prob_floor", 1.0, "`teacher_prob_floor`"),
        ("teacher_prob_floor", -0.1, "`teacher_prob_floor`"),
    ],
)
def test_bad_settings_are_named(name, value, match):
    """Both forms refuse them, and say which argument it was."""
    with pytest.raises(ValueError, match=match):
        token_divergence(torch.randn(2, V), torch.randn(2, V), **{name: value})
    with pytest.raises(ValueError, match=match):
        chunked_divergence(**inputs(), **{name: value})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teacher_weight": torch.randn(V + 1, H_T)}, "tokens"),
        ({"teacher_hidden": torch.randn(N - 1, H_T)}, "positions"),
        ({"weights": torch.ones(N, 1)}, "`weights`"),
        ({"weights": torch.ones(N - 1)}, "`weights`"),
        ({"memory_mb": 0}, "`memory_mb`"),
    ],
)
def test_bad_shapes_are_named(changes, match):
    """Unequal vocabularies, positions and weights are errors, never a silent broadcast."""
    with pytest.raises(ValueError, match=match):
        chunked_divergence(**(inputs(bias=False) | changes))


def test_dense_refuses_unequal_shapes():
    """A broadcast over the vocabulary or the positions would be a wrong number."""
    with pytest.raises(ValueError, match="differ"):
        token_divergence(torch.randn(2, V), torch.randn(2, V + 1))
    with pytest.raises(ValueError, match="differ"):
        token_divergence(torch.randn(2, V), torch.randn(1, V))
