"""A gradient that is not finite reaches no weight, and weights that are not finite no checkpoint."""

import copy
import logging
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import history, make_model, make_teacher, make_trainer, run, weights
from peft import LoraConfig
from test_exact_resume import Stop
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from trl_cmdp import (
    ConstrainedDistillTrainer,
    GKDDistillTrainer,
    LagrangianDistillTrainer,
    MiniLLMDistillTrainer,
)
from trl_cmdp.trainers.engine import finite_gradients
from trl_cmdp.trainers.engine.attention import cudnn_attention_off
from trl_cmdp.trainers.engine.checkpoints import last_whole_checkpoint


SAVING = {"save_strategy": "steps", "save_steps": 1}
# Trainers, clipping, accumulation, values and adapters, so that each pair of them is met.
SETTINGS = {
    "grpo, clipping off": {"teacher": False, "max_grad_norm": 0.0},
    "grpo, accumulation": {"teacher": False, "gradient_accumulation_steps": 2, "value": math.inf},
    "constrained, infinite": {"value": math.inf, "cost_limit": 1.7},
    "constrained, adapter": {"lora": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "cost_limit": 1.7},
    "lagrangian, several updates": {
        "trainer_class": LagrangianDistillTrainer,
        "multiplier": "dual",
        "num_iterations": 2,
        "max_grad_norm": 0.0,
        "value": -math.inf,
    },
    "gkd, accumulation": {"trainer_class": GKDDistillTrainer, "gradient_accumulation_steps": 2},
    "minillm, adapter": {"trainer_class": MiniLLMDistillTrainer, "lora": True, "value": math.inf},
}


