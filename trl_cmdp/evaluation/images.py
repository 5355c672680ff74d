"""Prompts with images in evaluation: their tokens and inputs row by row, and how a batch of rows is put together."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image

from .._prompts import Prompt, encode_prompt, parts_of, with_images
from ..teachers import OF_IMAGES, OF_TOKENS
from .rollout_records import IMAGE_PREFIX


AnyProcessor = PreTrainedTokenizerBase | ProcessorMixin

_PREVIEW_SIZE = 256  # pixels of a side


def tokenizer_of(processing_class: AnyProcessor) -> PreTrainedTokenizerBase:
    """A tokenizer itself, or the one of a processor."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def encode(
    processing_class: AnyProcessor,
    prompt: Prompt,
    chat_template: str | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Token ids of a prompt, and what a model reads of its images."""
    if isinstance(prompt, str) or not isinstance(processing_class, ProcessorMixin):
        return encode_prompt(tokenizer_of(processing_class), prompt, chat_template, chat_template_kwargs), {}
    encoded: Any = processing_class.apply_chat_template(
        [with_images({"prompt": prompt})],
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **(chat_template_kwargs or {}),
    )
    inputs = {name: encoded[name] for name in (*OF_IMAGES, *OF_TOKENS) if name in encoded}
    return encoded["input_ids"][0].tolist(), inputs


def collate(
    rows: Sequence[Mapping[str, torch.Tensor]], starts: Sequence[int], length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """
    Inputs of a model for the images of some rows.

    Args:
        rows (`Sequence[Mapping[str, torch.Tensor]]`):
            What [`encode`] gave for each.
        starts (`Sequence[int]`):
            Index at which each row's prompt begins.
        length (`int`):
            Length L of the padded rows.
        device (`torch.device`):
            Device of the result.

    Returns:
        `dict[str, torch.Tensor]`: Of images those of all rows, one after the other; of tokens `(B, L)`.
    """
    inputs: dict[str, torch.Tensor] = {}
    for name in OF_IMAGES:
        if found := [row[name] for row in rows if name in row]:
            shape = [max(sizes) for sizes in zip(*(values.shape[1:] for values in found), strict=True)]
            inputs[name] = torch.cat([_padded(values, shape) for values in found]).to(device)
    for name in OF_TOKENS:
        if any(name in row for row in rows):
            kinds = torch.zeros(len(rows), length, dtype=torch.long)
            for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
                if name in row:
                    kinds[index, start : start + row[name].size(1)] = row[name][0]
            inputs[name] = kinds.to(device)
    return inputs


def _padded(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Values (n, ...) with zeros up to the shape of each: the tiles and images that processors pad with."""
    missing = [size - own for size, own in zip(shape, values.shape[1:], strict=True)]
    return torch.nn.functional.pad(values, [amount for size in reversed(missing) for amount in (0, size)])


def previews(prompt: Prompt) -> list[str] | None:
    """Small copies of the images of a prompt, as records and reports have them; `None` where there are none."""
    return [_preview(part["image"]) for part in parts_of(prompt) if part["type"] == "image"] or None


def _preview(image: Any) -> str:
    small = load_image(image).convert("RGB")
    small.thumbnail((_PREVIEW_SIZE, _PREVIEW_SIZE))
    with io.BytesIO() as file:
        small.save(file, "JPEG", quality=80)
        return IMAGE_PREFIX + base64.b64encode(file.getvalue()).decode()
