"""A teacher that is the student's own base model, with its adapter off or with another one on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from .heads import LMHead, base_model, lm_head
from .local import hidden_states_inside


BASE = "base"  # the name that stands for no adapter at all


class AdapterTeacher:
    """
    A teacher on the weights of the student, which are in memory once: the base model of a student that trains an
    adapter, with every adapter off or with a second one active.

    Args:
        student (`torch.nn.Module`):
            Student, a [`~peft.PeftModel`] as the trainer wraps it.
        accelerator ([`~accelerate.Accelerator`]):
            Whose autocast the forward runs under.
        adapter_name (`str`):
            `"base"` for every adapter off, or the name of an adapter loaded on the student that is not trained.

    Raises:
        ValueError: If the student has no adapter, no adapter of this name, or is training it.
    """

    exact = True  # as of [`LocalTeacher`]

    def __init__(self, student: torch.nn.Module, accelerator: Accelerator, adapter_name: str):
        self._student, self._accelerator, self._adapter_name = student, accelerator, adapter_name
        self._peft_model = accelerator.unwrap_model(student)
        self._check()
        self._model = base_model(self._peft_model)
        self.vocab_size = self._model.get_input_embeddings().num_embeddings

    def _check(self) -> None:
        from peft import PeftModel  # an optional dependency

        if not isinstance(self._peft_model, PeftModel):
            raise ValueError(
                f"`teacher_adapter_name={self._adapter_name!r}` makes the student's own base model its teacher, so the "
                "student must train an adapter: pass `peft_config`, or a `PeftModel` as `model`."
            )
        adapters, active = sorted(self._peft_model.peft_config), self._peft_model.active_adapter
        if self._adapter_name == BASE:
            return
        if self._adapter_name not in adapters:
            raise ValueError(
                f"The student has no adapter {self._adapter_name!r}, only {adapters}. Load it before training, "
                f"`model.load_adapter(path, {self._adapter_name!r})`, or set `teacher_adapter_name='base'` for the "
                "base model alone."
            )
        if self._adapter_name == active:
            raise ValueError(
                f"`teacher_adapter_name={self._adapter_name!r}` is the adapter that is being trained, so the teacher "
                "would change with the student. Load the teacher's adapter under another name."
            )

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """The student's modules, made the teacher: its adapter, no dropout. Everything is put back afterwards."""
        model = self._peft_model
        training, student_adapter = model.training, model.active_adapter
        # Switching adapters makes parameters trainable and freezes others as PEFT sees fit.
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        model.eval()
        try:
            if self._adapter_name == BASE:
                with model.disable_adapter():
                    yield
            else:
                model.set_adapter(self._adapter_name)
                yield
        finally:
            model.set_adapter(student_adapter)
            for parameter, requires_grad in zip(model.parameters(), trainable, strict=True):
                parameter.requires_grad_(requires_grad)
            model.train(training)

    @torch.no_grad()
    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states (N, H) that predict the tokens at `rows` (B, T), as [`LocalTeacher.hidden_states`]."""
        with self._as_teacher():
            return hidden_states_inside(
                self._student, self._peft_model, self._model, self._accelerator, input_ids, attention_mask, rows
            )

    def head(self) -> LMHead:
        """Head of the base model, or of the teacher's adapter if that has one of its own (`modules_to_save`)."""
        with self._as_teacher():
            return lm_head(self._model)
