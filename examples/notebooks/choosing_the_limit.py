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
# # Choosing the limit
#
# A useful limit lies between what imitation reaches and where the student starts. Here both are measured, and then one
# student is trained at each of several limits, to see what becomes of it. The task is chained sums, with the embedded
# models; a few minutes on one CPU core. The page that goes with it: [choosing.md](../../docs/choosing.md).

# %%
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer, GKDDistillConfig, GKDDistillTrainer
from trl_cmdp.evaluation import Rate, sample_rollouts, score_rollouts
from trl_cmdp.tasks import arithmetic


logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)

# %% tags=["parameters"]
IMITATION_STEPS = 40  # "a few dozen"
LIMITS = [0.003, 0.03, 0.25, 1.0, 8.0]  # nats per token
STEPS = 40  # of each student; 16 prompts x 8 rollouts each
HELD_OUT = 300  # problems to evaluate on
OUTPUT_DIR = "../../outputs/notebooks/choosing_the_limit"

# %%
student_path, teacher_path = arithmetic.demo_model_path("student"), arithmetic.demo_model_path("teacher")
tokenizer = AutoTokenizer.from_pretrained(student_path)
teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
held_out = arithmetic.load_problems(HELD_OUT, "test", seed=0)


def train(trainer_class, config_class, steps, **fields):
    """A student trained from the same weights, on the same problems."""
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(student_path),
        reward_funcs=arithmetic.final_answer_reward,
        args=config_class(
            output_dir=OUTPUT_DIR,
            learning_rate=3e-4,
            max_steps=steps,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=arithmetic.MAX_COMPLETION_LENGTH,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **fields,
        ),
        train_dataset=arithmetic.load_problems(16 * steps, "train", seed=0),
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def measure(model):
    """Cost of one rollout of each held-out problem, whether its answer is right, and whether its steps are valid."""
    rollouts = sample_rollouts(model, tokenizer, held_out["prompt"], max_new_tokens=arithmetic.MAX_COMPLETION_LENGTH)
    texts = [rollout.completion for rollout in rollouts]
    costs = torch.stack([token_costs.mean() for token_costs in score_rollouts(rollouts, model, teacher)])
    right = [reward == 1 for reward in arithmetic.final_answer_reward(texts, held_out["answer"])]
    valid = list(map(arithmetic.valid_steps, held_out["prompt"], texts))
    return costs, right, valid


# %% [markdown]
# ## Where it starts, and what imitation reaches
#
# The start needs no training. For the other end a student imitates its teacher on its own rollouts (`trl-cmdp gkd`), and
# the reward is ignored.

# %%
start, start_right, start_valid = measure(AutoModelForCausalLM.from_pretrained(student_path))
imitated, imitated_right, imitated_valid = measure(train(GKDDistillTrainer, GKDDistillConfig, IMITATION_STEPS))

print(f"{'cost, nats per token':<24}{'mean':>8}{'10%':>8}{'50%':>8}{'90%':>8}{'99%':>8}")
for name, costs in (("at the start", start), ("after imitation", imitated)):
    quantiles = costs.quantile(torch.tensor([0.1, 0.5, 0.9, 0.99])).tolist()
    print(f"{name:<24}{costs.mean():>8.3f}" + "".join(f"{quantile:>8.3f}" for quantile in quantiles))

# %%
figure, axes = plt.subplots(figsize=(10.5, 3.6), layout="constrained")
shares = torch.arange(1, HELD_OUT + 1) / HELD_OUT
for name, costs, colour in (("after imitation", imitated, "#e69f00"), ("at the start", start, "0.45")):
    axes.step(costs.clamp(min=1e-3).sort().values, shares, where="post", color=colour, linewidth=1.8, label=name)
for limit in LIMITS:
    axes.axvline(limit, color="#1b6ca8", linestyle="--", linewidth=1)
    axes.text(limit, 1.04, f"{limit:g}", ha="center", color="#1b6ca8")
axes.plot([], [], color="#1b6ca8", linestyle="--", linewidth=1, label="limits tried below")
axes.set(xscale="log", xlim=(1e-3, 20), ylim=(0, 1.02), xlabel="cost, nats per token", ylabel="share of rollouts")
axes.xaxis.set_major_formatter("{x:g}")
axes.set_title("Share of rollouts of at most each cost", pad=22)
axes.grid(alpha=0.25)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(framealpha=1, edgecolor="none", loc="upper left")
plt.show()

