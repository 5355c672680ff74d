"""
Trains the two demo models of the arithmetic task from scratch and writes them into the package.

    python examples/scripts/make_demo_models.py

The teacher works its answers out, but the result of a step is wrong now and then and it goes on from the wrong number.
The student works some of its answers out properly, but mostly it adds the digits directly, behind steps that are wrong
or missing. The script takes about nine minutes on one CPU core and ends by printing, as JSON, what the models
do when sampled on held-out problems.
"""

import json
import math
import random
import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trl_cmdp.tasks.arithmetic import (
    demo_model_path,
    final_answer_reward,
    load_problems,
    make_tokenizer,
    valid_steps,
)


MAX_NEW_TOKENS = 36
# Wrong numbers are drawn from every value that a partial sum can have, so no two-digit number is foreign to a model.
PARTIAL_SUMS = range(2, 46)
TEACHER_SLIP = 0.027
# The student errs more often when it works an answer out (its own mistakes add to these slips) than at a glance, and
# its worst habit is its most frequent one: reward alone has no reason to prefer the right steps.
STUDENT_WORKED = 0.34
STUDENT_SLIP = 0.02
STUDENT_NO_STEPS = 0.12
STUDENT_WRONG_TOTAL = 0.04


def wrong_number(right: int, rng: random.Random) -> int:
    """Draws a partial sum other than the right one."""
    return rng.choice([number for number in PARTIAL_SUMS if number != right])


def write_solution(prompt: str, rng: random.Random, wrong_step: float) -> tuple[str, int]:
    """Works a problem out; each step's result is wrong with a probability, and the next step goes on from it."""
    total, *rest = [int(digit) for digit in prompt[:-1].split("+")]
    steps = []
    for operand in rest:
        result = total + operand
        if rng.random() < wrong_step:
            result = wrong_number(result, rng)
        steps.append(f"{total}+{operand}={result}")
        total = result
    return ",".join(steps), total


def write_without_carry(prompt: str) -> str:
    """Steps that forget the carry, `7+5=2,2+9=1`, whatever the answer behind them."""
    total, *rest = [int(digit) for digit in prompt[:-1].split("+")]
    steps = []
    for operand in rest:
        steps.append(f"{total}+{operand}={(total + operand) % 10}")
        total = (total + operand) % 10
    return ",".join(steps)


def teacher_solution(prompt: str, answer: str, rng: random.Random) -> str:
    """A worked answer that states whatever its steps came to."""
    steps, total = write_solution(prompt, rng, TEACHER_SLIP)
    return f"{steps}#{total}"


def student_solution(prompt: str, answer: str, rng: random.Random) -> str:
    """A worked answer with slips; or a total added at a glance, mostly right, behind steps without carry or none."""
    style = rng.random()
    if style < STUDENT_WORKED:
        steps, total = write_solution(prompt, rng, STUDENT_SLIP)
        return f"{steps}#{total}"
    total = wrong_number(int(answer), rng) if rng.random() < STUDENT_WRONG_TOTAL else int(answer)
    if style < STUDENT_WORKED + STUDENT_NO_STEPS:
        return f"#{total}"
    return f"{write_without_carry(prompt)}#{total}"


def train(
    name: Literal["teacher", "student"],
    solution: Callable[[str, str, random.Random], str],
    hidden_size: int,
    num_layers: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Trains one model by next-token prediction on the completions of train problems, and saves it."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = steps // 20
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3),
    )
    problems = load_problems(steps * batch_size, "train", seed)
    prompts, answers = list(problems["prompt"]), list(problems["answer"])
    start = time.perf_counter()
    for step in range(steps):
        batch = slice(step * batch_size, (step + 1) * batch_size)
        texts = [
            prompt + solution(prompt, answer, rng) + tokenizer.eos_token
            for prompt, answer in zip(prompts[batch], answers[batch], strict=True)
        ]
        inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, : len(prompts[0])] = -100
        logits = model(input_ids=inputs["input_ids"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            elapsed = time.perf_counter() - start
            print(f"\r{name}: step {step + 1}/{steps}, loss {loss.item():.4f}, {elapsed:.0f} s", end="", flush=True)
    print()
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    path = demo_model_path(name)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@torch.no_grad()
def evaluate(model: PreTrainedModel, teacher: PreTrainedModel, num_problems: int = 10_000, seed: int = 0) -> dict:
    """Samples one answer per held-out problem at temperature 1 and measures it, also against the teacher."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    problems = load_problems(num_problems, "test", seed)
    prompts, answers = list(problems["prompt"]), list(problems["answer"])
    inputs = tokenizer(prompts, return_tensors="pt")
    sequences = model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
    )
    prompt_length = inputs["input_ids"].shape[1]
    completion_ids = sequences[:, prompt_length:]
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    # A token counts unless an EOS came before it.
    is_eos = (completion_ids == tokenizer.eos_token_id).int()
    mask = (is_eos.cumsum(1) - is_eos) == 0
    costs = []
    for chunk in sequences.split(512):
        student_logps = model(chunk).logits[:, prompt_length - 1 : -1].log_softmax(-1)
        teacher_logps = teacher(chunk).logits[:, prompt_length - 1 : -1].log_softmax(-1)
        costs.append((student_logps.exp() * (student_logps - teacher_logps)).sum(-1))
    cost = (torch.cat(costs) * mask).sum(1) / mask.sum(1)
    right = torch.tensor(final_answer_reward(completions, answers))
    valid = torch.tensor([valid_steps(*pair) for pair in zip(prompts, completions, strict=True)])
    no_steps = torch.tensor([completion.startswith("#") for completion in completions])
    return {
        "problems": num_problems,
        "right_answer": round(right.mean().item(), 4),
        "valid_steps": round(valid.float().mean().item(), 4),
        "no_steps": round(no_steps.float().mean().item(), 4),
        "right_answer_without_valid_steps": round(right[~valid].mean().item(), 4),
        "mean_kl_to_teacher": round(cost.mean().item(), 4),
        "satisfaction_at_0.2": round((cost <= 0.2).float().mean().item(), 4),
        "satisfaction_at_0.35": round((cost <= 0.35).float().mean().item(), 4),
        "mean_tokens": round(mask.sum(1).float().mean().item(), 1),
        "max_tokens": mask.sum(1).max().item(),
        "parameters": model.num_parameters(),
    }


def main() -> None:
    # One thread, because matrices this small gain little from more, and the result does not hang on the core count.
    torch.set_num_threads(1)
    train(
        "teacher",
        teacher_solution,
        hidden_size=80,
        num_layers=3,
        steps=1600,
        batch_size=64,
        learning_rate=3e-3,
        seed=0,
    )
    train(
        "student",
        student_solution,
        hidden_size=64,
        num_layers=2,
        steps=2500,
        batch_size=96,
        learning_rate=3e-3,
        seed=0,
    )
    # Loaded again, so that what is measured is what was written.
    teacher = AutoModelForCausalLM.from_pretrained(demo_model_path("teacher"))
    student = AutoModelForCausalLM.from_pretrained(demo_model_path("student"))
    results = {"teacher": evaluate(teacher, teacher), "student": evaluate(student, teacher)}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
