"""
The Triton kernels against dense float64: on a GPU (`pytest -m cuda`), and without one in Triton's interpreter, which shows
that the arithmetic is correct. That they compile for a card is shown apart.
"""

import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from head_reference import (
    BETAS,
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
    reference_divergence,
    reference_loss,
    widened,
)

from trl_cmdp.core import Comparison, Head, chunked_divergence, chunked_policy_divergence, chunked_scores
from trl_cmdp.core.kernels import triton_tiles


pytest.importorskip("triton")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the interpreter's NumPy, for NaN and 0·∞
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ADVANTAGES = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, -0.3, 1.0])
BONUS = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0, 0.6, 0.7])
COMPARED = WEIGHTS != 0
# Largest error of a gradient, which is written and multiplied in the dtype of the inputs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Tiles of one row, which backward projects again; of two, of which it keeps a part; and of two, of which it keeps all.
ROW_MB = 28 * 14 / 2**20
MEMORY_MB = [1e-9, 4 * ROW_MB, 1]


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch):
    """Both kernels read a vocabulary of 23 in two steps, and tiles have some of the rows."""
    monkeypatch.setenv("TRL_CMDP_KERNEL", "triton")
    monkeypatch.setattr(triton_tiles, "_STATISTICS_BLOCK", 16)
    monkeypatch.setattr(triton_tiles, "_GRADIENT_BLOCK", 16)
    monkeypatch.setattr(triton_tiles, "_ALIGNMENT", 4)
    monkeypatch.setattr(triton_tiles, "_TILE_MB", 2.5 * ROW_MB)


def on_device(problem):
    """The problem on the device, its student trained."""

    def moved(tensor):
        return None if tensor is None else tensor.detach().to(DEVICE)

    there = {
        name: moved(value)
        if torch.is_tensor(value)
        else replace(value, weight=moved(value.weight), bias=moved(value.bias))
        for name, value in problem.items()
    }
    for leaf in leaves(there):
        leaf.requires_grad_()
    return there


def problem_of(dtype=torch.float32, **heads):
    return on_device(make_heads(dtype, **heads))


def policy(problem, comparison, token_ids=TOKENS, weights=WEIGHTS, **options):
    return chunked_policy_divergence(
        **problem, comparison=comparison, token_ids=token_ids.to(DEVICE), weights=weights.to(DEVICE), **options
    )


def reference_policy(problem, comparison, token_ids=TOKENS):
    """Log-probabilities, entropies, loss and costs in float64, from a problem in float64."""
    logits = logits_of(problem["student_hidden"], problem["student_head"]) / comparison.temperature
    logps, compared = logits.log_softmax(-1), COMPARED.to(DEVICE)
    costs = dense_costs(problem, comparison, compared)
    log_probs = logps.gather(-1, token_ids.to(DEVICE)[:, None]).squeeze(-1)
    loss = (WEIGHTS.to(DEVICE)[compared] * costs).sum()
    return log_probs, -(logps.exp() * logps).sum(-1), loss, costs.detach()


def backward(outputs, advantages=ADVANTAGES, bonus=BONUS, factor=1.0):
    log_probs, entropy, loss, _ = outputs
    parts = [(advantages, log_probs), (bonus, entropy), (factor, loss)]
    sum(
        ((of.to(DEVICE) if torch.is_tensor(of) else of) * values).sum() for of, values in parts if of is not None
    ).backward()


