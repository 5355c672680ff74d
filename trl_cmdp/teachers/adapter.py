"""A teacher that is the student's own base model, with its adapter off or with another one on."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate import Accelerator

from ..core import Head
from ..core.fingerprint import fingerprint, fingerprint_of_weights
from .local import LocalTeacher


BASE = "base"  # the name that stands for no adapter at all


class AdapterTeacher:
    """
    A [`Teacher`] on the weights of the student, which are in memory once: the base model of a student that trains an
    adapter, with every adapter off or with a second one active.

    Args:
        student (`torch.nn.Module`):
            Student, a [`~peft.PeftModel`] as the trainer wraps it.
        accelerator ([`~accelerate.Accelerator`] or `None`):
            Whose autocast the forward runs under. `None` for a student that no trainer wraps.
        adapter_name (`str`):
            `"base"` for every adapter off, or the name of an adapter loaded on the student that is not trained.

    Raises:
        ValueError: If the student has no adapter, no adapter of this name, or is training it.
    """

    exact = True
    ahead = 0

    def __init__(self, student: torch.nn.Module, accelerator: Accelerator | None, adapter_name: str):
        self.adapter_name = adapter_name
        self.model = student if accelerator is None else accelerator.unwrap_model(student)
        self._check()
        self._local = LocalTeacher(student, accelerator)  # with whichever adapter is active
        self.vocab_size, self.max_length = self._local.vocab_size, self._local.max_length

    def _check(self) -> None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError(
                'A student\'s own base is a teacher by its adapter: pip install "trl-cmdp[peft]"'
            ) from error

        if not isinstance(self.model, PeftModel):
            raise ValueError(
                f"`teacher_adapter_name={self.adapter_name!r}` makes the student's own base model its teacher, so the "
                "student must train an adapter: pass `peft_config`, or a `PeftModel` as `model`."
            )
        adapters, active = sorted(self.model.peft_config), self.model.active_adapter
        if self.adapter_name == BASE:
            return
        if self.adapter_name not in adapters:
            raise ValueError(
                f"The student has no adapter {self.adapter_name!r}, only {adapters}. Load it before training, "
                f"`model.load_adapter(path, {self.adapter_name!r})`, or set `teacher_adapter_name='base'` for the "
                "base model alone."
            )
        if self.adapter_name == active:
            raise ValueError(
                f"`teacher_adapter_name={self.adapter_name!r}` is the adapter that is being trained, so the teacher "
                "would change with the student. Load the teacher's adapter under another name."
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        """The student's modules, made the teacher: its adapter, no dropout. Everything is put back afterwards."""
        model = self.model
        training, student_adapter = model.training, model.active_adapter
        # Switching adapters makes parameters trainable and freezes others as PEFT sees fit.
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        model.eval()
        try:
            if self.adapter_name == BASE:
                with model.disable_adapter():
                    yield
            else:
                model.set_adapter(self.adapter_name)
                yield
        finally:
            model.set_adapter(student_adapter)
            for parameter, requires_grad in zip(model.parameters(), trainable, strict=True):
                parameter.requires_grad_(requires_grad)
            model.train(training)

    def autocast(self) -> AbstractContextManager[None]:
        """What the forward runs under."""
        return self._local.autocast()

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, **images: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (N, H), see [`Teacher`]."""
        with self.active():
            return self._local.hidden_states(input_ids, attention_mask, mask, **images)

    def head(self) -> Head:
        """Head of the base model, or of the teacher's adapter if that has one of its own (`modules_to_save`)."""
        with self.active():
            return self._local.head()

    def fingerprint(self) -> str:
        """Of the adapter's name, and of the weights that are not trained: its own and the base's."""
        frozen = ((name, one) for name, one in self.model.named_parameters() if not one.requires_grad)
        return fingerprint([self.adapter_name, fingerprint_of_weights(frozen)])
