"""The divergence part of `gpu.py`."""

import gc
import math
import os
import statistics
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from unittest import mock

import torch
import torch.nn.functional as F
from overhead import now
from rich.table import Table
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from trl_cmdp.core import Comparison, chunked_divergence, chunked_policy_divergence


FORMS = ("divergence", "policy")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPARED_ROWS = 128  # with float64


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison."""

    tokens: int
    vocab: int
    student_width: int
    teacher_width: int
    dtype: torch.dtype

    @property
    def flop(self) -> int:
        """Of one pass: both models projected once, and the two gradients of the student."""
        return 2 * self.tokens * self.vocab * (3 * self.student_width + self.teacher_width)


CASES = [Case(tokens, 151_936, width, 3584, torch.bfloat16) for width in (1536, 896) for tokens in (4096, 16_384)] + [
    Case(4096, 49_152, 576, 576, torch.float32)
]
TINY_CASES = [Case(12, 512, 16, 24, dtype) for dtype in (torch.bfloat16, torch.float32)]


class Inputs:
    """Hidden states and heads whose logits have a standard deviation of 2, and what a policy loss needs."""

    def __init__(self, case: Case):
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, device=DEVICE, generator=generator)

        def head(width):
            return (normal(case.vocab, width) * (2 / math.sqrt(width))).to(case.dtype)

        self.student_hidden = normal(case.tokens, case.student_width).to(case.dtype).requires_grad_()
        self.student_head = head(case.student_width).requires_grad_()
        self.teacher_hidden = normal(case.tokens, case.teacher_width).to(case.dtype)
        self.teacher_head = head(case.teacher_width)
        self.token_ids = torch.randint(case.vocab, (case.tokens,), device=DEVICE, generator=generator)
        self.advantages = normal(case.tokens)

    def first(self, rows: int, dtype: torch.dtype) -> "Inputs":
        """A copy of the first rows in another precision."""
        few = object.__new__(Inputs)
        few.token_ids, few.advantages = self.token_ids[:rows], self.advantages[:rows].to(dtype)
        few.student_hidden = self.student_hidden.detach()[:rows].to(dtype, copy=True).requires_grad_()
        few.student_head = self.student_head.detach().to(dtype, copy=True).requires_grad_()
        few.teacher_hidden, few.teacher_head = self.teacher_hidden[:rows].to(dtype), self.teacher_head.to(dtype)
        return few

    @property
    def models(self) -> tuple[torch.Tensor, ...]:
        return self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head

    def clear(self) -> None:
        self.student_hidden.grad = self.student_head.grad = None

    def policy_loss(self, log_probs: torch.Tensor) -> torch.Tensor:
        """The on-policy loss of GRPO: its derivative by each log-probability is minus the advantage."""
        return -(self.advantages * (log_probs - log_probs.detach()).exp()).sum()


def ours(inputs: Inputs, form: str) -> torch.Tensor:
    if form == "divergence":
        return chunked_divergence(*inputs.models)[0]
    weights = torch.ones_like(inputs.advantages)
    log_probs, _, loss, _ = chunked_policy_divergence(*inputs.models, Comparison(), inputs.token_ids, weights)
    return inputs.policy_loss(log_probs) + loss


def trls(inputs: Inputs, form: str) -> torch.Tensor:
    student = inputs.student_hidden, inputs.student_head, None
    loss = ChunkedDivergenceFunction.apply(*student, inputs.teacher_hidden, inputs.teacher_head, None, 1.0)[0].sum()
    if form == "divergence":
        return loss
    log_probs, *_ = ChunkedLogProbFunction.apply(
        *student, inputs.token_ids, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    return inputs.policy_loss(log_probs) + loss


def ligers(inputs: Inputs, form: str) -> torch.Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    labels = torch.ones_like(inputs.token_ids)  # none ignored
    return LigerFusedLinearJSD(jsd_beta=1.0)(*inputs.models, labels) * len(labels)  # its loss is the mean


def dense(inputs: Inputs, form: str) -> torch.Tensor:
    dtype = torch.promote_types(inputs.student_hidden.dtype, torch.float32)
    student = F.linear(inputs.student_hidden, inputs.student_head).to(dtype).log_softmax(-1)
    with torch.no_grad():
        teacher = F.linear(inputs.teacher_hidden, inputs.teacher_head).to(dtype).log_softmax(-1)
    loss = (student.exp() * (student - teacher)).sum()
    if form == "divergence":
        return loss
    log_probs = student.gather(-1, inputs.token_ids.unsqueeze(-1)).squeeze(-1)
    return inputs.policy_loss(log_probs) + loss


METHODS = {"ours, triton": ours, "ours, torch": ours, "trl": trls, "liger": ligers, "dense": dense}


def methods_of(form: str) -> list[str]:
    """Methods that this machine runs and that compute the form."""
    triton = find_spec("triton") is not None and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    liger = DEVICE == "cuda" and find_spec("liger_kernel") is not None and form == "divergence"
    runs = {"ours, triton": triton, "liger": liger}
    return [name for name in METHODS if runs.get(name, True)]


@contextmanager
def chosen_kernel(method: str):
    """Our functions run the kernel that the method names."""
    kernel = {"TRL_CMDP_KERNEL": method.removeprefix("ours, ")} if method.startswith("ours") else {}
    with mock.patch.dict(os.environ, kernel):
        yield


def milliseconds(function, repeats: int) -> list[float]:
    """Of each call."""
    times = []
    for _ in range(repeats):
        start = now()
        function()
        times.append(1000 * (now() - start))
    return times


def peak_mib(function) -> float | None:
    """Peak of the device's memory in the call, beyond what was there before; not known on a CPU."""
    if DEVICE == "cpu":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_method(method: str, form: str, inputs: Inputs, case: Case, repeats: int) -> dict:
    """Time, memory and speed of one method."""

    def run():
        inputs.clear()
        METHODS[method](inputs, form).backward()

    try:
        run()  # compiles
        inputs.clear()
        peak = peak_mib(run)
        times = milliseconds(run, repeats)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    returned = (inputs.student_hidden.nbytes + inputs.student_head.nbytes) / 2**20
    median = statistics.median(times)
    return {
        "ms": median,
        "ms_range": [min(times), max(times)],
        "memory_mib": None if peak is None else peak - returned,
        "tflops": case.flop / median / 1e9,
    }


