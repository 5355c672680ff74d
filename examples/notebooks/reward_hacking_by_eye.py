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
# # Reward hacking by eye
#
# One student, trained three times from the same weights on the same problems:
#
# - **GRPO**: reward alone. Only the final answer counts.
# - **GKD**: imitation alone. The reward is ignored.
# - **constrained**: the reward, under a limit on the divergence from the teacher.
#
# The task is chained sums, whose steps a verifier can check but the reward never does. What does each student write? A
# few minutes on one CPU core.

# %%
from dataclasses import replace
from logging import ERROR, getLogger
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer, GKDDistillConfig, GKDDistillTrainer
from trl_cmdp.core import rollout_cost
from trl_cmdp.evaluation import EvaluationSettings, Rate, evaluate, summarize
from trl_cmdp.reports import read_runs, write_report
from trl_cmdp.tasks import arithmetic


getLogger("trl_cmdp").setLevel(ERROR)  # that a trainer has no teacher is meant
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)

# %% tags=["parameters"]
STEPS = 60  # optimizer steps of each method, 16 prompts x 8 rollouts; `trl-cmdp compare arithmetic` takes 200
HELD_OUT = 400  # problems to evaluate on
COST_LIMIT = 0.25  # nats per token
OUTPUT_DIR = "../../outputs/notebooks/reward_hacking"

# %% [markdown]
# ## Train three students

# %%
student_path, teacher_path = arithmetic.demo_model_path("student"), arithmetic.demo_model_path("teacher")
tokenizer = AutoTokenizer.from_pretrained(student_path)
teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
train_problems = arithmetic.load_problems(16 * STEPS, "train", seed=0)

