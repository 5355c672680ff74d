"""
Checkpoints from which a run goes on as if it had never stopped, and the recognition of those that were cut off.

A checkpoint is written in this order: transformers' model, optimizer, schedule and random states; here the method's
state, each process's rollouts that its generation cycle still needs, and a list of all these files with their sizes;
transformers' trainer state. Only then are older checkpoints deleted. A checkpoint is whole if its trainer state and its
list can be read and no file of the list is shorter than it was. One without a list is another trainer's: of ours, one
that was cut off before the list lacks the trainer state too.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_map, tree_map_only
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


if TYPE_CHECKING:
    from ._base import DistillTrainer


_METHOD_STATE_FILE = "trl_cmdp_state.json"
_PROGRESS_FILE = "trl_cmdp_progress.json"
_ROLLOUTS_FILE = "trl_cmdp_rollouts_{process}.safetensors"

_logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- whole or cut off


def last_whole_checkpoint(output_dir: str | Path) -> str:
    """
    The newest checkpoint of a folder that is whole. Newer ones that are not are passed over with a warning.

    Args:
        output_dir (`str` or `Path`):
            Folder of the run.

    Raises:
        ValueError: If there is none.
    """
    steps = {
        path: int(step)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (step := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit()
    }
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        fault = _fault(path)
        if fault is None:
            return str(path)
        _logger.warning(f"{path} is not whole and is passed over: {fault}.")
    raise ValueError(
        f"There is no whole checkpoint in {output_dir} to resume from. Train without `resume_from_checkpoint`, which "
        "overwrites what is there."
    )


def check_whole(checkpoint: str | Path) -> None:
    """
    Refuse a checkpoint that cannot be resumed from.

    Args:
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.

    Raises:
        ValueError: If it is not whole.
    """
    fault = _fault(Path(checkpoint))
    if fault is not None:
        raise ValueError(
            f"{checkpoint} cannot be resumed from: {fault}. It was cut off while it was written: pass "
            "`resume_from_checkpoint=True` for the newest whole one."
        )


def _fault(checkpoint: Path) -> str | None:
    """What a checkpoint lacks of being whole, `None` if it is."""
    # TRL's controller of the entropy has a `_state.json` too, which it writes after all the others.
    found = [path.name for pattern in ("*_state.json", _PROGRESS_FILE) for path in checkpoint.glob(pattern)]
    contents = {}
    for name in sorted({TRAINER_STATE_NAME, *found}):
        try:
            contents[name] = json.loads((checkpoint / name).read_text())
        except OSError:
            return f"{name} is missing"
        except ValueError:
            return f"{name} is cut off"
    for name, size in contents.get(_PROGRESS_FILE, {"files": {}})["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} is cut off ({path.stat().st_size} of {size} bytes)"
    return None


def start_checkpoint(folder: Path) -> None:
    """Whatever an earlier run left in the folder is not whole from now on."""
    for path in [folder / TRAINER_STATE_NAME, *folder.glob("trl_cmdp_*")]:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- a run's progress


def save_progress(trainer: "DistillTrainer", folder: Path) -> None:
    """
    Write into a checkpoint what transformers and TRL do not: the last files but for the trainer's state.

    Args:
        trainer ([`DistillTrainer`]):
            Trainer, at the end of an optimizer step.
        folder (`Path`):
            Folder of the checkpoint.
    """
    if _micro_steps_left(trainer, trainer._step):
        save_tree(folder / _ROLLOUTS_FILE.format(process=trainer.accelerator.process_index), _rollouts_left(trainer))
    state = trainer._method_state() if trainer.teachers else {}
    if state and trainer.args.should_save:
        (folder / _METHOD_STATE_FILE).write_text(json.dumps(state))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        progress = {
            "step": trainer._step,
            "batches": _batches(trainer),
            "logging_window": _logging_window(trainer),
            "entropy": [trainer.entropy_coef, trainer._last_world_entropy],
            "files": {
                str(path.relative_to(folder)): path.stat().st_size
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        }
        (folder / _PROGRESS_FILE).write_text(json.dumps(progress))


def load_progress(trainer: "DistillTrainer", checkpoint: Path) -> None:
    """
    Go on where [`save_progress`] was. Rollouts of a cycle that this run would split otherwise are left behind, with a
    warning.

    Args:
        trainer ([`DistillTrainer`]):
            Trainer, with the trainer state of the checkpoint.
        checkpoint (`Path`):
            Folder of a whole checkpoint.

    Raises:
        ValueError: If another method wrote it.
    """
    if trainer.teachers and trainer._method_state():
        path = checkpoint / _METHOD_STATE_FILE
        if not path.exists():
            raise ValueError(
                f"{checkpoint} has no {_METHOD_STATE_FILE}, so it was not written by {type(trainer).__name__}: "
                "resuming would start the method's own state anew. Load its weights as `model` instead."
            )
        trainer._load_method_state(json.loads(path.read_text()))

    if trainer._train_sampler is not None:  # TRL's draws an order per epoch from its own random state
        for _ in range(int(trainer.state.epoch)):
            next(iter(trainer._train_sampler))
    # Where the data are, so that generation cycles begin where the sampler's do even if this one begins anew.
    trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    trainer._buffered_inputs = None
    if not (checkpoint / _PROGRESS_FILE).exists():
        _logger.warning(
            f"{checkpoint} has no {_PROGRESS_FILE}, so another trainer wrote it. If that was in the middle of a "
            "generation cycle, its rollouts are lost and the rest of the cycle is generated anew."
        )
        return

    progress = json.loads((checkpoint / _PROGRESS_FILE).read_text())
    if trainer.use_adaptive_entropy:  # TRL writes it after older checkpoints are deleted
        trainer.entropy_coef, trainer._last_world_entropy = progress["entropy"]
    window = progress["logging_window"]
    trainer._metrics["train"].update(window["metrics"])
    if trainer.teachers:
        trainer._sums["train"].update(window["sums"])
        trainer._maxima["train"].update(window["maxima"])

    saved, batches = progress["batches"], _batches(trainer)
    if saved == batches:
        trainer._step = progress["step"]
        if _micro_steps_left(trainer, trainer._step):
            path = checkpoint / _ROLLOUTS_FILE.format(process=trainer.accelerator.process_index)
            trainer._buffered_inputs = load_tree(path, trainer.accelerator.device)
    elif progress["step"] % (saved["steps_per_generation"] * saved["num_iterations"]):
        changed = [f"{name} {saved[name]}, now {batches[name]}" for name in saved if saved[name] != batches[name]]
        _logger.warning(
            f"{checkpoint} was saved in the middle of a generation cycle, whose rollouts this run cannot split as it "
            f"was begun ({'; '.join(changed)}). They are left behind and the rest of the cycle is generated anew: the "
            "weights will not be those of the run that was never interrupted."
        )


def _batches(trainer: "DistillTrainer") -> dict[str, int]:
    """What decides how rollouts are split over processes and steps."""
    args = trainer.args
    return {
        "processes": trainer.accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": args.num_iterations,
        "num_generations": args.num_generations,
    }


def _micro_steps_left(trainer: "DistillTrainer", step: int) -> int:
    """Micro-steps that the generation cycle still has, 0 at its end."""
    return -step % (trainer.args.steps_per_generation * trainer.num_iterations)


def _rollouts_left(trainer: "DistillTrainer") -> list[dict[str, Any] | None]:
    """The micro-batches that the generation cycle still needs, `None` in the places of the others."""
    left, parts = _micro_steps_left(trainer, trainer._step), trainer.args.steps_per_generation
    needed = {(trainer._step + ahead) % parts for ahead in range(min(left, parts))}
    return [batch if part in needed else None for part, batch in enumerate(trainer._buffered_inputs)]


def _logging_window(trainer: "DistillTrainer") -> dict[str, Any]:
    """What has been counted since the last log."""
    metrics = {name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()}
    if not trainer.teachers:
        return {"metrics": metrics}
    return {"metrics": metrics, "sums": trainer._sums["train"], "maxima": trainer._maxima["train"]}


# ---------------------------------------------------------------------------------------------------- tensors on disk


def save_tree(path: Path, tree: Any) -> None:
    """Dictionaries and lists of tensors and of what JSON has, as one safetensors file."""
    tensors: dict[str, torch.Tensor] = {}

    def stored(tensor: torch.Tensor) -> dict[str, Any]:
        name = str(len(tensors))
        # A copy, as safetensors refuses tensors that share memory.
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "on_host": tensor.device.type == "cpu"}

    structure = tree_map_only(torch.Tensor, stored, tree)
    save_file(tensors, path, metadata={"structure": json.dumps(structure)})


def load_tree(path: Path, device: torch.device) -> Any:
    """What [`save_tree`] wrote, its tensors in host memory or on `device` as they were; tuples are lists."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        structure = json.loads(file.metadata()["structure"])

    def is_tensor(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == {"tensor", "on_host"}

    def restored(leaf: Any) -> Any:
        if not is_tensor(leaf):
            return leaf
        tensor = tensors[leaf["tensor"]]
        return tensor if leaf["on_host"] else tensor.to(device)

    return tree_map(restored, structure, is_leaf=is_tensor)
