"""
Trains, kills with SIGKILL, resumes, kills once more, and twice more at the run's end, resumes, and compares with the run
that was never killed: weights and the saved model byte for byte, and everything logged but times. Started by
test_kills.py, and for a single run that is killed at its end alone by tests/trainers/test_run_end.py.

    python kill_runs.py OUTPUT [end]

torch and TRL are imported once: each run is a fork of this process, which trains nothing itself and has no threads.
"""

import contextlib
import faulthandler
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from helpers import make_dataset, make_lora, make_teacher, make_trainer, weights
from safetensors.torch import save_file
from transformers import TrainerCallback

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer
from trl_cmdp.trainers.engine.checkpoints import last_whole_checkpoint


STEPS = 6
KINDS = ["outside", "writing", "forward", "event"]
# Until the last checkpoint is written; after it, until the model is saved; inside the final save.
END_KINDS = ["last step", "last checkpoint", "final save"]
# Full and LoRA, with and without accumulation and several iterations: two kills in each.
GRID = [
    {"lora": lora, "gradient_accumulation_steps": accumulation, "num_iterations": iterations, "save_steps": save_steps}
    for (lora, accumulation, iterations), save_steps in zip(
        itertools.product([False, True], [1, 2], [1, 2]), [1, 2, 2, 1] * 2, strict=True
    )
]
PARTS = {"steps_per_generation": 4, "gradient_accumulation_steps": 2}
AUTO = {"cost_limit": "auto", "auto_limit_steps": 3, "num_iterations": 2}
SCHEDULE = {"cost_limit": 1.5, "cost_limit_start": 2.5, "cost_limit_schedule": "linear", "num_iterations": 2}
DUAL, PID = ({"multiplier": name, "multiplier_init": 0.1, "cost_limit": 1.5} for name in ("dual", "pid"))
TRAINERS = {
    "constrained": (ConstrainedDistillTrainer, [{"cost_limit": 1.7, **cell} for cell in GRID] + [AUTO, SCHEDULE]),
    "lagrangian": (
        LagrangianDistillTrainer,
        [DUAL | cell for cell in GRID[::3]]
        + [PID | cell for cell in GRID if cell not in GRID[::3]]
        + [DUAL | PARTS, PID | PARTS],
    ),
    "gkd": (
        GKDDistillTrainer,
        [{"lmbda": 0.5, **cell} for cell in GRID] + [PARTS, {"lmbda": 0.5, "seq_kd": True, **PARTS}],
    ),
    "minillm": (MiniLLMDistillTrainer, [*GRID, PARTS, {"teacher_mixed_alpha": 0.0, **PARTS}]),
}


@dataclass
class Kill:
    """Where to kill: how, and at which share of what is left of the run."""

    how: str
    share: float
    files: int  # written of a checkpoint by then


class Counts(TrainerCallback):
    """
    Counts the student's forwards (generation, scoring, loss), the trainer's events, and at the run's end both of them and
    what is done to files, and kills at one of them.
    """

    def __init__(self, begun, how=None, at=0):
        self.begun, self.how, self.at = begun, how, at
        self.seen = Counter()
        self.phase = None  # of the run's end
        self.start = 0.0

    def count(self, what):
        self.seen[what] += 1
        if what == self.how and self.seen[what] == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if what != self.phase and self.phase is not None:
            self.count(self.phase)

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()
        os.write(self.begun, b".")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.phase = "last step"
        self.count("event")

    def on_save(self, args, state, control, **kwargs):
        self.count("event")
        if state.global_step == state.max_steps:
            self.phase = "last checkpoint"

    def on_train_end(self, args, state, control, **kwargs):
        self.phase = "last checkpoint"
        self.count("event")

    def on_file(self, event, args):
        """An audit hook: files are opened, renamed and deleted. Those of a model come in the final save alone."""
        if self.phase == "final save" and event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            self.count("file")


