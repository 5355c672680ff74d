"""
Stops and resumes in the middle of a generation cycle, each process with rollouts of its own. Started by
test_exact_resume.py.

    torchrun --nproc_per_node 2 resume_two_processes.py OUTPUT
"""

import sys
from pathlib import Path

from test_exact_resume import assert_same_run, build


def main(output: str) -> None:
    settings = {"num_iterations": 2, "steps_per_generation": 2, "cost_limit": 1.7}
    whole = build(Path(output, "whole"), **settings)
    whole.train()
    build(Path(output, "stopped"), stop=3, **settings).train()
    resumed = build(Path(output, "stopped"), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.accelerator.num_processes == 2
    assert_same_run(resumed, whole)
    Path(output, f"same_{resumed.accelerator.process_index}").touch()


if __name__ == "__main__":
    main(sys.argv[1])
