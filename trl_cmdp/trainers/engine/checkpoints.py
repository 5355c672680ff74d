"""
The files of a checkpoint from which a run continues exactly, and the recognition of those that cannot be continued from.

A checkpoint is written in this order: transformers' model, optimizer, schedule and random states; here the method's
state, each process's rollouts that its generation cycle still needs, and a list of all these files with their sizes and
digests; transformers' trainer state. Only then are older checkpoints deleted. A checkpoint is whole if its trainer state
and its list are what they should be, the files are those of the list, and its weights are finite. One without a list is
another trainer's: of ours, one that was cut off before the list lacks the trainer state too.
"""

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_map, tree_map_only
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .guards import RefusedRun
from .run_identity import REWARDS, RunIdentity


METHOD_STATE_FILE = "trl_cmdp_state.json"
PROGRESS_FILE = "trl_cmdp_progress.json"
ROLLOUTS_FILE = "trl_cmdp_rollouts_{process}.safetensors"
_ENTROPY_FILE, _ENTROPY_KEYS = (
    "entropy_ctrl_state.json",
    {"entropy_coef", "last_world_entropy"},
)  # TRL's, after the list

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
_BLOCK = 2**20
_EVERY = 64  # of a larger file one block in so many is digested

_logger = logging.getLogger(__name__)


class _Fault(Exception):
    """Why a checkpoint cannot be continued from."""


# -------------------------------------------------------------------------------------------- the checkpoints of a run


def step_of(folder: Path) -> int | None:
    """Step of a checkpoint by its name, `None` for a folder that is none."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def newest_first(output_dir: str | Path) -> list[Path]:
    """
    The checkpoints of a folder, the last written first: by session, as a later one may have begun at an earlier step.
    Neither the clock nor the folders' times decide. One that was cut off is taken for one of the last session.
    """
    found = [path for path in Path(output_dir).glob("*") if step_of(path) is not None and path.is_dir()]
    sessions = {path: _session_of(path) for path in found}
    last = max(sessions.values(), default=0)
    return sorted(found, key=lambda path: (sessions[path] or last, step_of(path)), reverse=True)


def newest_written(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end. What was damaged since is not looked for."""
    return next((path for path in newest_first(output_dir) if (path / TRAINER_STATE_NAME).exists()), None)


def saved_step(checkpoint: str | Path) -> int:
    """Optimizer step that a whole checkpoint was saved at, whatever its folder is called."""
    step: int = _read_object(Path(checkpoint) / TRAINER_STATE_NAME)["global_step"]
    return step


def next_session(output_dir: str | Path) -> int:
    """Number of a training that begins now: above that of each that has left a checkpoint in the folder."""
    return 1 + max(map(_session_of, newest_first(output_dir)), default=0)


def last_whole_checkpoint(output_dir: str | Path, identity: RunIdentity | None = None) -> str:
    """
    The newest checkpoint of a folder that is whole, and of the run if one is given. Newer ones that are not are passed
    over with a warning.
    """
    others = []
    for path in newest_first(output_dir):
        fault = _fault(path)
        other = None if fault else _difference(path, identity)
        if fault is None and other is None:
            return str(path)
        if other is not None:
            others.append(f"{path} cannot be resumed from: {other}.")
        _logger.warning(
            f"{path} is not whole and is passed over: {fault}." if fault else f"{path} is passed over: {other}."
        )
    if others:
        raise RefusedRun(f"{others[0]} {_ANOTHER_RUN}")
    raise RefusedRun(
        f"There is no whole checkpoint in {output_dir} to resume from. Train without `resume_from_checkpoint`, which "
        "overwrites what is there."
    )


_ANOTHER_RUN = (
    "Resume with that run's arguments, or train into another `output_dir`. If a change is meant, name it: "
    "`resume_with_changes=['learning_rate']`."
)


def check_whole(checkpoint: str | Path, identity: RunIdentity | None = None) -> None:
    """Refuse a checkpoint that cannot be resumed from, or is not of the run if one is given."""
    fault = _fault(Path(checkpoint))
    if fault is not None:
        raise RefusedRun(
            f"{checkpoint} cannot be resumed from: {fault}. It was cut off while it was written, or damaged since: pass "
            "`resume_from_checkpoint=True` for the newest whole one."
        )
    other = _difference(Path(checkpoint), identity)
    if other is not None:
        raise RefusedRun(f"{checkpoint} cannot be resumed from: {other}. {_ANOTHER_RUN}")


def make_room(output_dir: str | Path, identity: RunIdentity, overwrite: bool) -> None:
    """
    Before a run begins anew: its folder holds no other run's checkpoints. They are deleted if that is asked for, and
    otherwise refused. Those of the same run, begun before, stay until this one writes its own.
    """
    if overwrite:
        for path in newest_first(output_dir):
            shutil.rmtree(path)
    whole = next((path for path in newest_first(output_dir) if _fault(path) is None), None)
    if whole is None:
        return
    other = _difference(whole, identity) if (whole / PROGRESS_FILE).exists() else "another trainer wrote it"
    if other is None:
        _logger.warning(
            f"The run begins anew although {whole} is there. `trainer.train(resume_from_checkpoint=True)` continues it."
        )
        return
    raise RefusedRun(
        f"{output_dir} holds another run. Of {whole}: {other}. Take another `output_dir`, or delete that run's "
        "checkpoints with `overwrite_output_dir=True`."
    )


def delete_older(newest: Path, limit: int, best: str | None) -> None:
    """Delete checkpoints beside the newest one until `limit` are left, those that were cut off and the oldest first."""
    kept = {path.resolve() for path in (newest, *([] if best is None else [Path(best)]))}
    others = [path for path in newest_first(newest.parent) if path.resolve() not in kept]
    others.sort(key=lambda path: _session_of(path) == 0)
    for path in others[max(0, limit - len(kept)) :]:
        shutil.rmtree(path, ignore_errors=True)


