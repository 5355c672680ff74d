"""What student and teacher must agree on before they are compared: the tokens, and what ends a turn."""

from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)


def check_vocabulary(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher_config: PretrainedConfig
) -> PreTrainedTokenizerBase | None:
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

    Returns:
        [`~transformers.PreTrainedTokenizerBase`] or `None`: The teacher's tokenizer, if it was found.

    Raises:
        ValueError: If the tokenizers differ, or the vocabulary sizes do and no tokenizer proves them padding.
    """
    student_size = student.config.get_text_config().vocab_size
    teacher_size = teacher_config.get_text_config().vocab_size
    teacher_tokenizer = own_tokenizer(teacher_config)
    if teacher_tokenizer is None:
        if student_size != teacher_size:
            raise ValueError(
                f"The student has a vocabulary of {student_size} tokens and the teacher of {teacher_size}, and the "
                "teacher's tokenizer could not be found to tell padding from another vocabulary. Pass the teacher as "
                "a path or hub id that holds its tokenizer, or use a teacher with the student's vocabulary."
            )
        logger.warning("Assuming that the teacher uses the student's tokenizer: their vocabularies have equal size.")
        return None
    # Tokens past the head are inputs alone (`<|image|>` of Llama-3.2-Vision): no distribution is over them.
    vocab = {token: index for token, index in tokenizer.get_vocab().items() if index < student_size}
    teacher_vocab = {token: index for token, index in teacher_tokenizer.get_vocab().items() if index < teacher_size}
    if vocab == teacher_vocab:
        return teacher_tokenizer
    differing = [
        token for token in sorted(set(vocab) | set(teacher_vocab)) if vocab.get(token) != teacher_vocab.get(token)
    ]
    raise ValueError(
        f"Student and teacher have different tokenizers: {len(differing)} tokens differ, for example "
        f"{', '.join(repr(token) for token in differing[:5])}. The divergence compares next-token distributions token "
        "by token, so both must share one tokenizer. Choose a teacher of the student's model family (or, across "
        "tokenizers, TRL's GOLD)."
    )


def own_tokenizer(teacher_config: PretrainedConfig) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer, looked up where its config came from; `None` if there is none."""
    source = teacher_config.name_or_path
    if not source:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        logger.warning(f"No tokenizer found for the teacher at {source!r} ({type(error).__name__}).")
        return None


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """
    Every token that ends a completion: those that the model declares, and the tokenizer's EOS.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            The model's.

    Returns:
        `list[int]`: Token ids.

    Raises:
        ValueError: If the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so nothing says what ends a completion. Set `tokenizer.eos_token` to the "
            "token with which the model ends its answers."
        )
    declared = _declared(generation_config)
    return [*declared, *([] if tokenizer.eos_token_id in declared else [tokenizer.eos_token_id])]


def end_ids(
    tokenizer: PreTrainedTokenizerBase, student_stops: list[int], teacher_eos_token: str | None
) -> tuple[int, int] | None:
    """
    The tokens with which student and teacher end a turn, to be treated as one stop action ([`OneStopTeacher`]).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both.
        student_stops (`list[int]`):
            What ends a completion of the student.
        teacher_eos_token (`str`, *optional*):
            Token with which the teacher ends a turn.

    Returns:
        `tuple[int, int]` or `None`: The student's and the teacher's, `None` where they are one token or none is given.

    Raises:
        ValueError: If it is no token of the tokenizer.
    """
    if teacher_eos_token is None:
        return None
    teacher_end = tokenizer.get_vocab().get(teacher_eos_token)
    if teacher_end is None:
        raise ValueError(
            f"`teacher_eos_token={teacher_eos_token!r}` is no token of the tokenizer. Give the token with which the "
            "teacher ends a turn, as '<|im_end|>'."
        )
    student_end = _end_of_turn(tokenizer, student_stops)
    return None if student_end == teacher_end else (student_end, teacher_end)


def warn_of_another_end(
    tokenizer: PreTrainedTokenizerBase,
    student_stops: list[int],
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    teacher_generation_config: GenerationConfig | None,
) -> None:
    """
    Warn where the teacher ends a turn with a token that does not end the student's.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Student's tokenizer.
        student_stops (`list[int]`):
            What ends a completion of the student.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Teacher's tokenizer, for its EOS and chat template.
        teacher_generation_config ([`~transformers.GenerationConfig`], *optional*):
            Teacher's.
    """
    if teacher_tokenizer is not None and teacher_tokenizer.eos_token_id is not None:
        teacher_end = _end_of_turn(teacher_tokenizer, stop_ids(teacher_tokenizer, teacher_generation_config))
    elif declared := _declared(teacher_generation_config):
        teacher_end = declared[0]
    else:
        return
    if teacher_end in student_stops:
        return
    token = tokenizer.convert_ids_to_tokens(teacher_end)
    stops = ", ".join(f"{tokenizer.convert_ids_to_tokens(stop)!r} ({stop})" for stop in student_stops)
    logger.warning(
        f"The teacher ends a turn with {token!r} ({teacher_end}), and the student's completions end at {stops} alone. At "
        "the end of an answer the teacher then asks for a token that does not end it, and the student unlearns to stop: "
        "`completions/clipped_ratio` rises to 1 while the divergence falls. Set "
        f"`teacher_eos_token={token!r}`, which counts the teacher's end of turn as the student's."
    )


def teacher_generation_config(source: str) -> GenerationConfig | None:
    """Generation config of a checkpoint that is not loaded here, `None` if it has none."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return None


def _declared(generation_config: GenerationConfig | None) -> list[int]:
    ids: Any = None if generation_config is None else generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    """Of the tokens that end a completion the one that the chat template ends an answer with, otherwise the EOS."""
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
        written = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        if ends := [token for token in written if token in stops]:
            return ends[-1]
    return tokenizer.eos_token_id
