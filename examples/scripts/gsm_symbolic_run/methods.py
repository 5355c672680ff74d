"""The student trained by one method."""

import shutil
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from trl_cmdp.tasks import gsm_symbolic

from .run import CUDA, DTYPE, Run
from .scales import COST_LIMIT, METHODS


SAVE_STEPS = 10


def make_trained(method: str, folder: Path, run: Run) -> None:
    """The student after one method's training. One that was stopped is resumed."""
    scale = run.scale
    trainer_class, config_class, fields = METHODS[method]
    output_dir = run.folder / f"{method}.trainer"
    args = config_class(
        output_dir=str(output_dir),
        cost_limit=COST_LIMIT,
        max_steps=scale.steps,
        per_device_train_batch_size=scale.micro_batch,
        gradient_accumulation_steps=scale.prompts_per_step * scale.num_generations // scale.micro_batch,
        num_generations=scale.num_generations,
        max_completion_length=scale.max_completion_length,
        learning_rate=scale.learning_rate,
        seed=run.seed,
        model_init_kwargs={"dtype": torch.float32},
        teacher_model_init_kwargs={"dtype": DTYPE},
        bf16=CUDA,
        gradient_checkpointing=False,  # TRL's default is True; here memory is plenty and time is not
        use_cpu=not CUDA,
        logging_steps=1,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        **fields,
    )
    trainer = trainer_class(
        model=str(run.folder / "student"),
        teacher_model=None if method == "grpo" else str(run.folder / "teacher"),
        reward_funcs=gsm_symbolic.final_answer_reward,
        args=args,
        train_dataset=run.problems("prompts"),
        callbacks=[StepLine(f"  seed {run.seed}, {method}")],
    )
    trainer.remove_callback(PrinterCallback)
    begun = output_dir.exists() and get_last_checkpoint(output_dir) is not None
    trainer.train(resume_from_checkpoint=begun)  # from the newest whole checkpoint
    trainer.save_model(str(folder))
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    shutil.rmtree(output_dir)


class StepLine(TrainerCallback):
    """Prints one line per optimizer step."""

    def __init__(self, name: str):
        self.name = name

    def on_log(self, args, state, control, logs, **kwargs):
        if "reward" in logs:
            line = f"{self.name}, step {state.global_step}/{state.max_steps}: reward {logs['reward']:.2f}"
            if "constraint/cost" in logs:
                line += f", cost {logs['constraint/cost']:.3f} (limit {COST_LIMIT})"
                line += f", satisfaction {logs['constraint/satisfaction_rate']:.2f}"
            print(f"{line}, length {logs['completions/mean_length']:.0f}, {logs['step_time']:.0f} s", flush=True)
