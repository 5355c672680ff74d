"""A teacher whose weights are in this process: loading it, and what it says."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..core import Head
from ..core.fingerprint import fingerprint_of_weights
from .models import base_model, embedding, is_plain_linear, last_hidden_state, lm_head, num_positions, predicting
from .offload import Offload, check_can_be_offloaded
from .quantized import allow_fast_kernel
from .teacher import Teacher


class LocalTeacher:
    """
    A [`Teacher`] in this process. Any causal language model can be read as one, a student in evaluation too.

    Args:
        module (`torch.nn.Module`):
            A [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], frozen and in eval mode if it is a teacher, as
            `accelerator` (or DeepSpeed) prepared it if there is one.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Whose autocast the forward runs under.
    """

    exact = True
    ahead = 0

    def __init__(self, module: torch.nn.Module, accelerator: Accelerator | None = None):
        self.module = module
        self._accelerator = accelerator
        self._unwrapped = module if accelerator is None else accelerator.unwrap_model(module)
        self._model = base_model(self._unwrapped)
        self.config = self._model.config
        self.vocab_size: int = embedding(self._model).num_embeddings
        self.max_length = num_positions(self.config)
        self._called_head: Head | None = None
        self._offload = Offload()

    def autocast(self) -> AbstractContextManager[None]:
        """What the forward runs under."""
        return nullcontext() if self._accelerator is None else self._accelerator.autocast()

    @torch.no_grad()
    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, **images: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (N, H), see [`Teacher`]."""
        self._offload.load(self.module)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **images}
        with self.autocast():
            hidden = last_hidden_state(self.module, self._model.get_output_embeddings(), **inputs)
        return predicting(hidden, mask.size(1))[mask]

    def head(self) -> Head:
        """Head, gathered where FSDP2 shards it. One that has to be called is kept, as a teacher's does not change."""
        if is_plain_linear(self._model.get_output_embeddings()):
            return lm_head(self._model)
        if self._called_head is None:
            self._called_head = lm_head(self._model)
        return self._called_head

    def leave_in(self, offload: Offload) -> None:
        """
        Have the weights on the device for [`~LocalTeacher.hidden_states`] alone; the head's, which losses read, always.

        Args:
            offload ([`Offload`]):
                Shared by the teachers of which one at a time is on the device.

        Raises:
            ValueError: If they cannot be moved.
        """
        check_can_be_offloaded(self._model)
        head = self.head()  # one that has to be called is called while the weights are there
        offload.add(self.module, kept=(head.weight, head.bias))
        self._offload = offload

    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint_of_weights(self._unwrapped.named_parameters())


def offloaded(teachers: Iterable[Teacher]) -> Offload:
    """Have the weights of those teachers that are in this process in host memory while nothing is asked of them."""
    offload = Offload()
    for teacher in teachers:
        if isinstance(teacher, LocalTeacher):
            teacher.leave_in(offload)
    offload.unload()
    return offload


def load_model(source: str, with_images: bool = False, **kwargs: Any) -> PreTrainedModel:
    """
    A checkpoint as a causal language model.

    Args:
        source (`str`):
            Path of a local folder, or model id on the Hub.
        with_images (`bool`, *optional*, defaults to `False`):
            Load the whole of a vision-language model. Otherwise of one that has a part for text alone (Llama 3.2 Vision)
            that part is loaded.
        kwargs:
            Keyword arguments of `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`]: The model.
    """
    first, second = AutoModelForCausalLM, AutoModelForImageTextToText
    if with_images:
        first, second = second, first
    try:
        return first.from_pretrained(source, **kwargs)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    return second.from_pretrained(source, **kwargs)


def load_teacher(
    teacher_model: str | PreTrainedModel,
    revision: str | None = None,
    init_kwargs: dict[str, Any] | None = None,
    with_images: bool = False,
) -> PreTrainedModel:
    """
    Teacher from a path, a hub id or an instance: frozen, in eval mode, in its checkpoint's own dtype.

    Remote code is never trusted unless `init_kwargs` says so: the student's `trust_remote_code` is not passed on.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            Path of a local folder, model id on the Hub, or an instance, also a [`~peft.PeftModel`].
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained`. Unless given `dtype` is `"auto"`, `trust_remote_code` is `False` and
            `use_safetensors` is `True`: no pickle is read.
        with_images (`bool`, *optional*, defaults to `False`):
            As in [`load_model`].

    Returns:
        [`~transformers.PreTrainedModel`]: The teacher.

    Raises:
        ValueError: If `init_kwargs` or `revision` are given for an instance, which is loaded already, or the checkpoint
            is not one of a causal language model.
    """
    if isinstance(teacher_model, str):
        # `None`, the default of transformers, asks on the terminal whether to run remote code.
        kwargs = {"dtype": "auto", "trust_remote_code": False, "use_safetensors": True, **(init_kwargs or {})}
        if revision is not None:
            kwargs.setdefault("revision", revision)
        teacher_model = load_model(teacher_model, with_images, **kwargs)
    elif init_kwargs is not None or revision is not None:
        raise ValueError(
            "`teacher_model_init_kwargs` and `teacher_model_revision` apply to a teacher given as a path or a hub id, "
            "but `teacher_model` is an instance. Load it with them, or pass its path."
        )
    allow_fast_kernel(teacher_model)
    return teacher_model.eval().requires_grad_(False)
