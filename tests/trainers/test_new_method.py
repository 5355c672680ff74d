"""A method is a signal: one of ten lines trains, and CONTRIBUTING shows it."""

import inspect
from pathlib import Path

import torch
from helpers import history, length_reward, make_args, make_dataset, make_model, make_teacher, make_tokenizer, weights

from trl_cmdp.core.signal import Rollouts, Signal
from trl_cmdp.trainers.engine.config import DistillConfig
from trl_cmdp.trainers.engine.distill_trainer import DistillTrainer


class ImitateFailuresTrainer(DistillTrainer):
    """Reward everywhere, and imitation on the rollouts that failed (its paper). The only change is the signal."""

    _config_class = DistillConfig
    _name = "Imitate failures"

    def _signal(self, rollouts: Rollouts) -> Signal:
        weights = rollouts.mask * (rollouts.rewards < 1).float().unsqueeze(1)  # (B, T)
        columns = self._log_constraint(rollouts, self.args.cost_limit, self.args.cost_scope)
        return Signal(rollouts.grpo_advantages, weights, columns)


def test_a_method_of_ten_lines_trains(tmp_path):
    model = make_model()
    args = make_args(tmp_path, DistillConfig, max_steps=2)
    trainer = ImitateFailuresTrainer(
        model, length_reward, args, make_dataset(), processing_class=make_tokenizer(), teacher_model=make_teacher()
    )
    before = weights(trainer)
    trainer.train()
    assert history(trainer, "distill_loss")[-1] > 0
    assert 0 <= history(trainer, "constraint/satisfaction_rate")[-1] <= 1
    assert any(not torch.equal(before[name], after) for name, after in weights(trainer).items())
    trainer.create_model_card()
    assert "Imitate failures" in Path(tmp_path, "README.md").read_text()


def test_contributing_shows_it():
    page = Path(__file__).parents[2].joinpath("CONTRIBUTING.md").read_text()
    assert inspect.getsource(ImitateFailuresTrainer) in page
