"""The step part of `gpu.py`."""

import os
import random
import statistics
from dataclasses import dataclass

import torch
from gpu_divergence import DEVICE, free_memory, milliseconds
from overhead import NUM_GENERATIONS, PARTS, medians, timed_training
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.tasks.arithmetic import demo_model_path


FIRST_TOKEN = 64  # of the random rollouts: past the tokenizer's own, its end of sequence among them


@dataclass(frozen=True)
class StepSize:
    """Sizes of the steps: models as keywords of `Qwen2Config`."""

    student: dict
    teacher: dict
    vocab: int
    rollouts: int
    micro_batch: int
    prompt_length: int
    completion_length: int
    steps: int


STEP = StepSize(
    {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    vocab=151_936,
    rollouts=64,
    micro_batch=8,
    prompt_length=64,
    completion_length=256,
    steps=3,
)
_TINY_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TINY_STEP = StepSize(
    _TINY_MODEL,
    _TINY_MODEL,
    vocab=512,
    rollouts=16,
    micro_batch=8,
    prompt_length=4,
    completion_length=8,
    steps=1,
)


def random_model(sizes: dict, vocab: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the sizes, in random weights, made on the device."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocab, pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def random_rollouts(size: StepSize):
    """A `rollout_func` of TRL's trainers: random tokens of fixed length."""
    draw = random.Random(0)

    def tokens(length):
        return [draw.randrange(FIRST_TOKEN, size.vocab) for _ in range(length)]

    def rollouts(prompts, trainer):
        prompt_ids = {prompt: tokens(size.prompt_length) for prompt in dict.fromkeys(prompts)}
        return {
            "prompt_ids": [prompt_ids[prompt] for prompt in prompts],
            "completion_ids": [tokens(size.completion_length) for _ in prompts],
            "logprobs": None,
        }

    return rollouts


@torch.no_grad()
def scoring_seconds(model: PreTrainedModel, size: StepSize) -> float:
    """Of TRL's scoring forward on every rollout of a step: log-probabilities through the fused head."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    shape = (size.micro_batch, size.prompt_length + size.completion_length)
    input_ids = torch.randint(FIRST_TOKEN, size.vocab, shape, device=DEVICE)
    labels = input_ids.clone()
    labels[:, : size.prompt_length] = -100

    def score():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            for _ in range(size.rollouts // size.micro_batch):
                model(input_ids, attention_mask=torch.ones_like(input_ids), labels=labels, fused_lm_head=True)

    score()
    return statistics.median(milliseconds(score, size.steps)) / 1000


def measure_step(tiny: bool) -> dict:
    size = TINY_STEP if tiny else STEP
    # Float32 weights under bfloat16 autocast are trained; the teacher's are bfloat16.
    frozen = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))

    def student():
        return random_model(size.student, size.vocab, torch.float32)

    def teacher():
        return random_model(size.teacher, size.vocab, frozen)

    forwards = {}
    for name, make in (("teacher forward", teacher), ("student forward", student)):
        forwards[name] = scoring_seconds(make(), size)
        free_memory()
    # Inside the limit nothing is then differentiated but the reward, and outside it is everything that shall be.
    alone = {"cost_limit_schedule": "constant", "unrewarded_distill_coef": 0.0}
    trainings = {
        "grpo": (GRPOTrainer, GRPOConfig, None, {}),
        "violating": (ConstrainedDistillTrainer, ConstrainedDistillConfig, teacher, {"cost_limit": 1e-9, **alone}),
        "feasible": (ConstrainedDistillTrainer, ConstrainedDistillConfig, teacher, {"cost_limit": 1e9, **alone}),
    }
    measured = {}
    for name, (trainer_class, config_class, make_teacher, fields) in trainings.items():
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps, parts = timed_training(
            trainer_class,
            config_class,
            (student(), tokenizer),
            size.micro_batch,
            size.completion_length,
            size.steps,
            make_teacher and make_teacher(),
            rollout_func=random_rollouts(size),
            device=DEVICE,
            gradient_accumulation_steps=size.rollouts // size.micro_batch,
            **fields,
        )
        measured[name] = {
            "seconds": statistics.median(steps),
            "seconds_range": [min(steps), max(steps)],
            "parts": medians(parts),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None,
        }
        print(f"  step, {name}: {measured[name]['seconds']:.2f} s", flush=True)
        free_memory()
    bound = measured["grpo"]["seconds"] + sum(forwards.values())
    sizes = {name: value for name, value in vars(size).items() if name != "steps"}
    return {
        "kernel": os.environ.get("TRL_CMDP_KERNEL", "the device's default"),
        "sizes": {**sizes, "num_generations": NUM_GENERATIONS},
        "forwards": forwards,
        "trainings": measured,
        "ratio": {name: measured[name]["seconds"] / bound for name in ("violating", "feasible")},
    }


def step_table(result: dict) -> Table:
    forwards = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["forwards"].items())
    table = Table(title=f"a step, in seconds; {forwards}")
    for column in ("step", "seconds", "ratio", *PARTS, "peak GiB"):
        table.add_column(column)
    for name, training in result["trainings"].items():
        ratio = f"{result['ratio'][name]:.3f}" if name in result["ratio"] else ""
        peak = "–" if training["peak_gib"] is None else f"{training['peak_gib']:.1f}"
        parts = (f"{seconds:.2f}" for seconds in training["parts"].values())
        table.add_row(name, f"{training['seconds']:.2f}", ratio, *parts, peak)
    return table
