"""A teacher whose weights are in this process: loading, vocabulary check, hidden states."""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from trl.models.utils import _ForwardRedirection

from ..core import Head
from ..core.fingerprint import fingerprint_of_weights
from .models import base_model, last_hidden_state, lm_head, predicting
from .quantized import allow_fast_kernel


logger = logging.get_logger(__name__)


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

    def __init__(self, module: torch.nn.Module, accelerator: Accelerator | None = None):
        self.module = module
        self._accelerator = accelerator
        self._unwrapped = module if accelerator is None else accelerator.unwrap_model(module)
        self._model = base_model(self._unwrapped)
        self.vocab_size: int = self._model.get_input_embeddings().num_embeddings

    @torch.no_grad()
    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, H), see [`Teacher`]."""
        with nullcontext() if self._accelerator is None else self._accelerator.autocast():
            # Inside the forward of the wrapper, which gathers what it shards.
            hidden = _ForwardRedirection()(
                self.module,
                self._unwrapped,
                last_hidden_state,
                self._model,
                input_ids=input_ids,
                attention_mask=attention_mask,
            )
        return predicting(hidden, mask.size(1))[mask]

    def head(self) -> Head:
        """Head, gathered where FSDP2 shards it."""
        return lm_head(self._model)

    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint_of_weights(self._unwrapped.named_parameters())


def load_teacher(
    teacher_model: str | PreTrainedModel, revision: str | None = None, init_kwargs: dict[str, Any] | None = None
) -> PreTrainedModel:
    """
    Teacher from a path, a hub id or an instance: frozen, in eval mode, in its checkpoint's own dtype.

    Remote code is never trusted unless `init_kwargs` says so: the student's `trust_remote_code` is not passed on.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            Path of a local folder, model id on the Hub, or an instance.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained`. Unless given `dtype` is `"auto"`, `trust_remote_code` is `False` and
            `use_safetensors` is `True`: no pickle is read.

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
        try:
            teacher_model = AutoModelForCausalLM.from_pretrained(teacher_model, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"{error}\nOf a vision-language model that has no causal language model of its own in transformers "
                "(Qwen2.5-VL) pass an instance, `AutoModelForImageTextToText.from_pretrained(...)`: it can be a teacher "
                "on text."
            ) from error
    elif init_kwargs is not None or revision is not None:
        raise ValueError(
            "`teacher_model_init_kwargs` and `teacher_model_revision` apply to a teacher given as a path or a hub id, "
            "but `teacher_model` is an instance. Load it with them, or pass its path."
        )
    allow_fast_kernel(teacher_model)
    return teacher_model.eval().requires_grad_(False)


def check_vocabulary(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher_config: PretrainedConfig
) -> None:
    """
    Check that student and teacher mean the same by every token id. Heads may differ in padding (Qwen2.5 pads one
    tokenizer to 151,936 and to 152,064): only the shared ids are compared.

    Args:
        student ([`~transformers.PreTrainedModel`]):
            Student.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.
        teacher_config ([`~transformers.PretrainedConfig`]):
            Teacher's config. Its tokenizer is looked up where the config came from.

    Raises:
        ValueError: If the tokenizers differ, or the vocabulary sizes do and no tokenizer proves them padding.
    """
    student_size = student.config.get_text_config().vocab_size
    teacher_size = teacher_config.get_text_config().vocab_size
    source = teacher_config.name_or_path
    teacher_tokenizer = None
    if source:
        try:
            teacher_tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            logger.warning(f"No tokenizer found for the teacher at {source!r} ({type(error).__name__}).")
    if teacher_tokenizer is None:
        if student_size != teacher_size:
            raise ValueError(
                f"The student has a vocabulary of {student_size} tokens and the teacher of {teacher_size}, and the "
                "teacher's tokenizer could not be found to tell padding from another vocabulary. Pass the teacher as "
                "a path or hub id that holds its tokenizer, or use a teacher with the student's vocabulary."
            )
        logger.warning("Assuming that the teacher uses the student's tokenizer: their vocabularies have equal size.")
        return
    # Tokens past the head are inputs alone (`<|image|>` of Llama-3.2-Vision): no distribution is over them.
    vocab = {token: index for token, index in tokenizer.get_vocab().items() if index < student_size}
    teacher_vocab = {token: index for token, index in teacher_tokenizer.get_vocab().items() if index < teacher_size}
    if vocab == teacher_vocab:
        return
    differing = [
        token for token in sorted(set(vocab) | set(teacher_vocab)) if vocab.get(token) != teacher_vocab.get(token)
    ]
    raise ValueError(
        f"Student and teacher have different tokenizers: {len(differing)} tokens differ, for example "
        f"{', '.join(repr(token) for token in differing[:5])}. The divergence compares next-token distributions token "
        "by token, so both must share one tokenizer. Choose a teacher of the student's model family (or, across "
        "tokenizers, TRL's GOLD)."
    )
