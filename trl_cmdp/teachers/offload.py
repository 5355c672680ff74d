"""Teachers whose weights are in host memory while nothing is asked of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


class Offload:
    """
    Weights of frozen models in host memory, pinned on a CUDA machine. One model at a time has them on its device. As they
    never change, they are copied to the device alone, and the copies there are dropped.

    Buffers stay on the device: they are small, and some models replace theirs in a forward (dynamic rotary embeddings).
    So do the scales of 4-bit layers, which are neither parameters nor buffers.
    """

    def __init__(self) -> None:
        self._host: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._models: dict[torch.nn.Module, tuple[torch.device, list[torch.nn.Parameter]]] = {}
        self._loaded: torch.nn.Module | None = None

    def add(self, model: torch.nn.Module, kept: Iterable[torch.Tensor | None]) -> None:
        """
        Copy the weights of a model to host memory. They stay on the device too, until [`~Offload.unload`].

        Args:
            model (`torch.nn.Module`):
                Frozen model, all of whose weights are on one device.
            kept (`Iterable[torch.Tensor | None]`):
                Parameters that stay on the device.
        """
        kept_ids = {id(tensor) for tensor in kept}
        moved = [parameter for parameter in model.parameters() if id(parameter) not in kept_ids]
        for parameter in moved:
            if parameter not in self._host:  # models may share parameters
                on_cuda = parameter.device.type == "cuda"
                host = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=on_cuda)
                host.copy_(parameter)
                self._host[parameter] = host
        self._models[model] = next(model.parameters()).device, moved

    def load(self, model: torch.nn.Module) -> None:
        """Have the weights of a model on its device, and no other's. Nothing happens for one that was not added."""
        if model is self._loaded or model not in self._models:
            return
        self.unload()
        self._loaded = model
        device, parameters = self._models[model]
        try:
            for parameter in parameters:
                # On a CPU, where this saves nothing, it is a copy all the same: one path for all devices.
                parameter.data = self._host[parameter].to(device, non_blocking=True, copy=True)
        except BaseException:  # the memory is exhausted, or Ctrl-C
            self.unload()
            raise

    def unload(self) -> None:
        """Have all weights in host memory alone. They can be read there, but the models cannot be called."""
        self._loaded = None
        for parameter, host in self._host.items():
            parameter.data = host
        if self._host:
            torch.cuda.empty_cache()  # for whoever else uses the device, such as vLLM

    @contextmanager
    def unloaded_afterwards(self) -> Iterator[None]:
        """What is loaded inside is unloaded at the end, also after an error."""
        try:
            yield
        finally:
            if self._loaded is not None:
                self.unload()


def check_can_be_offloaded(model: PreTrainedModel) -> None:
    """
    Check that the weights of a teacher can be moved between device and host memory.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Teacher, where it is used.

    Raises:
        ValueError: If its layers keep their weights elsewhere than in plain parameters, or on several devices.
    """
    quantization = model.config.to_dict().get("quantization_config")
    plain = all(type(parameter.data) is torch.Tensor for parameter in model.parameters())
    if not plain or (quantization is not None and not quantization.get("load_in_4bit")):
        raise ValueError(
            "`teacher_offload` cannot move the weights of this teacher, whose layers are quantised or sharded. Leave it "
            "out, or load the teacher unquantised or in bitsandbytes' 4 bits."
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(
            f"`teacher_offload` moves a teacher between one device and host memory, and the weights of this one are on "
            f"{', '.join(devices)}, as its `device_map` has it: leave out `teacher_offload` or the `device_map`."
        )
