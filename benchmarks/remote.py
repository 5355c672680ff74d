"""
An exact remote teacher on a real language model: its costs against those of the teacher in this process, and training
through a server that is killed.

    python benchmarks/remote.py

Teacher: SmolLM2-135M-Instruct in float32, in a vLLM pooling server on this machine's CPU (tests/slow/vllm_server.py makes
its environment). Student: the same model in nf4 with a fresh LoRA adapter.

Costs: of the student on worked solutions of GSM-Symbolic, by the server's hidden states and by those of the same teacher
in this process. Killed and restarted: the server is killed between two optimizer steps and started again; training must
end as if nothing had been. Killed for good: training must stop with one error, and resume from its checkpoint.
"""

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
import trl
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.evaluation import Rollout, score_rollouts
from trl_cmdp.teachers import RemoteTeacher, TeacherServerError


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples" / "scripts"), str(ROOT / "tests" / "slow")]

from demo_llm import load_problems, reward, save_teacher  # noqa: E402
from teachers import texts  # noqa: E402
from vllm_server import free_port, vllm_server  # noqa: E402


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
STEPS, ROLLOUTS, LENGTH = 4, 8, 32


class Server:
    """The vLLM server, to be killed and started again at one address."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.url, self.running = f"http://127.0.0.1:{self.port}", ExitStack()

    def start(self) -> None:
        # vLLM computes a float32 checkpoint in half precision unless told.
        arguments = ("--dtype", "float32", "--max-model-len", "1024")
        self.running.enter_context(vllm_server("pooling", self.folder, *arguments, port=self.port))

    def kill(self) -> None:
        self.running.close()

    def restart(self) -> None:
        self.kill()
        threading.Thread(target=self.start, daemon=True).start()


class AtStep(TrainerCallback):
    """Does something after an optimizer step, and notes when each began and ended."""

    def __init__(self, step, action):
        self.step, self.action, self.seconds = step, action, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
        if state.global_step == self.step:
            self.action()


def make_trainer(output: Path, folder: Path, server: Server, callback: TrainerCallback, max_wait: float):
    args = ConstrainedDistillConfig(
        output_dir=str(output),
        teacher_model_server_url=server.url,
        teacher_model_server_max_wait=max_wait,
        cost_limit=0.2,
        max_steps=STEPS,
        per_device_train_batch_size=ROLLOUTS,
        num_generations=4,
        max_completion_length=LENGTH,
        learning_rate=1e-3,
        model_init_kwargs={"dtype": torch.float32},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ConstrainedDistillTrainer(
        str(folder),
        reward,
        args,
        load_problems(STEPS * ROLLOUTS // 4, 0),
        processing_class=AutoTokenizer.from_pretrained(folder),
        quantization_config=NF4,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for parameter in trainer.model.parameters():  # as in examples/scripts/demo_llm.py
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def adapter(trainer) -> torch.Tensor:
    """All trained parameters, in one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@torch.no_grad()
def compare_costs(folder: Path, server: Server, number: int) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=NF4).eval()
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rollouts = []
    for question, solution in texts(number):
        prompt, whole = tokenizer(question)["input_ids"], tokenizer(question + solution)["input_ids"]
        rollouts.append(Rollout(question, solution, prompt, whole[len(prompt) :]))
    local = score_rollouts(rollouts, student, teacher, batch_size=8)
    remote_teacher = RemoteTeacher(server.url)
    start = time.perf_counter()
    remote_teacher.hidden_states(
        [rollout.prompt_ids + rollout.completion_ids for rollout in rollouts],
        [len(rollout.completion_ids) for rollout in rollouts],
    )
    seconds = time.perf_counter() - start
    remote = score_rollouts(rollouts, student, remote_teacher, batch_size=8)
    rollout_differences = torch.stack([(a.mean() - b.mean()).abs() for a, b in zip(remote, local, strict=True)])
    return {
        "rollouts": number,
        "tokens": sum(map(len, local)),
        "mean_cost": torch.cat(local).mean().item(),
        "largest_token_cost": torch.cat(local).max().item(),
        "largest_token_difference": (torch.cat(remote) - torch.cat(local)).abs().max().item(),
        "largest_rollout_difference": rollout_differences.max().item(),
        "seconds_for_hidden_states": seconds,
        "bytes_per_token": remote_teacher.head.weight.size(1) * remote_teacher.dtype.itemsize,
        "head_mb": remote_teacher.head.weight.numel() * remote_teacher.dtype.itemsize / 2**20,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=32, help="worked solutions that the costs are taken on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "remote.json")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "SmolLM2-135M-Instruct"
        save_teacher(folder)
        server = Server(folder)
        print("starting vLLM ...", flush=True)
        server.start()
        print("costs ...", flush=True)
        costs = compare_costs(folder, server, arguments.texts)

        print("training, undisturbed ...", flush=True)
        quiet_steps = AtStep(0, None)
        quiet = make_trainer(Path(parent) / "quiet", folder, server, quiet_steps, 600)
        quiet.train()
        print("training, server killed and restarted after step 2 ...", flush=True)
        restarted_steps = AtStep(2, server.restart)
        restarted = make_trainer(Path(parent) / "restarted", folder, server, restarted_steps, 600)
        restarted.train()
        print("training, server killed for good after step 2 ...", flush=True)
        killed = make_trainer(Path(parent) / "killed", folder, server, AtStep(2, server.kill), 15)
        error = None
        try:
            killed.train()
        except TeacherServerError as caught:
            error = str(caught).replace(server.url, "http://HOST:PORT")
        print("resuming ...", flush=True)
        server.start()
        resumed = make_trainer(Path(parent) / "killed", folder, server, AtStep(0, None), 600)
        resumed.train(resume_from_checkpoint=True)
        server.kill()

    reference = adapter(quiet)
    results = {
        "costs": costs,
        "restarted": {
            "steps": restarted.state.global_step,
            "step_seconds": restarted_steps.seconds,
            "undisturbed_step_seconds": quiet_steps.seconds,
            "relative_difference_of_weights": ((adapter(restarted) - reference).norm() / reference.norm()).item(),
        },
        "killed_for_good": {
            "error": error,
            "steps_before": killed.state.global_step,
            "steps_after_resume": resumed.state.global_step,
            "relative_difference_of_weights": ((adapter(resumed) - reference).norm() / reference.norm()).item(),
        },
    }
    table = Table(title="An exact remote teacher (vLLM pooling server, SmolLM2-135M-Instruct)")
    table.add_column("what")
    table.add_column("measured")
    table.add_row("largest difference of a token's cost", f"{costs['largest_token_difference']:.1e} nats")
    table.add_row("largest difference of a rollout's cost", f"{costs['largest_rollout_difference']:.1e} nats")
    table.add_row("mean cost", f"{costs['mean_cost']:.3f} nats per token")
    for name in ("restarted", "killed_for_good"):
        table.add_row(f"{name}: difference of weights", f"{results[name]['relative_difference_of_weights']:.1e}")
    table.add_row("restarted: steps", str(results["restarted"]["steps"]))
    table.add_row(
        "killed for good: steps before and after", f"{killed.state.global_step}, {resumed.state.global_step}"
    )
    table.add_row("killed for good: error", error or "none: it did not stop")
    Console().print(table)
    record = {
        "command": "python benchmarks/remote.py",
        "model": "SmolLM2-135M-Instruct, float32; student nf4 with LoRA",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "vllm": "0.32 (CPU)",
        },
        "results": results,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