def _session_of(checkpoint: Path) -> int:
    """Number of the training that wrote it, 0 if that is not known."""
    try:
        return read_progress(checkpoint)["session"]
    except _Fault:
        return 0


def _difference(checkpoint: Path, identity: RunIdentity | None) -> str | None:
    """What says that another run wrote a whole checkpoint. Another trainer's says nothing of its run."""
    if identity is None or not (checkpoint / PROGRESS_FILE).exists():
        return None
    found = read_progress(checkpoint)["run"]
    difference = identity.differences(found)
    if difference is None and found[REWARDS] != identity.parts[REWARDS]:
        _logger.warning(
            f"{checkpoint} was trained for the rewards {', '.join(found[REWARDS])}, and from here on the reward is "
            f"{', '.join(identity.parts[REWARDS])}."
        )
    return difference


# ------------------------------------------------------------------------------------------------- whole or cut off


def start_checkpoint(folder: Path) -> None:
    """Whatever an earlier run left in the folder is not whole from now on."""
    for path in [folder / TRAINER_STATE_NAME, *folder.glob("trl_cmdp_*")]:
        path.unlink(missing_ok=True)


def write_progress(folder: Path, content: dict[str, Any]) -> None:
    """The last file of ours, with a digest of its own."""
    content = {**content, "files": {name: _seal(folder / name) for name in _files(folder)}}
    text = json.dumps(content)
    (folder / PROGRESS_FILE).write_text(json.dumps({"sha256": _sha256(text), **content}))


def read_progress(folder: Path) -> dict[str, Any]:
    """What [`write_progress`] wrote."""
    content = _read_object(folder / PROGRESS_FILE)
    if content.pop("sha256", None) != _sha256(json.dumps(content)):
        raise _Fault(f"{PROGRESS_FILE} is not as it was written")
    return content


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be continued from, `None` if it is whole."""
    try:
        state = _read_object(checkpoint / TRAINER_STATE_NAME)
        if not _is_trainer_state(state):
            raise _Fault(f"{TRAINER_STATE_NAME} is not what a trainer writes")
        path = checkpoint / _ENTROPY_FILE
        if path.exists() and not _read_object(path).keys() >= _ENTROPY_KEYS:
            raise _Fault(f"{_ENTROPY_FILE} is not what a trainer writes")
        if (checkpoint / PROGRESS_FILE).exists():
            progress = read_progress(checkpoint)
            if progress["global_step"] != state["global_step"]:
                raise _Fault(f"{TRAINER_STATE_NAME} is of another checkpoint")
            for name, seal in progress["files"].items():
                _check_file(checkpoint / name, name, *seal)
        _check_weights(checkpoint)
    except _Fault as fault:
        return str(fault)
    return None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError:
        raise _Fault(f"{path.name} is missing") from None
    except (ValueError, RecursionError):
        raise _Fault(f"{path.name} is cut off or damaged") from None
    if not isinstance(content, dict):
        raise _Fault(f"{path.name} holds no JSON object")
    return content


def _is_trainer_state(state: dict[str, Any]) -> bool:
    """Whether its values have the types that transformers resumes from, those of a fresh state."""
    fresh = vars(TrainerState())
    if not {"epoch", "global_step", "log_history"} <= state.keys() <= fresh.keys():
        return False
    of_type = [
        _is_number(state[name]) if _is_number(like) else isinstance(state[name], type(like))
        for name, like in fresh.items()
        if like is not None and state.get(name) is not None
    ]
    return (
        all(of_type)
        and isinstance(state["global_step"], int)
        and _is_number(state["epoch"])
        and isinstance(state["log_history"], list)
        and all(isinstance(entry, dict) for entry in state["log_history"])
        and isinstance(state.get("best_model_checkpoint"), str | None)
        and (state.get("best_metric") is None or isinstance(state["best_metric"], int | float))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _check_file(path: Path, name: str, size: int, digest: str) -> None:
    if not path.is_file():
        raise _Fault(f"{name} is missing")
    found, found_digest = _seal(path)
    if found < size:
        raise _Fault(f"{name} is cut off ({found} of {size} bytes)")
    # What is longer was changed by somebody, and not by what ended the run: its reader sees to it, if that is not us.
    if found_digest != digest and (found == size or name.startswith("trl_cmdp_")):
        raise _Fault(f"{name} is not as it was written")


def _check_weights(checkpoint: Path) -> None:
    """The weights of the model can be read, and are finite."""
    ours = ROLLOUTS_FILE.partition("{")[0]
    for path in sorted(path for path in checkpoint.rglob("*.safetensors") if not path.name.startswith(ours)):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no dictionary)
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.isfinite().all():
                        raise _Fault(f"{path.name} holds weights that are not finite ({name})")
        except (SafetensorError, OSError) as error:
            raise _Fault(f"{path.name} cannot be read ({error})") from None


def _files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())


def _seal(path: Path) -> tuple[int, str]:
    """Size in bytes of a file, and a digest: of a large one of a block in so many, the first and the last among them."""
    size, digest = path.stat().st_size, hashlib.sha256()
    blocks = math.ceil(size / _BLOCK)
    step = 1 if blocks <= _EVERY else _EVERY
    with path.open("rb") as file:
        for block in [*range(0, blocks - 1, step), blocks - 1] if blocks else []:
            file.seek(block * _BLOCK)
            digest.update(file.read(_BLOCK))
    return size, digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
