"""Minute vision-language models of four families, with processors of a character tokenizer, and images."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from helpers import CHARACTERS, EOS, PAD, make_tokenizer
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)


class _QwenImageProcessor(Qwen2_5_VLProcessor):
    """Without its part for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.video_token = tokenizer.image_token, tokenizer.video_token
        self.image_token_id, self.video_token_id = tokenizer.image_token_id, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


FAMILIES = ("gemma", "idefics", "llava", "qwen")
# The token that stands for a part of an image, which the processor repeats; and what a prompt has for a whole one.
IMAGE_TOKENS = {"gemma": "<soft>", "idefics": "<image>", "llava": "<image>", "qwen": "<|image_pad|>"}
_PLACEHOLDERS = {**IMAGE_TOKENS, "gemma": "<boi>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>"}
_SPECIAL = {
    "gemma": {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    "idefics": {
        "image_token": "<image>",
        "fake": "<fake_token_around_image>",
        "global": "<global-img>",
        "end": "<end_of_utterance>",
    },
    "llava": {"image_token": "<image>"},
    "qwen": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    },
}
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": EOS,
    "tie_word_embeddings": False,
}
_TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}PLACEHOLDER{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def make_processor(family: str, characters: str = f"{CHARACTERS}\n", size: int = 8) -> ProcessorMixin:
    """Processor of images of `size` pixels, which makes four tokens of one of 8 (and LLaVA-NeXT ten)."""
    tokenizer = make_tokenizer(characters)
    special = _SPECIAL[family]
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    named = {name: token for name, token in special.items() if name.endswith("_token")}
    tokenizer.init_kwargs["extra_special_tokens"] = named
    for name, token in named.items():
        tokenizer._set_model_specific_special_tokens({name: token})
    template = _TEMPLATE.replace("PLACEHOLDER", _PLACEHOLDERS[family])
    square = {"height": size, "width": size}
    if family == "gemma":
        images = Gemma3ImageProcessorPil(size=square)
        return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    if family == "idefics":
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": size}, max_image_size={"longest_edge": size}, do_image_splitting=False
        )
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    if family == "llava":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": size}, crop_size=square, image_grid_pinpoints=[[size, size]]
        )
        return LlavaNextProcessor(
            images, tokenizer, patch_size=4, vision_feature_select_strategy="full", chat_template=template
        )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=1, size={"shortest_edge": size * size, "longest_edge": size * size}
    )
    return _QwenImageProcessor(images, tokenizer, chat_template=template)


def make_vlm(family: str, seed: int = 0, processor: ProcessorMixin | None = None, **text: Any) -> PreTrainedModel:
    """Model whose answers depend on its images."""
    tokenizer = (processor or make_processor(family)).tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL[family].values()}
    image = ids[IMAGE_TOKENS[family]]
    text = {**_TEXT, "vocab_size": len(tokenizer), **text}
    torch.manual_seed(seed)
    if family == "gemma":
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={**text, "head_dim": 8, "query_pre_attn_scalar": 8},
                vision_config={**_TOWER, "image_size": 8, "patch_size": 4},
                mm_tokens_per_image=4,
                image_token_index=image,
                boi_token_index=ids["<boi>"],
                eoi_token_index=ids["<eoi>"],
            )
        )
    elif family == "idefics":
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(
                text_config={**text, "model_type": "llama"},
                vision_config={**_TOWER, "image_size": 8, "patch_size": 4},
                scale_factor=1,
                image_token_id=image,
                pad_token_id=PAD,
                tie_word_embeddings=False,
            )
        )
    elif family == "llava":
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                text_config={**text, "model_type": "llama"},
                vision_config={**_TOWER, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
                image_token_index=image,
                image_grid_pinpoints=[[8, 8]],
                vision_feature_layer=-1,
                vision_feature_select_strategy="default",
                tie_word_embeddings=False,
            )
        )
    else:
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    **text,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 8,
                    "intermediate_size": 8,
                    "num_heads": 2,
                    "out_hidden_size": text["hidden_size"],
                    "patch_size": 4,
                    "spatial_merge_size": 1,
                    "fullatt_block_indexes": [0],
                },
                image_token_id=image,
                video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"],
                vision_end_token_id=ids["<|vision_end|>"],
                tie_word_embeddings=False,
            )
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # so that what the tower says weighs as much as the tokens
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and (
                "vision" in name or "visual" in name or "project" in name or "connector" in name
            ):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.float()


def make_seeing_teacher(family: str, seed: int = 1) -> PreTrainedModel:
    """Teacher of another width."""
    return make_vlm(family, seed, hidden_size=32, num_attention_heads=4)


def make_image(seed: int) -> Image.Image:
    """Image of random pixels, 8 high, and of an odd seed twice as wide."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8 * (1 + seed % 2), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_image_dataset(num_images: tuple[int, ...] = (1, 2, 1, 1), copies: int = 2, seed: int = 0) -> Dataset:
    """Prompts of a message, and for each as many images as `num_images` says."""
    prompts = ["1+2=", "3+4=", "5+6=", "7+8="] * copies
    counts = [num_images[index % len(num_images)] for index in range(len(prompts))]
    images = [
        [make_image(1000 * seed + 10 * row + number) for number in range(count)] for row, count in enumerate(counts)
    ]
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": prompt}] for prompt in prompts], "images": images}
    )


def dense_logits(model: PreTrainedModel, processor: ProcessorMixin, row: dict, completion: list[int]) -> torch.Tensor:
    """Full logits (L, V) of one row alone, from its own images, at which the completion's tokens were sampled."""
    parts = [*[{"type": "image"}] * len(row["images"]), {"type": "text", "text": row["prompt"][0]["content"]}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}])
    inputs = dict(processor(images=[row["images"]] if row["images"] else None, text=[text], return_tensors="pt"))
    ids = torch.tensor([completion])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full_like(ids, name == "attention_mask")], 1)
    return model(**inputs).logits[0, -(len(completion) + 1) : -1].double()
