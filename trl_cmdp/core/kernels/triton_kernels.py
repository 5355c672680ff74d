"""
What is fused between the products of hidden states with two heads, in Triton. A program has a row of the tile, or a
block of one; logits are read from the head's output where they are needed, and never stored.

Constants that the kernels are compiled for: `LAYOUT` is (stride of a tile's rows, tokens that both models have, tokens of
the student); `STUDENT` and `TEACHER` are (factor, inner), which make their head's output y the logit factor·tanh(inner·y),
or factor·y where `inner` is 0; `MEASURE` is (kind, β, log(1 − ε), log(ε/V)), the last two 0 without a probability floor ε.
"""

from importlib import import_module


# It comes with torch for CUDA, and is no dependency of everyone's: this module is imported where it is there.
triton, tl = import_module("triton"), import_module("triton.language")

NO_TEACHER, REVERSE_KL, FORWARD_KL, JSD, CROSS_ENTROPY = (tl.constexpr(kind) for kind in range(5))
_LOWEST = tl.constexpr(-3.4028234e38)
_LARGEST_LOG_RATIO = tl.constexpr(80.0)


@triton.jit
def statistics_kernel(
    student, teacher, token_ids, out, num_rows, LAYOUT: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """
    Reads a row of both tiles once and writes its `RowStatistics`, the fields `num_rows` apart. Each lane has sums of its
    own, relative to its own maximum, and lanes are joined at the end in float64: no reduction within the loop, and no
    more than V / BLOCK summands in float32. The JSD and a probability floor are no sums of that kind, as they need the
    normalisers first: with them the row is read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * LAYOUT[0]
    teacher += row * LAYOUT[0]
    out += row
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    reference = _reference(student, lanes, LAYOUT[2], STUDENT)
    maximum, total, moment = zeros + _LOWEST, zeros, zeros
    tl.store(out, reference)
    if MEASURE[0] != NO_TEACHER:
        teacher_reference = _reference(teacher, lanes, LAYOUT[1], TEACHER)
        teacher_maximum, teacher_total, gap = zeros + _LOWEST, zeros, zeros
        for start in tl.range(0, LAYOUT[1], BLOCK, num_stages=STAGES):
            tokens = start + lanes
            x = _logits(student, tokens, tokens < LAYOUT[1], STUDENT) - reference
            y = _logits(teacher, tokens, tokens < LAYOUT[1], TEACHER) - teacher_reference
            maximum, shrink, exps = _online(maximum, x)
            teacher_maximum, teacher_shrink, teacher_exps = _online(teacher_maximum, y)
            total = total * shrink + exps
            teacher_total = teacher_total * teacher_shrink + teacher_exps
            moment = _times(shrink, moment) + _times(exps, x)
            if MEASURE[0] == FORWARD_KL:
                gap = _times(teacher_shrink, gap) + _times(teacher_exps, y - x)
            elif MEASURE[0] == CROSS_ENTROPY:
                gap = _times(shrink, gap) - _times(exps, y)
            else:
                gap = _times(shrink, gap) + _times(exps, x - y)
        log_normalizer, share, norm = _joined(maximum, total)
        teacher_log_normalizer, teacher_share, teacher_norm = _joined(teacher_maximum, teacher_total)
        if MEASURE[0] == FORWARD_KL:
            cost = _mean(teacher_share, gap, teacher_norm) - teacher_log_normalizer + log_normalizer
        elif MEASURE[0] == CROSS_ENTROPY:
            cost = _mean(share, gap, norm) + teacher_log_normalizer
        else:
            cost = _mean(share, gap, norm) - log_normalizer + teacher_log_normalizer
        centre = cost
        if MEASURE[0] == JSD or MEASURE[3] != 0.0:
            costs, centres = zeros, zeros
            for start in tl.range(0, LAYOUT[1], BLOCK, num_stages=STAGES):
                tokens = start + lanes
                x = _logits(student, tokens, tokens < LAYOUT[1], STUDENT) - reference
                y = _logits(teacher, tokens, tokens < LAYOUT[1], TEACHER) - teacher_reference
                logps = x - log_normalizer.to(tl.float32)
                teacher_logps = _with_floor(y - teacher_log_normalizer.to(tl.float32), MEASURE)
                probs = tl.exp(logps)
                teacher_probs = tl.where(tokens < LAYOUT[1], tl.exp(teacher_logps), 0.0)
                # A KL is Σ (p·log(p/q) + q − p): rounding errors of the normalisers then cancel in first order.
                if MEASURE[0] == FORWARD_KL:
                    costs += _times(teacher_probs, teacher_logps - logps) + (probs - teacher_probs)
                elif MEASURE[0] == CROSS_ENTROPY:
                    costs -= _times(probs, teacher_logps)
                elif MEASURE[0] == REVERSE_KL:
                    term = _times(probs, logps - teacher_logps)
                    costs += term + (teacher_probs - probs)
                    centres += term
                else:
                    log_ratio = _clamped(logps - teacher_logps)
                    to_mixture = _mixture_gap(log_ratio, MEASURE)
                    term = _times(probs, to_mixture)
                    costs += MEASURE[1] * _times(teacher_probs, to_mixture - log_ratio) + (1.0 - MEASURE[1]) * term
                    centres += term
            # A row without a distribution must not look as if it had one: its normalisers are not finite.
            cost = tl.sum(costs.to(tl.float64), axis=0) + 0.0 * (log_normalizer + teacher_log_normalizer)
            centre = tl.sum(centres.to(tl.float64), axis=0)
            if MEASURE[0] == FORWARD_KL or MEASURE[0] == CROSS_ENTROPY:
                centre = cost
        tl.store(out + num_rows, log_normalizer.to(tl.float32))
        tl.store(out + 2 * num_rows, teacher_reference)
        tl.store(out + 3 * num_rows, teacher_log_normalizer.to(tl.float32))
        tl.store(out + 4 * num_rows, cost.to(tl.float32))
        tl.store(out + 5 * num_rows, centre.to(tl.float32))
    if token_ids is not None:
        for start in tl.range(LAYOUT[1], LAYOUT[2], BLOCK, num_stages=STAGES):
            tokens = start + lanes
            x = _logits(student, tokens, tokens < LAYOUT[2], STUDENT) - reference
            maximum, shrink, exps = _online(maximum, x)
            total = total * shrink + exps
            moment = _times(shrink, moment) + _times(exps, x)
        log_normalizer, share, norm = _joined(maximum, total)
        token = tl.load(token_ids + row)
        chosen = _logits(student, token, token < LAYOUT[2], STUDENT) - reference
        tl.store(out + 6 * num_rows, log_normalizer.to(tl.float32))
        tl.store(out + 7 * num_rows, (chosen - log_normalizer).to(tl.float32))
        tl.store(out + 8 * num_rows, (log_normalizer - _mean(share, moment, norm)).to(tl.float32))
        if MEASURE[0] != NO_TEACHER:
            chosen = _logits(teacher, token, token < LAYOUT[1], TEACHER) - teacher_reference
            tl.store(out + 9 * num_rows, _with_floor((chosen - teacher_log_normalizer).to(tl.float32), MEASURE))


@triton.jit
def gradient_kernel(
    student, teacher, token_ids, statistics, coefficients, out, num_rows, LAYOUT: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """
    Writes, in the dtype of `out`, the gradient of a·cost + b·log_prob + c·entropy by a block of the student's head's
    output; a, b and c are the rows' `coefficients`. A part whose coefficients are 0 contributes 0, whatever it is.
    """
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < LAYOUT[2]
    statistics += row
    coefficients += row
    z = _logits(student + row * LAYOUT[0], tokens, inside, STUDENT)
    x = z - tl.load(statistics)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if MEASURE[0] != NO_TEACHER:
        cost, centre = tl.load(statistics + 4 * num_rows), tl.load(statistics + 5 * num_rows)
        of_cost = tl.load(coefficients)
        y = _logits(teacher + row * LAYOUT[0], tokens, tokens < LAYOUT[1], TEACHER) - tl.load(
            statistics + 2 * num_rows
        )
        logps = x - tl.load(statistics + num_rows)
        teacher_logps = _with_floor(y - tl.load(statistics + 3 * num_rows), MEASURE)
        probs = tl.exp(logps)
        if MEASURE[0] == FORWARD_KL:
            by_logit = probs - tl.exp(teacher_logps)
        elif MEASURE[0] == CROSS_ENTROPY:
            by_logit = _times(probs, -teacher_logps - centre)
        elif MEASURE[0] == REVERSE_KL:
            by_logit = _times(probs, logps - teacher_logps - centre)
        else:
            to_mixture = _mixture_gap(_clamped(logps - teacher_logps), MEASURE)
            by_logit = (1.0 - MEASURE[1]) * _times(probs, to_mixture - centre)
        by_logit = tl.where(cost == cost, of_cost * by_logit, float("nan"))
        gradient += tl.where(tokens < LAYOUT[1], tl.where(of_cost != 0.0, by_logit, 0.0), 0.0)
    if token_ids is not None:
        token, entropy = tl.load(token_ids + row), tl.load(statistics + 8 * num_rows)
        of_log_prob, of_entropy = tl.load(coefficients + num_rows), tl.load(coefficients + 2 * num_rows)
        logps = x - tl.load(statistics + 6 * num_rows)
        probs = tl.exp(logps)
        by_logit = of_log_prob * (tl.where(tokens == token, 1.0, 0.0) - probs)
        by_logit -= of_entropy * _times(probs, logps + entropy)
        gradient += tl.where(tl.abs(of_log_prob) + tl.abs(of_entropy) != 0.0, by_logit, 0.0)
    if STUDENT[1] != 0.0:
        t = z / STUDENT[0]
        slope = STUDENT[0] * STUDENT[1] * (1.0 - t * t)
        gradient = tl.where(gradient == 0.0, 0.0, gradient * slope)  # also where the logit is NaN
    else:
        gradient *= STUDENT[0]
    tl.store(out + row * LAYOUT[0] + tokens, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(values, factor, out, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out = factor·values, in its own dtype; 0 where the factor is, whatever the values are."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(factor)
    if IN_PLACE and scale == 1.0:
        return
    scaled = tl.where(scale == 0.0, 0.0, tl.load(values + index, mask=index < size).to(tl.float32) * scale)
    tl.store(out + index, scaled.to(out.dtype.element_ty), mask=index < size)


@triton.jit
def _logits(outputs, tokens, inside, HEAD: tl.constexpr):
    """Logits of a head's outputs, −∞ outside."""
    z = tl.load(outputs + tokens, mask=inside, other=0.0)
    if HEAD[1] != 0.0:
        z = 2.0 * tl.sigmoid(2.0 * HEAD[1] * z) - 1.0  # tanh
    return tl.where(inside, z * HEAD[0], -float("inf"))


@triton.jit
def _reference(outputs, lanes, size, HEAD: tl.constexpr):
    """What a row's logits are made relative to, so that sums of large logits keep their digits."""
    largest = tl.max(_logits(outputs, lanes, lanes < size, HEAD), axis=0)
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _online(maximum, x):
    """The lanes' new maxima, the factor of the sums so far, and exp(x − maximum)."""
    larger = x > maximum
    ratio = tl.exp(-tl.abs(x - maximum))  # one of the two factors; the other is 1
    return tl.where(larger, x, maximum), tl.where(larger, ratio, 1.0), tl.where(larger, 1.0, ratio)


@triton.jit
def _joined(maximum, total):
    """Log-normaliser of a row, each lane's share of it relative to the row's maximum, and the sum of these."""
    top = tl.max(maximum, axis=0)
    share = tl.exp(maximum - top)
    norm = tl.sum((total * share).to(tl.float64), axis=0)
    return top + tl.log(norm), share, norm


@triton.jit
def _mean(share, moments, norm):
    return tl.sum(_times(share, moments).to(tl.float64), axis=0) / norm


@triton.jit
def _times(weights, values):
    """An impossible token's 0·∞ is 0. The caller marks the rows that have no distribution."""
    return tl.where(weights > 0.0, weights * values, 0.0)


@triton.jit
def _with_floor(logps, MEASURE: tl.constexpr):
    """Log-probabilities of the mixture (1 − ε)·μ + ε/V."""
    if MEASURE[3] != 0.0:
        kept = logps + MEASURE[2]
        top = tl.maximum(kept, MEASURE[3])
        logps = top + tl.log(tl.exp(kept - top) + tl.exp(MEASURE[3] - top))
    return logps


@triton.jit
def _clamped(log_ratio):
    return tl.minimum(tl.maximum(log_ratio, -_LARGEST_LOG_RATIO), _LARGEST_LOG_RATIO)


@triton.jit
def _mixture_gap(log_ratio, MEASURE: tl.constexpr):
    """log π − log m = −log(1 + β·(μ/π − 1)) of log π − log μ. The quotient makes the logarithm exact near μ = π."""
    change = MEASURE[1] * (tl.exp(-log_ratio) - 1.0)
    moved = 1.0 + change
    return -tl.where(moved == 1.0, change, tl.log(moved) * (change / (moved - 1.0)))
