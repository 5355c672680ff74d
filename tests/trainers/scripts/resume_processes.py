"""
Stops and resumes in the middle of a generation cycle, each process with rollouts of its own. Run by several_processes.py.
"""

from pathlib import Path

from test_exact_resume import assert_same_run, build


def main(output: Path) -> None:
    settings = {"num_iterations": 2, "steps_per_generation": 2, "cost_limit": 1.7}
    whole = build(output / "whole", **settings)
    whole.train()
    build(output / "stopped", stop=3, **settings).train()
    resumed = build(output / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)
    (output / f"same_{resumed.accelerator.process_index}").touch()
