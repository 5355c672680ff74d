"""A `GRPOTrainer` whose prompts may have images in some rows and none in others."""

from typing import Any

from ..._prompts import images_of
from .resumable_trainer import ResumableGRPOTrainer


class VisionGRPOTrainer(ResumableGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that trains on prompts with and without images in one dataset, at which TRL fails. The only
    change is how it is told of prompts without.

    Takes the arguments of [`~trl.GRPOTrainer`].
    """

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
        pixels = output.get("pixel_values")
        if pixels is not None and pixels.dim() == 5 and "image_sizes" not in output:
            # Idefics has a row of images for each prompt. TRL takes it for one for each image where both are as many.
            output["num_images"] = [1] * len(pixels)
        return output
