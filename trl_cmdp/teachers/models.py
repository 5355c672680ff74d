"""What is read of a causal language model, teacher or student: its last hidden states and its head."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from ..core import Head
from .images import OF_IMAGES


_CONFIG_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_CONFIG_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_CONFIG_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_BLOCK = 256  # columns of a head that are found at a time


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself: of a [`~peft.PeftModel`] the one that it adapts, adapter included."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a causal language model that its head stands on."""
    # The text part of some vision-language models (Mllama, Llama 4) has a `base_model_prefix` that only the whole has.
    return model.model if model.base_model is model else model.base_model


def embedding(model: PreTrainedModel) -> torch.nn.Embedding:
    """The input embeddings, inside whatever an adapter wraps around them."""
    return next(part for part in model.get_input_embeddings().modules() if isinstance(part, torch.nn.Embedding))


def num_positions(config: PretrainedConfig) -> int | None:
    """Length of the longest sequence that a model can read, `None` where its positions are no table."""
    text = config.get_text_config().to_dict()
    if text.get("rope_parameters") is not None:
        return None
    positions = next((text[name] for name in _CONFIG_POSITIONS if text.get(name) is not None), 0)
    return positions if positions > 0 else None


class LeftAligned:
    """
    A padded batch whose rows are moved to begin at index 0, so that they are padded on the right alone. What follows a
    token does not change what a causal model says of it: each row is scored as if it were alone, whatever the model makes
    of positions and of padding (learned positions, ALiBi, chunked attention, recurrent states).

    Args:
        model_inputs:
            Inputs of a model: `attention_mask` of shape `(B, L)`, longer where a prefix is in the cache, and any of
            shape `(B, L, ...)`. Those of images are left as they are.

    Attributes:
        inputs (`dict[str, Any]`): The inputs of the moved rows, `(B, L', ...)`, and where there are no images without the
            columns that only pad.
    """

    def __init__(self, model_inputs: dict[str, Any]):
        tokens = model_inputs["inputs_embeds" if model_inputs.get("inputs_embeds") is not None else "input_ids"]
        self._shape = tokens.shape[:2]
        attended = model_inputs["attention_mask"]
        prefix, attended = attended.split([attended.size(1) - tokens.size(1), tokens.size(1)], dim=1)
        attended = attended.bool()
        # An image must keep its tokens, in a completion too that is masked whole because it was cut.
        length = attended.size(1) if model_inputs.keys() & OF_IMAGES else int(attended.sum(1).max())
        self._columns = attended.sort(dim=1, descending=True, stable=True).indices[:, :length]
        self._index = (attended.cumsum(1) - 1).clamp(min=0)  # (B, L), where each token has gone
        self.inputs = {
            name: self.align(values)
            if name not in OF_IMAGES and isinstance(values, torch.Tensor) and values.shape[:2] == self._shape
            else values
            for name, values in model_inputs.items()
        }
        if prefix.size(1):
            moved = self.align(model_inputs["attention_mask"][:, prefix.size(1) :])
            self.inputs["attention_mask"] = torch.cat([prefix, moved], dim=1)

    @property
    def length(self) -> int:
        """Length L' of the moved rows."""
        return self._columns.size(1)

    def align(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B, L, ...) at the columns of the moved rows, (B, L', ...)."""
        return _take(values, self._columns)

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B, L', ...) back in the batch's own columns, (B, L, ...). At padding they mean nothing."""
        return _take(values, self._index)


def _take(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(values), device=values.device).unsqueeze(1)
    return values[rows, columns.to(values.device)]


def last_hidden_state(
    forward: Callable[..., Any], head: torch.nn.Module, **model_inputs: torch.Tensor
) -> torch.Tensor:
    """
    Hidden states that a model gives to its head. Whatever a model must be told of a batch of rollouts, it is told here.

    The model's own forward is run and the head's input taken, so that everything in between counts: prompts that an
    adapter puts before the tokens, and what an architecture does to its backbone's output.

    Args:
        forward (`Callable`):
            The model, or its forward.
        head (`torch.nn.Module`):
            Its head, `get_output_embeddings()`.
        model_inputs:
            Inputs of the model, `input_ids` of shape `(B, P + T)` and `attention_mask` among them, padded anywhere, and
            images.

    Returns:
        `torch.Tensor`: Hidden states of shape `(B, P + T, H)`, for each row as if it were alone.
    """
    rows = LeftAligned(model_inputs)
    captured: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        captured.append(inputs[0])
        return (inputs[0][:1, -1:],)  # no logits but one token's

    hook = head.register_forward_pre_hook(keep)
    try:
        forward(**rows.inputs, use_cache=False)
    finally:
        hook.remove()
    return rows.restore(captured[0][:, -rows.length :])  # without the virtual tokens of a prompt


def predicting(hidden: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Of hidden states (B, P + T, H) those that predict the last T tokens, (B, T, H)."""
    return hidden[:, -(num_tokens + 1) : -1]


def lm_head(model: PreTrainedModel) -> Head:
    """
    Head of a causal language model, with what the architecture does to its logits. A linear layer is read, gathered where
    FSDP2 shards it. Whatever else is there (an adapter, a quantised layer) is called, without gradient.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.

    Returns:
        [`~core.Head`]: The head.

    Raises:
        ValueError: If the head is not linear.
    """
    module = model.get_output_embeddings()
    if is_plain_linear(module):
        return read_head(model)
    weight, bias = _called(module, backbone(model).dtype)
    return Head(weight, bias, *_of_logits(model))


def read_head(model: PreTrainedModel) -> Head:
    """[`lm_head`] of a head that is known to be linear: its own parameters, with gradient."""
    head = model.get_output_embeddings()
    weight, bias = (
        parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for parameter in (head.weight, head.bias)
    )
    return Head(weight, bias, *_of_logits(model))


def is_plain_linear(module: torch.nn.Module) -> bool:
    """Whether a layer does no more than its weight and bias say."""
    if "peft" in sys.modules:  # it is optional, and a model with its layers has imported it
        from peft.utils import ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper):  # whose weight is that of the copy in use
            return is_plain_linear(module.original_module)
    if type(module).forward is not torch.nn.Linear.forward:
        return False
    weight = module.weight
    return type(weight.data) in (torch.Tensor, DTensor) and weight.is_floating_point() and not weight.is_meta


@torch.no_grad()
def _called(module: torch.nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (V, H) and bias (V,) of an affine layer, from what it makes of the identity and of 0."""
    embeddings = next(part for part in module.modules() if isinstance(part, torch.nn.Linear))
    width, device = embeddings.in_features, next(module.parameters()).device
    identity = torch.eye(width, dtype=dtype, device=device)
    offset = module(torch.zeros(1, 1, width, dtype=dtype, device=device))[0, 0]  # (V,)
    weight = offset.new_empty(len(offset), width)
    for columns in torch.arange(width, device=device).split(_BLOCK):
        weight[:, columns] = (module(identity[None, columns])[0] - offset).T
    return weight, offset if bool(offset.any()) else None


def _of_logits(model: PreTrainedModel) -> tuple[float, float | None]:
    """Logit scale and soft cap of an architecture."""
    # Architectures name them differently; the names are those that TRL's fused head knows, and RecurrentGemma's.
    config = model.config.get_text_config().to_dict()
    scale = next((config[key] for key in _CONFIG_SCALES if config.get(key) is not None), None)
    divisor = config.get("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if config["model_type"] == "hyperclovax" else 1 / divisor
    softcap = next((config[key] for key in _CONFIG_SOFTCAPS if config.get(key) is not None), None)
    return 1.0 if scale is None else scale, softcap
