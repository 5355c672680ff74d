"""The images in a batch of rollouts: which inputs of a model they are, and how they are split among its rows."""

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid


# Inputs of a model, by the names that TRL gives a batch. Rows of the first kind are images, their patches or tiles.
OF_IMAGES = (
    "pixel_values",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_position_ids",
    "image_sizes",
    "spatial_shapes",
)
OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
_OF_ROWS = tuple(f"{part}_{kind}" for part in ("prompt", "teacher_prompt", "completion") for kind in ("ids", "mask"))
_COUNTS = ("num_images", "num_tiles")  # by which TRL splits what is of images among the rows


def take_rows(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The rollouts of some rows of a batch, with their images. What else the batch holds is left out."""
    split = split_pixel_values_by_grid(batch)
    taken = {
        name: split[name][rows] if isinstance(split[name], torch.Tensor) else [split[name][row] for row in rows]
        for name in (*_OF_ROWS, *OF_IMAGES, *OF_TOKENS, *_COUNTS)
        if name in split
    }
    return unsplit_pixel_values_by_grid(taken)


def model_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a model reads of a batch: prompts and completions as one, and their images."""
    inputs = {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
    }
    return inputs | without_no_images({name: batch[name] for name in (*OF_IMAGES, *OF_TOKENS) if name in batch})


def without_no_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a model without those of images where there are none: rows of text alone, in a batch that has some."""
    pixels, mask = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
    # Idefics has images of padding in each row without one of its own, and fails where there are no others.
    if pixels is None or (pixels.numel() > 0 and (mask is None or bool(mask.any()))):
        return inputs
    return {name: values for name, values in inputs.items() if name not in OF_IMAGES}
