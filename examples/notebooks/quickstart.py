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
# # Quickstart: a student, a teacher and a limit
#
# The task is chained sums. The teacher works them out step by step, and slips in about one of ten. The student often
# reaches the correct answer through wrong steps, or through none. Both are minute models that come with the package, so
# this notebook runs on one CPU core in about two minutes.
#
# We train the student for correct answers, under a limit on how far it may be from its teacher.

# %%
import matplotlib.pyplot as plt
import torch
from IPython.display import display
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.evaluation import Rate, sample_rollouts, score_rollouts
from trl_cmdp.tasks import arithmetic


logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are so small that a second thread only waits

# %% [markdown]
# Everything that sets the size of the run. `trl-cmdp demo` takes 200 steps and 1000 problems; less is enough to see
# what happens.

# %% tags=["parameters"]
STEPS = 60  # optimizer steps of 16 prompts x 8 rollouts
HELD_OUT = 400  # problems to evaluate on
COST_LIMIT = 0.25  # nats per token
OUTPUT_DIR = "../../outputs/notebooks/quickstart"

# %%
student_path, teacher_path = arithmetic.demo_model_path("student"), arithmetic.demo_model_path("teacher")
tokenizer = AutoTokenizer.from_pretrained(student_path)
student = AutoModelForCausalLM.from_pretrained(student_path)
teacher = AutoModelForCausalLM.from_pretrained(teacher_path)

train_problems = arithmetic.load_problems(16 * STEPS, "train", seed=0)
held_out = arithmetic.load_problems(HELD_OUT, "test", seed=0)
prompt = held_out[0]["prompt"]
print("problem   ", prompt)
print("all steps ", arithmetic.worked_solution(prompt))
print("answer    ", held_out[0]["answer"])

# %% [markdown]
# ## Measure first
#
# One rollout of each held-out problem, sampled at temperature 1, and its cost: the exact divergence from the teacher
# at every token. The cost of a rollout is their mean, in nats per token. `Rate` gives a share with its 95% interval.


# %%
def measure(model):
    """Rollouts, the cost of each, and three rates."""
    rollouts = sample_rollouts(model, tokenizer, held_out["prompt"], max_new_tokens=arithmetic.MAX_COMPLETION_LENGTH)
    costs = torch.stack([token_costs.mean() for token_costs in score_rollouts(rollouts, model, teacher)])
    texts = [rollout.completion for rollout in rollouts]
    rewards = arithmetic.final_answer_reward(texts, held_out["answer"])
    rates = {
        "right answer": Rate.of(reward == 1 for reward in rewards),
        "all steps valid": Rate.of(map(arithmetic.valid_steps, held_out["prompt"], texts)),
        "within the limit": Rate.of((costs <= COST_LIMIT).tolist()),
    }
    return rollouts, costs, rates


def print_rates(name, rates):
    print(name)
    for what, rate in rates.items():
        print(f"  {what:<18}{rate.value:.3f}  [{rate.interval[0]:.3f}, {rate.interval[1]:.3f}]")


_, _, teacher_rates = measure(teacher)
rollouts_before, costs_before, before = measure(student)
print_rates("teacher", teacher_rates)
print_rates("student before", before)

# %% [markdown]
# By its answers the student is as good as its teacher. How it comes to them is another matter: most of its solutions
# hold a wrong step, or no step at all.
#
# ## Train
#
# `ConstrainedDistillTrainer` is a `GRPOTrainer` with a teacher and a limit. A small callback draws what it logs while
# it trains.


# %%
class LiveCurve(TrainerCallback):
    """Draws reward, cost and satisfaction every few steps, in place."""

    panels = {
        "reward": "mean reward",
        "constraint/cost": "mean cost, nats per token",
        "constraint/satisfaction_rate": "share within the limit",
    }

    def __init__(self, every=10):
        self.every = every
        self.figure, self.axes = plt.subplots(1, 3, figsize=(10.5, 2.9), layout="constrained")
        self.handle = display(self.figure, display_id=True)
        plt.close(self.figure)  # or it would be shown once more at the end of the cell

    def on_log(self, args, state, control, logs, **kwargs):
        if "reward" in logs and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            self.draw(state.log_history)

    def draw(self, log):
        for axes, (metric, title) in zip(self.axes, self.panels.items(), strict=True):
            axes.clear()
            steps, values = zip(*((entry["step"], entry[metric]) for entry in log if metric in entry), strict=True)
            axes.plot(steps, values, color="#1b6ca8", linewidth=1.5)
            axes.set(title=title, xlabel="optimizer step", ylim=(0, max(1.05, *values)))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        self.axes[1].axhline(COST_LIMIT, color="black", linestyle="--", linewidth=1, label="limit")
        self.axes[1].legend(frameon=False)
        self.handle.update(self.figure)


