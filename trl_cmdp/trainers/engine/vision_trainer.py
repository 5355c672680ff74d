"""A `GRPOTrainer` whose prompts may have images in some rows and none in others."""

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from ..._prompts import images_of
from ...teachers import base_model, without_no_images
from .resumable_trainer import ResumableGRPOTrainer


class VisionGRPOTrainer(ResumableGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that trains on prompts with and without images in one dataset, at which TRL fails. The only
    change is how it is told of prompts without.

    Takes the arguments of [`~trl.GRPOTrainer`].
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for model in (self.model, self.ref_model) if self._is_vlm else ():
            if model is not None:
                _leave_out_no_images(base_model(self.accelerator.unwrap_model(model)))

    def _generate(self, prompts):
        *others, images, tool_images = super()._generate(prompts)
        if images is not None:  # of a prompt without any it is `None`, which processors do not take
            images = [of_prompt or [] for of_prompt in images]
        return *others, images, tool_images

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]):
        if not any(map(images_of, inputs)):
            # TRL sees by empty lists that it reads text alone.
            inputs = [{**row, "images": []} if {"image", "images"} & row.keys() else row for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        if _in_rows(**output):
            output["num_images"] = [1] * len(output["pixel_values"])
        return output

    def _get_per_token_logps_and_entropies(self, *args: Any, **inputs: Any):
        if _in_rows(**inputs):
            inputs["num_images"] = [1] * len(inputs["pixel_values"])
        return super()._get_per_token_logps_and_entropies(*args, **inputs)


def _in_rows(pixel_values: torch.Tensor | None = None, image_sizes: torch.Tensor | None = None, **others: Any) -> bool:
    """
    Whether there is a row of images for each prompt, padded (Idefics). Where there are as many images as prompts TRL takes
    it for one for each image, unless it is told of one for each prompt.
    """
    return pixel_values is not None and pixel_values.dim() == 5 and image_sizes is None


def _leave_out_no_images(model: PreTrainedModel) -> None:
    """Let a model read the rows of text in a micro-batch without images, which TRL hands it as none at all."""
    forward_of_all = model.forward

    @functools.wraps(type(model).forward)  # PEFT and `generate` look at its signature
    def forward(_, *args, **kwargs):
        return forward_of_all(*args, **without_no_images(kwargs))

    model.forward = forward.__get__(model)
