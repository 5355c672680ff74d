"""The divergence by its definition, in float64 and over everything at once: what the tests of the chunked functions compare with."""

from dataclasses import replace

import torch

from trl_cmdp.core import Comparison, Head


N, V, H_S, H_T = 7, 23, 5, 6
BETAS = [0.0, 0.3, 0.5, 1.0]
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 0.1], dtype=torch.float64)
TOKENS = torch.tensor([3, 0, 22, 9, 9, 1, 17])
SOME = 336 * 8 / 2**20
# In float64 tiles of one row, of four in blocks of five tokens, and of all rows and tokens.
MEMORY_MB = [1e-9, SOME, 256]
COMPARISONS = [
    *(Comparison(beta) for beta in BETAS),
    Comparison(0.0, temperature=0.7),
    Comparison(0.5, temperature=1.4, teacher_prob_floor=0.2),
    Comparison(1.0, teacher_prob_floor=0.05),
    Comparison(temperature=0.7, cross_entropy=True),
]
HEADS = [
    {},
    {"bias": False, "scales": (0.3, 2.0)},
    {"caps": (3.0, 5.0), "vocabularies": (V + 4, V)},
    {"scales": (0.5, 0.25), "caps": (2.0, 30.0), "vocabularies": (V, V + 4)},
]
# Each comparison with each pair of heads, in tiles of every size.
PROBLEMS = [
    (comparison, heads, MEMORY_MB[(i + j) % 3])
    for i, comparison in enumerate(COMPARISONS)
    for j, heads in enumerate(HEADS)
]


def kl(p, q):
    """KL(p‖q) by its definition, 0·log 0 being 0, gradients included."""
    support = p > 0
    ratio = torch.where(support, p, 1.0).log() - torch.where(support, q, 1.0).log()
    return torch.where(support, p * ratio, 0.0).sum(-1)


def reference_divergence(student_logits, teacher_logits, beta=1.0, temperature=1.0, floor=0.0, cross_entropy=False):
    student = (student_logits.double() / temperature).softmax(-1)
    teacher = (teacher_logits.double() / temperature).softmax(-1)
    teacher = (1 - floor) * teacher + floor / teacher.shape[-1]
    if cross_entropy:
        return -torch.where(student > 0, student * teacher.log(), 0.0).sum(-1)
    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    mixture = (1 - beta) * student + beta * teacher
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def logits_of(hidden, head):
    """What a head makes of hidden states, differentiable."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = head.logit_scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def make_heads(
    dtype=torch.float64,
    seed=0,
    *,
    vocabularies=(V, V),
    scales=(1.0, 1.0),
    caps=(None, None),
    bias=True,
    weights=None,
):
    """
    Hidden states and heads; the student's require a gradient. With `weights` the teacher's hidden states are those of
    the positions of weight other than 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    problem = {}
    for who, width, vocab, scale, cap in zip(
        ("student", "teacher"), (H_S, H_T), vocabularies, scales, caps, strict=True
    ):
        problem[f"{who}_hidden"] = draw(N, width)
        problem[f"{who}_head"] = Head(draw(vocab, width), draw(vocab) if bias else None, scale, cap)
    if weights is not None:
        problem["teacher_hidden"] = problem["teacher_hidden"][weights != 0]
    for leaf in leaves(problem):
        leaf.requires_grad_()
    return problem


def leaves(problem):
    """What of the student is trained: hidden states, weight and bias."""
    head = problem["student_head"]
    return [x for x in (problem["student_hidden"], head.weight, head.bias) if x is not None]


def widened(problem, cast=lambda tensor: tensor):
    """A copy in float64, its student trained; `cast` rounds hidden states and weights before."""

    def wide(tensor):
        return None if tensor is None else tensor.detach().double()

    copy = {
        name: wide(cast(value))
        if torch.is_tensor(value)
        else replace(value, weight=wide(cast(value.weight)), bias=wide(value.bias))
        for name, value in problem.items()
    }
    for leaf in leaves(copy):
        leaf.requires_grad_()
    return copy


def reference_loss(problem, weights, comparison=None, cast=lambda tensor: tensor):
    """The loss, the costs and the gradients (in float64) of everything of the student's."""
    wide = widened(problem, cast)
    costs = dense_costs(wide, comparison or Comparison())
    loss = (weights.double() * costs).sum()
    return loss.detach(), costs.detach(), torch.autograd.grad(loss, leaves(wide))


def dense_costs(problem, comparison, rows=slice(None)):
    """Divergences over the tokens that both heads have."""
    student, teacher = problem["student_head"], problem["teacher_head"]
    shared = min(student.vocab_size, teacher.vocab_size)
    return reference_divergence(
        logits_of(problem["student_hidden"][rows], student.first(shared)),
        logits_of(problem["teacher_hidden"], teacher.first(shared)),
        comparison.beta,
        comparison.temperature,
        comparison.teacher_prob_floor,
        comparison.cross_entropy,
    )


def error(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def assert_gradients(problem, expected, tolerance):
    """The gradients of what of the student is trained."""
    for leaf, gradient in zip(leaves(problem), expected, strict=True):
        assert error(leaf.grad, gradient) < tolerance