trainer = ConstrainedDistillTrainer(
    model=student,
    reward_funcs=arithmetic.final_answer_reward,
    args=ConstrainedDistillConfig(
        output_dir=OUTPUT_DIR,
        cost_limit=COST_LIMIT,
        learning_rate=3e-4,
        max_steps=STEPS,
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=arithmetic.MAX_COMPLETION_LENGTH,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=train_problems,
    processing_class=tokenizer,
    teacher_model=teacher,
    callbacks=[LiveCurve()],
)
trainer.remove_callback(PrinterCallback)  # a line of every metric per step
trainer.train()
print(f"{STEPS} steps, {STEPS * 128} rollouts")

# %% [markdown]
# The answers were mostly right from the start, so the reward has little room. The cost has: most rollouts begin outside
# the limit, and there the student is taught to imitate. Once a rollout is inside, the reward leads.
#
# ## Measure again

# %%
rollouts_after, costs_after, after = measure(student)
print_rates("student after", after)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
students = {
    "student before": (before, "0.6"),
    "student after": (after, "#1b6ca8"),
    "teacher": (teacher_rates, "#2e7d4f"),
}
for number, (name, (rates, colour)) in enumerate(students.items()):
    for place, rate in enumerate(rates.values()):
        low, high = rate.interval
        bars = [[max(0, rate.value - low)], [max(0, high - rate.value)]]
        left.bar(place + 0.27 * (number - 1), rate.value, 0.25, color=colour, label=name if place == 0 else None)
        left.errorbar(place + 0.27 * (number - 1), rate.value, yerr=bars, color="black", capsize=3, linewidth=1)
left.set_xticks(range(3), list(before))
left.set(ylim=(0, 1.05), title=f"{HELD_OUT} held-out problems, 95% intervals")
left.legend(loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=3, frameon=False)

bins = torch.logspace(-3, 1.2, 50)
for costs, name in ((costs_before, "student before"), (costs_after, "student after")):
    right.hist(costs.clamp(min=1e-3), bins=bins, color=students[name][1], alpha=0.75, label=name)
right.axvline(COST_LIMIT, color="black", linestyle="--", linewidth=1, label="limit")
right.set(xscale="log", xlabel="cost of a rollout, nats per token", ylabel="rollouts", title="Cost of each rollout")
right.xaxis.set_major_formatter("{x:g}")
right.legend(frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# In this run satisfaction goes from about 0.3 to about 0.98, and the steps become valid as often as the teacher's. What
# is left outside the limit, on the right of the dashed line, is what 60 steps were not enough for: with 200 steps
# `trl-cmdp demo` ends at 0.99 ([benchmarks](../../benchmarks/README.md#the-demo)).
#
# ## Look at the rollouts
#
# Rates do not show reasoning. The first problems of the held-out set, unselected, before and after:


# %%
def verdict(row, text):
    right = arithmetic.final_answer_reward([text], [row["answer"]]) == [1.0]
    valid = arithmetic.valid_steps(row["prompt"], text)
    return ("right" if right else "WRONG") + (", steps valid" if valid else ", steps WRONG")


for number in range(min(8, HELD_OUT)):
    row = held_out[number]
    print(row["prompt"])
    for name, rollouts, costs in (("before", rollouts_before, costs_before), ("after", rollouts_after, costs_after)):
        text = rollouts[number].completion
        print(f"  {name:<7} {text:<36} {verdict(row, text):<20} {costs[number]:6.2f} nats per token")

# %% [markdown]
# ## Keep it
#
# What is saved is a plain transformers checkpoint: neither `trl_cmdp` nor the teacher is needed to use it.

# %%
trainer.save_model(f"{OUTPUT_DIR}/student")
loaded = AutoModelForCausalLM.from_pretrained(f"{OUTPUT_DIR}/student")
inputs = tokenizer("7+5+9+3+8=", return_tensors="pt")
output = loaded.generate(**inputs, max_new_tokens=arithmetic.MAX_COMPLETION_LENGTH, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))

# %% [markdown]
# Next: [what reward alone does](reward_hacking_by_eye.ipynb), [how to choose the limit](choosing_the_limit.ipynb),
# [your own rewards and data](custom_rewards_and_tasks.ipynb).
