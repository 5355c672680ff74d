"""
The files of a checkpoint from which a run continues exactly, and the recognition of those that were cut off.

A checkpoint is written in this order: transformers' model, optimizer, schedule and random states; here the method's
state, each process's rollouts that its generation cycle still needs, and a list of all these files with their sizes;
transformers' trainer state. Only then are older checkpoints deleted. A checkpoint is whole if its trainer state and its
list can be read and no file of the list is shorter than it was. One without a list is another trainer's: of ours, one
that was cut off before the list lacks the trainer state too.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_map, tree_map_only
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


METHOD_STATE_FILE = "trl_cmdp_state.json"
PROGRESS_FILE = "trl_cmdp_progress.json"
ROLLOUTS_FILE = "trl_cmdp_rollouts_{process}.safetensors"

_logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- whole or cut off


def last_whole_checkpoint(output_dir: str | Path) -> str:
    """The newest checkpoint of a folder that is whole. Newer ones that are not are passed over with a warning."""
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
    """Refuse a checkpoint that cannot be resumed from."""
    fault = _fault(Path(checkpoint))
    if fault is not None:
        raise ValueError(
            f"{checkpoint} cannot be resumed from: {fault}. It was cut off while it was written: pass "
            "`resume_from_checkpoint=True` for the newest whole one."
        )


def _fault(checkpoint: Path) -> str | None:
    """What a checkpoint lacks of being whole, `None` if it is."""
    # TRL's controller of the entropy has a `_state.json` too, which it writes after all the others.
    found = [path.name for pattern in ("*_state.json", PROGRESS_FILE) for path in checkpoint.glob(pattern)]
    contents = {}
    for name in sorted({TRAINER_STATE_NAME, *found}):
        try:
            contents[name] = json.loads((checkpoint / name).read_text())
        except OSError:
            return f"{name} is missing"
        except ValueError:
            return f"{name} is cut off"
    for name, size in contents.get(PROGRESS_FILE, {"files": {}})["files"].items():
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


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of each file of a folder, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


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
