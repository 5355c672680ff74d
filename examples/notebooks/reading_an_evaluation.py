# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading an evaluation
#
# An evaluation leaves records behind: every rollout, with the cost of each of its tokens. Every figure is computed from
# them, again and again, without a model. This notebook takes records that are committed in this repository, computes
# their figures, and says how to read them. Half a minute.
#
# Two sets of records:
#
# - SmolLM2-135M on GSM-Symbolic at a small scale ([what was run](../../docs/gsm_symbolic.md)): real text, few problems.
# - Nine methods on chained sums, three seeds, 1000 problems each ([what it says](../../docs/comparison.md)).

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from trl_cmdp.core import clopper_pearson_interval, rollout_cost, wilson_interval
from trl_cmdp.evaluation import (
    compare_evaluations,
    compare_methods,
    judge_pairs,
    pair_rollouts,
    read_records,
    read_rollout_records,
    summarize,
    win_rate,
)
from trl_cmdp.evaluation.judges import ProcessJudge
from trl_cmdp.reports import comparison_table, difference_table, evaluation_table, plot_pareto


# %% tags=["parameters"]
RESULTS = "../../benchmarks/results"
SPLIT = "validation"  # of GSM-Symbolic: new problems of known templates; "test" has unknown ones
SIMULATIONS = 2000  # evaluations simulated to show what an interval says

# %% [markdown]
# ## One evaluation
#
# The first line of a records file says what was asked for; each other line is a rollout.

# %%
folder = Path(RESULTS) / "gsm_symbolic" / "records"
names = ["teacher", "student", "grpo", "gkd", "lambda", "constrained"]
evaluations = {name: read_rollout_records(folder / f"{name}-{SPLIT}.jsonl") for name in names}

settings, rollouts = evaluations["constrained"]
print(f"{settings.num_problems} problems x {settings.num_samples}, temperature {settings.temperature:g}, ", end="")
print(f"limit {settings.cost_limit:g} nats per token, against the teacher {settings.teacher!r}\n")
rollout = rollouts[0]
print(f"{rollout.prompt}\n\n-> {rollout.completion!r}\n")
print(f"right: {rollout.right}, truncated: {rollout.truncated}, the first tokens and their costs:")
print(list(zip(rollout.tokens[:8], rollout.costs[:8], strict=True)))

# %%
table = evaluation_table([summarize(*evaluation) for evaluation in evaluations.values()])
display(Markdown(table))

# %% [markdown]
# With so few problems the intervals are the message, not the values before them. How to read a row:
#
# - **final answer** and **satisfaction** are shares of rollouts, with 95% intervals that count problems, not rollouts:
#   more samples of the same problem say less than more problems.
# - **KL** weighs every token alike, **mean cost** every rollout. They differ where short rollouts are the far ones.
# - **exceed the limit, at most** is the figure to quote for a promise: with 95% confidence no larger share of rollouts
#   like these exceeds the limit.
# - The limit is not part of the records. Another one can be asked for at any time:

# %%
for limit in (0.1, settings.cost_limit, 1.0, 2.0):
    satisfaction = summarize(*evaluations["constrained"], cost_limit=limit).sampled.costs.satisfaction
    print(f"limit {limit:<5g} satisfaction {satisfaction.value:.3f} [{satisfaction.low:.3f}, {satisfaction.high:.3f}]")

# %% [markdown]
# ## What an interval says
#
# A rate of 0 from few problems is not a rate of 0. The band is the 95% interval of a rate that was measured as 0, and
# of one that was measured as 95%, by the number of problems (one rollout each):

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
for rate, colour in ((0.0, "#d1495b"), (0.95, "#1b6ca8")):
    numbers = [n for n in (10, 15, 20, 40, 60, 100, 200, 300, 500, 1000) if (rate * n).is_integer()]
    low, high = zip(*(clopper_pearson_interval(int(rate * n), n, 0.95) for n in numbers), strict=True)
    left.fill_between(numbers, low, high, color=colour, alpha=0.3, linewidth=0, label=f"measured {rate:.0%}")
    left.plot(numbers, [rate] * len(numbers), color=colour, linewidth=1.2)
num_problems = settings.num_problems
left.axvline(num_problems, color="black", linestyle=":", linewidth=1)
left.text(num_problems, 0.5, f" {num_problems} problems,\n as above", va="center")
left.set(xscale="log", xlabel="problems", ylabel="rate", ylim=(0, 1), title="How wide is a 95% interval?")
left.xaxis.set_major_formatter("{x:g}")
left.legend(frameon=False, loc="center right")

truth, n = 0.9, 100
generator = torch.Generator().manual_seed(0)
successes = torch.binomial(
    torch.full((SIMULATIONS,), float(n)), torch.full((SIMULATIONS,), truth), generator=generator
)
intervals = [wilson_interval(int(k), n, 0.95) for k in successes]
hits = [low <= truth <= high for low, high in intervals]
for row, ((low, high), hit) in enumerate(zip(intervals[:50], hits, strict=False)):
    right.plot([row, row], [low, high], color="#1b6ca8" if hit else "#d1495b", linewidth=2)
right.axhline(truth, color="black", linestyle="--", linewidth=1)
right.set(xlabel="evaluation", ylabel="rate", title=f"50 evaluations of {n} problems; the truth is {truth:g}")
for axes in (left, right):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
print(f"{sum(hits) / SIMULATIONS:.1%} of {SIMULATIONS} simulated intervals hold the truth")

# %% [markdown]
# That is what "95%" says: of many such evaluations about 19 in 20 have an interval that holds the true rate. It does not
# say that this one does (a red one looks like any other), and two rates whose intervals overlap may still differ: for
# that, ask for the difference.
#
# ## Differences and win rates
#
# All students met the same problems, so differences are taken problem by problem, and their intervals are the narrower
# for it. An interval that holds 0 shows no difference; it does not show that there is none.

