"""Two thousand optimizer steps: memory stays flat, steps do not get slower, and files stay in proportion."""

import statistics
import time

import numpy as np
import psutil
import pytest
from helpers import run
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_cmdp.tasks.arithmetic import demo_model_path, final_answer_reward, load_problems


STEPS, WARM_UP = 2000, 500


class Probe(TrainerCallback):
    """After each step: resident memory in MiB, and CPU time of this process, which other work does not lengthen."""

    def __init__(self):
        self.memory: list[float] = []
        self.clock: list[float] = []
        self._process = psutil.Process()

    def on_step_end(self, args, state, control, **kwargs):
        self.memory.append(self._process.memory_info().rss / 2**20)
        self.clock.append(time.process_time())


@pytest.mark.slow
def test_long_run(tmp_path, capsys):
    """The demo's task and models, eight rollouts a step. The learning rate is so small that answers keep their length."""
    probe = Probe()
    trainer = run(
        tmp_path,
        model=AutoModelForCausalLM.from_pretrained(demo_model_path("student")),
        teacher_model=demo_model_path("teacher"),
        tokenizer=AutoTokenizer.from_pretrained(demo_model_path("student")),
        reward_funcs=final_answer_reward,
        train_dataset=load_problems(1024, "train", 0),
        callbacks=[probe],
        cost_limit=0.25,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        max_completion_length=16,
        learning_rate=1e-7,
        save_strategy="steps",
        save_steps=500,
        save_total_limit=2,
    )
    assert trainer.state.global_step == STEPS

    memory = probe.memory[WARM_UP:]
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0] * 100  # MiB per 100 steps
    seconds = np.diff(probe.clock)[WARM_UP:]
    third = len(seconds) // 3
    drift = statistics.median(seconds[-third:]) / statistics.median(seconds[:third]) - 1
    states = {
        step: (tmp_path / f"checkpoint-{step}" / "trainer_state.json").stat().st_size for step in (STEPS - 500, STEPS)
    }
    with capsys.disabled():
        print(
            f"\nlong run: {STEPS} steps; memory {slope:+.2f} MiB per 100 steps after step {WARM_UP}; step time "
            f"{drift:+.1%} from the first to the last third; {states[STEPS] / STEPS / 1024:.1f} KiB of trainer state a "
            "step"
        )
    assert slope < 1
    assert abs(drift) < 0.1
    # Nothing that is written grows faster than the steps that it is of.
    assert states[STEPS] / states[STEPS - 500] < 1.05 * STEPS / (STEPS - 500)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
