"""What `evaluate` and `calibrate` load of a student whose problems have images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

ADAPTER_FILE = "adapter_config.json"


def tokenizer_source(student: str) -> str:
    """Where the tokenizer of a student is: of an adapter without one, that of its base."""
    folder = Path(student)
    if (folder / ADAPTER_FILE).exists() and not (folder / "tokenizer_config.json").exists():
        return str(json.loads((folder / ADAPTER_FILE).read_text())["base_model_name_or_path"])
    return student


def fingerprint_of_problems(problems: "Dataset") -> str:
    """Of the rows as they are stored: images are not decoded."""
    from ..core.fingerprint import fingerprint_of_rows

    return fingerprint_of_rows(problems.with_format("arrow")[:].to_pylist())


def load_processor(student: str, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> "ProcessorMixin":
    """Processor of a student, with its tokenizer as it was loaded and the chat template that is asked for."""
    from transformers import AutoProcessor, ProcessorMixin

    processor = AutoProcessor.from_pretrained(tokenizer_source(student), trust_remote_code=False)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"The problems have images, and the student {student!r} has no processor beside its tokenizer. Evaluate a "
            "vision-language model, or remove the images."
        )
    processor.tokenizer = tokenizer
    if chat_template is not None:
        processor.chat_template = chat_template
    return processor


def load_adapter(student: str, is_trainable: bool, **options: Any) -> "PeftModel":
    """An adapter on its vision-language base."""
    from peft import PeftConfig, PeftModel  # an optional dependency

    from ..teachers import load_model

    config = PeftConfig.from_pretrained(student)
    base = load_model(config.base_model_name_or_path, True, revision=config.revision or "main", **options)
    return PeftModel.from_pretrained(base, student, is_trainable=is_trainable)