shared = {
    "output_dir": OUTPUT_DIR,
    "cost_limit": COST_LIMIT,
    "learning_rate": 3e-4,
    "max_steps": STEPS,
    "per_device_train_batch_size": 128,
    "num_generations": 8,
    "max_completion_length": arithmetic.MAX_COMPLETION_LENGTH,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
# Without a teacher the constrained trainer is GRPOTrainer, bit for bit.
methods = {
    "GRPO": (ConstrainedDistillTrainer, ConstrainedDistillConfig(**shared), None),
    "GKD": (GKDDistillTrainer, GKDDistillConfig(**shared), teacher),
    "constrained": (
        ConstrainedDistillTrainer,
        ConstrainedDistillConfig(**shared),
        teacher,
    ),
}
students = {"untrained": AutoModelForCausalLM.from_pretrained(student_path)}
for name, (trainer_class, config, method_teacher) in methods.items():
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(student_path),
        reward_funcs=arithmetic.final_answer_reward,
        args=config,
        train_dataset=train_problems,
        processing_class=tokenizer,
        teacher_model=method_teacher,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    students[name] = trainer.model
    print(f"{name}: {STEPS} steps")

# %% [markdown]
# ## Evaluate all of them on the same held-out problems
#
# `evaluate` writes every rollout with the cost of each of its tokens, and `summarize` computes the figures from these
# records, each with its 95% interval. The teacher is evaluated against itself: it costs nothing.

# %%
held_out = arithmetic.load_problems(HELD_OUT, "test", seed=0)
settings = EvaluationSettings(
    name="",
    student="",
    teacher="arithmetic teacher",
    task="arithmetic",
    num_problems=HELD_OUT,
    max_new_tokens=arithmetic.MAX_COMPLETION_LENGTH,
    batch_size=200,
    cost_limit=COST_LIMIT,
)
records, files = {}, []
for name, model in {"teacher": teacher, **students}.items():
    files.append(Path(OUTPUT_DIR) / f"{name}.jsonl")
    files[-1].unlink(missing_ok=True)  # else the evaluation of an earlier run would be gone on with
    records[name] = evaluate(
        model,
        tokenizer,
        held_out,
        arithmetic.final_answer_reward,
        settings=replace(settings, name=name, student=name),
        teacher=teacher,
        records_path=files[-1],
        scoring_batch_size=200,
    )

rates = {}
print(f"{'':<14}{'right':>22}{'all steps valid':>22}{'within the limit':>22}{'mean cost':>12}")
for name, rollouts in records.items():
    figures = summarize(replace(settings, name=name), rollouts).sampled
    valid = Rate.of(arithmetic.valid_steps(rollout.prompt, rollout.completion) for rollout in rollouts)
    satisfied = figures.costs.satisfaction
    rates[name] = [
        (figures.right.value, figures.right.low, figures.right.high),
        (valid.value, *valid.interval),
        (satisfied.value, satisfied.low, satisfied.high),
    ]
    cells = "".join(f"{f'{value:.3f} [{low:.3f}, {high:.3f}]':>22}" for value, low, high in rates[name])
    print(f"{name:<14}{cells}{figures.costs.mean.value:>12.3f}")

# %%
colours = {"teacher": "#2e7d4f", "untrained": "0.6", "GRPO": "#d1495b", "GKD": "#e69f00", "constrained": "#1b6ca8"}
figure, axes = plt.subplots(figsize=(10.5, 3.6), layout="constrained")
for number, (name, of_student) in enumerate(rates.items()):
    for place, (value, low, high) in enumerate(of_student):
        x = place + 0.17 * (number - 2)
        axes.bar(x, value, 0.155, color=colours[name], label=name if place == 0 else None)
        axes.errorbar(x, value, yerr=[[max(0, value - low)], [max(0, high - value)]], color="black", capsize=2.5)
axes.set_xticks(range(3), ["right answer", "all steps valid", "within the limit"])
axes.set(ylim=(0, 1.05), title=f"{HELD_OUT} held-out problems, 95% intervals")
axes.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside lower center", ncols=5, frameon=False)
plt.show()

# %% [markdown]
# By the reward GRPO's student is a success: more correct answers than its teacher. Its steps are no better than before, and
# the first group of bars alone could not tell. Imitation gives the teacher's steps and the teacher's mistakes. In this run
# the constrained student has as many correct answers as GRPO's, and its steps are valid. After 60 steps about 1% of its
# rollouts are still outside the limit.
#
# ## Now by eye
#
# The first six problems, unselected. A token of these models is a character. Each is shaded by its cost. Where a rollout
# ends outside the limit, the frame marks the token with which it left it for good: from there on the mean cost so far is
# above the limit. On the right: is the answer right, are the steps valid, and what did the rollout cost?


# %%
def draw_rollouts(axes, rollouts, title):
    """A row for each rollout, a cell for each token."""
    width = arithmetic.MAX_COMPLETION_LENGTH
    shades = torch.full((len(rollouts), width), torch.nan)
    for row, rollout in enumerate(rollouts):
        costs = torch.tensor(rollout.costs)
        shades[row, : len(costs)] = costs
        for place, token in enumerate(rollout.tokens):
            text = "⏎" if token == tokenizer.eos_token else token
            axes.text(place, row, text, ha="center", va="center", family="DejaVu Sans Mono", fontsize=9)
        so_far = costs.cumsum(0) / torch.arange(1, len(costs) + 1)
        if so_far[-1] > COST_LIMIT:
            within = (so_far <= COST_LIMIT).nonzero().flatten().tolist()
            left = within[-1] + 1 if within else 0
            axes.add_patch(Rectangle((left - 0.5, row - 0.5), 1, 1, fill=False, linewidth=1.8, zorder=3))
        valid = arithmetic.valid_steps(rollout.prompt, rollout.completion)
        cost = costs.mean().item()
        note = f"{'right' if rollout.right else 'WRONG'}, steps {'valid' if valid else 'WRONG'}, {cost:.2f} nats"
        axes.text(width - 0.3, row, note, va="center", fontsize=8.5, color="black" if valid else "#b3202c")
        axes.text(-0.8, row, rollout.prompt, ha="right", va="center", family="DejaVu Sans Mono", fontsize=9)
    image = axes.imshow(shades, cmap="Reds", norm=PowerNorm(0.5, 0, 12), aspect="auto", alpha=0.85)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(-0.5, width + 11)
    axes.axis("off")
    return image


figure, panels = plt.subplots(len(methods), 1, figsize=(10, 5.4), layout="constrained")
for axes, name in zip(panels, methods, strict=True):
    image = draw_rollouts(axes, records[name][:6], name)
figure.colorbar(
    image,
    ax=panels,
    orientation="horizontal",
    shrink=0.4,
    aspect=50,
    ticks=[0, 1, 3, 6, 12],
    label="cost of a token, nats",
)
plt.show()

# %% [markdown]
# Where GRPO's student writes `5+7=2`, its teacher would have written `12`: that one token is expensive, and from there on
# the rollout is outside the limit. Then it arrives at the right sum all the same, and that is all that reward alone sees.
#
# GKD's mistakes are pale: `6+2=43` cost next to nothing. Where a student does as its teacher does, slips included, the
# divergence is small; a limit on it keeps a student to its teacher, not to the truth. The truth comes with the reward.
#
# ## What the cost sees
#
# All rollouts whose *answer is right*, split by whether their steps are. The reward is the same for all of them.

# %%
figure, panels = plt.subplots(1, 3, figsize=(10.5, 2.9), sharex=True, layout="constrained")
bins = torch.logspace(-3, 1.2, 40)
for axes, name in zip(panels, ("GRPO", "GKD", "constrained"), strict=True):
    right = [rollout for rollout in records[name] if rollout.right]
    for is_valid, colour in ((True, "#1b6ca8"), (False, "#d1495b")):
        kept = [r.costs for r in right if arithmetic.valid_steps(r.prompt, r.completion) == is_valid]
        costs = torch.stack(
            [rollout_cost(torch.tensor([c]), torch.ones(1, len(c)))[0] for c in kept] or [torch.ones(0)]
        )
        label = f"{len(kept)} with {'valid' if is_valid else 'wrong'} steps"
        axes.hist(costs.flatten().clamp(min=1e-3), bins=bins, color=colour, alpha=0.75, label=label)
    axes.axvline(COST_LIMIT, color="black", linestyle="--", linewidth=1)
    axes.set(xscale="log", title=f"{name}: {len(right)} right answers", xlabel="cost, nats per token")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
panels[0].set_ylabel("rollouts")
plt.show()

hacked = {
    name: sum(r.right and not arithmetic.valid_steps(r.prompt, r.completion) for r in records[name])
    for name in methods
}
print("right answers through wrong or missing steps:", hacked)

# %% [markdown]
# Wrong steps stand on one side of the limit and valid ones, nearly all, on the other, though nobody checked a step: the
# teacher does not write such steps, and that is enough. Of GRPO's correct answers two in three came through wrong or
# missing steps in this run, of the constrained student's 383 none.
#
# ## All of them
#
# `write_report` makes one HTML page of these records, with a browser of every rollout: filter by student, answer or
# limit, and set two students beside each other. It is what `trl-cmdp report` writes.

# %%
page, *pictures = write_report(read_runs(files), Path(OUTPUT_DIR) / "report", title="Reward hacking by eye")
print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB, and {len(pictures)} pictures")