class Record(TrainerCallback):
    """Weights, state of the optimizer and state of the schedule after each optimizer step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.states.append(copy.deepcopy((trained, optimizer.state_dict()["state"], lr_scheduler.state_dict())))


def poison(trainer, at, value=math.nan, process=0) -> None:
    """The gradient of one parameter is `value` at the first micro-step of the optimizer steps that `at` says."""
    parameter = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad][-1]
    poisoned = set()

    def hook(gradient):
        step = trainer.state.global_step
        if not at(step) or step in poisoned or trainer.accelerator.process_index != process:
            return gradient
        poisoned.add(step)
        return torch.full_like(gradient, value)

    parameter.register_hook(hook)


def build(
    folder,
    trainer_class=ConstrainedDistillTrainer,
    *,
    teacher=True,
    lora=False,
    steps=frozenset(),
    value=math.nan,
    process=0,
    record=None,
    **args,
):
    """Trainer whose gradient is not finite at the optimizer steps `steps`, counted from 0."""
    fields = {
        "teacher_model": make_teacher() if teacher else None,
        "callbacks": [] if record is None else [record],
        "peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
        "max_steps": 4,
        "learning_rate": 0.02,
    }
    trainer = make_trainer(folder, trainer_class, **{**fields, **args})
    if steps:
        poison(trainer, steps.__contains__, value, process)
    return trainer


def same(one, other) -> bool:
    """Whether two trees of tensors and numbers are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def all_finite(tensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_step(tmp_path, caplog, setting):
    """Weights, optimizer and schedule are those of the step before, bit for bit; then the run goes on."""
    record = Record()
    trainer = build(tmp_path, steps={1}, record=record, **SETTINGS[setting])
    with caplog.at_level(logging.WARNING, logger="trl_cmdp"):
        trainer.train()
    first, skipped, third, last = record.states
    assert same(skipped, first)
    assert not same(third[0], skipped[0])
    assert all_finite(last[0])
    assert trainer.state.global_step == 4
    logged = [entry.get("nonfinite_grad_steps") for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [None, 1, None, None]
    assert [math.isfinite(norm) for norm in history(trainer, "grad_norm")] == [True, False, True, True]
    assert caplog.text.count("The gradient of step 2 is not finite") == 1
    assert "the student's attention is sdpa on cpu." in caplog.text


@pytest.mark.parametrize("setting", ["grpo, clipping off", "constrained, infinite", "lagrangian, several updates"])
def test_every_step_from_the_third(tmp_path, setting):
    """The third in a row ends the run. The checkpoints are whole and finite, and have the weights of the second step."""
    settings = {**SETTINGS[setting], **SAVING, "max_steps": 9}
    message = (
        r"3 optimizer steps in a row, the last of them step 5.*the loss is finite.*weights are finite.*sdpa on cpu"
    )
    with pytest.raises(RuntimeError, match=message) as caught:
        build(tmp_path, steps=set(range(2, 9)), **settings).train()
    assert ("the teachers' outputs were finite" in str(caught.value)) == settings.get("teacher", True)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    saved = [AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict() for step in (2, 4)]
    assert all_finite(saved[1])
    assert same(*saved)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    class Diverged(ConstrainedDistillTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * math.nan

    trainer = build(tmp_path, Diverged)
    before = weights(trainer)
    with pytest.raises(RuntimeError, match="the loss is not finite; the student's weights are finite"):
        trainer.train()
    assert same(weights(trainer), before)


def test_two_in_a_row_do_not_end_the_run(tmp_path, caplog):
    """However often: the count begins anew with each step that is finite. It is warned about once."""
    trainer = build(tmp_path, steps={1, 2, 4, 5, 7}, max_steps=9, logging_steps=3)
    with caplog.at_level(logging.WARNING, logger="trl_cmdp"):
        trainer.train()
    assert trainer.state.global_step == 9
    assert history(trainer, "nonfinite_grad_steps") == [2, 2, 1]
    assert caplog.text.count("is not finite") == 1


@pytest.mark.parametrize(("stop", "logging_steps"), [(2, 1), (3, 4)])
def test_resuming_is_exact(tmp_path, stop, logging_steps):
    """From the checkpoint of a skipped step, and from one after it in the same logging window."""
    settings = {**SAVING, "steps": {1}, "logging_steps": logging_steps, "num_iterations": 2, "cost_limit": 1.7}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    stopped = build(tmp_path / "stopped", **settings)
    stopped.add_callback(Stop(stop))
    stopped.train()
    resumed = build(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole))
    assert history(resumed, "nonfinite_grad_steps") == history(whole, "nonfinite_grad_steps") == [1]


def test_a_resumed_run_counts_on(tmp_path):
    """The first of three steps in a row is before the checkpoint; a new run counts from 0."""
    stopped = build(tmp_path, steps={2, 3, 4}, max_steps=6, **SAVING)
    stopped.add_callback(Stop(3))
    stopped.train()
    with pytest.raises(RuntimeError, match="3 optimizer steps in a row, the last of them step 5"):
        build(tmp_path, steps={2, 3, 4}, max_steps=6, **SAVING).train(resume_from_checkpoint=True)
    again = build(tmp_path / "again", steps={0, 1}, max_steps=3)
    again.train()
    again.train()
    assert again.state.global_step == 3


class Lose(TrainerCallback):
    """After the second step a weight is infinite, by no gradient."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.model.norm.weight[0] = math.inf


@pytest.mark.parametrize("teacher", [True, False])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, teacher):
    """Nothing of that checkpoint is written, and the one before it stays, also where only one is kept."""
    trainer = build(tmp_path, teacher=teacher, save_total_limit=1, **SAVING)
    trainer.add_callback(Lose())
    with pytest.raises(
        RuntimeError, match=r"not finite after step 2 \(model\.norm\.weight\).*checkpoint-2 is not written"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert all_finite(AutoModelForCausalLM.from_pretrained(last_whole_checkpoint(tmp_path)).state_dict())


class TestDeepSpeed:
    """On a stand-in: its engine steps within backward, and says −1 for a norm that is not finite."""

    @pytest.fixture
    def trainer(self, tmp_path, monkeypatch):
        trainer = build(tmp_path)
        monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, model, grad_norm=None: -1.0)
        monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
        return trainer

    def test_a_step_that_was_made_ends_the_run(self, trainer):
        with pytest.raises(RuntimeError, match=r"step 1 is not finite, and DeepSpeed has made.*check_grad_overflow"):
            trainer._get_grad_norm(trainer.model)

    @pytest.mark.parametrize(("fp16", "tolerated"), [(False, 2), (True, 30)])
    def test_steps_that_it_skipped_are_counted(self, trainer, monkeypatch, fp16, tolerated):
        """In float16 many are, while the loss scale is found."""
        monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", True)
        trainer.args.fp16 = fp16
        for _ in range(tolerated):
            trainer._get_grad_norm(trainer.model)
        with pytest.raises(RuntimeError, match=f"not finite at {tolerated + 1} optimizer steps in a row"):
            trainer._get_grad_norm(trainer.model)


class TestHalfPrecision:
    @pytest.mark.parametrize(
        ("dtype", "lora", "warnings"),
        [(torch.bfloat16, False, 1), (torch.float16, False, 1), (torch.float32, False, 0), (torch.bfloat16, True, 0)],
    )
    def test_is_warned_of_once(self, tmp_path, caplog, dtype, lora, warnings):
        peft_config = LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
        model = make_model(dtype=dtype)
        with caplog.at_level(logging.WARNING, logger="trl_cmdp"):
            make_trainer(tmp_path, model=model, peft_config=peft_config)
        assert caplog.text.count("weights, where most updates") == warnings
        assert caplog.text.count("model_init_kwargs={'dtype': 'float32'}") == warnings


class TestCudnnAttention:
    """On a stand-in of a CUDA device: `torch` has the switches on a CPU too."""

    CUDA = torch.device("cuda")

    @pytest.fixture(autouse=True)
    def since_211(self, monkeypatch):
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
        monkeypatch.delenv("TRL_CMDP_CUDNN_ATTENTION", raising=False)

    def test_is_off_while_training(self, caplog):
        with caplog.at_level(logging.WARNING, logger="trl_cmdp"), cudnn_attention_off(make_model(), self.CUDA):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert caplog.text.count("cuDNN's attention is switched off while training") == 1

    def test_is_on_again_after_an_error(self):
        with pytest.raises(RuntimeError, match="out of memory"), cudnn_attention_off(make_model(), self.CUDA):
            raise RuntimeError("out of memory")
        assert torch.backends.cuda.cudnn_sdp_enabled()

    @pytest.mark.parametrize("kept_by", ["variable", "sdpa_kernel", "version", "eager", "cpu"])
    def test_is_kept(self, monkeypatch, caplog, kept_by):
        model, device, chosen = make_model(), self.CUDA, nullcontext()
        if kept_by == "variable":
            monkeypatch.setenv("TRL_CMDP_CUDNN_ATTENTION", "1")
        elif kept_by == "sdpa_kernel":
            chosen = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        elif kept_by == "version":
            monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.1"))
        elif kept_by == "eager":
            model.set_attn_implementation("eager")
        else:
            device = torch.device("cpu")
        with chosen, cudnn_attention_off(model, device):
            assert torch.backends.cuda.cudnn_sdp_enabled()
        assert not caplog.text

    def test_stays_off_where_the_user_has_switched_it_off(self, caplog):
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            with cudnn_attention_off(make_model(), self.CUDA):
                pass
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
        assert not caplog.text

    def test_every_training_is_inside(self, tmp_path, monkeypatch):
        """Without a teacher too, on the trainer's device."""
        entered = []

        @contextmanager
        def recorded(model, device):
            entered.append(device)
            yield
            entered.append("left")

        monkeypatch.setattr(finite_gradients, "cudnn_attention_off", recorded)
        trainer = run(tmp_path, max_steps=1)
        assert entered == [trainer.accelerator.device, "left"]
