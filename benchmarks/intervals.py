"""
Coverage of the 95% interval for rates of clustered trials, by simulation.

    python benchmarks/intervals.py          # minutes; writes benchmarks/results/intervals.json
    python benchmarks/intervals.py --quick  # seconds, writes nothing

A rate of success, some prompts, k rollouts of each. How prompts differ: beta-binomial with an intra-prompt correlation
from 0 to 1, or a mixture of prompts that always succeed with prompts that succeed half the time. Each repetition draws
how many prompts have 0, 1, ..., k successes, and asks whether the interval holds the true rate. The interval is
computed for all repetitions at once, and checked against `clustered_rate_interval` itself on some of them.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy.special import betainc, stdtrit
from scipy.stats import betabinom, binom, norm

from trl_cmdp.core import clustered_rate_interval


CONFIDENCE = 0.95
INSIDE, BOUNDARY = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95), (0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
CORRELATIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99, 1.0, "mixture")
ROLLOUTS, PROMPTS = (1, 2, 4, 8, 16, 32), (200, 500, 1000)
GRID = [
    (rate, correlation, k, prompts)
    for prompts in PROMPTS
    for k in ROLLOUTS
    for correlation in (CORRELATIONS if k > 1 else CORRELATIONS[:1])
    for rate in INSIDE + BOUNDARY
]


def success_probabilities(rate, correlation, k):
    """Probability of 0, 1, ..., k successes of a prompt, of shape (k + 1,)."""
    successes = np.arange(k + 1)
    if correlation == "mixture":
        even = 2 * (1 - rate)  # share of prompts that succeed half the time
        return even * binom.pmf(successes, k, 0.5) + (1 - even) * (successes == k)
    if correlation == 0 or rate == 1:
        return binom.pmf(successes, k, rate)
    if correlation == 1:
        return np.where(successes == k, rate, np.where(successes == 0, 1 - rate, 0.0))
    weight = 1 / correlation - 1
    return betabinom.pmf(successes, k, rate * weight, (1 - rate) * weight)


def draw(rate, correlation, k, prompts, repetitions, rng):
    """Number of prompts with 0, 1, ..., k successes, of shape (repetitions, k + 1)."""
    probabilities = success_probabilities(rate, correlation, k)
    return rng.multinomial(prompts, probabilities / probabilities.sum(), size=repetitions)


def effective_trials(counts):
    """Observed rates and effective trials of [`clustered_rate_interval`], of shape (repetitions,) each."""
    k, prompts = counts.shape[1] - 1, counts[0].sum()
    successes = np.arange(k + 1)
    n = k * prompts
    rate = counts @ successes / n
    squares = (successes - k * rate[:, None]) ** 2
    total, fourth = (counts * squares).sum(1), (counts * squares**2).sum(1)
    differing = total > 1e-12 * n
    total = np.where(differing, total, 1.0)
    estimate = np.clip(rate * (1 - rate) * n**2 * (prompts - 1) / prompts / total, prompts, n)
    spread = np.maximum(fourth - total**2 / prompts, 1e-6 * total**2)
    degrees = np.clip(2 * total**2 / spread, 1, 1e6)
    discount = (norm.ppf(0.5 + CONFIDENCE / 2) / stdtrit(degrees, 0.5 + CONFIDENCE / 2)) ** 4
    return rate, np.where(differing, prompts + (estimate - prompts) * discount, prompts)


def holds(rate, effective, true_rate):
    """Whether Clopper-Pearson holds the true rate: neither of its tail probabilities is below 2.5%."""
    successes, failures = rate * effective, (1 - rate) * effective
    tiny = 1e-300
    at_least = np.where(successes > 0, betainc(np.maximum(successes, tiny), failures + 1, true_rate), 1)
    at_most = np.where(failures > 0, betainc(np.maximum(failures, tiny), successes + 1, 1 - true_rate), 1)
    return np.minimum(at_least, at_most) >= (1 - CONFIDENCE) / 2


def coverage(rate, correlation, k, prompts, repetitions, rng):
    """Share of the repetitions whose interval holds the true rate."""
    counts = draw(rate, correlation, k, prompts, repetitions, rng)
    return holds(*effective_trials(counts), rate).mean().item()


def same_as_the_function(rate, correlation, k, prompts, rng):
    """Whether the function itself, on one draw, agrees about rates on both sides of each of its bounds."""
    counts = draw(rate, correlation, k, prompts, 1, rng)
    successes = torch.arange(k + 1).repeat_interleave(torch.from_numpy(counts[0]))
    low, high = clustered_rate_interval(successes, torch.full_like(successes, k), CONFIDENCE)
    observed = effective_trials(counts)
    step = 1e-7
    checks = [(low + step, True), (high - step, True)]
    checks += [(low - step, False)] * (low > step) + [(high + step, False)] * (high < 1 - step)
    return all(holds(*observed, value).item() == inside for value, inside in checks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repetitions", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "intervals.json")
    arguments = parser.parse_args()
    repetitions = 500 if arguments.quick else arguments.repetitions
    rng = np.random.default_rng(0)
    rows = []
    for number, case in enumerate(GRID):
        if number % 20 == 0 and not same_as_the_function(*case, rng):
            raise SystemExit(f"The simulation does not compute what `clustered_rate_interval` does: {case}.")
        rows.append([*case, round(coverage(*case, repetitions, rng), 5)])
    extremes = {}
    for name, rates in (("rates 0.5 to 0.95", INSIDE), ("rates 0.97 to 1", BOUNDARY)):
        lowest, *_, highest = sorted((row for row in rows if row[0] in rates), key=lambda row: row[-1])
        extremes[name] = {"lowest": lowest, "highest": highest}
        print(f"{name}: coverage {lowest[-1]:.4f} {lowest[:-1]} to {highest[-1]:.4f} {highest[:-1]}")
    if arguments.quick:
        return
    record = {
        "confidence": CONFIDENCE,
        "repetitions": repetitions,
        # At the nominal coverage; at most this much anywhere above it.
        "monte_carlo_standard_error": round(math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / repetitions), 5),
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (np, scipy, torch)},
        },
        "extremes": extremes,
        "columns": ["rate", "correlation", "rollouts", "prompts", "coverage"],
        "rows": rows,
    }
    lines = json.dumps({**record, "rows": []}, indent=2)
    body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    arguments.output.write_text(lines.replace('"rows": []', f'"rows": [\n{body}\n  ]') + "\n")


if __name__ == "__main__":
    main()
