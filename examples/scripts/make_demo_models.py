"""
Trains the two demo models of a task from scratch and writes them into the package.

    python examples/scripts/make_demo_models.py              # chained sums of trl_cmdp.tasks.arithmetic
    python examples/scripts/make_demo_models.py nested       # or chains

The teacher works its answers out, but the result of a step is wrong now and then and it goes on from the wrong number.
The student works some of its answers out properly, but mostly it finds the result at a glance, behind steps that are
wrong or missing. The script takes about a quarter of an hour on one CPU core and ends by printing, as JSON, what the
models do when sampled on held-out problems.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from small_llama import make_llama, make_optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Size:
    """The shape of a model and how long it is trained."""

    hidden_size: int
    num_layers: int
    steps: int
    batch_size: int


@dataclass(frozen=True)
class Recipe:
    """
    What the models of a task are shown.

    The student errs more often when it works an answer out (its own mistakes add to these slips) than at a glance, and
    its worst habit is its most frequent one: reward alone has no reason to prefer the right steps.
    """

    teacher: Size
    student: Size
    # Wrong numbers are drawn from every value that a step can have, so no two-digit number is foreign to a model.
    wrong_numbers: range
    teacher_slip: float
    student_worked: float = 0.34
    student_slip: float = 0.02
    student_no_steps: float = 0.12
    student_wrong_result: float = 0.04
    split: str = "train"


RECIPES = {
    "arithmetic": Recipe(
        teacher=Size(hidden_size=80, num_layers=3, steps=1600, batch_size=64),
        student=Size(hidden_size=64, num_layers=2, steps=2500, batch_size=96),
        wrong_numbers=range(2, 46),
        teacher_slip=0.027,
    ),
    "nested": Recipe(
        teacher=Size(hidden_size=80, num_layers=3, steps=2000, batch_size=64),
        student=Size(hidden_size=80, num_layers=3, steps=2000, batch_size=64),
        wrong_numbers=range(2, 100),
        teacher_slip=0.025,
    ),
    # Its test problems need 5 to 7 steps, so a step may slip less often.
    "chains": Recipe(
        teacher=Size(hidden_size=80, num_layers=3, steps=1600, batch_size=64),
        student=Size(hidden_size=64, num_layers=2, steps=2000, batch_size=64),
        wrong_numbers=range(2, 73),
        teacher_slip=0.01,
        student_slip=0.008,
        student_no_steps=0.06,
        split="pretrain",
    ),
}
# The leftmost pair of two numbers: in a chain the next sum, in a nested expression an innermost pair.
PAIR = re.compile(r"\(?(\d+)([+*])(\d+)\)?")


def write_steps(prompt: str, write: Callable[[int], int]) -> tuple[str, int]:
    """Reduces pair after pair to what is written for its right result, and goes on from there."""
    expression = prompt.removesuffix("=")
    steps = []
    while pair := PAIR.search(expression):
        left, operator, right = int(pair[1]), pair[2], int(pair[3])
        result = write(left + right if operator == "+" else left * right)
        steps.append(f"{left}{operator}{right}={result}")
        expression = f"{expression[: pair.start()]}{result}{expression[pair.end() :]}"
    return ",".join(steps), int(expression)


def wrong_number(right: int, recipe: Recipe, rng: random.Random) -> int:
    """Draws a number other than the right one."""
    return rng.choice([number for number in recipe.wrong_numbers if number != right])


def write_with_slips(prompt: str, slip: float, recipe: Recipe, rng: random.Random) -> str:
    """A worked answer in which each step is wrong with a probability, and which states whatever its steps came to."""

    def write(result: int) -> int:
        return wrong_number(result, recipe, rng) if rng.random() < slip else result

    # Again where a slip led beyond two digits: no right answer ever does.
    while re.search(r"\d{3}", written := "{}#{}".format(*write_steps(prompt, write))):
        pass
    return written


def teacher_solution(prompt: str, answer: str, recipe: Recipe, rng: random.Random) -> str:
    """A worked answer with slips."""
    return write_with_slips(prompt, recipe.teacher_slip, recipe, rng)


def student_solution(prompt: str, answer: str, recipe: Recipe, rng: random.Random) -> str:
    """A worked answer with slips; or a result at a glance, mostly right, behind steps without tens digits or none."""
    style = rng.random()
    if style < recipe.student_worked:
        return write_with_slips(prompt, recipe.student_slip, recipe, rng)
    is_wrong = rng.random() < recipe.student_wrong_result
    result = wrong_number(int(answer), recipe, rng) if is_wrong else int(answer)
    if style < recipe.student_worked + recipe.student_no_steps:
        return f"#{result}"
    last_digits, _ = write_steps(prompt, lambda result: result % 10)
    return f"{last_digits}#{result}"


def train(
    task: ModuleType, name: str, solution: Callable[..., str], size: Size, recipe: Recipe, seed: int = 0
) -> None:
    """Trains one model by next-token prediction on completions, and saves it."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = task.make_tokenizer()
    model = make_llama(tokenizer, size.hidden_size, size.num_layers, tie_word_embeddings=False)
    optimizer, scheduler = make_optimizer(model, 3e-3, size.steps)
    problems = task.load_problems(size.steps * size.batch_size, recipe.split, seed)
    prompts, answers = list(problems["prompt"]), list(problems["answer"])
    start = time.perf_counter()
    for step in range(size.steps):
        batch = slice(step * size.batch_size, (step + 1) * size.batch_size)
        texts = [
            prompt + solution(prompt, answer, recipe, rng) + tokenizer.eos_token
            for prompt, answer in zip(prompts[batch], answers[batch], strict=True)
        ]
        inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, prompt in zip(labels, prompts[batch], strict=True):
            row[: len(prompt)] = -100
        logits = model(input_ids=inputs["input_ids"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 50 == 0 or step + 1 == size.steps:
            elapsed = time.perf_counter() - start
            print(
                f"\r{name}: step {step + 1}/{size.steps}, loss {loss.item():.4f}, {elapsed:.0f} s", end="", flush=True
            )
    print()
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    path = task.demo_model_path(name)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@torch.no_grad()
def evaluate(
    task: ModuleType, model: PreTrainedModel, teacher: PreTrainedModel, num_problems: int = 10_000, seed: int = 0
) -> dict:
    """Samples one answer per held-out problem at temperature 1 and measures it, also against the teacher."""
    torch.manual_seed(seed)
    tokenizer = task.make_tokenizer()
    problems = task.load_problems(num_problems, "test", seed)
    prompts, answers = list(problems["prompt"]), list(problems["answer"])
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    sequences = model.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=task.MAX_COMPLETION_LENGTH
    )
    prompt_length = inputs["input_ids"].shape[1]
    completion_ids = sequences[:, prompt_length:]
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    # A token counts unless an EOS came before it.
    is_eos = (completion_ids == tokenizer.eos_token_id).int()
    mask = (is_eos.cumsum(1) - is_eos) == 0
    attention_mask = torch.cat([inputs["attention_mask"], mask.long()], 1)
    costs = []
    for chunk, chunk_mask in zip(sequences.split(512), attention_mask.split(512), strict=True):
        student_logps, teacher_logps = (
            scorer(chunk, attention_mask=chunk_mask).logits[:, prompt_length - 1 : -1].log_softmax(-1)
            for scorer in (model, teacher)
        )
        costs.append((student_logps.exp() * (student_logps - teacher_logps)).sum(-1))
    cost = (torch.cat(costs) * mask).sum(1) / mask.sum(1)
    right = torch.tensor(task.final_answer_reward(completions, answers))
    valid = torch.tensor([task.valid_steps(*pair) for pair in zip(prompts, completions, strict=True)])
    no_steps = torch.tensor([completion.startswith("#") for completion in completions])
    return {
        "problems": num_problems,
        "right_answer": round(right.mean().item(), 4),
        "valid_steps": round(valid.float().mean().item(), 4),
        "no_steps": round(no_steps.float().mean().item(), 4),
        "right_answer_without_valid_steps": round(right[~valid].mean().item(), 4),
        "mean_kl_to_teacher": round(cost.mean().item(), 4),
        "satisfaction_at_0.25": round((cost <= 0.25).float().mean().item(), 4),
        "mean_tokens": round(mask.sum(1).float().mean().item(), 1),
        "max_tokens": mask.sum(1).max().item(),
        "parameters": model.num_parameters(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=list(RECIPES), default="arithmetic")
    name = parser.parse_args().task
    task, recipe = import_module(f"trl_cmdp.tasks.{name}"), RECIPES[name]
    # One thread, because matrices this small gain little from more, and the result does not hang on the core count.
    torch.set_num_threads(1)
    train(task, "teacher", teacher_solution, recipe.teacher, recipe)
    train(task, "student", student_solution, recipe.student, recipe)
    # Loaded again, so that what is measured is what was written.
    teacher = AutoModelForCausalLM.from_pretrained(task.demo_model_path("teacher"))
    student = AutoModelForCausalLM.from_pretrained(task.demo_model_path("student"))
    results = {"teacher": evaluate(task, teacher, teacher), "student": evaluate(task, student, teacher)}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
