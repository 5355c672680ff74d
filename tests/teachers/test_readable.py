"""A model is refused if it is not read as it is, and never for the rounding of its own precision."""

from types import MethodType

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_cmdp.teachers import LocalTeacher, check_reading


class Autocast:
    """What of an accelerator a teacher asks for. A real one shares its precision with every other in the process."""

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16)

    def unwrap_model(self, model):
        return model


@pytest.fixture(params=["weights", "autocast"])
def deep(request):
    """28 layers in bfloat16, by their weights or by autocast, as accelerate wraps them: logits come back in float32."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16 if request.param == "weights" else torch.float32).eval()
    model.forward = convert_outputs_to_fp32(model.forward)
    assert model(input_ids=torch.arange(3)[None]).logits.dtype == torch.float32
    return model, LocalTeacher(model, None if request.param == "weights" else Autocast())


def test_rounding_of_half_precision_is_no_other_reading(deep):
    check_reading("teacher", *deep)


def test_another_reading_is_refused_in_half_precision_too(deep):
    """A head's output that its weight does not give, by a third."""
    model, teacher = deep
    forward = model.forward

    def scaled(self, *args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs

    model.forward = MethodType(scaled, model)
    with pytest.raises(ValueError, match="cannot be scored exactly"):
        check_reading("teacher", model, teacher)
