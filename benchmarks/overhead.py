"""
What the teacher costs: the constrained trainer's step against its lower bound.

    python benchmarks/overhead.py            # or `make bench`, ten minutes; writes benchmarks/results/overhead.json

The ratio is (constrained step) / (plain GRPO step + one teacher forward + one student scoring forward), all timed in
this one run, in alternating rounds, on completions of fixed length. The two forwards are TRL's own scoring forward
(log-probabilities through the fused head, no gradient) with the teacher's and with the student's weights. Printed with
generation and without it (what both trainers spend in `_generate` taken off), with every rollout violating the limit,
the most that the method ever does, and with none. Then the share of each part: the student's forwards (GRPO's with its
head, ours without), the teacher's, the kernels of both heads (scores; log-probabilities, divergence and its gradient),
backward (the policy's gradient by the head among it), and the optimizer.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import transformers
import trl
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.tasks.arithmetic import demo_model_path, load_problems
from trl_cmdp.trainers.engine import forward


NUM_GENERATIONS = 8
CASES = {
    # name: (batch of rollouts, completion length, models)
    "demo": (128, 32, lambda: (_embedded("student"), _embedded("teacher"))),
    "vocabulary-152k": (16, 64, lambda: (_wide_vocabulary(0, 256), _wide_vocabulary(1, 512))),
}
PARTS = ("generation", "student", "teacher", "divergence", "backward", "optimizer")


def _embedded(name):
    return AutoModelForCausalLM.from_pretrained(demo_model_path(name))


def _wide_vocabulary(seed, hidden_size):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=151936,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=hidden_size // 64,
            tie_word_embeddings=True,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def now():
    """Seconds, once a GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step, and of its parts."""

    def __init__(self):
        self.steps, self.parts = [], []
        self._part = dict.fromkeys(PARTS, 0.0)
        self._inside = []

    def timed(self, name, function):
        """The function, its time counted as part `name` and not as that of a part around it."""

        def call(*args, **kwargs):
            # Generation is one part, whatever it calls.
            if "generation" in self._inside:
                return function(*args, **kwargs)
            start = now()
            self._inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.pop()
                seconds = now() - start
                self._part[name] += seconds
                if self._inside:
                    self._part[self._inside[-1]] -= seconds

        return call

    def watch(self, trainer):
        trainer._generate = self.timed("generation", trainer._generate)
        trainer.accelerator.backward = self.timed("backward", trainer.accelerator.backward)
        if isinstance(trainer, ConstrainedDistillTrainer):
            (teacher,) = trainer.teachers.values()
            teacher.hidden_states = self.timed("teacher", teacher.hidden_states)
            student = trainer._student_forward
            student._forward = self.timed("student", student._forward)
        else:
            trainer.model.forward = self.timed("student", trainer.model.forward)

    def on_step_begin(self, args, state, control, **kwargs):
        # The batch is prepared, and so generated, inside the step.
        self._start, self._part = now(), dict.fromkeys(PARTS, 0.0)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._optimizer_start = now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._part["optimizer"] += now() - self._optimizer_start

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(now() - self._start)
        self.parts.append(self._part)


def reward(completions, **kwargs):
    return [float(len(completion) % 2) for completion in completions]


def timed_training(
    trainer_class, config_class, models, batch, length, steps, teacher, rollout_func=None, device="cpu", **fields
):
    """Seconds of each step and of its parts. `batch` rollouts are one forward and backward, and by default one step."""
    student, tokenizer = models
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_generations=NUM_GENERATIONS,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},  # fixed length
            max_steps=steps + 1,
            learning_rate=0.0,  # the same work at every step
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=device == "cpu",
            bf16=device != "cpu",
            gradient_checkpointing=False,
            **fields,
        )
        rollouts = (steps + 1) * batch * args.gradient_accumulation_steps
        prompts = load_problems(rollouts // NUM_GENERATIONS, "train", 0)["prompt"]
        trainer = trainer_class(
            student,
            reward,
            args,
            Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[timer],
            rollout_func=rollout_func,
            **({} if teacher is None else {"teacher_model": teacher}),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        timer.watch(trainer)
        # What the kernels of both heads take, out of the student's forward.
        names = ("chunked_divergence", "chunked_policy_divergence", "chunked_scores")
        with ExitStack() as patches:
            for name in names:
                timed = timer.timed("divergence", getattr(forward, name))
                patches.enter_context(mock.patch.object(forward, name, timed))
            trainer.train()
    return timer.steps[1:], timer.parts[1:]  # the first step warms up


def medians(parts):
    return {name: statistics.median(part[name] for part in parts) for name in PARTS}


@torch.no_grad()
def timed_scoring(model, batch, length, repeats):
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    prompt_length = len(load_problems(1, "train", 0)["prompt"][0])
    input_ids = torch.randint(3, 15, (batch, prompt_length + length))
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(input_ids, attention_mask=torch.ones_like(input_ids), labels=labels, fused_lm_head=True)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure(name, rounds, steps):
    batch, length, build = CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    ratios = {key: [] for key in ("violating", "violating, no generation", "feasible", "feasible, no generation")}
    seconds = {key: [] for key in ("grpo", "violating", "feasible", "teacher forward", "student forward")}
    parts = {key: [] for key in ("grpo", "violating", "feasible")}
    for _ in range(rounds):
        forwards = {
            "teacher forward": statistics.median(timed_scoring(build()[1], batch, length, steps)),
            "student forward": statistics.median(timed_scoring(build()[0], batch, length, steps)),
        }
        plain, plain_parts = timed_training(
            GRPOTrainer, GRPOConfig, (build()[0], tokenizer), batch, length, steps, None
        )
        grpo, generation = statistics.median(plain), medians(plain_parts)["generation"]
        bound = grpo + sum(forwards.values())
        parts["grpo"].extend(plain_parts)
        for key, limit in (("violating", 1e-9), ("feasible", 1e9)):
            student, teacher = build()
            constrained, constrained_parts = timed_training(
                ConstrainedDistillTrainer,
                ConstrainedDistillConfig,
                (student, tokenizer),
                batch,
                length,
                steps,
                teacher,
                cost_limit=limit,
                cost_limit_schedule="constant",
                unrewarded_distill_coef=0.0,  # inside the limit only the reward is then differentiated
            )
            step = statistics.median(constrained)
            ratios[key].append(step / bound)
            without = step - medians(constrained_parts)["generation"]
            ratios[f"{key}, no generation"].append(without / (bound - generation))
            seconds[key].append(step)
            parts[key].extend(constrained_parts)
        seconds["grpo"].append(grpo)
        for key, value in forwards.items():
            seconds[key].append(value)
    shares = {}
    for key, values in parts.items():
        shares[key] = {name: value / statistics.median(seconds[key]) for name, value in medians(values).items()}
        shares[key]["rest"] = 1 - sum(shares[key].values())
    return {
        "rollouts": batch,
        "completion_length": length,
        "ratio": {key: statistics.median(values) for key, values in ratios.items()},
        "ratio_range": {key: [min(values), max(values)] for key, values in ratios.items()},
        "seconds": {key: statistics.median(values) for key, values in seconds.items()},
        "share": shares,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a round")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()

    results = {}
    table = Table(title="(constrained step) / (GRPO step + teacher forward + student scoring forward)")
    for column in ("models", "rollouts × tokens", "violating", "  no generation", "feasible", "  no generation "):
        table.add_column(column)
    for name in CASES:
        print(f"measuring {name} ...", flush=True)
        results[name] = measure(name, arguments.rounds, arguments.steps)
        ratios = [f"{value:.3f}" for value in results[name]["ratio"].values()]
        table.add_row(name, f"{results[name]['rollouts']} × {results[name]['completion_length']}", *ratios)
    Console().print(table)
    table = Table(title="share of a step")
    for column in ("models", "trainer", "seconds", *PARTS, "rest"):
        table.add_column(column)
    for name, result in results.items():
        for key, shares in result["share"].items():
            table.add_row(
                name, key, f"{result['seconds'][key]:.2f}", *(f"{100 * share:.0f}%" for share in shares.values())
            )
    Console().print(table)
    record = {
        "command": "python benchmarks/overhead.py",
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
