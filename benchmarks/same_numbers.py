"""
One hash per setting of the losses and final weights of five steps, at a commit: a refactoring shows the same ones.

    python benchmarks/same_numbers.py COMMIT [COMMIT ...]

Each commit is unpacked into a temporary folder and trained there, in a process of its own, on one thread, with the
embedded models of the arithmetic task and with minute models made from a seed. What differs between commits is marked.
The numbers belong to one machine and one set of library versions.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


SETTINGS = {
    "grpo": ("constrained", {}, None),
    "constrained": ("constrained", {}, "local"),
    "constrained, token": ("constrained", {"credit_assignment": "token", "cost_scope": "worst_prefix"}, "local"),
    "constrained, sum": (
        "constrained",
        {"constraint_aggregation": "sum_then_normalize", "cost_scope": "sum", "cost_limit": 5.0},
        "local",
    ),
    "constrained, auto": ("constrained", {"cost_limit": "auto", "auto_limit_steps": 2}, "local"),
    "constrained, schedule": (
        "constrained",
        {"cost_limit_schedule": "cosine", "cost_limit_start": 2.0, "num_iterations": 2},
        "local",
    ),
    "constrained, teacher_nll": (
        "constrained",
        {"cost": "teacher_nll", "violation_distill_loss": "teacher_nll", "loss_type": "dr_grpo"},
        "local",
    ),
    "constrained, two teachers": ("constrained", {"cost_limit": {"a": 0.2, "b": 0.5}}, "two"),
    "constrained, adapter": ("constrained", {"teacher_adapter_name": "base", "cost_limit": 0.001}, None),
    "constrained, recomputed": (
        "constrained",
        {"teacher_hidden_memory_mb": 1e-6, "gradient_accumulation_steps": 2, "teacher_prob_floor": 1e-3},
        "local",
    ),
    "lagrangian, fixed": ("lagrangian", {"multiplier": "fixed", "multiplier_init": 0.1}, "local"),
    "lagrangian, dual": ("lagrangian", {"multiplier": "dual", "multiplier_init": 0.1}, "local"),
    "lagrangian, pid": ("lagrangian", {"multiplier": "pid", "loss_type": "grpo"}, "local"),
    "gkd": ("gkd", {"teacher_beta": 0.5}, "local"),
    "gkd, sequences": ("gkd", {"lmbda": 0.5, "seq_kd": True, "teacher_beta": 0.0}, "local"),
    "minillm": ("minillm", {}, "local"),
    "minillm, no mixture": ("minillm", {"teacher_mixed_alpha": 0.0, "temperature": 0.7}, "local"),
}
# Of the constrained method: given, as their defaults may change, where a commit has them.
COEFFICIENTS = {
    "violation_distill_coef": 0.5,
    "unrewarded_distill_coef": 0.0,
    "cost_limit_schedule": "constant",
}


def train(name: str) -> str:
    """Hash of one setting, trained by the library that is on the path."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import trl_cmdp
    from trl_cmdp.tasks.arithmetic import demo_model_path, final_answer_reward, load_problems

    method, arguments, teacher = SETTINGS[name]
    prefix = {"constrained": "Constrained", "lagrangian": "Lagrangian", "gkd": "GKD", "minillm": "MiniLLM"}[method]
    trainer_class, config_class = (getattr(trl_cmdp, f"{prefix}Distill{kind}") for kind in ("Trainer", "Config"))
    student = AutoModelForCausalLM.from_pretrained(demo_model_path("student"))
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))

    def small_teacher(seed: int):
        torch.manual_seed(seed)
        vocab_size = student.config.vocab_size
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
            )
        )

    known_teacher = demo_model_path("teacher")
    teachers = {"local": known_teacher, "two": {"a": known_teacher, "b": small_teacher(3)}}
    dataset = load_problems(64, "train", seed=5)
    if teacher == "two":
        dataset = dataset.add_column("teacher", ["a", "b"] * 32)
    fields = config_class.__dataclass_fields__
    known = {name: value for name, value in COEFFICIENTS.items() if name in fields}
    peft_config = None
    if "teacher_adapter_name" in arguments:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with tempfile.TemporaryDirectory() as output_dir:
        args = config_class(
            output_dir,
            **{
                "per_device_train_batch_size": 16,
                "num_generations": 4,
                "max_completion_length": 24,
                "max_steps": 5,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                **known,
                **arguments,
            },
        )
        trainer = trainer_class(
            student,
            final_answer_reward,
            args,
            dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            teacher_model=None if teacher is None else teachers[teacher],
        )
        trainer.train()
        digest = hashlib.sha256()
        for entry in trainer.state.log_history:
            logged = {key: value for key, value in entry.items() if "time" not in key and "_per_second" not in key}
            logged = {key: value for key, value in logged.items() if key not in ("total_flos", "epoch")}
            digest.update(json.dumps(logged, sort_keys=True).encode())
        for key, tensor in sorted(trainer.model.state_dict().items()):
            digest.update(key.encode() + tensor.detach().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", default=["HEAD"], help="commits to compare, HEAD by default")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        for name in args.settings:
            print(f"{name}\t{train(name)}", flush=True)
        return
    root = Path(__file__).parents[1]
    hashes: dict[str, list[str]] = {name: [] for name in args.settings}
    for commit in args.commits:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(["git", "archive", commit], cwd=root, check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, str(Path(__file__).resolve()), "--inside", "--settings", *args.settings]
            run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if run.returncode != 0:
                sys.exit(f"{run.stderr}\n{commit} does not train.")
        for name, digest in (line.split("\t") for line in run.stdout.splitlines() if "\t" in line):
            hashes[name].append(digest)
            print(f"{commit}  {name:28}{digest}", flush=True)
    if different := [name for name, found in hashes.items() if len(set(found)) > 1]:
        sys.exit(f"Not the same in all commits: {', '.join(different)}")


if __name__ == "__main__":
    main()
