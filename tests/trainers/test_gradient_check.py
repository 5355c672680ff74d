"""Before the first update, every part that should train gets a gradient, or the training is refused by name."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import make_model, make_teacher, make_trainer, weights
from peft import IA3Config, LoraConfig, OFTConfig, PromptTuningConfig, get_peft_model

from trl_cmdp.trainers.engine.gradient_check import GradientCheck


IDS = torch.tensor([[5, 3, 9, 12, 2, 7, 4, 11]])
ADAPTERS = {
    "full": lambda: None,
    "lora": lambda: LoraConfig(r=2, target_modules="all-linear"),
    "lora-of-some": lambda: LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
    "resumed-lora": lambda: LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "dora": lambda: LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"]),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "prompt-tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


class InferenceOnly(torch.nn.Linear):
    """A layer whose kernel is outside autograd."""

    @torch.no_grad()
    def forward(self, inputs):
        return super().forward(inputs)


class Integers(torch.nn.Module):
    """The same, with weights that are no parameters."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.register_buffer("weight", (100 * linear.weight).round().to(torch.int32))

    @torch.no_grad()
    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.weight / 100)


class Experts(torch.nn.Module):
    """The first expert gets every token, so that the second is idle."""

    def __init__(self, linear: torch.nn.Module):
        super().__init__()
        self.experts = torch.nn.ModuleList([copy.deepcopy(linear), linear])

    def forward(self, inputs):
        return self.experts[0](inputs)


def inference_only(linear: torch.nn.Linear) -> InferenceOnly:
    layer = InferenceOnly(linear.in_features, linear.out_features, bias=False)
    layer.load_state_dict(linear.state_dict())
    return layer


def make_student(adapter: str, replace=None, name: str = "self_attn.o_proj") -> torch.nn.Module:
    """Student of two blocks of layers, with an adapter. In the second block `replace` changes the layer of this name."""
    model = make_model(spread=0.3, num_hidden_layers=2)
    if replace is not None:
        block = model.model.layers[1]
        block.set_submodule(name, replace(block.get_submodule(name)))
    config = ADAPTERS[adapter]()
    return model if config is None else get_peft_model(model, config)


def first_step(model: torch.nn.Module, loss=lambda logits: logits.square().mean()) -> None:
    """What a trainer does up to its first update."""
    check = GradientCheck(Accelerator(cpu=True))
    check.on_train_begin(None, None, None, model=model)
    loss(model.train()(IDS).logits).backward()
    check.on_pre_optimizer_step(None, None, None, model=model)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_kind_of_adapter_passes(adapter):
    model = make_student(adapter)
    first_step(model)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize(
    ("adapter", "replace", "kind"),
    [*((adapter, inference_only, "InferenceOnly") for adapter in ADAPTERS), ("lora-of-some", Integers, "Integers")],
)
def test_a_layer_outside_autograd_is_refused_by_name(adapter, replace, kind):
    with pytest.raises(RuntimeError, match=rf"No gradient passes through .*layers\.1\.self_attn\.o_proj.*{kind}"):
        first_step(make_student(adapter, replace))


def test_parameters_without_gradient_are_refused_by_name():
    """A block that detaches its output has no weights of its own."""
    model = make_student("full")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(RuntimeError, match=r"No gradient reaches 4 .*: model\.layers\.1\.mlp\.gate_proj\.weight, "):
        first_step(model)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_idle_experts_and_unused_modules_pass(adapter):
    model = make_student(adapter, Experts, name="mlp")
    model.add_module("tower", torch.nn.Linear(3, 3))
    first_step(model)
    assert any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_passes(use_reentrant):
    model = make_student("lora")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    first_step(model)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_loss_of_zero_passes():
    """A group of equal rewards gives gradients, which are zero."""
    model = make_student("full")
    first_step(model, lambda logits: 0 * logits.sum())
    assert not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("with_teacher", [True, False], ids=["teacher", "grpo"])
def test_a_training_ends_before_its_first_update(tmp_path, with_teacher):
    teacher = make_teacher() if with_teacher else None
    trainer = make_trainer(tmp_path, model=make_student("lora", inference_only), teacher_model=teacher)
    before = weights(trainer)
    with pytest.raises(RuntimeError, match=r"No gradient passes through .*layers\.1\.self_attn\.o_proj"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_training_is_the_same_without_the_check(tmp_path):
    """Bit for bit, dropout and sampling included."""
    trained = []
    for checked in (True, False):
        config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
        trainer = make_trainer(
            tmp_path, teacher_model=make_teacher(), peft_config=config, gradient_accumulation_steps=2
        )
        if not checked:
            trainer.remove_callback(GradientCheck)
        trainer.train()
        trained.append(weights(trainer))
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
