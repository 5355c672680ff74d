"""What a run that goes wrong says while it trains: each symptom once, where it is true, and nothing of a healthy run."""

import re
from pathlib import Path

import pytest
from helpers import make_teacher, make_trainer, scripted
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig

from trl_cmdp import GKDDistillTrainer, LagrangianDistillTrainer
from trl_cmdp.trainers.telemetry.symptoms import Symptoms


PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
STEPS = 12
CUT, REWARD, LOOSE, TIGHT = (
    "was cut at max_completion_length=6",
    "had the same reward",
    "no rollout has exceeded",
    "has stopped falling",
)
WITHOUT_END = [[3 + (row + place) % 9 for place in range(6)] for row in range(8)]


def said(caplog, folder, *trainer_class, **kwargs):
    """The symptoms of a run."""
    trainer = make_trainer(folder, *trainer_class, **{"teacher_model": make_teacher(), "max_steps": STEPS, **kwargs})
    trainer.train()
    return [record.message for record in caplog.records if record.name.endswith("symptoms")]


def test_each_is_said_once_with_its_link(tmp_path, caplog):
    """Twelve steps of completions without an end, of one reward, and a limit that is out of reach."""
    lines = said(
        caplog,
        tmp_path,
        rollout_func=scripted(WITHOUT_END),
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        cost_limit=1e-6,
        learning_rate=0.0,
    )
    assert [sum(text in line for line in lines) for text in (CUT, REWARD, TIGHT, LOOSE)] == [1, 1, 1, 0]
    headings = {
        re.sub(r"[^\w -]", "", line[3:]).strip().lower() for line in PAGE.read_text().splitlines() if line[:3] == "## "
    }
    for line in lines:
        (anchor,) = re.findall(r"\(docs/troubleshooting\.md#([\w-]+)\)", line)
        assert anchor in {heading.replace(" ", "-") for heading in headings}


def test_a_limit_that_nothing_exceeds(tmp_path, caplog):
    lines = said(caplog, tmp_path, cost_limit=1e6)
    assert [LOOSE in line for line in lines] == [True]


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [
        ((), {"cost_limit": 1.7}),
        ((GKDDistillTrainer,), {"cost_limit": 1e6}),  # imitation: the limit is only measured against
        ((GKDDistillTrainer,), {"cost_limit": 1e-6, "reward_funcs": None}),
        ((LagrangianDistillTrainer,), {"cost_limit": 1e6}),  # of a fixed multiplier too
        ((), {"cost_limit": 1.7, "reward_funcs": None}),
    ],
)
def test_a_healthy_run_says_nothing(trainer_class, settings, tmp_path, caplog):
    assert said(caplog, tmp_path, *trainer_class, **settings) == []


class Logs:
    """A run as its logs tell it, of as many steps as it has entries."""

    def __init__(self, tmp_path, max_steps, learns_from_reward=True, keeps_limit=True):
        self.args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        self.state = TrainerState(max_steps=max_steps, is_world_process_zero=True)
        self.symptoms = Symptoms(learns_from_reward, keeps_limit)

    def run(self, *entries):
        self.symptoms.on_train_begin(self.args, self.state, TrainerControl())
        for entry in entries:
            self.state.global_step += 1
            logs = {"reward": 0.5, "reward_std": 0.1, **entry}
            self.symptoms.on_log(self.args, self.state, TrainerControl(), logs)
            self.state.log_history.append(logs)


def constraint(satisfied, cost, limit=0.2):
    return {"constraint/satisfaction_rate": satisfied, "constraint/cost": cost, "constraint/limit": limit}


def test_a_cost_that_still_falls_is_no_limit_out_of_reach(tmp_path, caplog):
    """Of a hundred steps twenty are looked at: none is within the limit, but the cost falls by a percent a step."""
    Logs(tmp_path, 100).run(*(constraint(0.0, 2 * 0.99**step) for step in range(100)))
    assert not caplog.messages


def test_a_limit_that_is_reached_late_is_not_out_of_reach(tmp_path, caplog):
    Logs(tmp_path, 100).run(*(constraint(0.05 * (step % 3 == 0), 2.0) for step in range(100)))
    assert not caplog.messages


def test_the_phase_of_imitation_does_not_count(tmp_path, caplog):
    """`cost_limit="auto"` has no limit for thirty steps; what holds for twenty steps of the limit is then said."""
    Logs(tmp_path, 100).run(*[{}] * 30, *[constraint(1.0, 0.1)] * 19)
    assert not caplog.messages
    Logs(tmp_path, 100).run(*[{}] * 30, *[constraint(1.0, 0.1)] * 20)
    assert ["Of 20 steps no rollout has exceeded" in message for message in caplog.messages] == [True]


def test_what_an_earlier_session_has_seen_counts(tmp_path, caplog):
    """A solved task, whose rewards are all 1, resumed; and a limit that was felt before it was met."""
    run = Logs(tmp_path, 50)
    run.run(*[constraint(0.5, 0.3)] * 10)
    run.run(*[{"reward": 1.0, "reward_std": 0.0, **constraint(1.0, 0.1)}] * 40)
    assert not caplog.messages
