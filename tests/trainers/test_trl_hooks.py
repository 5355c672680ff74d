"""The private parts of TRL that the trainers touch are still where and what they expect."""

import importlib
import sys

import pytest
import torch
import trl.trainer.utils
from helpers import (
    history,
    length_reward,
    make_args,
    make_dataset,
    make_model,
    make_teacher,
    make_tokenizer,
    make_trainer,
    run,
)
from trl import GRPOConfig, GRPOTrainer

from trl_cmdp.trainers.engine.trl_hooks import ATTRIBUTES, TESTED_TRL, check_trl_hooks


def moved(what: str, where: str) -> str:
    return f"TRL moved or changed {what}: adapt {where} in trl_cmdp/trainers, then this test."


@pytest.fixture(scope="module")
def plain_trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("plain"), GRPOTrainer, steps_per_generation=2)


@pytest.fixture(scope="module")
def generation_batch(plain_trainer):
    plain_trainer.model.train()
    rows = [dict(plain_trainer.train_dataset[0]) for _ in range(8)]
    return plain_trainer._generate_and_score_completions(rows)


def test_signatures_and_attributes(plain_trainer):
    """The table that every trainer with a teacher checks."""
    check_trl_hooks(plain_trainer)
    types = {name: type(getattr(plain_trainer, name)) for name, kind in ATTRIBUTES.items()}
    assert all(issubclass(types[name], kind) for name, kind in ATTRIBUTES.items()), types


class TestMovedHook:
    """A release that moved a hook is refused by name, with a teacher only."""

    MESSAGE = rf"TRL {trl.__version__} has moved .*{{}}.* tested with TRL {' and '.join(TESTED_TRL)}: install one"

    @pytest.fixture
    def loss_with_another_argument(self, monkeypatch):
        compute = GRPOTrainer._compute_loss
        monkeypatch.setattr(
            GRPOTrainer, "_compute_loss", lambda self, model, inputs, window=0: compute(self, model, inputs)
        )

    @pytest.mark.usefixtures("loss_with_another_argument")
    def test_signature(self, tmp_path):
        found = r"`GRPOTrainer._compute_loss` is \(self, model, inputs, window=0\), not \(self, model, inputs\)"
        with pytest.raises(ImportError, match=self.MESSAGE.format(found)):
            make_trainer(tmp_path, teacher_model=make_teacher())
        assert len(history(run(tmp_path), "loss")) == 2

    def test_gone(self, tmp_path, monkeypatch):
        monkeypatch.delattr(trl.models.utils, "prepare_deepspeed")
        with pytest.raises(ImportError, match=self.MESSAGE.format(r"`trl.models.utils.prepare_deepspeed` is gone")):
            make_trainer(tmp_path, teacher_model=make_teacher())

    def test_function_that_takes_more(self, tmp_path, monkeypatch):
        """What is only called may take another argument that has a default."""
        monkeypatch.setattr(trl.models.utils, "prepare_deepspeed", lambda model, accelerator, config=None: model)
        make_trainer(tmp_path, teacher_model=make_teacher())

    def test_gone_at_import(self, monkeypatch):
        """A private name that the package imports."""
        monkeypatch.delattr(trl.models.utils, "prepare_deepspeed")
        for name in [name for name in sys.modules if name.startswith("trl_cmdp.trainers")]:
            monkeypatch.delitem(sys.modules, name)  # to be imported anew
        with pytest.raises(ImportError, match=f"TRL {trl.__version__} has moved what .*prepare_deepspeed"):
            importlib.import_module("trl_cmdp.trainers")


def test_logs_and_metrics(plain_trainer, generation_batch):
    """Our advantages replace GRPO's in `_logs`; our columns go beside; the zero-variance metric is overwritten."""
    message = moved("`_logs` or `_metrics`", "`_log_rollouts`")
    assert len(plain_trainer._logs["advantages"]) == 8, message
    assert {"prompt", "completion", "rewards", "extra"} <= plain_trainer._logs.keys(), message
    assert plain_trainer._logs["extra"]["cost"].maxlen == plain_trainer.args.generation_batch_size, message
    assert set(plain_trainer._metrics) == {"train", "eval"}, message
    assert len(plain_trainer._metrics["train"]["frac_reward_zero_std"]) == 1, message


def test_generation_batch(generation_batch):
    """What scoring reads and what the loss is given."""
    message = moved("the output of `_generate_and_score_completions`", "`_generate_and_score_completions`")
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        assert generation_batch[name].dim() == 2, message
        assert len(generation_batch[name]) == 8, message
    assert generation_batch["advantages"].shape == (8,), message
    assert generation_batch["num_items_in_batch"].dim() == 0, message
    assert "tool_mask" not in generation_batch, message


def test_extra_tensors_and_lists_survive_shuffle_and_split():
    """Weights (a tensor) and teacher states (a list of tensors) ride in the batch, row by row."""
    rows = torch.arange(6)
    batch = {
        "prompt_ids": rows,
        "divergence_weights": rows.unsqueeze(1),
        "teacher_hidden": [row.view(1) for row in rows],
    }
    shuffled = trl.trainer.utils.shuffle_sequence_dict(batch)
    for part in trl.trainer.utils.split_tensor_dict(shuffled, 2):
        ids = part["prompt_ids"].tolist()
        message = moved("`split_tensor_dict`", "`teacher_hidden`")
        assert part["divergence_weights"].squeeze(1).tolist() == ids, message
        assert [hidden.item() for hidden in part["teacher_hidden"]] == ids, message


def test_fused_forward():
    """
    The student's forward returns log-probabilities at the trainer's temperature, and never logits. A hook on
    `base_model` sees the backbone's last hidden state of that one forward.
    """
    model = make_model(spread=0.6)
    input_ids = torch.tensor([[2, 3, 4, 5]])
    logits = model(input_ids=input_ids).logits
    trl.trainer.utils.add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    seen = []
    model.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    outputs = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)
    expected = (logits[:, :-1] / 0.5).log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    message = moved("`add_fused_lm_head`", "`StudentForward`")
    torch.testing.assert_close(outputs.log_probs, expected, msg=lambda text: f"{message}\n{text}")
    assert outputs.entropy.shape == outputs.log_probs.shape, message
    assert "forward" in vars(model), message  # an instance attribute, which is what we wrap
    assert [tuple(hidden.shape) for hidden in seen] == [(1, 4, 8)], message


def test_accumulation_steps_of_the_window(tmp_path):
    """`current_gradient_accumulation_steps` is set by the time the loss is computed."""
    seen = []

    class Spy(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(self.current_gradient_accumulation_steps)
            return super()._compute_loss(model, inputs)

    args = make_args(tmp_path, GRPOConfig, gradient_accumulation_steps=3, max_steps=1)
    Spy(make_model(), length_reward, args, make_dataset(), processing_class=make_tokenizer()).train()
    assert seen == [3, 3, 3], moved("`current_gradient_accumulation_steps`", "`policy_token_weight`")
