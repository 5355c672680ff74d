"""The teacher's own prompts of a trainer: the dataset's column `teacher_prompt`, as tokens."""

from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer

from ..._prompts import TEACHER_PROMPT_IMAGES, encode_prompt, images_of, prompt_fault
from ...teachers import check_room, check_teacher_template, max_length, template_tokenizer
from .checks import named_datasets
from .teachers import teacher_index


class TeacherPrompts:
    """
    What each rollout's teacher reads in the place of the prompt, where the dataset has a column `teacher_prompt`. Text
    becomes tokens as a `prompt` does; messages are rendered with the teacher's own chat template where it has another.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer, with its teachers.

    Attributes:
        used (`bool`): Whether the datasets have the column.

    Raises:
        ValueError: If messages cannot be rendered, a row leaves no room for the completion in the positions of its
            teacher, or the teacher is mixed into the turns between tools.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer, self._names = trainer, list(trainer.teachers)
        self._teachers = list(trainer.teachers.values())
        datasets = {
            name: dataset
            for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset).items()
            if "teacher_prompt" in next(iter(dataset or []), {})
        }
        self.used = "training" in datasets
        if not self.used:
            return
        if trainer.tools and trainer._teacher_mixed_alpha > 0:
            raise ValueError(
                "With tools a teacher that has prompts of its own (column 'teacher_prompt') cannot be mixed in: set "
                "`teacher_mixed_alpha=0`."
            )
        self._tokenizers = [template_tokenizer(teacher, trainer.processing_class) for teacher in self._teachers]
        for name, dataset in datasets.items():
            self._check(name, dataset)

    def _check(self, name: str, dataset: Any) -> None:
        """Check that messages can be rendered, by the first row, and that every row leaves room for the completion."""
        trainer, first = self._trainer, next(iter(dataset))["teacher_prompt"]
        if not isinstance(first, str):
            for tokenizer in self._tokenizers:
                check_teacher_template(
                    tokenizer, trainer.processing_class, first, trainer.chat_template, trainer.chat_template_kwargs
                )
        if isinstance(dataset, Dataset) and any(max_length(one) is not None for one in self._teachers):
            for index, row in enumerate(dataset):
                self._encode(row, f"Row {index} of the {name} dataset")

    def token_ids(self, rows: list[dict[str, Any]]) -> list[list[int]] | None:
        """Token ids of the teacher's prompt of each row, `None` where the datasets have no such column."""
        if any(("teacher_prompt" in row) != self.used for row in rows):
            raise ValueError(
                "Some rows of the datasets have a 'teacher_prompt' and some have none: the costs would be of teachers that "
                "see more or less. Give every row one, in evaluation too, and leave `remove_unused_columns` at false."
            )
        if not self.used:
            return None
        if any(map(images_of, rows)):
            raise ValueError(TEACHER_PROMPT_IMAGES)
        return [self._encode(row, f"The row with the prompt {str(row.get('prompt'))[:60]!r}") for row in rows]

    def padded(self, prompt_ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (B, P), padded on the left as the student's prompts are."""
        padded = self._trainer._tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
        padded = padded.to(self._trainer.accelerator.device)
        return padded["input_ids"], padded["attention_mask"]

    def _encode(self, row: dict[str, Any], what: str) -> list[int]:
        trainer, prompt = self._trainer, row["teacher_prompt"]
        if (fault := prompt_fault(prompt)) is not None:  # of a stream, which is not read ahead
            raise ValueError(f"{what}: the prompt (column 'teacher_prompt') {fault}")
        index = int(teacher_index([row], self._names, torch.device("cpu")))
        if isinstance(prompt, str) or self._tokenizers[index] is None:
            ids = trainer._tokenize_prompts([prompt])[0][0]
        else:
            kwargs = {"tools": trainer.tools or None, **trainer.chat_template_kwargs}
            ids = encode_prompt(self._tokenizers[index], prompt, chat_template_kwargs=kwargs)
        check_room(self._teachers[index], len(ids), trainer.max_completion_length, what)
        return ids
