"""Sampling rollouts, as the trainers do: same prompt format, same end of a completion."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .._prompts import Prompt
from ..teachers import base_model, check_sampling, keep_differentiable, stop_ids
from .images import AnyProcessor, collate, encode, tokenizer_of


@dataclass(frozen=True)
class Rollout:
    """
    One completion of one prompt.

    Args:
        prompt (`str` or `list[dict[str, Any]]`):
            Prompt, text or messages.
        completion (`str`):
            Completion as text, without special tokens.
        prompt_ids (`list[int]`):
            Tokens of the prompt.
        completion_ids (`list[int]`):
            Tokens of the completion, the end-of-sequence token included where there is one.
        teacher_prompt_ids (`list[int]`, *optional*):
            Tokens that the teacher reads in the place of `prompt_ids`, `None` where it reads these.
        images (`Mapping[str, torch.Tensor]`, *optional*):
            What a model reads of the prompt's images, by the names of its inputs.
    """

    prompt: Prompt
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    teacher_prompt_ids: list[int] | None = None
    images: Mapping[str, torch.Tensor] = field(default_factory=dict)


def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: AnyProcessor,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> list[Rollout]:
    """
    One rollout per prompt, from the full distribution at `temperature` (no top-k, no top-p), or greedy.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to sample from. Put in eval mode for the call.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer, with a padding token, or for prompts with images its processor.
        prompts (`Sequence[str | list[dict[str, Any]]]`):
            Prompts: text, or messages for the chat template, images in their parts `{"type": "image", "image": ...}`.
        max_new_tokens (`int`):
            Longest completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        greedy (`bool`, *optional*, defaults to `False`):
            Take the most likely token instead of sampling.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts generated at a time. Part of what the seed means: another size draws other samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The global random state is left as it was.
        chat_template (`str`, *optional*):
            Chat template in place of the tokenizer's own.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the chat template, such as `{"enable_thinking": False}`.
        progress (`Callable[[int, int], Any]`, *optional*):
            Called with (done, total) after each batch.

    Returns:
        `list[Rollout]`: Rollouts in the order of the prompts.

    Raises:
        ValueError: If the tokenizer has no padding token, or the model does not generate from its own distribution.
    """
    processing_class, tokenizer = tokenizer, tokenizer_of(tokenizer)
    end_ids = eos_ids(model, tokenizer)
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no padding token. Set `tokenizer.pad_token`, for example to its EOS.")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_ids,
        disable_compile=True,
        # As in training: it would stand for an image that there is none of.
        suppress_tokens=[base_model(model).config.image_token_id]
        if isinstance(processing_class, ProcessorMixin)
        else None,
        **({} if greedy else {"temperature": temperature, "top_k": 0, "top_p": 1.0}),
    )
    keep_differentiable(model)  # it may be trained afterwards
    training = model.training
    model.eval()
    rollouts: list[Rollout] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), _no_own_generation_config(model):
        check_sampling("model", model)
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            encoded = [encode(processing_class, prompt, chat_template, chat_template_kwargs) for prompt in batch]
            batch_ids, batch_images = map(list, zip(*encoded, strict=True))
            inputs = tokenizer.pad({"input_ids": batch_ids}, padding=True, padding_side="left", return_tensors="pt")
            inputs = inputs.to(model.device)
            length = inputs["input_ids"].size(1)
            images = collate(batch_images, [length - len(ids) for ids in batch_ids], length, model.device)
            output = model.generate(**inputs, **images, generation_config=config)  # type: ignore[operator]
            completions = output[:, length:].tolist()
            for prompt, prompt_ids, own_images, ids in zip(batch, batch_ids, batch_images, completions, strict=True):
                end = next((i + 1 for i, token in enumerate(ids) if token in end_ids), len(ids))
                text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
                rollouts.append(Rollout(prompt, text, prompt_ids, ids[:end], images=own_images))
            if progress is not None:
                progress(len(rollouts), len(prompts))
    model.train(training)
    return rollouts


@contextmanager
def _no_own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    # transformers fills what our config leaves open from the model's own: a repetition penalty, a smallest probability.
    owners = {id(owner): owner for owner in (model, base_model(model))}.values()  # PEFT keeps one of its own
    kept = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that the model declares to end a completion, and the tokenizer's."""
    return stop_ids(tokenizer, base_model(model).generation_config)