COMPARISONS = [
    *(Comparison(beta) for beta in BETAS),
    Comparison(0.0, temperature=0.7, teacher_prob_floor=0.1),
    Comparison(0.5, temperature=1.4, teacher_prob_floor=0.2),
    Comparison(1.0, teacher_prob_floor=0.05),
    Comparison(temperature=0.7, cross_entropy=True),
    Comparison(cross_entropy=True, teacher_prob_floor=0.1),
]
HEADS = [
    {},
    {"bias": False, "scales": (0.3, 2.0)},
    {"caps": (3.0, 5.0), "vocabularies": (V + 4, V)},
    {"scales": (0.5, 0.25), "caps": (2.0, 30.0), "vocabularies": (V, V + 4)},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    (comparison, HEADS[(i + j) % 4], DTYPES[(i + 2 * j) % 3], MEMORY_MB[(i // 2 + j) % 3])
    for i, comparison in enumerate(COMPARISONS)
    for j in range(2)
]


@pytest.mark.parametrize(("comparison", "heads", "dtype", "memory_mb"), CASES[::2])
def test_divergence_equals_the_formula(comparison, heads, dtype, memory_mb):
    """Loss, costs and gradients, from which a factor on the loss is not missing."""
    problem, weights = problem_of(dtype, **heads), WEIGHTS.to(DEVICE)
    loss, costs = chunked_divergence(**problem, weights=weights, **asdict(comparison), memory_mb=memory_mb)
    expected_loss, expected_costs, expected_grads = reference_loss(problem, weights, comparison)
    assert loss.dtype == costs.dtype == torch.float32
    assert not costs.requires_grad
    assert error(loss, expected_loss) < 1e-5
    assert error(costs, expected_costs) < 1e-5
    (3.0 * loss).backward()
    assert {leaf.grad.dtype for leaf in leaves(problem)} == {dtype}
    assert_gradients(problem, [3.0 * grad for grad in expected_grads], TOLERANCE[dtype])


@pytest.mark.parametrize(("comparison", "heads", "dtype", "memory_mb"), CASES[1::2])
def test_policy_and_divergence_equal_the_formula(comparison, heads, dtype, memory_mb):
    """All four outputs, and the gradient of all of them together."""
    problem = problem_of(dtype, weights=WEIGHTS, **heads)
    wide, token_ids = widened(problem), TOKENS.clone()
    token_ids[1] = problem["student_head"].vocab_size - 1  # padding of the student's vocabulary, where it has any
    actual = policy(problem, comparison, token_ids, memory_mb=memory_mb)
    expected = reference_policy(wide, comparison, token_ids)
    for value, target in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        assert error(value.detach(), target.detach()) < 1e-5
    for outputs in (actual, expected):
        backward(outputs, factor=2.0)
    assert_gradients(problem, [leaf.grad for leaf in leaves(wide)], TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("factor", "bonus", "advantages"),
    [(None, BONUS, ADVANTAGES), (2.0, None, None), (0.0, None, ADVANTAGES), (None, BONUS, None)],
)
def test_gradient_of_any_part_of_the_loss(factor, bonus, advantages):
    problem = problem_of(weights=WEIGHTS)
    wide = widened(problem)
    for outputs in (policy(problem, Comparison()), reference_policy(wide, Comparison())):
        backward(outputs, advantages, bonus, factor)
    assert_gradients(problem, [leaf.grad for leaf in leaves(wide)], 1e-5)


def test_autocast_rounds_hidden_states_and_weights_alone():
    problem = problem_of()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss, costs = chunked_divergence(**problem)
    expected_loss, expected_costs, expected_grads = reference_loss(
        problem, torch.ones(N, device=DEVICE), cast=lambda tensor: tensor.bfloat16()
    )
    assert error(loss, expected_loss) < 1e-5
    assert error(costs, expected_costs) < 1e-5
    loss.backward()
    assert {leaf.grad.dtype for leaf in leaves(problem)} == {torch.float32}
    assert_gradients(problem, expected_grads, TOLERANCE[torch.bfloat16])


def test_no_grad_gives_values_alone():
    """The same ones, whatever the strides of the tokens."""
    problem = problem_of(weights=WEIGHTS)
    expected = policy(problem, Comparison())
    with torch.no_grad():
        actual = policy(problem, Comparison(), torch.stack([TOKENS, TOKENS + 1], -1)[:, 0])
    for value, target in zip(actual, expected, strict=True):
        assert not value.requires_grad
        assert torch.equal(value, target.detach())


def test_scores_are_the_costs_and_both_log_probs():
    problem, comparison = problem_of(caps=(4.0, None)), Comparison(0.3, 0.7, 0.1)
    scores = chunked_scores(**problem, comparison=comparison, token_ids=TOKENS.to(DEVICE), memory_mb=MEMORY_MB[1])
    wide = widened(problem)
    students, teachers = (
        (logits_of(wide[f"{who}_hidden"], wide[f"{who}_head"]) / 0.7).softmax(-1) for who in ("student", "teacher")
    )
    assert error(scores.costs, dense_costs(wide, comparison)) < 1e-5
    for logps, probs in ((scores.student_logps, students), (scores.teacher_logps, 0.9 * teachers + 0.1 / V)):
        assert error(logps, probs.gather(-1, TOKENS.to(DEVICE)[:, None]).squeeze(-1).log().detach()) < 1e-5
    assert chunked_scores(**problem, comparison=comparison).student_logps is None


# -------------------------------------------------------------------------------------------------- logits at the edges


def heads_of(student_logits, teacher_logits):
    """Heads that make these logits (n, V) of the rows of the identity."""
    identity = torch.eye(len(student_logits), device=DEVICE)
    student, teacher = (logits.float().T.contiguous().to(DEVICE) for logits in (student_logits, teacher_logits))
    return identity, Head(student.requires_grad_()), identity, Head(teacher)


@pytest.mark.parametrize(("beta", "offset"), [(0.0, 20.0), (0.5, 1000.0), (1.0, 20.0), (1.0, 1000.0)])
def test_holds_for_close_distributions_of_large_logits(monkeypatch, beta, offset):
    """A cost of 5e-3, as of a student inside its budget: 1e-5 relative, also in the gradient."""
    monkeypatch.setattr(triton_tiles, "_STATISTICS_BLOCK", 1024)
    monkeypatch.setattr(triton_tiles, "_GRADIENT_BLOCK", 1024)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 4000, generator=generator) * 3 + offset
    teacher = student + (0.1 if beta in (0.0, 1.0) else 0.25) * torch.randn(4, 4000, generator=generator)
    wide = student.double().requires_grad_()
    expected = reference_divergence(wide, teacher, beta)
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    models = heads_of(student, teacher)
    loss, costs = chunked_divergence(*models, beta=beta)
    loss.backward()
    assert 3e-3 < expected.mean() < 2e-2
    assert error(costs.cpu(), expected.detach()) < 1e-5
    assert error(models[1].weight.grad.T.cpu(), expected_grad) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits(beta):
    """Certain rows and logits of 1e4: finite, and as in float64."""
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    logits[:, 0] *= 1e4
    logits[0, 1, 5] = logits[1, 1, 5] = 80.0
    logits[:, 2] -= 1e4
    wide = logits.double().requires_grad_()
    expected = reference_divergence(*wide, beta)
    models = heads_of(*logits)
    loss, costs = chunked_divergence(*models, beta=beta)
    loss.backward()
    (grad,) = torch.autograd.grad(expected[1:].sum(), wide)
    finite = expected.isfinite()  # by its definition the KL of row 0 is infinite where a probability underflows
    assert error(costs.cpu()[finite], expected[finite].detach()) < 1e-5
    assert costs.isfinite().all()
    assert error(models[1].weight.grad.T.cpu()[1:], grad[0, 1:]) < 1e-5


@pytest.mark.parametrize("comparison", [*(Comparison(beta) for beta in BETAS), Comparison(cross_entropy=True)])
def test_impossible_tokens(comparison):
    """−∞ in the biases of both models: as the smaller vocabulary, with zero gradient there."""
    problem = make_heads(torch.float32, weights=WEIGHTS)
    kept = [token for token in range(V) if token != 5]
    small = dict(problem)
    for name in ("student_head", "teacher_head"):
        head = problem[name]
        small[name] = Head(head.weight[kept], head.bias[kept])
        with torch.no_grad():
            head.bias[5] = -torch.inf
    problem, small = on_device(problem), widened(on_device(small))
    token_ids = torch.where(TOKENS == 5, 6, TOKENS)
    actual = policy(problem, comparison, token_ids)
    expected = reference_policy(small, comparison, token_ids - (token_ids > 5).long())
    for value, target in zip(actual, expected, strict=True):
        assert error(value.detach(), target.detach()) < 1e-5
    for outputs in (actual, expected):
        backward(outputs)
    hidden, weight, _ = leaves(problem)
    assert error(hidden.grad, leaves(small)[0].grad) < 1e-5
    assert error(weight.grad[kept], leaves(small)[1].grad) < 1e-5
    assert (weight.grad[5] == 0).all()


def test_tokens_impossible_for_one_model():
    """The teacher's alone make reverse KL and cross-entropy infinite; the student's alone the forward KL."""
    problem = problem_of()
    for who, comparisons in (
        ("teacher", {Comparison(): True, Comparison(cross_entropy=True): True, Comparison(0.5): False}),
        ("student", {Comparison(0.0): True, Comparison(): False, Comparison(0.5): False}),
    ):
        head = problem[f"{who}_head"]
        with torch.no_grad():
            impossible = replace(head, bias=head.bias.index_fill(0, torch.tensor([4], device=DEVICE), -torch.inf))
        for comparison, infinite in comparisons.items():
            costs = chunked_scores(**(problem | {f"{who}_head": impossible}), comparison=comparison).costs
            assert costs.isposinf().all() if infinite else costs.isfinite().all()


# ------------------------------------------------------------------------------------------------ rows that are not finite


@pytest.mark.parametrize("beta", BETAS)
def test_rows_of_weight_zero_poison_nothing(beta):
    weights, results = WEIGHTS.to(DEVICE), []
    for poison in (False, True):
        problem = problem_of(caps=(5.0, None))
        if poison:
            with torch.no_grad():
                problem["student_hidden"][1] = torch.nan
                problem["teacher_hidden"][4] = torch.inf
        loss, costs = chunked_divergence(**problem, weights=weights, beta=beta)
        loss.backward()
        results.append([loss.detach(), costs[weights != 0], *(leaf.grad for leaf in leaves(problem))])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("comparison", [*(Comparison(beta) for beta in BETAS), Comparison(cross_entropy=True)])
def test_nan_of_the_student_is_not_hidden(comparison):
    """Values and gradient of a row that is not finite, compared or not, are NaN, and of the others are not."""
    problem, broken = problem_of(weights=WEIGHTS), torch.isin(torch.arange(N), torch.tensor([1, 2]))
    with torch.no_grad():
        problem["student_hidden"][broken.to(DEVICE)] = torch.nan
    outputs = log_probs, entropy, _, costs = policy(problem, comparison)
    assert torch.equal(log_probs.isnan().cpu(), broken)
    assert torch.equal(entropy.isnan().cpu(), broken)
    assert torch.equal(costs.isnan().cpu(), broken[COMPARED])
    backward(outputs)
    assert torch.equal(problem["student_hidden"].grad.isnan().any(-1).cpu(), broken)


def test_nan_of_the_teacher_reaches_its_own_row_alone():
    problem = problem_of(weights=WEIGHTS)
    problem["teacher_hidden"][1] = torch.nan  # of row 2
    outputs = policy(problem, Comparison())
    assert outputs[2].isnan()
    assert outputs[3].isnan().tolist() == [False, True, False, False, False]
    backward(outputs)
    assert problem["student_hidden"].grad.isnan().any(-1).tolist() == [row == 2 for row in range(N)]


def test_what_is_not_asked_for_is_zero():
    """A loss times 0, also where it is NaN."""
    problem = problem_of()
    with torch.no_grad():
        problem["student_hidden"][1] = torch.nan
    loss, _ = chunked_divergence(**problem)
    (gradient,) = torch.autograd.grad(loss, leaves(problem)[1], torch.zeros_like(loss))
    assert loss.isnan()
    assert (gradient == 0).all()


def test_small_weights_do_not_vanish_in_float16():
    """1e-7 of a logit's gradient is less than float16 holds."""
    problem = problem_of(torch.float16)
    loss, _ = chunked_divergence(**problem, weights=torch.full((N,), 1e-7, device=DEVICE))
    (1e7 * loss).backward()
    _, _, expected = reference_loss(problem, torch.ones(N, device=DEVICE))
    assert_gradients(problem, expected, TOLERANCE[torch.float16])


# ------------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("frozen", [(1, 2), (0,)], ids=["head", "hidden"])
def test_frozen_part_gets_no_gradient(frozen):
    problem, whole = problem_of(weights=WEIGHTS), problem_of(weights=WEIGHTS)
    for index in frozen:
        leaves(problem)[index].requires_grad_(False)
    for each in (problem, whole):
        backward(policy(each, Comparison()))
    for index, (leaf, trained) in enumerate(zip(leaves(problem), leaves(whole), strict=True)):
        if index in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, trained.grad)


@pytest.mark.parametrize("rows", [0, N])
def test_nothing_compared(rows):
    problem = problem_of(weights=torch.zeros(N))
    problem["student_hidden"] = problem["student_hidden"].detach()[:rows].requires_grad_()
    outputs = policy(problem, Comparison(), TOKENS[:rows], torch.zeros(rows))
    assert outputs[2] == 0.0
    assert [len(outputs[index]) for index in (0, 1, 3)] == [rows, rows, 0]
    backward(outputs, ADVANTAGES[:rows], BONUS[:rows])
    assert (problem["student_head"].weight.grad != 0).any() == (rows > 0)


def test_misuse_is_an_error():
    """A second backward, a head that changed before backward, and no memory."""
    problem = problem_of(weights=WEIGHTS)
    log_probs, _, loss, _ = policy(problem, Comparison())
    (log_probs.sum() + loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        log_probs.sum().backward()
    outputs = policy(problem, Comparison())
    with torch.no_grad():
        problem["student_head"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(outputs)
    with pytest.raises(ValueError, match="`memory_mb`"):
        policy(problem, Comparison(), memory_mb=0)


# ----------------------------------------------------------------------------------------------------------------- card


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_waits_for_nothing(dtype):
    """Forward and backward of both forms, once compiled, make no host synchronisation."""
    hidden, divergence = problem_of(dtype, weights=WEIGHTS), problem_of(dtype)
    weights, advantages, token_ids = WEIGHTS.to(DEVICE), ADVANTAGES.to(DEVICE), TOKENS.to(DEVICE)

    def step():
        log_probs, entropy, loss, _ = chunked_policy_divergence(
            **hidden, comparison=Comparison(), token_ids=token_ids, weights=weights
        )
        ((advantages * log_probs).sum() + entropy.sum() + loss).backward()
        chunked_divergence(**divergence, weights=weights)[0].backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden["student_head"].weight.grad.isfinite().all()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from trl_cmdp.core.kernels import triton_kernels as kernels

types = dict(student="*fp32", teacher="*fp32", token_ids="*i64", out="*bf16", num_rows="i32", statistics="*fp32",
             coefficients="*fp32", values="*fp32", factor="*fp32", size="i32")
plain = dict(LAYOUT=(128, 100, 128), STUDENT=(1.0, 0.0), TEACHER=(1.0, 0.0), MEASURE=(1, 1.0, 0.0, 0.0), BLOCK=64, STAGES=3)
full = plain | dict(STUDENT=(30.0, 0.03), MEASURE=(3, 0.5, -0.1, -7.0))
for kernel, constants in ((kernels.statistics_kernel, plain), (kernels.statistics_kernel, full),
                          (kernels.gradient_kernel, plain | dict(token_ids=None)), (kernels.gradient_kernel, full),
                          (kernels.scale_kernel, dict(IN_PLACE=True, BLOCK=64))):
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    if kernel is kernels.statistics_kernel:
        signature["out"] = "*fp32"
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print("compiled")
"""


def test_kernels_compile_for_a_card(tmp_path):
    """For compute capability 9.0, which takes no GPU: what the interpreter accepts may still not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.stdout == "compiled\n", run.stderr
