"""
What TRL promises of `GRPOTrainer` holds with a teacher: the features that the other files of this folder leave out.

Of each, two things are shown. Within the limit the run is GRPO's, bit for bit, the feature's metric included. Beyond it
the gradient is that of TRL's own loss, the feature in it, plus that of the divergence. docs/promises.md says where each
of the other promises is held.
"""

import itertools
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from helpers import (
    EOS,
    PAD,
    VOCAB,
    assert_gradient_is_dense,
    history,
    make_dataset,
    make_lora,
    make_model,
    make_teacher,
    make_tokenizer,
    make_trainer,
    micro_batches,
    same_weights,
    save_model,
)
from test_tools import SCRIPT, Environment
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM
from trl import GRPOTrainer

from trl_cmdp import ConstrainedDistillTrainer


STEPS = 3


def make_mixture_of_experts() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return MixtralForCausalLM(config)


def make_environments() -> dict[str, type]:
    """Two environments with rewards of their own: one instance for each rollout, and each instance has a number."""
    numbers = itertools.count()

    class Plain(Environment):
        def __init__(self):
            self.number = next(numbers)

        def get_reward(self) -> float:
            return float(self.number % 3 == 0)

    class Observed(Plain):
        def reset(self, **kwargs) -> str | None:
            return "?"

    return {"plain": Plain, "observed": Observed}


def environments() -> dict:
    tokenizer, dataset = SCRIPT["make_tokenizer"](), SCRIPT["make_dataset"]()
    names = ["plain", "observed"] * (len(dataset) // 2)
    return {
        "model": make_model(vocab_size=len(tokenizer), spread=0.4),
        "teacher_model": make_teacher(vocab_size=len(tokenizer)),
        "tokenizer": tokenizer,
        "reward_funcs": None,
        "train_dataset": dataset.add_column("environment", names),
        "shuffle_dataset": False,
        "environment_factory": make_environments(),
    }


FEATURES = {
    "sync_ref_model": lambda path: {
        "model": save_model(path, make_model(), make_tokenizer()),
        "beta": 0.5,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 1.0,
    },
    "mixture_of_experts": lambda path: {"model": make_mixture_of_experts(), "router_aux_loss_coef": 0.5},
    "qlora": lambda path: {
        "model": save_model(path, make_model(hidden_size=64, spread=0.1), make_tokenizer()),
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        "peft_config": make_lora(target_modules=["q_proj", "up_proj"]),
    },
    "stream": lambda path: {"train_dataset": IterableDataset.from_generator(lambda: iter(make_dataset()))},
    "entropy": lambda path: {"entropy_coef": 0.5},
    "adaptive_entropy": lambda path: {
        "use_adaptive_entropy": True,
        "entropy_target": 9.0,
        "entropy_coef_delta": 0.125,
    },
    "top_entropy": lambda path: {"top_entropy_quantile": 0.5},
    "environments": lambda path: environments(),
}
METRICS = {
    "sync_ref_model": "kl",
    "mixture_of_experts": "aux_loss",
    "entropy": "entropy_coef",
    "adaptive_entropy": "entropy_coef",
}


def build(folder: Path, feature: str, trainer_class=ConstrainedDistillTrainer, **arguments):
    arguments = {"teacher_model": make_teacher(), **FEATURES[feature](folder / "model"), **arguments}
    if trainer_class is GRPOTrainer:
        del arguments["teacher_model"]
    return make_trainer(folder, trainer_class, max_steps=STEPS, **arguments)


def train(*args, **kwargs):
    trainer = build(*args, **kwargs)
    trainer.train()  # before another is built, which would draw from the same random numbers
    return trainer


@pytest.mark.parametrize("feature", FEATURES)
def test_within_the_limit_it_is_grpo_and_beyond_it_distils(tmp_path, feature):
    grpo = train(tmp_path / "grpo", feature, GRPOTrainer)
    within = train(tmp_path / "within", feature, cost_limit=1e6)
    beyond = train(tmp_path / "beyond", feature, cost_limit=0.01)
    for name in ("loss", "grad_norm", "reward", *filter(None, [METRICS.get(feature)])):
        assert len(history(grpo, name)) == STEPS
        assert history(within, name) == history(grpo, name), name
    assert max(history(grpo, "grad_norm")) > 0
    assert same_weights(within, grpo)
    assert not same_weights(beyond, grpo)
    assert history(within, "distill_loss") == [0.0] * STEPS
    assert min(history(beyond, "distill_loss")) > 0
    if feature == "sync_ref_model":  # before the first update, and once the student has become the reference
        before, apart, synchronised = history(beyond, "kl")
        assert apart > 1e-6
        assert max(abs(before), abs(synchronised)) < 0.01 * apart
    if feature == "mixture_of_experts":
        assert min(history(beyond, "aux_loss")) > 0
    if feature == "adaptive_entropy":
        assert history(beyond, "entropy_coef") == [0.125, 0.25, 0.375]
    if feature == "environments":  # one prompt in each step, so one environment
        for name, scores in (("Plain", [True, False, True]), ("Observed", [False, True, False])):
            assert [value is not None for value in history(beyond, f"rewards/{name}/mean")] == scores


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in ("stream", "adaptive_entropy")])
def test_gradient_is_that_of_trls_loss_and_of_the_divergence(tmp_path, feature):
    trainer = build(tmp_path, feature, cost_limit=1e-9, violation_distill_coef=1.0)
    batches = micro_batches(trainer, [trainer.train_dataset[0]] * 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # away from the reference model, and from adapters of zeros
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batches[0]["advantages"] = torch.tensor([2.0, -1.0, 0.5, -1.5])  # all violate the limit, so theirs hardly differ
    # TRL trains the adapters of a quantised model in bfloat16.
    assert_gradient_is_dense(trainer, batches, tolerance=1e-2 if feature == "qlora" else 1e-5)
