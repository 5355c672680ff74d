"""Prompts of a teacher's own, behind which it reads the student's completions (the dataset's `teacher_prompt`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .._prompts import Prompt, check_chat_template, encode_prompt, prompt_fault
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


def encode_teacher_prompts(
    prompts: Sequence[Prompt],
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of a teacher's own prompts, as the trainers make them. The arguments are those of the student's prompts."""
    own = template_tokenizer(teacher, tokenizer)
    for index, prompt in enumerate(prompts):
        if (fault := prompt_fault(prompt)) is not None:
            raise ValueError(f"Row {index}: the prompt (column 'teacher_prompt') {fault}")
    messages = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if messages is not None:
        check_teacher_template(own, tokenizer, messages, chat_template, chat_template_kwargs)
    of_messages = (tokenizer, chat_template) if own is None else (own, None)
    return [
        encode_prompt(tokenizer, prompt)
        if isinstance(prompt, str)
        else encode_prompt(of_messages[0], prompt, of_messages[1], chat_template_kwargs)
        for prompt in prompts
    ]


def max_length(teacher: Teacher) -> int | None:
    """Length of the longest sequence, prompt and completion, that a teacher can read; `None` if nothing bounds it."""
    if isinstance(teacher, ServerTeacher):
        # The last token is not sent for hidden states; for log-probabilities the server writes one more.
        return teacher.remote.max_model_len + (1 if teacher.exact else -1)
    return teacher.max_length


def check_room(teacher: Teacher, prompt_length: int, completion_length: int, row: str) -> None:
    """Check that a teacher can read a prompt of its own and the longest completion. `row` is what an error names."""
    longest, needed = max_length(teacher), prompt_length + completion_length
    if longest is not None and needed > longest:
        raise ValueError(
            f"{row}: its `teacher_prompt` of {prompt_length} tokens and a completion of up to {completion_length} are "
            f"{needed} tokens, and the teacher reads {longest} at most. Shorten one of them, leave the row out, or use a "
            "teacher with more positions (of a server, a larger `--max-model-len`)."
        )
