"""Before the first update: does every part that should train get a gradient at all?"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


_logger = logging.getLogger(__name__)

_CONTAINERS = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.ParameterList)


class GradientCheck(TrainerCallback):
    """
    Ends a training that would leave a part untrained, before its first update. It watches the first optimizer step's own
    forward and backward passes, so it costs no pass of its own and changes no number.

    An error is raised for

    - a layer with weights that gets an input with gradient and returns an output without. Quantised layers do so where
      their kernel is made for inference. Adapters and residual connections carry some gradient past such a layer, so a
      parameter without any need not show it.
    - a trainable parameter that has no gradient although its module took part in the forward pass. A gradient of zero is
      one: the first of a LoRA's two matrices starts with it. Modules that took no part may have none: experts that no
      token was sent to, a vision tower on text alone. Of a model that reads images it is a warning: some take the
      features of an inner layer of their vision tower, and the layers after it run for nothing.

    DeepSpeed updates within the backward pass and keeps gradients to itself: there only layers are checked.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._took_part: set[str] = set()  # names of modules

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self._stop()  # what an earlier training that failed has left
        self._took_part.clear()
        for name, module in model.named_modules():
            hook = module.register_forward_hook(partial(self._after_forward, name), with_kwargs=True)
            self._hooks.append(hook)

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        if not self._hooks:
            return
        self._stop()
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            return
        missing = list(self._without_gradient(model))
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            message = (
                f"No gradient reaches {len(missing)} of the trainable parameters, so they would not be trained: {names}. "
                "Find what cuts the gradient between them and the loss (`torch.no_grad`, `detach`, a kernel for "
                "inference), or freeze them with `requires_grad_(False)`."
            )
            if model.config.get_text_config() is model.config:
                raise RuntimeError(message)
            _logger.warning(message)

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _after_forward(
        self, name: str, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        if not torch.is_grad_enabled():  # generation and scoring
            return
        self._took_part.add(name)
        outputs = _floating(output)
        if (
            outputs
            and not any(tensor.requires_grad for tensor in outputs)
            and any(tensor.requires_grad for tensor in _floating((args, kwargs)))
            and _has_weights(module)
        ):
            self._stop()
            raise RuntimeError(
                f"No gradient passes through the layer {name!r} ({type(module).__module__}.{type(module).__name__}): what "
                "comes before it in the student would not be trained. If it is quantised, its kernel is made for "
                "inference. Use a quantisation that can be trained, such as bitsandbytes, or train without one."
            )

    def _without_gradient(self, model: torch.nn.Module) -> Iterator[str]:
        """Trainable parameters that have no gradient, of modules that took part."""
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters():
            # FSDP may leave this process no element of a parameter, and then no gradient.
            if not parameter.requires_grad or parameter.grad is not None or parameter.numel() == 0:
                continue
            owner = name.rpartition(".")[0]
            while isinstance(modules[owner], _CONTAINERS):  # has no forward of its own
                owner = owner.rpartition(".")[0]
            if owner in self._took_part:
                yield name


def _floating(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _has_weights(module: torch.nn.Module) -> bool:
    """Whether it holds weights itself: parameters, or the integers in which some quantised layers keep them."""
    integers = [buffer for buffer in module.buffers(recurse=False) if not buffer.is_floating_point()]
    return bool(integers or list(module.parameters(recurse=False)))