for name in ("substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "log"):
    setattr(Counts, f"on_{name}", lambda self, args, state, control, **kwargs: self.count("event"))


def train(folder: Path, trainer_class, setting: dict, counts: Counts) -> None:
    """One run to its end, from the newest whole checkpoint if there is one."""
    setting = {"save_steps": 1, **setting}
    lora = setting.pop("lora", False)
    trainer = make_trainer(
        folder,
        trainer_class,
        teacher_model=make_teacher(),
        callbacks=[counts],
        peft_config=make_lora(lora_dropout=0.1) if lora else None,
        train_dataset=make_dataset(copies=2).add_column("completion", ["3", "7", "11", "15"] * 2),
        max_steps=STEPS,
        learning_rate=0.02,
        save_strategy="steps",
        save_total_limit=2,
        **setting,
    )
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda *_: counts.count("forward"))
    trainer.train(resume_from_checkpoint=True if whole_checkpoint(folder) else None)
    counts.count("event")
    counts.phase = "final save"
    sys.addaudithook(counts.on_file)
    trainer.save_model(str(folder / "model"))
    counts.phase = None
    entries = [
        {name: value for name, value in entry.items() if "time" not in name}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    save_file(weights(trainer), folder / "weights.safetensors")
    (folder / "log.json").write_text(json.dumps(entries, sort_keys=True))
    figures = {**counts.seen, "seconds": time.monotonic() - counts.start}
    (folder / "figures.json").write_text(json.dumps(figures))


def fork(folder: Path, trainer_class, setting: dict, how=None, at=0) -> int:
    """Process id of a run that has begun to train, or has ended before that."""
    folder.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.enable()  # a crash leaves its place in the output
            train(folder, trainer_class, setting, Counts(write, how, at))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    return process


def was_killed(process: int, folder: Path) -> bool:
    """Wait for the end of a run: whether it was killed, or done."""
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise RuntimeError(f"wait status {status}\n" + (folder / "output.txt").read_text()[-3000:])
    return False


def whole_checkpoint(folder: Path) -> Path | None:
    with contextlib.suppress(ValueError):
        return Path(last_whole_checkpoint(folder))


def steps_done(folder: Path) -> int:
    checkpoint = whole_checkpoint(folder)
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def run_and_kill(folder: Path, trainer_class, setting: dict, kill: Kill, figures: dict) -> bool:
    """Start or resume a run and kill it: whether it was not done before."""
    done = steps_done(folder)
    share = kill.share * (1 if kill.how in END_KINDS else 1 - done / STEPS)
    at = 1 + int(share * figures[kill.how]) if kill.how in figures else 0
    every = setting.get("save_steps", 1)
    step = done + every * (1 + int(kill.share * ((STEPS - done) // every)))
    checkpoint = folder / f"checkpoint-{step}"
    if kill.how == "writing":
        shutil.rmtree(checkpoint, ignore_errors=True)  # what a kill before may have left of it
    process = fork(folder, trainer_class, setting, kill.how, at)
    if kill.how == "outside":
        time.sleep(share * figures["seconds"])
        os.kill(process, signal.SIGKILL)  # also of one that is done: it has not been waited for
    if kill.how == "writing":
        while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if checkpoint.exists() and len(os.listdir(checkpoint)) >= kill.files:
                os.kill(process, signal.SIGKILL)
                break
            time.sleep(1e-4)
    return was_killed(process, folder)


def kill_once(folder: Path, trainer_class, setting: dict, how: str, figures: dict, draws: random.Random) -> None:
    """Start or resume a run and kill it before it is done, or at its end."""
    before = folder.with_name("before")
    while True:
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            shutil.copytree(folder, before)
        kill = Kill(how, draws.random(), draws.randint(1, 10))
        killed = run_and_kill(folder, trainer_class, setting, kill, figures)
        if killed and (how in END_KINDS or steps_done(folder) < STEPS):
            return
        shutil.rmtree(folder)  # the run was done first: once more
        if before.exists():
            shutil.copytree(before, folder)


def main(output: str, part: str = "all") -> None:
    logging.getLogger("trl_cmdp").setLevel(logging.ERROR)  # not to say of each checkpoint that it was cut off
    seen, survived, of = Counter(), Counter(), Counter()
    draws = random.Random(0)
    trainers = TRAINERS
    if part == "end":
        trainers = {"constrained": (ConstrainedDistillTrainer, [{"cost_limit": 1.7, "num_iterations": 2}])}
    for name, (trainer_class, settings) in trainers.items():
        kinds = KINDS * (2 * len(settings) // len(KINDS))
        draws.shuffle(kinds)
        for index, setting in enumerate(settings):
            whole, killed = (Path(output, f"{name}-{index}-{which}") for which in ("whole", "killed"))
            was_killed(fork(whole, trainer_class, setting), whole)
            figures = json.loads((whole / "figures.json").read_text())
            at_the_end = [kind for place, kind in enumerate(END_KINDS) if place != index % 3]
            hows = END_KINDS if part == "end" else [kinds.pop(), kinds.pop(), *at_the_end]
            of[name] += len(hows)
            for how in hows:
                kill_once(killed, trainer_class, setting, how, figures, draws)
                checkpoint = whole_checkpoint(killed)
                steps = [int(path.name.rpartition("-")[2]) for path in killed.glob("checkpoint-*")]
                seen[how] += 1
                seen["cut off"] += max(steps, default=0) > steps_done(killed)
                seen["in a cycle"] += checkpoint is not None and any(checkpoint.glob("trl_cmdp_rollouts_*"))
            was_killed(fork(killed, trainer_class, setting), killed)
            models = [path.relative_to(whole) for path in whole.glob("model/*model.safetensors")]
            differing = [
                str(file)
                for file in ("weights.safetensors", "log.json", *models)
                if (whole / file).read_bytes() != (killed / file).read_bytes()
            ]
            if differing or not models:
                print(f"{name} {setting}: {' and '.join(differing)} differ", flush=True)
                continue
            survived[name] += len(hows)
            shutil.rmtree(whole)
            shutil.rmtree(killed)
    counts = ", ".join(f"{name} {survived[name]}/{of[name]}" for name in trainers)
    how = ", ".join(f"{kind} {seen[kind]}" for kind in [*KINDS, *END_KINDS, "cut off", "in a cycle"])
    print(f"kills survived {survived.total()} of {of.total()} ({counts}; {how})")


if __name__ == "__main__":
    main(*sys.argv[1:])
