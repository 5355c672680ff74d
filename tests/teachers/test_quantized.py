"""A teacher quantised by bitsandbytes when it is loaded, on the CPU."""

import pytest
import torch
from helpers import history, make_model, run
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    make_model(1, hidden_size=64, spread=0.3).save_pretrained(path)
    return str(path)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
INT8 = {"load_in_8bit": True}


@pytest.mark.parametrize(
    ("quantization_config", "layer", "tolerance"), [(NF4, "Linear4bit", 0.3), (INT8, "Linear8bitLt", 0.1)]
)
def test_teacher_model_init_kwargs(tmp_path, teacher_path, quantization_config, layer, tolerance):
    """The layers are bitsandbytes', the costs near those of the teacher as it was, and training runs."""
    runs = []
    for init_kwargs in (None, {"quantization_config": quantization_config}):
        trainer = run(
            tmp_path,
            trainer_kwargs={"teacher_model": teacher_path},
            teacher_model_init_kwargs=init_kwargs,
            cost_limit=1e-3,
            max_steps=1,
        )
        runs.append(trainer)
    module = runs[1].teacher_model.model.layers[0].mlp.up_proj
    assert type(module).__name__ == layer
    exact, quantized = (history(trainer, "constraint/cost")[0] for trainer in runs)
    assert quantized != exact
    assert quantized == pytest.approx(exact, rel=tolerance)
    assert history(runs[1], "distill_loss")[0] > 0


def test_memory(teacher_path):
    """4 bits and their scales are less than a fifth of the layers' 32 bits."""

    def layer_bytes(**kwargs):
        model = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.float32, **kwargs)
        return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "proj" in name)

    assert layer_bytes(quantization_config=NF4) < 0.2 * layer_bytes()
