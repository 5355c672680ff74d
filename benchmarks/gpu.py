"""
One card: the divergence against TRL's Triton kernels, Liger and dense autograd, and a constrained step against GRPO's.

    python benchmarks/gpu.py           # under three minutes; writes benchmarks/results/gpu-CARD.json
    python benchmarks/gpu.py --only divergence  # or step; writes to --output alone
    python benchmarks/gpu.py --tiny    # the same code on the CPU in seconds, at sizes that say nothing; writes nothing

`divergence`: reverse KL from hidden states and heads, forward and backward, alone ("divergence") and with
log-probabilities and entropy ("policy"). Milliseconds are medians, and the clock stops once the device has finished. Memory is the peak beyond inputs and
returned gradients. TFLOP/s count one pass, 2·N·V·(3·H_s + H_t), whatever a method computes, and stand beside what a
plain product reaches on this card in that precision. Errors are ‖error‖/‖reference‖ against dense autograd in float64
on the first rows of the same inputs. "ours" is measured with each of our kernels that the device runs.

`step`: optimizer steps of models of the sizes of Qwen2.5-Math 1.5B and 7B with random weights, on random rollouts, so
nothing is generated. The ratio is (constrained step) / (GRPO step + one teacher forward + one student scoring forward),
with every rollout violating the limit and with none, and with the device's default kernel or the one that the environment
variable TRL_CMDP_KERNEL names. It needs no network and no model hub. Liger is left out where it is not installed.
"""

import argparse
import json
import platform
import re
import sys
from pathlib import Path

import torch
import transformers
import trl
from gpu_divergence import DEVICE, divergence_table, measure_divergence
from gpu_step import measure_step, step_table
from rich.console import Console


PARTS = ("divergence", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU computes in seconds")
    parser.add_argument("--output", type=Path, help="record (of a whole run by default results/gpu-CARD.json)")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        sys.exit("No CUDA device is here. --tiny runs on the CPU.")
    transformers.utils.logging.set_verbosity_error()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    record = {
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }
    print(f"{device}, torch {torch.__version__}", flush=True)
    console = Console(width=170)
    if "divergence" in arguments.only:
        record["divergence"] = measure_divergence(arguments.tiny)
        console.print(divergence_table(record["divergence"]))
    if "step" in arguments.only:
        record["step"] = measure_step(arguments.tiny)
        console.print(step_table(record["step"]))
    output = arguments.output
    if output is None and not arguments.tiny and set(arguments.only) == set(PARTS):
        output = Path(__file__).parent / "results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json"
    if output is not None:
        output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