def errors(method: str, form: str, inputs: Inputs, reference: Inputs, value: torch.Tensor) -> dict:
    """‖error‖/‖reference‖ of the loss and of both gradients."""
    few = inputs.first(len(reference.token_ids), inputs.student_hidden.dtype)
    loss = METHODS[method](few, form)
    loss.backward()
    pairs = {
        "loss": (loss.detach(), value),
        "grad_hidden": (few.student_hidden.grad, reference.student_hidden.grad),
        "grad_head": (few.student_head.grad, reference.student_head.grad),
    }
    return {
        name: ((actual.double() - expected).norm() / expected.norm()).item()
        for name, (actual, expected) in pairs.items()
    }


def product_tflops(dtype: torch.dtype, size: int) -> float:
    """What a plain product reaches."""
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(milliseconds(lambda: torch.mm(a, b), 10)) / 1e9


def free_memory() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def measure_divergence(tiny: bool) -> dict:
    cases, repeats = (TINY_CASES, 1) if tiny else (CASES, 3)
    products = {str(dtype): product_tflops(dtype, 64 if tiny else 8192) for dtype in (torch.bfloat16, torch.float32)}
    rows, compared = [], set()
    for case in cases:
        inputs = Inputs(case)
        shape = (case.vocab, case.student_width, case.teacher_width, case.dtype)
        for form in FORMS:
            reference = None
            if shape not in compared:  # more tokens are the same rows again
                reference = inputs.first(min(COMPARED_ROWS, case.tokens), torch.float64)
                value = dense(reference, form)
                value.backward()
            for method in methods_of(form):
                with chosen_kernel(method):
                    row = measure_method(method, form, inputs, case, repeats)
                    if reference is not None and "error" not in row:
                        row["errors"] = errors(method, form, inputs, reference, value.detach())
                if "tflops" in row:
                    row["share_of_product"] = row["tflops"] / products[str(case.dtype)]
                shapes = {name: str(each) if name == "dtype" else each for name, each in vars(case).items()}
                rows.append({"method": method, "form": form, **shapes, **row})
                print(f"  {form}, {case.tokens} tokens, {method}: {row.get('ms', math.nan):.1f} ms", flush=True)
        compared.add(shape)
        del inputs, reference
        free_memory()
    return {"product_tflops": products, "rows": rows}


def divergence_table(result: dict) -> Table:
    products = ", ".join(f"{dtype} {tflops:.0f}" for dtype, tflops in result["product_tflops"].items())
    table = Table(title=f"forward + backward; a product reaches, in TFLOP/s: {products}")
    columns = ("form", "tokens × vocabulary", "hidden", "dtype", "method", "ms", "MiB", "TFLOP/s", "of product")
    for column in (*columns, "error of loss", "hidden's gradient", "head's gradient"):
        table.add_column(column)
    for row in result["rows"]:
        case = (row["form"], f"{row['tokens']} × {row['vocab']}", f"{row['student_width']} / {row['teacher_width']}")
        cells = (*case, row["dtype"].removeprefix("torch."), row["method"])
        if "error" in row:
            table.add_row(*cells, row["error"])
            continue
        memory = "–" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        speed = (f"{row['ms']:.1f}", memory, f"{row['tflops']:.1f}", f"{row['share_of_product']:.0%}")
        table.add_row(*cells, *speed, *(f"{error:.1e}" for error in row.get("errors", {}).values()))
    return table