# %%
references = [name for name in names if name != "constrained"]
differences = [compare_evaluations(evaluations[name], evaluations["constrained"]) for name in references]
display(Markdown(difference_table(differences)))

# %% [markdown]
# The process judge asks a question that final answers do not: whose equations hold, and follow from the problem?

# %%
for name in references:
    pairs = pair_rollouts(evaluations[name][1], evaluations["constrained"][1], (name, "constrained"))
    wins = win_rate(judge_pairs(pairs, ProcessJudge()))
    shares = [
        f"{what} {rate.value:4.0%}" for what, rate in (("win", wins.win), ("tie", wins.tie), ("loss", wins.loss))
    ]
    low, high = wins.win.interval
    print(f"{name:<8} against constrained: {', '.join(shares)}   (wins: [{low:.0%}, {high:.0%}])")

# %% [markdown]
# Read the ties first. Two students that write no equation tie, and that is no sign of equal reasoning.
#
# ## Where along the text does the cost arise?
#
# The distribution of the rollouts' costs, and the mean cost of each token by its place in the completion. Places that
# fewer than half of the rollouts reach are left out: there only the longest ones speak.

# %%
colours = {"student": "0.5", "grpo": "#d1495b", "gkd": "#e69f00", "lambda": "#7b4fa3", "constrained": "#1b6ca8"}
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
for name, colour in colours.items():
    token_costs = [torch.tensor(record.costs) for record in evaluations[name][1]]
    costs = torch.stack([rollout_cost(c[None], torch.ones(1, len(c)), settings.cost_scope)[0] for c in token_costs])
    shares = torch.arange(1, len(costs) + 1) / len(costs)
    costs, shares = torch.cat([torch.zeros(1), costs.sort().values]), torch.cat([torch.zeros(1), shares])
    left.step(costs, shares, where="post", color=colour, linewidth=1.5, label=name)
    places = range(max(map(len, token_costs)))
    columns = [torch.stack([c[place] for c in token_costs if len(c) > place]) for place in places]
    kept = [column.mean() for column in columns if len(column) >= len(token_costs) / 2]
    smooth = [torch.stack(kept[max(0, place - 4) : place + 1]).mean() for place in range(len(kept))]
    right.plot(range(1, len(kept) + 1), smooth, color=colour, linewidth=1.5)
left.axvline(settings.cost_limit, color="black", linestyle="--", linewidth=1, label="limit")
left.set(xlabel="cost of a rollout, nats per token", ylabel="share of rollouts", xlim=(0, None), ylim=(0, 1.02))
left.set_title("Costs of the rollouts")
right.axhline(settings.cost_limit, color="black", linestyle="--", linewidth=1)
right.set(xlabel="token of the completion", ylabel="nats", ylim=(0, None), title="Cost by place (mean of 5 places)")
for axes in (left, right):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
plt.show()

# %% [markdown]
# On the left, where a line crosses the limit is the satisfaction. On the right, a hump at the beginning is a student
# that starts its answers otherwise than its teacher, a rise towards the end one that loses the thread.
#
# ## A comparison of methods
#
# `trl-cmdp compare` keeps one record for each method and seed: of every held-out problem whether the answer was right
# and the steps valid, and the cost. The intervals here are over seeds and problems together.

# %%
cells = read_records((Path(RESULTS) / "arithmetic" / "records.jsonl").read_text())
comparison = compare_methods(cells)
display(Markdown(comparison_table(comparison)))

# %%
with TemporaryDirectory() as drafts:  # `plot_pareto` writes a PNG too
    display(plot_pareto(comparison, Path(drafts) / "pareto.png", "Chained sums: right answers against cost"))

# %% [markdown]
# Up is better answers, left is nearer to the teacher, and filled marks satisfy the limit. Correct answers alone would put
# GRPO among the best; its place far to the right, and its hollow mark, say how it got there. Among the filled marks the
# differences are small, so look at them paired:

# %%
figure, all_axes = plt.subplots(1, 3, figsize=(10.5, 3.4), sharey=True, layout="constrained")
methods = [row for row in comparison.methods if row.right_difference is not None]
fields = {
    "right_difference": "right answers",
    "valid_difference": "all steps valid",
    "satisfaction_difference": "satisfaction",
}
for axes, (field, title) in zip(all_axes, fields.items(), strict=True):
    for place, row in enumerate(methods):
        difference = getattr(row, field)
        colour = "0.6" if difference.low <= 0 <= difference.high else "#1b6ca8" if difference.value > 0 else "#d1495b"
        axes.plot([100 * difference.low, 100 * difference.high], [place, place], color=colour, linewidth=2)
        axes.plot(100 * difference.value, place, "o", color=colour, markersize=5)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xscale("symlog", linthresh=2, linscale=1)
    axes.set_xlim(-100, 3)
    axes.set_xticks([-50, -10, -2, 0, 2], ["-50", "-10", "-2", "0", "2"])
    axes.set(title=title, xlabel="points more than constrained")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
all_axes[0].set_yticks(range(len(methods)), [row.method for row in methods])
all_axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# Grey: the interval holds 0, and three seeds do not tell the two apart. Blue: more than the constrained method. Red:
# less. In these records nothing is blue in one column without being red in another: λ = 0.1 has as many correct answers,
# and fewer valid steps and a lower satisfaction; MiniLLM satisfies the limit more often, and has fewer correct answers.
# [The comparison](../../docs/comparison.md) goes through them, losses included.
#
# More: [how the figures are defined](../../docs/evaluation.md), [judges](../../docs/judges.md), and
# [the report](../../docs/report.md), which makes one page of all this with every rollout in it.
