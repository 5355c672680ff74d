"""Per-token divergences between student and teacher: dense, and from hidden states in tiles of bounded memory."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# Vocabulary-sized buffers that are alive at once in a tile, at most: both models' log-probabilities, the mixture of the
# JSD, one temporary and the slope of a soft cap. The tile's number of rows follows from it and from `memory_mb`.
_BUFFERS_PER_ROW = 5


def token_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float = 1.0,
    temperature: float = 1.0,
    *,
    teacher_prob_floor: float = 0.0,
) -> torch.Tensor:
    """
    Exact divergence c_t = D(π(.|s_t), μ(.|s_t)) between two next-token distributions, in nats (2509.22921, eq. for
    the per-step cost; the generalised Jensen-Shannon divergence is 2306.13649, eq. 3).

    Differentiable with respect to both logits. Entries of −inf are impossible tokens: they contribute nothing where
    the first distribution is 0, and make a KL infinite where only the second is.

    Args:
        student_logits (`torch.Tensor`):
            Student logits of shape `(..., V)`.
        teacher_logits (`torch.Tensor`):
            Teacher logits of shape `(..., V)`.
        beta (`float`, *optional*, defaults to `1.0`):
            `1.0` is the reverse KL(π‖μ), `0.0` the forward KL(μ‖π), anything between the generalised JSD with mixture
            (1 − beta)·π + beta·μ. The convention of TRL's `DistillationConfig.beta`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that both logits are divided by.
        teacher_prob_floor (`float`, *optional*, defaults to `0.0`):
            ε of the mixture (1 − ε)·μ + ε/V that replaces the teacher. A positive value bounds the reverse KL by
            log(V/ε).

    Returns:
        `torch.Tensor`: Divergence of shape `(...)`, in float32 (float64 if an input is float64).
    """
    _check_divergence_arguments(beta, temperature, teacher_prob_floor)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student logits of shape {tuple(student_logits.shape)} and teacher logits of shape "
            f"{tuple(teacher_logits.shape)} differ. Slice both to the tokens that the two vocabularies share."
        )
    dtype = _accumulation_dtype(student_logits, teacher_logits)
    student_logps = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)  # (..., V)
    teacher_logps = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)  # (..., V)
    teacher_logps = _with_prob_floor(teacher_logps, teacher_prob_floor)
    if beta == 1.0:
        return _kl(student_logps, teacher_logps)
    if beta == 0.0:
        return _kl(teacher_logps, student_logps)
    # Where both are −inf, `logaddexp` has a NaN derivative: a finite log of 0 takes its place.
    finite_logps = student_logps.clamp(min=torch.finfo(dtype).min)
    mixture_logps = torch.logaddexp(finite_logps + math.log1p(-beta), teacher_logps + math.log(beta))
    return beta * _kl(teacher_logps, mixture_logps) + (1 - beta) * _kl(student_logps, mixture_logps)


def chunked_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    weights: torch.Tensor | None = None,
    beta: float = 1.0,
    temperature: float = 1.0,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    memory_mb: float = 256,
    *,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    teacher_prob_floor: float = 0.0,
    cross_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weighted exact divergence from hidden states and language-model heads, without either model's full logits.

    Rows are processed in tiles of at most `memory_mb`. As the weights are known beforehand, the gradient is formed
    in the same pass as the value, and neither model is projected again in backward. A head that needs no gradient
    costs none. Under `torch.no_grad()` only the costs are computed.

    Args:
        student_hidden (`torch.Tensor`):
            Student hidden states of shape `(N, H_s)`: the positions that count, and no others.
        student_weight (`torch.Tensor`):
            Weight of the student's head, of shape `(V, H_s)`.
        teacher_hidden (`torch.Tensor`):
            Teacher hidden states of shape `(N, H_t)`.
        teacher_weight (`torch.Tensor`):
            Weight of the teacher's head, of shape `(V, H_t)`.
        weights (`torch.Tensor`, *optional*):
            Weight of each position in the loss, of shape `(N,)`. 1 if `None`. Treated as a constant. A position of
            weight 0 contributes nothing to the loss and its gradient, also where its values are not finite.
        beta (`float`, *optional*, defaults to `1.0`):
            Divergence, as in [`token_divergence`].
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both models.
        student_bias (`torch.Tensor`, *optional*):
            Bias of the student's head, of shape `(V,)`.
        teacher_bias (`torch.Tensor`, *optional*):
            Bias of the teacher's head, of shape `(V,)`.
        memory_mb (`float`, *optional*, defaults to `256`):
            Memory that the vocabulary-sized tiles may take, in MiB. At least one row is processed at a time.
        student_logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the student's logits (Cohere, Granite, Falcon-H1).
        teacher_logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the teacher's logits.
        student_final_logit_softcapping (`float`, *optional*):
            Soft cap c of c·tanh(logits/c), applied to the student's logits after the scale (Gemma).
        teacher_final_logit_softcapping (`float`, *optional*):
            Soft cap of the teacher's logits.
        teacher_prob_floor (`float`, *optional*, defaults to `0.0`):
            Mixture of the teacher with the uniform distribution, as in [`token_divergence`].
        cross_entropy (`bool`, *optional*, defaults to `False`):
            Take −Σ_a π(a|s)·log μ(a|s) in place of the divergence, whatever `beta`: the teacher's expected negative
            log-likelihood of the student's next token (2610.00332), reverse KL plus the student's entropy.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The loss Σ weights·costs, a scalar with gradient to the student's hidden
        states, head weight and head bias; and the costs of shape `(N,)`, in nats, without gradient. Both in float32
        (float64 if the hidden states are), accumulated in that precision also for half-precision inputs.
    """
    _check_divergence_arguments(beta, temperature, teacher_prob_floor)
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"The student's head has {student_weight.shape[0]} tokens and the teacher's {teacher_weight.shape[0]}. "
            "Slice both heads to the tokens that the two vocabularies share."
        )
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"{student_hidden.shape[0]} student positions against {teacher_hidden.shape[0]} teacher positions: both "
            "must be the same tokens."
        )
    if memory_mb <= 0:
        raise ValueError(f"`memory_mb` must be positive, got {memory_mb}.")
    if weights is None:
        weights = torch.ones(student_hidden.shape[0], device=student_hidden.device)
    elif weights.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"`weights` must have one entry for each of the {student_hidden.shape[0]} positions, got shape "
            f"{tuple(weights.shape)}."
        )
    settings: dict[str, Any] = {
        "beta": beta,
        "temperature": temperature,
        "memory_mb": memory_mb,
        "student_scale": student_logit_scale,
        "teacher_scale": teacher_logit_scale,
        "student_softcap": student_final_logit_softcapping,
        "teacher_softcap": teacher_final_logit_softcapping,
        "teacher_prob_floor": teacher_prob_floor,
        "cross_entropy": cross_entropy,
    }
    # Inside `forward` of an autograd function the grad mode is off, so what needs a gradient is settled here.
    settings["needs_grad"] = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (student_hidden, student_weight, student_bias)
    )
    loss, costs = _ChunkedDivergence.apply(  # type: ignore[no-untyped-call]
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        weights.detach(),
        settings,
    )
    return loss, costs


