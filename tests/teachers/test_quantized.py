"""
Teachers and students that bitsandbytes quantised, on the CPU, with its kernel for AVX512-BF16 and without.

The switch of that kernel is forced both ways, so that every processor shows both. The kernel itself is replaced by one
that needs no such processor; packing, unpacking and the assertion on a layer's shape are bitsandbytes' own.
"""

import copy
import sys

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from helpers import (
    history,
    make_dataset,
    make_model,
    make_teacher,
    make_tokenizer,
    make_trainer,
    run,
    save_model,
    weights,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from trl_cmdp.evaluation import sample_rollouts, score_rollouts
from trl_cmdp.teachers import allow_fast_kernel, keep_differentiable, load_teacher, readable


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
INT8 = {"load_in_8bit": True}
IDS = torch.tensor([[5, 3, 9, 12, 2, 7, 4, 11]])


class Kernel:
    """The kernel on packed weights: bfloat16, and outside autograd."""

    def __init__(self):
        self.calls = 0

    @torch.no_grad()
    def __call__(self, inputs, weight, out=None, state=None):
        self.calls += 1
        scales = state.absmax.T.reshape(-1).float()
        quantized, state = _convert_weight_packed_for_cpu_inverse(weight, copy.copy(state))
        state.absmax, state.nested, state.dtype = scales, False, torch.bfloat16
        return torch.nn.functional.linear(inputs.bfloat16(), dequantize_4bit(quantized, state)).to(inputs.dtype)


def force(monkeypatch, supported: bool) -> Kernel:
    """Make bitsandbytes take the processor for one with AVX512-BF16, or for one without."""
    kernel = Kernel()
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: supported)
    monkeypatch.setattr(bitsandbytes.functional, "gemv_4bit", kernel)
    return kernel


@pytest.fixture(params=[False, True], ids=["no-avx512-bf16", "avx512-bf16"])
def processor(request, monkeypatch):
    force(monkeypatch, request.param)
    return request.param


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    """A checkpoint with some layers of which the kernel takes the shape (64 x 64) and some of which it does not."""
    return save_model(tmp_path_factory.mktemp("teacher"), make_model(1, hidden_size=64, spread=0.3))


@pytest.fixture(scope="module")
def student_path(tmp_path_factory):
    """
    A checkpoint with two blocks of layers of which the kernel takes every shape. A row of theirs is two blocks of 64, the
    order of which matters.
    """
    model = make_model(hidden_size=128, intermediate_size=64, num_hidden_layers=2, spread=0.1)
    return save_model(tmp_path_factory.mktemp("student"), model, make_tokenizer())


def load_nf4(path: str, **quantization) -> LlamaForCausalLM:
    config = BitsAndBytesConfig(**{**NF4, **quantization})
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)


