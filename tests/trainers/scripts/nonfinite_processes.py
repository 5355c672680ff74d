"""The gradient of one process of several is not finite before the reduction. Run by several_processes.py."""

from pathlib import Path

import torch
from test_finite_gradients import Record, build, poison


def main(output: Path) -> None:
    record = Record()
    trainer = build(output / "one", steps={1}, process=1, record=record)
    rank = trainer.accelerator.process_index
    trainer.train()
    torch.save(record.states, output / f"one_{rank}.pt")

    trainer = build(output / "many", process=1, save_strategy="steps", save_steps=1)
    poison(trainer, lambda step: step >= 1, process=1)
    try:
        trainer.train()
    except RuntimeError as error:
        (output / f"many_{rank}.txt").write_text(str(error))
