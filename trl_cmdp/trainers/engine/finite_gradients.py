"""
A `GRPOTrainer` in which a gradient that is not finite reaches no weight, and weights that are not finite no checkpoint.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from .attention import cudnn_attention_off, describe_attention
from .processes import on_any_process


_TOLERATED = 2  # steps in a row that are skipped without ending the run
_TOLERATED_IN_FP16 = 30  # where the loss scale is found by halving it from 2¹⁶ at such steps

_logger = logging.getLogger(__name__)


class FiniteGRPOTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that skips an optimizer step whose gradient is not finite. The only change is there: neither
    weights nor optimizer nor schedule notice such a step, `nonfinite_grad_steps` counts it, and the third in a row ends
    the run. Where every gradient is finite it is `GRPOTrainer`, bit for bit.

    Takes the arguments of [`~trl.GRPOTrainer`].
    """

    _nonfinite_in_a_row = 0  # optimizer steps; checkpoints have it
    _warned_of_nonfinite = False
    _step_loss: torch.Tensor | float = 0.0  # summed over the micro-steps of the optimizer step under way

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._warn_of_half_precision()

    def train(self, *args, **kwargs):
        self._nonfinite_in_a_row, self._warned_of_nonfinite, self._step_loss = 0, False, 0.0
        with cudnn_attention_off(self.model, self.accelerator.device):
            return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Norm of the whole gradient, the same on every process. transformers asks for it before each optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:  # DeepSpeed has none before its first step
            norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # the one time that it is read
        finite = norm is None or (math.isfinite(norm) and norm >= 0)  # DeepSpeed says −1 for one that is not finite
        if self.is_deepspeed_enabled:
            finite = self._deepspeed_stepped(finite)
        elif self.accelerator.scaler is None:  # which skips such a step itself
            # What accelerate has for a loss scale that overflows: `optimizer.step` does nothing, the schedule waits.
            self.optimizer._is_overflow = not finite
            if not finite:
                self.accelerator.gradient_state._set_sync_gradients(False)  # until the next micro-step
        if finite:
            self._nonfinite_in_a_row = 0
        else:
            self._count_nonfinite(norm)
        self._step_loss = 0.0
        return norm

    def _deepspeed_stepped(self, finite: bool) -> bool:
        """Whether DeepSpeed, whose engine makes the step within backward, made it with a finite gradient."""
        skipped = self.accelerator.optimizer_step_was_skipped
        if not finite and not skipped:
            raise RuntimeError(
                f"The gradient of step {self.state.global_step + 1} is not finite, and DeepSpeed has made the step with "
                f"it: the weights are lost. The checkpoints in {self.args.output_dir} are whole. Set "
                '`"bf16": {"check_grad_overflow": true}` in the DeepSpeed config, which skips such steps, and continue '
                "with `trainer.train(resume_from_checkpoint=True)`."
            )
        return not skipped

    def _count_nonfinite(self, norm: float | None) -> None:
        self._nonfinite_in_a_row += 1
        counted = self._metrics["train"]["nonfinite_grad_steps"]
        counted[:] = [sum(counted) + 1]  # one number, as TRL logs the mean
        if self._nonfinite_in_a_row > (_TOLERATED_IN_FP16 if self.args.fp16 else _TOLERATED):
            self._raise_nonfinite()
        if not self._warned_of_nonfinite and not self.args.fp16 and self.accelerator.is_main_process:
            self._warned_of_nonfinite = True
            _logger.warning(
                f"The gradient of step {self.state.global_step + 1} is not finite (its norm is {norm}). The step is "
                "skipped and the weights stay as they are; further ones are counted in `nonfinite_grad_steps`. A known "
                "cause is cuDNN's attention on H100 and H200 (docs/troubleshooting.md); the student's attention is "
                f"{describe_attention(self.model, self.accelerator.device)}."
            )

    def _raise_nonfinite(self) -> None:
        last = self.state.global_step + 1
        raise RuntimeError(
            f"The gradient was not finite at {self._nonfinite_in_a_row} optimizer steps in a row, the last of them step "
            f"{last}, so training ends here. None of them has changed a weight. Looked at: "
            f"{'; '.join(self._looked_at())}. If the loss is finite, the backward makes it: try another attention "
            "(`model_init_kwargs={'attn_implementation': 'eager'}`) or float32 (`bf16=False`). If it is not, look at "
            "`reward` and `kl` in the log, and lower the learning rate. The checkpoints in "
            f"{self.args.output_dir} are whole and finite: continue with `trainer.train(resume_from_checkpoint=True)`."
        )

    def _looked_at(self) -> list[str]:
        """What is known of a step whose gradient is not finite. Called on every process."""
        loss_failed = on_any_process(self.accelerator, not math.isfinite(float(self._step_loss)))
        weights_failed = on_any_process(self.accelerator, bool(nonfinite_weights(self.model)))
        return [
            f"the loss is {'not ' if loss_failed else ''}finite",
            f"the student's weights are {'not ' if weights_failed else ''}finite",
            f"its attention is {describe_attention(self.model, self.accelerator.device)}",
        ]

    def _check_weights(self, folder: Path) -> None:
        """Refuse to write weights that are not finite into a checkpoint. Called on every process."""
        names = nonfinite_weights(self.model)
        if on_any_process(self.accelerator, bool(names)):
            raise RuntimeError(
                f"The student's weights are not finite after step {self.state.global_step} "
                f"({', '.join(names[:3]) or 'on another process'}), so {folder} is not written. The checkpoints before "
                "it are whole: once the cause is gone, continue with `trainer.train(resume_from_checkpoint=True)`."
            )

    def _warn_of_half_precision(self) -> None:
        """A quantised student trains an adapter; DeepSpeed and FSDP keep float32 weights beside those of the model."""
        sharded = self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.mixed_precision != "no")
        if sharded or is_peft_model(self.model) or not self.accelerator.is_main_process:
            return
        trained = {parameter.dtype for parameter in self.model.parameters() if parameter.requires_grad}
        for dtype in sorted(trained & {torch.bfloat16, torch.float16}, key=str):
            _logger.warning(
                f"The student is trained in {str(dtype).removeprefix('torch.')} weights, where most updates of a learning "
                "rate such as 1e-5 are lost to rounding. Load it in float32 (TRL's default; "
                "`model_init_kwargs={'dtype': 'float32'}`, or `--dtype float32`) and compute in half precision by "
                "`bf16=True`."
            )


def nonfinite_weights(model: torch.nn.Module) -> list[str]:
    """Names of the parameters with a value that is not finite, of what this process holds."""
    names = []
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if own.is_floating_point() and not bool(own.isfinite().all()):
            names.append(name)
    return names
