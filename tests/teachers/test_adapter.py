"""The student's own base as its teacher: with the adapter off, or with another one on."""

import copy

import pytest
import torch
from helpers import (
    capture_rollouts,
    dense_costs,
    history,
    loss_and_gradients,
    make_model,
    make_rows,
    make_teacher,
    make_trainer,
    micro_batches,
    random_completions,
    relative_error,
    run,
    scripted,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from trl_cmdp import GKDDistillTrainer, MiniLLMDistillTrainer
from trl_cmdp.teachers import AdapterTeacher


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5}


def student(
    *adapters: str, dropout: float = 0.5, modules_to_save: list[str] | None = None, size: float = 1.0
) -> PeftModel:
    """Student of random adapters: `default`, which is trained, and those named."""
    config = LoraConfig(**{**LORA, "lora_dropout": dropout}, modules_to_save=modules_to_save)
    model = get_peft_model(make_model(spread=0.6), config)
    for name in adapters:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if "lora" in parameter_name or "modules_to_save" in parameter_name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return model


ROLLOUTS = scripted(random_completions(8))


def build(tmp_path, model, **kwargs):
    settings = {"cost_limit": 0.2, "gradient_accumulation_steps": 2, **kwargs}
    return make_trainer(tmp_path, model=model, rollout_func=ROLLOUTS, **settings)


def separate_copy(model: PeftModel, adapter_name: str) -> torch.nn.Module:
    """The teacher as a model of its own."""
    if adapter_name == "base":
        return make_model(spread=0.6)
    model = copy.deepcopy(model).eval()
    model.set_adapter(adapter_name)
    return model.merge_and_unload()


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["lora", "and-head"])
@pytest.mark.parametrize("adapter_name", ["base", "expert"])
def test_it_is_as_good_as_a_separate_copy(tmp_path, monkeypatch, adapter_name, modules_to_save):
    """Costs, against the dense divergence from a teacher made of the same weights; loss and gradients, against it."""
    model = student("expert", dropout=0.0, modules_to_save=modules_to_save)
    teacher, student_copy = separate_copy(model, adapter_name), separate_copy(model, "default")
    results = []
    for settings in ({"teacher_adapter_name": adapter_name}, {"teacher_model": teacher}):
        trainer = build(tmp_path, copy.deepcopy(model), **settings)
        captured = capture_rollouts(trainer, monkeypatch)
        batches = micro_batches(trainer, make_rows(8))
        assert any(batch["divergence_weights"].any() for batch in batches)
        results.append((captured[0].costs[captured[0].mask], *loss_and_gradients(trainer, batches)))
    (costs, loss, gradients), (_, expected_loss, expected_gradients) = results
    expected = torch.cat(
        [dense_costs(student_copy, teacher, batch)[batch["completion_mask"].bool()] for batch in batches]
    )
    assert costs.max() > 0.1
    torch.testing.assert_close(costs.double().sort().values, expected.sort().values, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_error(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter_name", ["base", "expert"])
def test_everything_is_put_back(tmp_path, adapter_name, recomputed):
    """Active adapter, what is trainable (one parameter is frozen by hand) and the mode, after scoring and loss."""
    model = student("expert")
    frozen = next(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.get_parameter(frozen).requires_grad_(False)
    memory = {"teacher_hidden_memory_mb": 1e-6} if recomputed else {}
    trainer = build(tmp_path, model, teacher_adapter_name=adapter_name, **memory)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    loss_and_gradients(trainer, micro_batches(trainer, make_rows(8)))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.active_adapter == "default"
    assert model.training
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    assert not any(layer.disable_adapters for layer in layers)


@pytest.mark.parametrize("adapter_name", ["base", "expert"])
def test_the_teacher_has_no_dropout(adapter_name):
    """Its hidden states are the same each time, while the student trains with dropout."""
    model = student("expert").train()
    teacher = AdapterTeacher(model, None, adapter_name)
    inputs = torch.randint(2, 16, (2, 6))
    mask = torch.ones(2, 3, dtype=torch.bool)
    hidden = [teacher.hidden_states(inputs, torch.ones_like(inputs), mask) for _ in range(2)]
    assert torch.equal(*hidden)


def test_training(tmp_path):
    """A student away from its base is drawn back to it; neither base nor teacher's adapter changes."""
    model = student("expert", dropout=0.0, size=0.5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = run(
        tmp_path,
        model=model,
        teacher_adapter_name="base",
        cost_limit=1e-3,
        max_steps=60,
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=60,
    )
    costs = history(trainer, "constraint/cost")
    assert sum(costs[-5:]) < 0.5 * sum(costs[:5])
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(".default." in name for name in changed)
    # What is saved is the student's adapter, in PEFT's own form.
    saved = load_file(tmp_path / "checkpoint-60" / "adapter_model.safetensors")
    reloaded = PeftModel.from_pretrained(make_model(spread=0.6), tmp_path / "checkpoint-60")
    assert saved
    inputs = torch.randint(2, 16, (2, 6))
    model.eval()
    torch.testing.assert_close(reloaded(input_ids=inputs).logits, model(input_ids=inputs).logits)


def test_peft_config(tmp_path):
    """A fresh adapter starts at its base, with nothing to pay."""
    trainer = run(tmp_path, peft_config=LoraConfig(r=2), teacher_adapter_name="base", max_steps=1)
    assert history(trainer, "constraint/cost")[0] == pytest.approx(0.0, abs=1e-6)
    assert history(trainer, "constraint/satisfaction_rate") == [1.0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": make_model()}, "must train an adapter: pass `peft_config`"),
        ({"teacher_adapter_name": "judge"}, r"no adapter 'judge', only \['default', 'expert'\]"),
        ({"teacher_adapter_name": "default"}, "the adapter that is being trained"),
        ({"teacher_model": make_teacher()}, "leave out `teacher_model`"),
        ({"trainer_class": MiniLLMDistillTrainer}, "samples completions from the teacher"),
        ({"trainer_class": GKDDistillTrainer, "lmbda": 0.5, "seq_kd": True}, "samples completions from the teacher"),
    ],
)
def test_an_adapter_that_cannot_teach_is_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, **{"model": student("expert"), "teacher_adapter_name": "base", **changes})
