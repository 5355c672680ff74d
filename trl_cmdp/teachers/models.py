"""What is read of a causal language model, teacher or student: its last hidden states and its head."""

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..core import Head


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself: of a [`~peft.PeftModel`] the one that it adapts, adapter included."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a causal language model that its head stands on."""
    # The text part of some vision-language models (Mllama, Llama 4) has a `base_model_prefix` that only the whole has.
    return model.model if model.base_model is model else model.base_model


def last_hidden_state(model: PreTrainedModel, **model_inputs: torch.Tensor) -> torch.Tensor:
    """
    Hidden states that a model's head turns into logits. Whatever a model must be told of a batch of rollouts, it is told
    here.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        model_inputs:
            Inputs of the model, `input_ids` of shape `(B, P + T)` and `attention_mask` among them.

    Returns:
        `torch.Tensor`: Hidden states of shape `(B, P + T, H)`.
    """
    return backbone(model)(**model_inputs, use_cache=False).last_hidden_state


def predicting(hidden: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Of hidden states (B, P + T, H) those that predict the last T tokens, (B, T, H)."""
    return hidden[:, -(num_tokens + 1) : -1]


def lm_head(model: PreTrainedModel) -> Head:
    """
    Head of a causal language model, gathered where FSDP2 shards it, with what the architecture does to its logits.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.

    Returns:
        [`~core.Head`]: The head.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    # Architectures name their logit scale differently; the names are those that TRL's fused head knows.
    config = model.config.get_text_config().to_dict()
    scale = next(
        (
            config[key]
            for key in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if config.get(key) is not None
        ),
        None,
    )
    divisor = config.get("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if config["model_type"] == "hyperclovax" else 1 / divisor
    return Head(weight, bias, 1.0 if scale is None else scale, config.get("final_logit_softcapping"))