# %% [markdown]
# Where a curve crosses a dashed line is the share of rollouts that satisfy this limit. Between the two curves is where
# a limit asks for something that can be reached and is not there yet. At the left end even imitation is outside, at
# the right end nearly everything is inside from the beginning.
#
# `cost_limit="auto"` takes its limit from such an imitation phase at the beginning of a run: by default twice the 90%
# quantile of the costs. Of the costs above that would be:

# %%
print(f"{2.0 * imitated.quantile(0.9).item():.3f} nats per token")

# %% [markdown]
# That is a tight limit: close to the best that imitation reached. (The phase measures training rollouts of its last
# quarter, so it will not give this very number.)
#
# ## What becomes of the student

# %%
outcomes = {}
print(f"{'limit':>7}{'right':>22}{'all steps valid':>22}{'within its limit':>22}{'mean cost':>11}")
for limit in LIMITS:
    costs, right, valid = measure(train(ConstrainedDistillTrainer, ConstrainedDistillConfig, STEPS, cost_limit=limit))
    rates = [Rate.of(right), Rate.of(valid), Rate.of((costs <= limit).tolist())]
    outcomes[limit] = (rates, costs.mean().item())
    cells = [f"{rate.value:.3f} [{rate.interval[0]:.3f}, {rate.interval[1]:.3f}]" for rate in rates]
    print(f"{limit:>7g}" + "".join(f"{cell:>22}" for cell in cells) + f"{costs.mean():>11.3f}")

# %%
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
names = {"right answer": "#1b6ca8", "all steps valid": "#2e7d4f", "within its limit": "#d1495b"}
for number, (name, colour) in enumerate(names.items()):
    rates = [rates[number] for rates, _ in outcomes.values()]
    values = [rate.value for rate in rates]
    bars = [[max(0, r.value - r.interval[0]) for r in rates], [max(0, r.interval[1] - r.value) for r in rates]]
    left.errorbar(LIMITS, values, yerr=bars, color=colour, marker="o", capsize=3, linewidth=1.4, label=name)
left.axhline(Rate.of(start_valid).value, color="#2e7d4f", linestyle=":", linewidth=1, label="valid at the start")
left.set(ylim=(0, 1.05), title=f"After {STEPS} steps, with 95% intervals", ylabel="share of rollouts")
right_axes.plot(LIMITS, [cost for _, cost in outcomes.values()], color="#1b6ca8", marker="o", label="trained student")
right_axes.plot(LIMITS, LIMITS, color="black", linestyle="--", linewidth=1, label="the limit itself")
right_axes.axhline(start.mean().item(), color="0.45", label="at the start")
right_axes.axhline(imitated.mean().item(), color="#e69f00", label="after imitation")
right_axes.set(yscale="log", title="Where the mean cost ends", ylabel="mean cost, nats per token")
right_axes.yaxis.set_major_formatter("{x:g}")
for axes in (left, right_axes):
    axes.set(xscale="log", xlabel="cost limit, nats per token")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8.5)
figure.legend(*right_axes.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False, fontsize=8.5)
plt.show()

# %% [markdown]
# From left to right, in this run:
#
# - **0.003** is below what imitation reaches. Once the limit has come down to it, after twelve steps, every rollout
#   violates, so every rollout is trained to imitate, and the reward is hardly heard: the fewest valid steps of the five.
# - **0.03, 0.25 and 1** can be reached. What is still outside is mostly what 40 steps were too few for. Their intervals
#   overlap; the choice is not delicate here.
# - **8** is above where all but the shortest answers start: it is nearly satisfied by doing nothing. What puts the steps in
#   order is the teacher that is heard beside the reward (`unrewarded_distill_coef`), as under a fixed weight. With that at
#   0 it would be reward alone, with a limit on paper.
#
# So satisfaction by itself chooses the loosest limit. Read it beside what the limit is for.
#
# For your own model and data, `trl-cmdp calibrate` does the first half of this from the command line: the costs at the
# start, what a short run of imitation reaches, and the range between. The limit is in the unit of `cost_scope`, and
# [choosing.md](../../docs/choosing.md) says what else it depends on.
