"""
The gradient of one process of two is not finite before the reduction. Started by test_finite_gradients.py.

    torchrun --nproc_per_node 2 nonfinite_two_processes.py OUTPUT
"""

import sys
from pathlib import Path

import torch
from test_finite_gradients import Record, build, poison


def main(output: str) -> None:
    record = Record()
    trainer = build(Path(output, "one"), steps={1}, process=1, record=record, ddp_backend="gloo")
    rank = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    torch.save(record.states, Path(output, f"one_{rank}.pt"))

    trainer = build(Path(output, "many"), process=1, ddp_backend="gloo", save_strategy="steps", save_steps=1)
    poison(trainer, lambda step: step >= 1, process=1)
    try:
        trainer.train()
    except RuntimeError as error:
        Path(output, f"many_{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