def dequantized(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with plain layers of float32 weights."""
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "proj" not in name}, strict=False
    )
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
    return plain


def make_qlora(folder, path: str, **kwargs):
    """Trainer of an adapter on an nf4 student. TRL makes such adapters bfloat16, which hides small errors."""
    adapter = LoraConfig(r=2, target_modules="all-linear")
    quantization = BitsAndBytesConfig(**NF4)
    trainer = make_trainer(folder, model=path, quantization_config=quantization, peft_config=adapter, **kwargs)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def with_adapter(model: LlamaForCausalLM) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


@torch.no_grad()
def evaluate(model: torch.nn.Module) -> torch.Tensor:
    """Logits of one forward in eval mode, which packs the layers where the switch is on."""
    return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("quantization_config", "layer", "tolerance"), [(NF4, "Linear4bit", 0.3), (INT8, "Linear8bitLt", 0.1)]
)
def test_teacher_model_init_kwargs(tmp_path, processor, teacher_path, quantization_config, layer, tolerance):
    """The layers are bitsandbytes', the costs near those of the teacher as it was, and training runs."""
    runs = []
    for init_kwargs in (None, {"quantization_config": quantization_config}):
        trainer = run(
            tmp_path,
            teacher_model=teacher_path,
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


def test_eight_bits_that_keep_outliers_apart_are_refused(tmp_path, monkeypatch, teacher_path):
    """
    What such layers say of a rollout depends on those beside it: in so small a model by half a percent, in SmolLM2-135M
    by a tenth. Without a threshold it does not, and training runs.
    """
    monkeypatch.setattr(readable, "_ROUNDING", 1e-4)

    def settings(threshold):
        config = {**INT8, "llm_int8_threshold": threshold}
        return {"teacher_model": teacher_path, "teacher_model_init_kwargs": {"quantization_config": config}}

    with pytest.raises(ValueError, match=r"`llm_int8_threshold=0\.0` in the quantization config, or in 4 bits"):
        make_trainer(tmp_path, **settings(2.0))
    run(tmp_path, max_steps=1, **settings(0.0))


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_eight_bits_that_keep_outliers_apart_are_named(tmp_path, caplog, teacher_path, threshold):
    """Where two rows differ by less than rounding, which in half precision is a fifth, others may differ by more."""
    config = BitsAndBytesConfig(**INT8, llm_int8_threshold=threshold)
    make_trainer(tmp_path, teacher_model=teacher_path, teacher_model_init_kwargs={"quantization_config": config})
    warnings = [
        record.getMessage() for record in caplog.records if "8-bit layers leave unquantised" in record.getMessage()
    ]
    assert [warning.partition(",")[0] for warning in warnings] == (["The teacher"] if threshold else [])


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("supported", "calls", "tolerance"), [(False, 0, 1e-5), (True, 4, 0.03)])
def test_teacher_uses_the_fast_kernel_where_it_takes_the_shape(
    monkeypatch, teacher_path, supported, calls, tolerance, double
):
    """The four attention layers do. The logits are those of the dequantised teacher, in the kernel's precision."""
    kernel = force(monkeypatch, supported)
    teacher = load_teacher(load_nf4(teacher_path, bnb_4bit_use_double_quant=double))
    assert relative(evaluate(teacher), evaluate(dequantized(teacher))) < tolerance
    assert kernel.calls == calls


@pytest.mark.parametrize("saved", [False, True], ids=["evaluated", "saved"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_gradients_are_those_of_the_dequantised_weights(processor, student_path, double, saved):
    """Also if the student was evaluated before, which packs its layers, and then saved, which unpacks them."""
    model = load_nf4(student_path, bnb_4bit_use_double_quant=double)
    loaded = dequantized(model)
    evaluate(model)
    if saved:
        model.state_dict()
    keep_differentiable(model)
    unpacked = dequantized(model)
    for name, parameter in unpacked.named_parameters():
        error = relative(parameter, loaded.get_parameter(name))
        assert error < (5e-3 if processor else 1e-9), name  # packing rounds the scales
    student, reference = with_adapter(model), with_adapter(unpacked)
    assert relative(evaluate(student), evaluate(reference)) < 1e-5
    for each in (student, reference):
        each.train()(IDS).logits[0, torch.arange(7), IDS[0, 1:]].sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.requires_grad}
    assert len(expected) == 28  # two matrices for each of seven layers in both blocks
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert relative(parameter.grad, expected[name]) < 1e-5, name


def test_student_trains_the_same_on_either_processor(tmp_path, monkeypatch, student_path):
    """Bit for bit, through evaluations and checkpoints and after resuming, with its own base as the teacher."""

    def build(folder):
        return make_qlora(
            folder,
            student_path,
            eval_dataset=make_dataset(1),
            teacher_adapter_name="base",
            cost_limit=1e-3,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
        )

    trained = []
    for supported in (False, True):
        kernel = force(monkeypatch, supported)
        folder = tmp_path / str(supported)
        trainer = build(folder)
        trainer.evaluate()
        trainer.train()
        resumed = build(folder)
        resumed.train(str(folder / "checkpoint-1"))
        trained.extend([weights(trainer), weights(resumed)])
        assert kernel.calls == 0
    assert trained[0]
    for other in trained[1:]:
        assert all(torch.equal(value, other[name]) for name, value in trained[0].items())


def test_adapter_loads_back(tmp_path, processor, student_path):
    """Trained, evaluated and saved, it gives the same logits over a freshly quantised base that was evaluated too."""
    trainer = make_qlora(tmp_path, student_path, teacher_model=make_teacher(), learning_rate=0.1)
    trainer.train()
    sample_rollouts(trainer.model, make_tokenizer(), ["1+2="], max_new_tokens=3)
    trainer.save_model(str(tmp_path / "adapter"))
    student = PeftModel.from_pretrained(load_nf4(student_path), str(tmp_path / "adapter"))
    sample_rollouts(student, make_tokenizer(), ["1+2="], max_new_tokens=3)
    with student.disable_adapter():
        before = evaluate(student)
    torch.testing.assert_close(evaluate(student), evaluate(trainer.model))
    assert relative(before, evaluate(student)) > 1e-3  # it was trained


def test_evaluation_leaves_a_student_to_be_trained_and_saved(processor, student_path, teacher_path):
    """Its weights are what they were, and gradients pass. The teacher has shapes that the kernel does not take."""
    student, teacher = load_nf4(student_path), load_nf4(teacher_path)
    before = copy.deepcopy(student.state_dict())
    rollouts = sample_rollouts(student, make_tokenizer(), ["1+2=", "3+4="], max_new_tokens=3)
    costs = score_rollouts(rollouts, student, teacher)
    expected = score_rollouts(rollouts, dequantized(student), dequantized(load_nf4(teacher_path)))
    torch.testing.assert_close(torch.cat(costs), torch.cat(expected), rtol=0.05, atol=0.01)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    embeddings = student.get_input_embeddings()(IDS).detach().requires_grad_()
    student.train()(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_student_on_the_packed_path_is_refused(tmp_path, monkeypatch, student_path):
    """Were its switch turned on again, the first update would not be made."""
    force(monkeypatch, True)
    trainer = make_qlora(tmp_path, student_path, teacher_model=make_teacher())
    for module in trainer.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    evaluate(trainer.model)
    before = weights(trainer)
    with pytest.raises(RuntimeError, match=r"No gradient passes through .*layers\.0\.self_attn\..*Linear4bit"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("function", [keep_differentiable, allow_fast_kernel])
def test_bitsandbytes_is_not_imported(monkeypatch, function):
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    function(make_model())
    assert "bitsandbytes" not in sys.modules
