"""A `GRPOTrainer` whose completions need not be the student's own: how methods get others to train on."""

from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch

from ..._prompts import TEACHER_PROMPT_IMAGES, with_images
from ...teachers import LocalTeacher, Offload, check_images, check_sampling
from .forward import StudentForward
from .mixture import check_mixing
from .processes import on_any_process
from .teacher_prompts import TeacherPrompts
from .teachers import Teacher
from .vision_trainer import VisionGRPOTrainer


class OffPolicyGRPOTrainer(VisionGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that with a teacher can also train on completions of the dataset, of the teacher, or of a
    mixture of student and teacher. The only change is where training completions come from.

    Takes the arguments of [`~trl.GRPOTrainer`].
    """

    teachers: dict[str, Teacher]
    _student_forward: StudentForward
    _offload: Offload
    _teacher_mixed_alpha = 0.0  # share of the teacher in what training rollouts are sampled from
    _samples_from_teacher = False
    _ends: tuple[int, int] | None = None  # of a turn, the student's and the teacher's, where both are one stop action
    _rows: list[dict[str, Any]]  # of the dataset, that are being generated for
    _teacher_prompts: TeacherPrompts
    _teacher_prompt_ids: list[list[int]] | None = None  # of these rows, where the teacher has prompts of its own
    _multimodal_fields: Mapping[str, Any] = MappingProxyType({})  # what their images are to a model
    _images_are_checked = False

    @property
    def teacher_model(self) -> torch.nn.Module | None:
        """The teacher's module, where a single teacher is in this process; `teachers` has all of them."""
        teachers = list(self.teachers.values())
        return teachers[0].module if len(teachers) == 1 and isinstance(teachers[0], LocalTeacher) else None

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def latest_teacher_prompts(self) -> list[str]:
        """What the teachers read before this process's latest rollouts, where they have prompts of their own."""
        return [self._tokenizer.decode(ids) for ids in self._teacher_prompt_ids or []]

    def _check_images(self) -> None:
        """Once: before training or, where only a later row has an image or a tool returns one, with the first of them."""
        if self._images_are_checked:
            return
        with self._offload.unloaded_afterwards():
            for teacher in self.teachers.values():
                check_images(teacher, self.processing_class, self.accelerator.device)
        self._images_are_checked = True

    def _off_policy_completions(self, prompt_ids: list[list[int]]) -> list[list[int]] | None:
        """Token ids of the training completions that are not sampled from the student, `None` if all are."""
        return None

    def _generate_and_score_completions(self, inputs):
        self._rows = inputs
        self._teacher_prompt_ids = self._teacher_prompts.token_ids(inputs) if self.teachers else None
        output = super()._generate_and_score_completions(inputs)
        if self._teacher_prompt_ids is None:
            return output
        if on_any_process(self.accelerator, "pixel_values" in output):  # returned by a tool
            raise ValueError(TEACHER_PROMPT_IMAGES)
        ids, mask = self._teacher_prompts.padded(self._teacher_prompt_ids)
        return {**output, "teacher_prompt_ids": ids, "teacher_prompt_mask": mask}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        training = bool(self.teachers) and self._mode == "train"
        self._multimodal_fields = multimodal_fields
        completions = self._off_policy_completions(prompt_ids) if training else None
        if completions is not None:
            return completions, None
        alpha = self._teacher_mixed_alpha if training else 0.0
        with ExitStack() as mixed:
            if alpha > 0:
                teacher, own = self._sampling_teacher(), self._teacher_prompt_ids
                prompts = None if own is None else self._teacher_prompts.padded(own)
                mixed.enter_context(self._offload.unloaded_afterwards())
                self._offload.load(teacher)
                mixed.enter_context(self._student_forward.mixing(alpha, teacher, self._ends, prompts))
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )

    def _sampling_teacher(self) -> torch.nn.Module:
        """The one teacher that completions can be sampled from."""
        if self.teacher_model is None:
            raise ValueError(
                f"{type(self).__name__} with these arguments samples completions from the teacher, which takes a single "
                "`teacher_model` in this process. Turn that off (MiniLLM: `teacher_mixed_alpha=0`, GKD: "
                "`seq_kd=False`), or pass one."
            )
        return self.teacher_model

    def _check_sampling_teacher(self) -> None:
        """Before training, refuse a teacher that completions cannot be sampled from."""
        teacher = self._sampling_teacher()
        check_sampling("teacher", teacher)
        if self._teacher_mixed_alpha > 0:
            check_mixing(teacher)

    def _teacher_completions(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Completions sampled from the teacher: TRL's own generation, with the teacher in the student's place."""
        multimodal_fields = self._multimodal_fields
        if self._teacher_prompt_ids is not None:  # which are text alone
            prompt_ids, multimodal_fields = self._teacher_prompt_ids, {}
        student, stops = self.model_wrapped, self.eos_token_ids
        backends = self.use_vllm, self.use_transformers_continuous_batching
        self.model_wrapped = self._sampling_teacher()
        self.use_vllm = self.use_transformers_continuous_batching = False
        if self._ends is not None:
            self.eos_token_ids = self.generation_config.eos_token_id = [*stops, self._ends[1]]
        try:
            with self._offload.unloaded_afterwards():
                self._offload.load(self.model_wrapped)
                completions, _ = super()._generate_single_turn(
                    prompt_ids, None, multimodal_fields, self.num_generations
                )
        finally:
            self.model_wrapped = student
            self.use_vllm, self.use_transformers_continuous_batching = backends
            if self._ends is not None:
                self.eos_token_ids = self.generation_config.eos_token_id = stops
        return [self._with_own_end(ids) for ids in completions]

    def _with_own_end(self, token_ids: list[int]) -> list[int]:
        """A completion of the teacher's, or of a chat template that ends a turn as the teacher does, with our end."""
        if self._ends is None:
            return token_ids
        own, teachers = self._ends
        return [own if token == teachers else token for token in token_ids]

    def _dataset_completions(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """The dataset's own completions of the rows, as the token ids that a student would have written."""
        tokenizer, completions = self._tokenizer, []
        for row, ids in zip(self._rows, prompt_ids, strict=True):
            completion = row["completion"]
            if isinstance(completion, str):
                tokens = [*tokenizer(completion, add_special_tokens=False)["input_ids"]]
                tokens.append(tokenizer.eos_token_id)
            else:  # messages: what the chat template adds to the prompt
                roles = sorted({message["role"] for message in completion} - {"assistant"})
                if roles:
                    raise ValueError(
                        f"A `completion` of the dataset has messages of the role {', '.join(map(repr, roles))}, whose "
                        "tokens are not the student's to learn. Give each assistant turn a row of its own, with what "
                        "came before in its `prompt`."
                    )
                messages = with_images(row, *completion) if self._is_vlm else [*row["prompt"], *completion]
                whole = self.processing_class.apply_chat_template(
                    [messages],
                    chat_template=self.chat_template,
                    tokenize=True,
                    return_dict=True,
                    **self.chat_template_kwargs,
                )["input_ids"][0]
                if whole[: len(ids)] != ids:
                    raise ValueError(
                        "The chat template does not continue its own prompt when the completion is added, so the "
                        "completion's tokens cannot be told apart. Give `prompt` and `completion` as text."
                    )
                tokens = self._with_own_end(whole[len(ids) :])
                # What a template writes after the end of the turn (a newline), no student ever does.
                ends = [position for position, token in enumerate(tokens) if token in self.eos_token_ids]
                tokens = tokens[: ends[-1] + 1] if ends else tokens
            completions.append(tokens[: self.max_completion_length])
        return completions
