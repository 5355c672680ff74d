"""Prompts of a teacher's own, behind which it reads the student's completions (the dataset's `teacher_prompt`)."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._prompts import check_chat_template
from .agreement import own_tokenizer
from .local import LocalTeacher
from .server_teacher import ServerTeacher
from .teacher import Teacher


_OF_TEACHER = "the teacher (column 'teacher_prompt')"


def template_tokenizer(
    teacher: Teacher, processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer whose chat template renders a teacher's own prompts.

    Args:
        teacher ([`Teacher`]):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Student's tokenizer or processor.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`] or `None`: The teacher's own. `None` where its prompts are rendered as
        the student's are: both have one template, the teacher is the student's base or another adapter of it, or no
        tokenizer of the teacher was found.
    """
    if isinstance(teacher, LocalTeacher):
        config = teacher.config
    elif isinstance(teacher, ServerTeacher):
        config = teacher.remote.config
    else:
        return None
    own = own_tokenizer(config)
    return None if own is None or own.chat_template == processing_class.chat_template else own


def check_teacher_template(
    tokenizer: PreTrainedTokenizerBase | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    messages: list[dict[str, Any]],
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """
    Check that messages can be rendered for a teacher.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            What [`template_tokenizer`] returned.
        processing_class, chat_template:
            Student's tokenizer or processor, and the template in place of its own, which render where it is `None`.
        messages (`list[dict[str, Any]]`):
            Prompt of the teacher.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of either template.

    Raises:
        ValueError: If they cannot.
    """
    if tokenizer is not None and tokenizer.chat_template is None:
        raise ValueError(
            f"The prompts of {_OF_TEACHER} are messages, and the teacher's own tokenizer ({tokenizer.name_or_path!r}) has "
            "no chat template. Make text of them, or save a chat template with that tokenizer."
        )
    if tokenizer is not None:
        processing_class, chat_template = tokenizer, None
    check_chat_template(processing_class, messages, _OF_TEACHER, chat_template, chat_template_kwargs)
