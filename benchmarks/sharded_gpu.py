"""
What only GPUs can show: the same global batch trained on one GPU, and by DDP, FSDP2 and DeepSpeed ZeRO on several.

    python benchmarks/sharded_gpu.py --gpus 2   # writes benchmarks/results/sharded_gpu.json
    python benchmarks/sharded_gpu.py --on-cpu   # one process against two over gloo: whether this script works

**Not run on GPUs yet**: no machine with two of them was at hand. What a CPU can show is in
tests/trainers/test_processes.py (DDP) and tests/slow/test_sharded.py (FSDP2's `fully_shard`).

Rollouts depend on prompt, place in the group and step alone, so every launch sees the same ones. Losses, gradient norms
and global metrics of each step are compared with those of one process; sharding adds the same numbers in another order.
ZeRO needs `pip install deepspeed`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path


RECORD = Path(__file__).parent / "results" / "sharded_gpu.json"
LAUNCHES = ("multi_gpu", "fsdp2", "zero2", "zero3")
METRICS = ("loss", "grad_norm", "distill_loss", "constraint/cost", "constraint/satisfaction_rate")
TOLERANCE = 1e-3  # relative, absolute below 1
ROLLOUTS, STEPS = 32, 4


def train(output_dir: Path, on_cpu: bool) -> None:
    """One process of a launch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
    from trl_cmdp.tasks import arithmetic

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = AutoTokenizer.from_pretrained(arithmetic.demo_model_path("student"))

    def rollout(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        completions = []
        for row, prompt in enumerate(prompts):
            place = (first + row + trainer.state.global_step) % trainer.num_generations
            solution = arithmetic.worked_solution(prompt)
            # A right one, one that skips its steps, and ones with a wrong digit.
            text = [solution, solution[solution.index("#") :]][place] if place < 2 else solution[:place] + "7"
            completions.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completions, "logprobs": None}

    trainer = ConstrainedDistillTrainer(
        AutoModelForCausalLM.from_pretrained(arithmetic.demo_model_path("student")),
        arithmetic.final_answer_reward,
        ConstrainedDistillConfig(
            str(output_dir),
            cost_limit=0.25,
            max_steps=STEPS,
            per_device_train_batch_size=ROLLOUTS // processes,
            num_generations=8,
            max_completion_length=arithmetic.MAX_COMPLETION_LENGTH,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            shuffle_dataset=False,
            bf16=False,
            use_cpu=on_cpu,
            ddp_backend="gloo" if on_cpu and processes > 1 else None,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
        ),
        arithmetic.load_problems(STEPS * ROLLOUTS // 8, "train", 0),
        processing_class=tokenizer,
        teacher_model=arithmetic.demo_model_path("teacher"),
        rollout_func=rollout,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        history = [{name: entry[name] for name in METRICS} for entry in trainer.state.log_history if "loss" in entry]
        record = {"processes": trainer.accelerator.num_processes, "history": history}
        (output_dir / "record.json").write_text(json.dumps(record))


def launch(name: str, processes: int, on_cpu: bool) -> list[dict[str, float]]:
    """Metrics of each step of one way to train."""
    if on_cpu:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--mixed_precision", "no"]
        command += ["--config_file", str(files("trl") / "accelerate_configs" / f"{name}.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        script = [str(Path(__file__).resolve()), "--worker", folder, *(["--on-cpu"] if on_cpu else [])]
        subprocess.run([*command, *script], check=True)
        record = json.loads(Path(folder, "record.json").read_text())
    if record["processes"] != processes:
        raise RuntimeError(f"{name} ran in {record['processes']} processes, not in {processes}.")
    return record["history"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="GPUs of the launches that are compared with one")
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=LAUNCHES)
    parser.add_argument("--on-cpu", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        train(arguments.worker, arguments.on_cpu)
        return 0
    reference = launch("single_gpu", 1, arguments.on_cpu)
    deviations = {}
    for name in ("cpu",) if arguments.on_cpu else arguments.launches:
        history = launch(name, arguments.gpus, arguments.on_cpu)
        assert len(history) == len(reference) == STEPS
        deviations[name] = {
            metric: max(
                abs(step[metric] - single[metric]) / max(1.0, abs(single[metric]))
                for step, single in zip(history, reference, strict=True)
            )
            for metric in METRICS
        }
        print(name, {metric: f"{value:.1e}" for metric, value in deviations[name].items()}, flush=True)
    if not arguments.on_cpu:
        record = {"gpus": arguments.gpus, "steps": STEPS, "one_gpu": reference, "largest_deviation": deviations}
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return int(any(value > TOLERANCE for of_launch in deviations.values() for value in of_launch.values()))


if __name__ == "__main__":
    sys.exit(main())
