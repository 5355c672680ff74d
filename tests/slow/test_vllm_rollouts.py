"""Training on rollouts of vLLM itself, in the trainer's process. Where vLLM is missing, these tests run in its own environment."""

import functools
import importlib.util
import math
from unittest import mock

import pytest
import torch
from helpers import (
    capture_rollouts,
    dense_costs,
    dense_logps,
    history,
    loss_and_gradients,
    make_rows,
    make_trainer,
    micro_batches,
    relative_error,
    weights,
)
from transformers import AutoModelForCausalLM
from vllm_server import run_tests_beside_vllm

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer


HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.slow
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="run by test_beside_vllm")


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is here")
def test_beside_vllm():
    run_tests_beside_vllm(__file__)


@functools.cache
def _engine(dtype, kwargs):
    from vllm import LLM

    # For these kernels vLLM packs the weights of a CPU's linear layers and drops them: none could be loaded later.
    with (
        mock.patch("vllm._custom_ops._supports_onednn", False),
        mock.patch("vllm.model_executor.layers.utils.check_cpu_sgl_kernel", return_value=False),
    ):
        return LLM(dtype=dtype, enforce_eager=True, **dict(kwargs))


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request, monkeypatch):
    """What vLLM computes in. Trainers share one engine for each: at the start each loads its own weights into it."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # a trainer before set them for vLLM; the next would see a launcher's
    monkeypatch.setattr(
        "trl.generation.vllm_generation.LLM", lambda **kwargs: _engine(request.param, tuple(kwargs.items()))
    )
    return request.param


def build(tmp_path, llamas, trainer_class=ConstrainedDistillTrainer, **kwargs):
    student, teacher = llamas
    settings = {
        "vllm_importance_sampling_mode": "token_truncate",
        "max_completion_length": 16,
        "cost_limit": 1.0,  # no rollout of these models keeps it
        "max_steps": 3,
        **kwargs,
    }
    return make_trainer(
        tmp_path,
        trainer_class,
        model=str(student),
        teacher_model=str(teacher),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        vllm_gpu_memory_utilization=0.05,
        **settings,
    )


@needs_vllm
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_costs_and_log_probs_are_those_of_the_student_as_it_is_now(tmp_path, llamas, monkeypatch, dtype):
    """Over steps that change the student much: vLLM samples from its new weights, and costs are exact on its tokens."""
    trainer = build(tmp_path, llamas, learning_rate=0.02, max_steps=4)
    captured = capture_rollouts(trainer, monkeypatch)
    before = AutoModelForCausalLM.from_pretrained(llamas[0], dtype=torch.float32)
    drifts = []
    generate = trainer._generate_and_score_completions

    @torch.no_grad()
    def check(rows):
        batch = generate(rows)
        mask = batch["completion_mask"]
        costs = dense_costs(trainer.model, trainer.teacher_model, batch) * mask
        torch.testing.assert_close(captured[-1].costs.double(), costs, rtol=1e-4, atol=1e-5)
        assert torch.equal(captured[-1].mask.long(), mask)
        given = batch["sampling_per_token_logps"] * mask
        assert (given - dense_logps(trainer.model, batch) * mask).abs().max() < 5e-3
        drifts.append((given - dense_logps(before, batch) * mask).abs().max().item())
        return batch

    monkeypatch.setattr(trainer, "_generate_and_score_completions", check)
    trainer.train()
    assert len(drifts) == 4
    assert drifts[0] < 5e-3
    assert drifts[-1] > 0.1  # the weights that vLLM started with would not have passed
    for name in ("min", "mean", "max"):
        ratios = history(trainer, f"sampling/importance_sampling_ratio/{name}")
        assert len(ratios) == 4
        assert all(abs(ratio - 1) < 1e-2 for ratio in ratios)
    assert len(history(trainer, "constraint/cost")) == 4


@needs_vllm
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_correction_reaches_the_policy_loss_alone(tmp_path, llamas, dtype, mode):
    """A sampler in half precision is corrected: by the same loss and gradients as with two projections."""
    trainer = build(tmp_path, llamas, vllm_importance_sampling_mode=mode)
    (batch,) = micro_batches(trainer, make_rows(4))
    ratio, mask = batch["importance_sampling_ratio"], batch["completion_mask"]
    spread = (ratio - 1).abs().max()
    assert spread < 1e-2 if dtype == "float32" else spread > 1e-3
    assert "old_per_token_logps" not in batch
    batch["advantages"] = torch.tensor([1.0, -1.0, 2.0, -2.0])  # a policy part of the divergence's size
    loss, gradients = loss_and_gradients(trainer, [batch])
    trainer._student_forward._fused = False
    apart_loss, apart = loss_and_gradients(trainer, [batch])
    assert loss == pytest.approx(apart_loss, rel=1e-5)
    assert relative_error(gradients, apart) < 2e-5

    def by_definition(ratio):
        """Gradient of Σ (w·D − ratio·A·log π) over the number of tokens, the loss `dapo`."""
        trainer.model.zero_grad()
        policy = ratio * batch["advantages"].unsqueeze(1) * dense_logps(trainer.model, batch)
        costs = dense_costs(trainer.model, trainer.teacher_model, batch)
        (((batch["divergence_weights"] * costs - policy) * mask).sum() / mask.sum()).backward()
        return {name: parameter.grad for name, parameter in trainer.model.named_parameters()}

    assert batch["divergence_weights"].any()
    assert relative_error(gradients, by_definition(ratio)) < 1e-4
    if dtype == "bfloat16":
        assert relative_error(gradients, by_definition(1.0)) > 5e-4


@needs_vllm
@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        (LagrangianDistillTrainer, {"multiplier": "dual"}),
        (GKDDistillTrainer, {}),
        (MiniLLMDistillTrainer, {"teacher_mixed_alpha": 0.0}),
        (ConstrainedDistillTrainer, {"credit_assignment": "token", "num_iterations": 2}),
    ],
    ids=["lagrangian", "gkd", "minillm", "reused"],
)
def test_every_method_trains(tmp_path, llamas, dtype, trainer_class, settings):
    trainer = build(tmp_path, llamas, trainer_class, max_steps=2, **settings)
    before = weights(trainer)
    trainer.train()
    assert all(math.isfinite(loss) for loss in history(trainer, "loss"))
    assert all(cost > 0 for cost in history(trainer, "constraint/cost"))
    assert all(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
