"""
The divergence from hidden states and heads: ours, TRL's chunked kernel, and dense autograd, on the CPU in float32.

    python benchmarks/divergence.py          # a quarter of an hour; writes benchmarks/results/divergence.json
    python benchmarks/divergence.py --quick  # a minute, a small vocabulary, writes nothing

Reverse KL at a vocabulary of 151,936, forward and backward, all from the same setting of `memory_mb`. Every
measurement has a process of its own, and methods take turns. Seconds are of one call after a warm-up on few tokens.
Memory is the process's peak of resident memory during the call, whose counter is reset right before it, less what was
resident before and less the gradients that are returned. Errors are ‖error‖/‖reference‖ against dense float64 on the
same (rounded) inputs.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import trl
from rich.console import Console
from rich.table import Table
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from trl_cmdp.core import Comparison, chunked_divergence, chunked_policy_divergence, token_divergence


WARM_UP_TOKENS = 64


def make_inputs(case, dtype=torch.float32):
    """Hidden states and heads whose logits have a standard deviation of 2, and what a policy loss needs."""
    torch.manual_seed(0)
    tokens, vocab = case["tokens"], case["vocab"]
    inputs = {}
    for who, width in zip(("student", "teacher"), case["hidden"], strict=True):
        inputs[f"{who}_hidden"] = torch.randn(tokens, width).to(dtype)
        inputs[f"{who}_head"] = torch.randn(vocab, width).mul_(2 / math.sqrt(width)).to(dtype)
    inputs["student_hidden"].requires_grad_()
    inputs["student_head"].requires_grad_(case["form"] != "frozen head")
    return inputs, torch.randint(vocab, (tokens,)), torch.randn(tokens)


def policy_loss(log_probs, advantages):
    """The on-policy loss of GRPO: its derivative by each log-probability is minus the advantage."""
    return -(advantages * (log_probs - log_probs.detach()).exp()).sum()


def ours(inputs, token_ids, advantages, case):
    if case["form"] != "policy and divergence":
        return chunked_divergence(**inputs, beta=case["beta"], memory_mb=case["memory_mb"])[0]
    log_probs, _, loss, _ = chunked_policy_divergence(
        **inputs,
        comparison=Comparison(case["beta"]),
        token_ids=token_ids,
        weights=torch.ones(len(token_ids)),
        memory_mb=case["memory_mb"],
    )
    return policy_loss(log_probs, advantages) + loss


def trls(inputs, token_ids, advantages, case):
    student = inputs["student_hidden"], inputs["student_head"], None
    teacher = inputs["teacher_hidden"], inputs["teacher_head"], None
    loss = ChunkedDivergenceFunction.apply(*student, *teacher, case["beta"])[0].sum()
    if case["form"] != "policy and divergence":
        return loss
    log_probs, *_ = ChunkedLogProbFunction.apply(
        *student, token_ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    return policy_loss(log_probs, advantages) + loss


def dense(inputs, token_ids, advantages, case):
    logits = F.linear(inputs["student_hidden"], inputs["student_head"])
    student = logits.log_softmax(-1)
    teacher = F.linear(inputs["teacher_hidden"], inputs["teacher_head"]).log_softmax(-1)
    loss = (student.exp() * (student - teacher)).sum()
    if case["form"] != "policy and divergence":
        return loss
    log_probs = student.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return policy_loss(log_probs, advantages) + loss


METHODS = {"ours": ours, "trl": trls, "dense": dense}


def resident(field):
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"No {field} in /proc/self/status.")


def measure(case):
    """In a process of its own: seconds and CPU seconds of one call, or the memory that it takes in MiB."""
    run = METHODS[case["method"]]
    if case["measure"] == "memory":
        small = case | {"tokens": 2, "vocab": 512}  # loads code, and leaves nothing of size behind
        run(*make_inputs(small), small).backward()
        inputs, token_ids, advantages = make_inputs(case)
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run(inputs, token_ids, advantages, case).backward()
        peak = resident("VmHWM")
        returned = sum(x.grad.nbytes for x in inputs.values() if x.grad is not None)
        return {"mib": (peak - before - returned) / 2**20}
    inputs, token_ids, advantages = make_inputs(case)
    few = {name: x.detach()[:WARM_UP_TOKENS] if "hidden" in name else x.detach() for name, x in inputs.items()}
    few = {name: x.requires_grad_(inputs[name].requires_grad) for name, x in few.items()}
    run(few, token_ids[:WARM_UP_TOKENS], advantages[:WARM_UP_TOKENS], case).backward()
    del few
    start, cpu_start = time.perf_counter(), time.process_time()
    run(inputs, token_ids, advantages, case).backward()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def in_subprocess(case):
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(case, rounds):
    """Median seconds and memory of each method, and ours over the others', with the range over rounds."""
    seconds, memory = {name: [] for name in METHODS}, {}
    for _ in range(rounds):
        for name in METHODS:
            seconds[name].append(in_subprocess(case | {"method": name, "measure": "time"})["seconds"])
    for name in METHODS:
        memory[name] = in_subprocess(case | {"method": name, "measure": "memory"})["mib"]
    result = {**case, "seconds": {}, "seconds_range": {}, "memory_mib": memory, "time_ratio": {}, "memory_ratio": {}}
    for name in METHODS:
        result["seconds"][name] = statistics.median(seconds[name])
        result["seconds_range"][name] = [min(seconds[name]), max(seconds[name])]
        if name == "ours":
            continue
        ratios = [mine / other for mine, other in zip(seconds["ours"], seconds[name], strict=True)]
        result["time_ratio"][name] = {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        result["memory_ratio"][name] = memory["ours"] / memory[name]
    return result


def scaling(case, lengths):
    """Seconds and memory over the number of tokens, and the exponent of a power law through the seconds."""
    rows = []
    for tokens in lengths:
        at = case | {"method": "ours", "tokens": tokens}
        timed = in_subprocess(at | {"measure": "time"})
        rows.append({"tokens": tokens, **timed, "mib": in_subprocess(at | {"measure": "memory"})["mib"]})
    logs = torch.tensor([[math.log(row["tokens"]), math.log(row["seconds"])] for row in rows])
    x, y = (logs - logs.mean(0)).T
    mib = [row["mib"] for row in rows]
    return {"rows": rows, "exponent": (x @ y / (x @ x)).item(), "memory_max_over_min": max(mib) / min(mib)}


def accuracy(case):
    """Errors of the costs and of both gradients against dense float64, at each β and precision of the inputs."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs, *_ = make_inputs(case, dtype)
        weights = torch.rand(case["tokens"])
        for beta in (0.0, 0.5, 1.0):
            leaves = inputs["student_hidden"], inputs["student_head"]
            loss, costs = chunked_divergence(**inputs, weights=weights, beta=beta, memory_mb=case["memory_mb"])
            actual = (costs, *torch.autograd.grad(loss, leaves))
            wide = {name: x.detach().double() for name, x in inputs.items()}
            wide_leaves = [wide[name].requires_grad_() for name in ("student_hidden", "student_head")]
            logits = (F.linear(wide[f"{who}_hidden"], wide[f"{who}_head"]) for who in ("student", "teacher"))
            expected_costs = token_divergence(*logits, beta)
            grads = torch.autograd.grad((weights.double() * expected_costs).sum(), wide_leaves)
            names = ("costs", "grad_hidden", "grad_weight")
            errors = {
                name: ((value.double() - target).norm() / target.norm()).item()
                for name, value, target in zip(names, actual, (expected_costs.detach(), *grads), strict=True)
            }
            rows.append({"inputs": str(dtype).removeprefix("torch."), "beta": beta, **errors})
    return {"tokens": case["tokens"], "vocab": case["vocab"], "hidden": case["hidden"], "rows": rows}


def print_tables(comparisons, scaled, accurate):
    console = Console(width=130)
    table = Table(
        "form", "hidden", "method", "seconds", "ours / it", "range", "MiB", "ours / it", title="Forward + backward"
    )
    for result in comparisons:
        for name, seconds in result["seconds"].items():
            ratio = result["time_ratio"].get(name)
            table.add_row(
                result["form"],
                "/".join(map(str, result["hidden"])),
                name,
                f"{seconds:.2f}",
                "" if ratio is None else f"{ratio['median']:.3f}",
                "" if ratio is None else "{:.3f} to {:.3f}".format(*ratio["range"]),
                f"{result['memory_mib'][name]:.0f}",
                "" if ratio is None else f"{result['memory_ratio'][name]:.3f}",
            )
    console.print(table)
    table = Table("tokens", "seconds", "MiB", title=f"tokens^{scaled['exponent']:.3f}")
    for row in scaled["rows"]:
        table.add_row(str(row["tokens"]), f"{row['seconds']:.2f}", f"{row['mib']:.0f}")
    console.print(table)
    table = Table("inputs", "β", "costs", "hidden's gradient", "head's gradient", title="‖error‖/‖reference‖")
    for row in accurate["rows"]:
        errors = (f"{row[name]:.1e}" for name in ("costs", "grad_hidden", "grad_weight"))
        table.add_row(row["inputs"], str(row["beta"]), *errors)
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small trial that writes nothing")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--memory-mb", type=float, default=256, help="`memory_mb` of ours")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "divergence.json")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # one measurement, in a subprocess
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(arguments.case)))
        return

    quick = arguments.quick
    base = {"vocab": 16384 if quick else 151936, "beta": 1.0, "memory_mb": arguments.memory_mb}
    base |= {"tokens": 256 if quick else 1024, "hidden": [256, 512], "form": "trained head"}
    comparisons = []
    for case in (
        base,
        base | {"hidden": [896, 1536]},
        base | {"form": "frozen head"},
        base | {"form": "policy and divergence"},
    ):
        print(f"measuring {case['form']}, hidden {case['hidden']} ...", flush=True)
        comparisons.append(compare(case, 1 if quick else arguments.rounds))
    print("measuring scaling and accuracy ...", flush=True)
    scaled = scaling(base, [2**k for k in (range(6, 10) if quick else range(8, 14))])
    accurate = accuracy(base | {"tokens": 64})
    print_tables(comparisons, scaled, accurate)
    if quick:
        return
    record = {
        "command": "python benchmarks/divergence.py",
        "memory_mb": arguments.memory_mb,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average_at_the_end": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "trl": trl.__version__},
        "comparisons": comparisons,
        "scaling": scaled,
        "accuracy": accurate,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
