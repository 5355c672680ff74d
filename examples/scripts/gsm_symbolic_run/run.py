"""One seed of the experiment: its folder, problems and models."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_cmdp.tasks import gsm_symbolic

from .scales import Scale


CUDA = torch.cuda.is_available()
# What is trained has float32 weights: bfloat16 rounds updates of this size away. On CUDA its forward and backward run in
# bfloat16 (`bf16=CUDA`), as do models that only answer; few CPUs multiply in bfloat16.
DTYPE = torch.bfloat16 if CUDA else torch.float32


@dataclass(frozen=True)
class Run:
    """
    One seed of the experiment.

    Args:
        folder (`Path`):
            Where its stages are, a folder for each.
        scale ([`Scale`]):
            What it is made of.
        seed (`int`):
            Seed of problems, training and evaluation.
        base (`str`, *optional*):
            Path or hub id of the model that the teacher is made from; `None` takes the scale's.
    """

    folder: Path
    scale: Scale
    seed: int
    base: str | None = None

    def problems(self, name: str) -> Dataset:
        """One of the sets of problems that [`write_problems`] has made."""
        path = self.folder / "problems" / f"{name}.jsonl"
        if not path.exists():
            raise SystemExit(f"{path} is missing. Run the stage `problems` first.")
        lines = path.read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([json.loads(line) for line in lines])


def write_problems(folder: Path, run: Run) -> None:
    """Every problem of a run, as JSON lines: no later stage needs reasoning-gym."""
    scale = run.scale
    load = partial(gsm_symbolic.load_problems, max_steps=scale.max_steps, max_number=scale.max_number)
    # Those that the student is measured on are none that is reported: problems of one draw are all different.
    reported = scale.validation_problems
    validation = load(reported + scale.tuning_problems, "validation", run.seed)
    sets = {
        "solutions": load(scale.teacher_problems, "train", run.seed + 1000),
        "prompts": load(scale.steps * scale.prompts_per_step, "train", run.seed),
        "tuning": validation.select(range(reported, len(validation))),
        "validation": validation.select(range(reported)),
        "test": load(scale.test_problems, "test", run.seed),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in problems.to_list()]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model on the run's device, to be trained unless a `dtype` is given."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cuda" if CUDA else "cpu")
