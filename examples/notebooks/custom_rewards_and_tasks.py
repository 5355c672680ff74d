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
# # Your own rewards, data and verifier
#
# - a data set of your own, by the names of its columns,
# - a verifier of your own,
# - a second reward with a weight, and what a limit does to one that was not thought through.
#
# The models are the minute ones that come with the package, so the data are sums; nothing else here depends on that.
# About three minutes on one CPU core.

# %%
import csv
import random
import re
from logging import ERROR, getLogger
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.evaluation import Rate, sample_rollouts, score_rollouts
from trl_cmdp.tasks import arithmetic, table


getLogger("trl_cmdp").setLevel(ERROR)  # that a trainer has no teacher is meant
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)

# %% tags=["parameters"]
STEPS = 60  # optimizer steps of 16 prompts x 8 rollouts
HELD_OUT = 300  # problems to evaluate on
COST_LIMIT = 0.25  # nats per token
WEIGHTS = [1.0, 0.5]  # of the two rewards
OUTPUT_DIR = "../../outputs/notebooks/custom_rewards"

# %% [markdown]
# ## Data
#
# Say the problems are in a CSV file whose columns have their own names. JSON, JSONL, Parquet, and datasets on the Hub
# are read the same way.

# %%
rng = random.Random(0)
sums = {"+".join(rng.choices("123456789", k=5)): None for _ in range(3 * (16 * STEPS + HELD_OUT))}  # each once
data = Path(OUTPUT_DIR) / "data"
data.mkdir(parents=True, exist_ok=True)
for split, rows in (("train", list(sums)[HELD_OUT:]), ("test", list(sums)[:HELD_OUT])):
    with (data / f"{split}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "total", "author"])
        writer.writerows([f"{digits}=", sum(map(int, digits.split("+"))), "us"] for digits in rows)
print("\n".join((data / "test.csv").read_text().splitlines()[:4]))

# %%
columns = {"prompt_column": "question", "answer_column": "total"}
train_problems = table.load_problems(16 * STEPS, "train", seed=0, path=str(data), **columns)
held_out = table.load_problems(HELD_OUT, "test", seed=0, path=str(data), **columns)
print(train_problems.column_names, train_problems[0])

# %% [markdown]
# A folder with `train.*` and `test.*` has these splits; a single file is all `train`. (The models were made on sums like
# these, so "held out" means here: not trained on in this notebook.)
#
# ## A verifier
#
# A reward function takes the completions and the columns that it needs, and gives a number for each completion.
# `**kwargs` takes what it does not need. (For text and mathematics in general there is `table.final_answer_reward`.)


# %%
def total_is_right(completions, answer, **kwargs):
    """1 if the last number of the completion is the total."""
    numbers = [re.findall(r"\d+", completion) for completion in completions]
    return [float(bool(found) and found[-1] == total) for found, total in zip(numbers, answer, strict=True)]


# %% [markdown]
# Try a reward on texts whose verdict you know, before a model does:

# %%
for text, expected in (
    ("7+5=12,12+9=21,21+3=24,24+8=32#32", 1.0),
    ("#32", 1.0),
    ("7+5=12,12+9=21,21+3=24,24+8=32#23", 0.0),
    ("#", 0.0),
    ("", 0.0),
):
    (reward,) = total_is_right([text], ["32"])
    assert reward == expected, (text, reward)
    print(f"{text!r:<40}{reward}")

# %% [markdown]
# ## A second reward, and a trap
#
# Tokens cost money, so let us reward short answers a little. `reward_weights` weighs the two.


# %%
def brevity(completions, **kwargs):
    """From 1 for an empty completion to 0 for one of the greatest length."""
    return [1 - len(completion) / arithmetic.MAX_COMPLETION_LENGTH for completion in completions]


# %% [markdown]
# The trap: the shortest answer to these sums has no steps at all. `"#32"` is right, earns 0.46 for its brevity, and
# cannot be checked by anyone. Reward alone has no reason to stay away from it. A teacher that works its answers out is
# one.
#
# ## Train with reward alone, and under a limit

# %%
student_path, teacher_path = arithmetic.demo_model_path("student"), arithmetic.demo_model_path("teacher")
tokenizer = AutoTokenizer.from_pretrained(student_path)
teacher = AutoModelForCausalLM.from_pretrained(teacher_path)


def train(teacher_model):
    trainer = ConstrainedDistillTrainer(  # without a teacher it is GRPOTrainer
        model=AutoModelForCausalLM.from_pretrained(student_path),
        reward_funcs=[total_is_right, brevity],
        args=ConstrainedDistillConfig(
            output_dir=OUTPUT_DIR,
            reward_weights=WEIGHTS,
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
        teacher_model=teacher_model,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


trainers = {"reward alone": train(None), "constrained": train(teacher)}

# %%
panels = {
    "rewards/total_is_right/mean": "right total",
    "rewards/brevity/mean": "brevity",
    "completions/mean_length": "tokens of a completion",
}
colours = {"untrained": "0.6", "reward alone": "#d1495b", "constrained": "#1b6ca8"}
figure, all_axes = plt.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
for axes, (metric, title) in zip(all_axes, panels.items(), strict=True):
    for name, trainer in trainers.items():
        logged = [(entry["step"], entry[metric]) for entry in trainer.state.log_history if metric in entry]
        axes.plot(*zip(*logged, strict=True), color=colours[name], linewidth=1.6, label=name)
    axes.set(title=title, xlabel="optimizer step", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
all_axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## What they learned

# %%
models = {"untrained": AutoModelForCausalLM.from_pretrained(student_path)}
models |= {name: trainer.model for name, trainer in trainers.items()}
texts, rates = {}, {}
print(f"{'':<14}{'right total':>22}{'all steps valid':>22}{'within the limit':>22}{'tokens':>8}")
for name, model in models.items():
    rollouts = sample_rollouts(model, tokenizer, held_out["prompt"], max_new_tokens=arithmetic.MAX_COMPLETION_LENGTH)
    costs = [token_costs.mean().item() for token_costs in score_rollouts(rollouts, model, teacher)]
    texts[name] = [rollout.completion for rollout in rollouts]
    rates[name] = {
        "right total": Rate.of(reward == 1 for reward in total_is_right(texts[name], held_out["answer"])),
        "all steps valid": Rate.of(map(arithmetic.valid_steps, held_out["prompt"], texts[name])),
        "within the limit": Rate.of(cost <= COST_LIMIT for cost in costs),
    }
    cells = [f"{r.value:.3f} [{r.interval[0]:.3f}, {r.interval[1]:.3f}]" for r in rates[name].values()]
    length = sum(len(rollout.completion_ids) for rollout in rollouts) / len(rollouts)
    print(f"{name:<14}" + "".join(f"{cell:>22}" for cell in cells) + f"{length:>8.1f}")

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
for number, (name, of_student) in enumerate(rates.items()):
    for place, rate in enumerate(of_student.values()):
        x, (low, high) = place + 0.27 * (number - 1), rate.interval
        axes.bar(x, rate.value, 0.25, color=colours[name], label=name if place == 0 else None)
        bars = [[max(0, rate.value - low)], [max(0, high - rate.value)]]
        axes.errorbar(x, rate.value, yerr=bars, color="black", capsize=3, linewidth=1)
axes.set_xticks(range(3), list(rates["untrained"]))
axes.set(ylim=(0, 1.05), title=f"{HELD_OUT} held-out problems, 95% intervals")
axes.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %%
for number in range(min(5, HELD_OUT)):
    print(held_out[number]["prompt"])
    for name in models:
        print(f"  {name:<14} {texts[name][number]}")

# %% [markdown]
# In this run reward alone takes the bait: two thirds of the length, hardly a solution with valid steps, and no more right
# totals than before. The constrained student writes *longer* answers than it did, brevity or not: most of its rollouts
# began outside the limit, and what counts first is to come inside. Then the total is what is left to be earned.
#
# A limit is no substitute for a good reward. It bounds how far a bad one can lead.
#
# On the command line, `--reward_funcs my_rewards.total_is_right my_rewards.brevity --reward_weights 1.0 0.5` takes the
# functions by their dotted paths: see [the command line](../../docs/command_line.md), and [tasks](../../docs/tasks.md) for
# the verifier that comes with the package.
