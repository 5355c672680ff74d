"""What a teacher of prompts with images must agree on with the student: that it reads them as the student does."""

from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from .images import OF_IMAGES, OF_TOKENS
from .local import LocalTeacher
from .server_teacher import SERVERS_READ_TEXT, ServerTeacher
from .teacher import Teacher


_WIDTH, _HEIGHT = 96, 64  # small enough that the most pixels that a processor keeps play no part
_ROUNDING = 0.05  # of a pixel's value, by how much two ways to resize differ
_SAME = 0.01  # share of its size by which a reading of equal rows may differ: each rounds its own way
_MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1+2="}]}]


def check_images(teacher: Teacher, processor: PreTrainedTokenizerBase | ProcessorMixin, device: torch.device) -> None:
    """
    Check that a teacher reads images as the student's processor prepares them, and looks at them.

    Args:
        teacher ([`Teacher`]):
            Teacher.
        processor ([`~transformers.ProcessorMixin`]):
            The student's processor.
        device (`torch.device`):
            Device of what the teacher reads.

    Raises:
        ValueError: If it does not, or if the student has a tokenizer in place of a processor.
    """
    if isinstance(teacher, ServerTeacher):
        raise ValueError(SERVERS_READ_TEXT)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"The data has images, and the student a tokenizer ({type(processor).__name__}), which reads text alone. Take "
            "a vision-language model as the student and its processor, "
            "`processing_class=AutoProcessor.from_pretrained(...)`, or remove the images."
        )
    if isinstance(teacher, LocalTeacher):
        _check_processor(processor, teacher.config)
    _check_reading(teacher, processor, device)


def _check_processor(processor: ProcessorMixin, teacher_config: PretrainedConfig) -> None:
    """Compare the student's processor with the teacher's, if there is one where the teacher came from."""
    source = teacher_config.name_or_path
    if not source:
        return
    try:
        other = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (ImportError, OSError, ValueError):
        return
    if not isinstance(other, ProcessorMixin):
        return
    gradient = Image.linear_gradient("L").resize((_WIDTH, _HEIGHT)).convert("RGB")
    text = processor.apply_chat_template(_MESSAGES, add_generation_prompt=True)
    try:
        own, others = (one(images=[[gradient]], text=[text], return_tensors="pt") for one in (processor, other))
    except Exception as error:  # of many kinds: of a family whose prompts have another placeholder
        raise ValueError(_differing(source, f"{type(error).__name__}: {error}")) from error
    if own["input_ids"].shape != others["input_ids"].shape:
        lengths = own["input_ids"].size(1), others["input_ids"].size(1)
        raise ValueError(
            _differing(
                source, f"of one image of {_WIDTH} × {_HEIGHT} pixels they make {lengths[0]} and {lengths[1]} tokens"
            )
        )
    if not own["input_ids"].equal(others["input_ids"]):
        place = int((own["input_ids"] != others["input_ids"]).nonzero()[0, 1])
        tokens = own["input_ids"][0, place].item(), others["input_ids"][0, place].item()
        raise ValueError(_differing(source, f"in an image's place they put the tokens {tokens[0]} and {tokens[1]}"))
    for name in OF_IMAGES:
        if (name in own) != (name in others):
            raise ValueError(_differing(source, f"one alone makes `{name}`"))
        if name in own and own[name].shape != others[name].shape:
            shapes = tuple(own[name].shape), tuple(others[name].shape)
            raise ValueError(_differing(source, f"their `{name}` have the shapes {shapes[0]} and {shapes[1]}"))
        if name in own and (own[name].float() - others[name].float()).abs().max() > _ROUNDING:
            raise ValueError(
                _differing(source, f"their `{name}` have other values (look at `image_mean`, `image_std`)")
            )


def _differing(source: str, how: str) -> str:
    return (
        f"The processors of student and teacher ({source!r}) prepare images differently: {how}. The teacher reads the "
        "student's token ids and images, so both must take them alike. Use a teacher of the student's model family and "
        "version, or its processor for both."
    )


@torch.no_grad()
def _check_reading(teacher: Teacher, processor: ProcessorMixin, device: torch.device) -> None:
    """Ask the teacher for one token after two images."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (_HEIGHT, _WIDTH, 3), generator=generator, dtype=torch.uint8).numpy()
    images = [[Image.new("RGB", (_WIDTH, _HEIGHT))], [Image.fromarray(noise)]]
    text = processor.apply_chat_template(_MESSAGES, add_generation_prompt=True)
    batch: Any = processor(images=images, text=[text] * 2, padding=True, return_tensors="pt")
    names = {"input_ids", "attention_mask", *OF_IMAGES, *OF_TOKENS}
    inputs = {name: values.to(device) for name, values in batch.items() if name in names}
    try:
        one, other = teacher.hidden_states(**inputs, mask=torch.ones(2, 1, dtype=torch.bool, device=device))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            "The teacher cannot read images as the student's processor prepares them "
            f"({type(error).__name__}: {error}). Student and teacher must have the same image token, as many of them for "
            "an image, and the same inputs: use a vision-language teacher of the student's model family, one of those that "
            f"read no others than TRL hands on ({', '.join((*OF_IMAGES, *OF_TOKENS))})."
        ) from error
    if (one - other).norm() <= _SAME * one.norm():  # false of NaN, which the first step names
        raise ValueError(
            "The teacher does not look at images: what it says after two of them is the same. It is a model of text "
            "alone, or was loaded as one. Use a vision-language teacher of the student's model family, as an instance "
            "`AutoModelForImageTextToText.from_pretrained(...)`."
        )
