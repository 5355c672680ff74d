"""The teacher, trained on worked solutions, and the student, cut out of it and healed."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from smollm2 import save_teacher as save_smollm2
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from trl_cmdp.evaluation import sample_rollouts
from trl_cmdp.tasks import gsm_symbolic
from trl_cmdp.trainers.engine.attention import cudnn_attention_off

from .run import CUDA, DTYPE, Run, load_model


HEALING_LEARNING_RATE = 5e-4
# The student's share of right answers, of the teacher's: room to learn, and rewards to learn from.
HEALED = (1 / 3, 1 / 2)
HEALING_PASSES = 4  # over the worked solutions, at most


def make_teacher(folder: Path, run: Run) -> None:
    """The base after one pass over worked solutions."""
    base = run.base or run.folder / "base"
    if not run.base and not base.exists():
        if run.scale.random_base:
            save_random_base(base, run)
        else:
            save_smollm2(base)
    tokenizer, lora = AutoTokenizer.from_pretrained(base), None
    if run.scale.teacher_lora:
        from peft import LoraConfig

        lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    rate = run.scale.teacher_learning_rate
    model = train_on_solutions(load_model(base), tokenizer, run.problems("solutions"), rate, run, lora)
    (model.merge_and_unload() if lora else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_student(folder: Path, run: Run) -> None:
    """The teacher without its middle layers, healed on worked solutions."""
    teacher_folder, scale = run.folder / "teacher", run.scale
    tokenizer, model = AutoTokenizer.from_pretrained(teacher_folder), load_model(teacher_folder)
    # A block in the middle is missed less than every third layer, when that many are left out.
    first = scale.student_layers // 2
    last = scale.student_layers - first
    kept = [*model.model.layers[:first], *model.model.layers[-last:]]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)  # and loaded anew: a layer knows its index in the cache
    tokenizer.save_pretrained(folder)
    del model
    heal(folder, tokenizer, run)


def heal(folder: Path, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Trains the student in `folder` on worked solutions until its right answers are in the range `HEALED`."""
    solutions, scale = run.problems("solutions"), run.scale
    measured = scale.tuning_problems > 0
    teacher = share_right(load_model(run.folder / "teacher", DTYPE), tokenizer, run) if measured else 0.0
    used, number, rounds = 0, scale.healing_problems, []
    while number >= scale.solutions_batch_size and used + number <= HEALING_PASSES * len(solutions):
        more = solutions.select([index % len(solutions) for index in range(used, used + number)])
        student = train_on_solutions(load_model(folder), tokenizer, more, HEALING_LEARNING_RATE, run)
        right = share_right(student, tokenizer, run) if measured else 0.0
        if measured:
            rounds.append({"solutions": used + number, "right": right, "teacher": teacher})
            print(f"  seed {run.seed}, student: {right:.3f} right after {used + number} solutions", flush=True)
        if right > HEALED[1] * teacher:  # too many: from the weights before, with fewer
            number //= 2
            continue
        student.save_pretrained(folder)
        used += number
        if right >= HEALED[0] * teacher:
            if measured:
                (folder / "healing.json").write_text(json.dumps(rounds, indent=2) + "\n")
            return
    raise SystemExit(
        f"After {used} worked solutions the student is not right {HEALED[0]:.2f} to {HEALED[1]:.2f} times as often as "
        f"its teacher ({teacher:.3f}): {rounds}. Change the scale's `student_layers` or `healing_problems`."
    )


def share_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run) -> float:
    """Share of right answers on the tuning problems."""
    problems = run.problems("tuning")
    rollouts = sample_rollouts(
        model,
        tokenizer,
        problems["prompt"],
        max_new_tokens=run.scale.max_completion_length,
        batch_size=run.scale.evaluation_batch_size,
        seed=run.seed,
    )
    rewards = gsm_symbolic.final_answer_reward([rollout.completion for rollout in rollouts], problems["answer"])
    return sum(rewards) / len(rewards)


def train_on_solutions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    learning_rate: float,
    run: Run,
    peft_config=None,
) -> PreTrainedModel:
    """The model after one pass over worked solutions."""
    batch_size = run.scale.solutions_batch_size
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(run.folder / "sft"),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, len(problems) // batch_size),
            train_sampling_strategy="group_by_length",
            seed=run.seed,
            bf16=CUDA,
            gradient_checkpointing=False,
            use_cpu=not CUDA,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=problems.map(
            lambda row: {"prompt": row["prompt"], "completion": " " + row["solution"]},
            remove_columns=problems.column_names,
        ),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    with cudnn_attention_off(trainer.model, trainer.accelerator.device):  # as our trainers do
        trainer.train()
    return trainer.model


def save_random_base(folder: Path, run: Run) -> None:
    """A random model of four layers, with a tokenizer made from the worked solutions."""
    solutions = run.problems("solutions")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([*solutions["prompt"], *solutions["solution"]], 384, special_tokens=["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            initializer_range=0.3,  # unlike each other with and without a layer
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