@torch.no_grad()
def chunked_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    memory_mb: float = 256,
    *,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    prob_floor: float = 0.0,
) -> torch.Tensor:
    """
    Log-probabilities of given tokens from hidden states and a language-model head, in tiles and without gradient.

    Args:
        hidden (`torch.Tensor`):
            Hidden states of shape `(N, H)`.
        weight (`torch.Tensor`):
            Weight of the head, of shape `(V, H)`.
        token_ids (`torch.Tensor`):
            Tokens of shape `(N,)`, each below V.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature.
        bias (`torch.Tensor`, *optional*):
            Bias of the head, of shape `(V,)`.
        memory_mb (`float`, *optional*, defaults to `256`):
            Memory that the vocabulary-sized tiles may take, in MiB. At least one row is processed at a time.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits.
        final_logit_softcapping (`float`, *optional*):
            Soft cap of the logits.
        prob_floor (`float`, *optional*, defaults to `0.0`):
            Mixture with the uniform distribution, as in [`token_divergence`].

    Returns:
        `torch.Tensor`: Log-probabilities of shape `(N,)`, in nats, float32 (float64 if the hidden states are).
    """
    accumulation, dtype = _accumulation_dtype(hidden), _compute_dtype(hidden)
    log_probs = torch.empty(hidden.shape[0], device=hidden.device, dtype=accumulation)  # (N,)
    tile = max(1, int(memory_mb * 2**20 // (_BUFFERS_PER_ROW * weight.shape[0] * accumulation.itemsize)))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], tile):
            rows = slice(start, start + tile)
            logits = _project(hidden[rows].to(dtype), weight, bias, accumulation, memory_mb)  # (n, V)
            logps, _ = _transformed_logps_(logits, logit_scale, final_logit_softcapping, temperature, False)
            logps = _with_prob_floor(logps, prob_floor, out=logps)
            log_probs[rows] = logps.gather(-1, token_ids[rows].unsqueeze(-1)).squeeze(-1)
    return log_probs


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        weights,
        settings,
    ):
        accumulation = _accumulation_dtype(student_hidden, teacher_hidden)
        student_dtype, teacher_dtype = _compute_dtype(student_hidden), _compute_dtype(teacher_hidden)
        num_rows, vocab = student_hidden.shape[0], student_weight.shape[0]
        device = student_hidden.device
        needs_hidden, needs_weight, needs_bias = settings["needs_grad"]
        needs_any = any(settings["needs_grad"])

        costs = torch.zeros(num_rows, device=device, dtype=accumulation)  # (N,)
        weights = weights.to(device=device, dtype=accumulation)  # (N,)
        weightless = (weights == 0).unsqueeze(-1)  # (N, 1)
        grad_hidden = torch.zeros(student_hidden.shape, device=device, dtype=accumulation) if needs_hidden else None
        grad_weight = torch.zeros(student_weight.shape, device=device, dtype=accumulation) if needs_weight else None
        grad_bias = torch.zeros(vocab, device=device, dtype=accumulation) if needs_bias else None

        row_bytes = _BUFFERS_PER_ROW * vocab * accumulation.itemsize
        tile = max(1, int(settings["memory_mb"] * 2**20 // row_bytes))
        # Autocast would round the products to half precision, which the casts below decide for themselves.
        with torch.autocast(device.type, enabled=False):
            for start in range(0, num_rows, tile):
                rows = slice(start, start + tile)
                student_rows = student_hidden[rows].to(student_dtype)  # (n, H_s)
                student_logits = _project(
                    student_rows, student_weight, student_bias, accumulation, settings["memory_mb"]
                )  # (n, V)
                teacher_logits = _project(
                    teacher_hidden[rows].to(teacher_dtype),
                    teacher_weight,
                    teacher_bias,
                    accumulation,
                    settings["memory_mb"],
                )  # (n, V)
                costs[rows], grad_logits = _divergence_tile(
                    student_logits, teacher_logits, weights[rows] if needs_any else None, settings
                )
                if grad_logits is None:
                    continue
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                if grad_hidden is not None:
                    _accumulate_product(grad_hidden[rows], grad_logits, student_weight, student_dtype, settings)
                if grad_weight is not None:
                    # Rows of weight 0 are cleared on both sides, as 0 times NaN or inf is NaN.
                    clean_rows = student_rows.to(accumulation).masked_fill(weightless[rows], 0.0)
                    grad_weight.addmm_(grad_logits.t(), clean_rows)
                del student_logits, teacher_logits, grad_logits  # before the next tile takes its own

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (student_hidden, student_weight, student_bias)]
        ctx.mark_non_differentiable(costs)
        return (weights * costs).masked_fill(weightless.squeeze(-1), 0.0).sum(), costs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        grads = (
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, *(None,) * 5)


def _divergence_tile(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, weights: torch.Tensor | None, settings: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Costs (n,) of one tile, and the gradient (n, V) of Σ weights·costs by the head's output, both tiles consumed."""
    beta, temperature = settings["beta"], settings["temperature"]
    needs_grad = weights is not None
    student_logps, slope = _transformed_logps_(
        student_logits, settings["student_scale"], settings["student_softcap"], temperature, needs_grad
    )
    teacher_logps, _ = _transformed_logps_(
        teacher_logits, settings["teacher_scale"], settings["teacher_softcap"], temperature, False
    )
    teacher_logps = _with_prob_floor(teacher_logps, settings["teacher_prob_floor"], out=teacher_logps)

    # Every KL is summed as in `_kl`, in place: nothing below is alive that `_BUFFERS_PER_ROW` does not count.
    if settings["cross_entropy"]:  # H(π, μ), dH/dz = π·(−log μ − H(π, μ))
        student_probs = student_logps.exp_()
        surprisal = teacher_logps.neg_().masked_fill_(student_probs == 0, 0.0)  # as in `_log_gap`
        costs = torch.mul(student_probs, surprisal).sum(-1)
        grad = surprisal.sub_(costs.unsqueeze(-1)).mul_(student_probs)
    elif beta == 0.0:  # KL(μ‖π), dD/dz = π − μ
        gap = _log_gap(teacher_logps, student_logps)  # (n, V)
        teacher_probs = teacher_logps.exp_()
        grad = student_logps.exp_().sub_(teacher_probs)
        costs = gap.mul_(teacher_probs).sum(-1) + grad.sum(-1)
    else:  # with m = μ, or the mixture of the JSD: dD/dz = coefficient · π·(log π − log m − KL(π‖m))
        if beta == 1.0:
            coefficient, reference_logps = 1.0, teacher_logps
            costs = teacher_logps.new_zeros(teacher_logps.shape[0])
        else:
            coefficient = 1 - beta
            reference_logps = student_logps + math.log1p(-beta)
            torch.logaddexp(reference_logps, teacher_logps + math.log(beta), out=reference_logps)
            teacher_gap = _log_gap(teacher_logps, reference_logps)
            costs = beta * teacher_gap.mul_(teacher_logps.exp_()).sum(-1)
            del teacher_gap
        gap = _log_gap(student_logps, reference_logps)  # (n, V)
        student_probs = student_logps.exp_()
        buffer = reference_logps.exp_().sub_(student_probs, alpha=coefficient)
        if beta < 1.0:
            buffer.sub_(teacher_logps, alpha=beta)  # by now the teacher's probabilities
        costs += buffer.sum(-1)
        student_part = torch.mul(student_probs, gap, out=buffer).sum(-1)  # (n,)
        costs += coefficient * student_part
        grad = gap.sub_(student_part.unsqueeze(-1)).mul_(student_probs).mul_(coefficient)
    if weights is None:
        return costs, None
    if slope is not None:
        grad.mul_(slope)
    grad.mul_(weights.unsqueeze(-1) / temperature)
    return costs, grad.masked_fill_((weights == 0).unsqueeze(-1), 0.0)


def _transformed_logps_(
    logits: torch.Tensor, scale: float, softcap: float | None, temperature: float, needs_slope: bool
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """Log-probabilities after scale, soft cap and temperature (in place), and the slope of scale and soft cap."""
    slope: torch.Tensor | float | None = None if scale == 1.0 else scale
    logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = logits.square().neg_().add_(1.0).mul_(scale) if needs_slope else None
        logits.mul_(softcap)
    logits.div_(temperature)
    # First the maximum: the normaliser of large logits would carry their rounding error into every entry.
    logits.sub_(logits.amax(-1, keepdim=True))
    return logits.sub_(logits.logsumexp(-1, keepdim=True)), slope


def _project(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, accumulation: torch.dtype, memory_mb: float
) -> torch.Tensor:
    """Logits (n, V) in the accumulation dtype. A head of another dtype is cast in slices, never as a whole."""
    logits = torch.empty((hidden.shape[0], weight.shape[0]), device=hidden.device, dtype=accumulation)
    if weight.dtype == hidden.dtype == accumulation:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        # CUDA multiplies half precision into float32 by itself; elsewhere the rounded inputs are widened first.
        mixed = hidden.device.type == "cuda" and hidden.dtype in (torch.float16, torch.bfloat16)
        for tokens in _vocabulary_slices(weight, accumulation, memory_mb):
            head = weight[tokens].to(hidden.dtype).t()  # (H, v)
            if mixed:
                logits[:, tokens] = torch.mm(hidden, head, out_dtype=accumulation)
            else:
                torch.mm(hidden.to(accumulation), head.to(accumulation), out=logits[:, tokens])
    return logits if bias is None else logits.add_(bias.to(accumulation))


def _accumulate_product(
    out: torch.Tensor, grad_logits: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """out += grad_logits @ weight, in the dtype of `out`."""
    if weight.dtype == dtype == out.dtype:
        out.addmm_(grad_logits, weight)
        return
    for tokens in _vocabulary_slices(weight, out.dtype, settings["memory_mb"]):
        out.addmm_(grad_logits[:, tokens], weight[tokens].to(dtype).to(out.dtype))


def _vocabulary_slices(weight: torch.Tensor, dtype: torch.dtype, memory_mb: float) -> list[slice]:
    vocab, width = weight.shape
    size = max(1, int(memory_mb * 2**20 // (_BUFFERS_PER_ROW * width * dtype.itemsize)))
    return [slice(start, start + size) for start in range(0, vocab, size)]


def _accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Dtype whose rounding the projection's inputs take: autocast's where it is on, as in the models' own heads."""
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def _log_gap(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """log p − log q, and 0 where p is 0: those entries have no weight, and −inf − (−inf) would be NaN."""
    return (logps - reference_logps).masked_fill_(logps == -torch.inf, 0.0)


def _kl(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """
    KL(p‖q) as Σ (p·log(p/q) + q − p). The last two add up to 0; with them a rounding error in either normaliser has no
    effect in first order, which in float32 would dominate the KL of two close distributions.
    """
    probs = logps.exp()
    return (probs * _log_gap(logps, reference_logps) + (reference_logps.exp() - probs)).sum(-1)


def _with_prob_floor(logps: torch.Tensor, floor: float, out: torch.Tensor | None = None) -> torch.Tensor:
    if floor == 0.0:
        return logps
    return torch.logaddexp(logps + math.log1p(-floor), logps.new_tensor(math.log(floor / logps.shape[-1])), out=out)


def _check_divergence_arguments(beta: float, temperature: float, teacher_prob_floor: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta` must lie in [0, 1] (0 is forward KL, 1 reverse KL), got {beta}.")
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    if not 0.0 <= teacher_prob_floor < 1.0:
        raise ValueError(f"`teacher_prob_floor` must lie in [0, 1), got {teacher_prob_floor}.")
