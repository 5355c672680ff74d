"""
Trains the same global batch in one process or in several, on rollouts that depend on nothing but the prompt and the
place in the group, and saves what came of it; then runs the scripts of this folder that need several processes. One
launch serves all, as importing takes longer than training. Started by test_processes.py.

    torchrun --nproc_per_node 2 several_processes.py OUTPUT
"""

import math
import os
import sys
import threading
from pathlib import Path

import torch
from fake_server import answer
from fake_vllm import FakeServer
from helpers import (
    EOS,
    FIRST,
    VOCAB,
    history,
    make_dataset,
    make_lora,
    make_model,
    make_teacher,
    make_tokenizer,
    make_trainer,
    save_model,
    weights,
)
from peft import get_peft_model
from transformers import TrainerCallback

from trl_cmdp import ConstrainedDistillTrainer, GKDDistillTrainer, LagrangianDistillTrainer, MiniLLMDistillTrainer
from trl_cmdp.teachers import RemoteTeacher, TeacherServerError


ROLLOUTS = 16  # per step, over all processes


SETTINGS = {
    "trajectory": {},
    "token": {"credit_assignment": "token", "loss_type": "grpo"},
    "recomputed": {"divergence_memory_mb": 1e-6, "teacher_hidden_memory_mb": 1e-6, "loss_type": "dr_grpo"},
    # The first two prompts fill process 0, so each process has rollouts of one teacher alone.
    "several_teachers": {"several": True, "cost_limit": {"first": 1.5, "second": 2.5}},
    "several_recomputed": {"several": True, "teacher_hidden_memory_mb": 1e-6},
    # Of unequal lengths, the longest on process 1.
    "teacher_prompt": {"own_prompts": True, "teacher_hidden_memory_mb": 1e-6},
    # Each process asks servers of its own, in the loss too.
    "servers": {"several": True, "served": True, "teacher_hidden_memory_mb": 1e-6},
    "adapter": {"teacher_adapter_name": "base", "cost_limit": 0.5},
    # A limit on the sum, which the short rollouts of process 0 all keep: it has nothing to distil, and the other one
    # nothing that is feasible.
    "one_process_violates": {"cost_limit": 9.0, "cost_scope": "sum", "scale_rewards": "batch"},
    # Of the first two prompts, which fill process 0, no token is the student's own.
    "one_process_masked": {"rollout": "masked"},
    # Twelve rollouts to evaluate on, which do not fill the processes' batches: accelerate repeats the first of them.
    "uneven_evaluation": {"evaluated": [0, 1, 2]},
    "group_across_processes": {"num_generations": ROLLOUTS},
    "sampled_cost": {"cost": "teacher_nll", "cost_scope": "worst_prefix", "cost_limit": 4.5},
    "auto_limit": {"cost_limit": "auto", "auto_limit_steps": 2, "auto_limit_quantile": 0.5, "auto_limit_margin": 1.0},
    "dual": {"trainer_class": LagrangianDistillTrainer, "multiplier": "dual", "multiplier_lr": 0.5},
    "minillm": {"trainer_class": MiniLLMDistillTrainer, "teacher_mixed_alpha": 0.0},
    # Without `rollout_func`: the processes agree on the draw, and on the dataset's completions.
    "gkd": {"trainer_class": GKDDistillTrainer, "lmbda": 0.0, "rollout": None},
}


def completion(prompt: str, place: int, step: int) -> list[int]:
    """Ragged random tokens: few for the first two prompts, which fill process 0, more for the others."""
    generator = torch.Generator().manual_seed(1000 * int(prompt[0]) + 10 * place + step)
    length = (place + step) % 3 % 2 + (4 if prompt[0] in "57" else 0)
    return [*torch.randint(FIRST, VOCAB, (length,), generator=generator).tolist(), EOS]


def rollout(prompts, trainer):
    first = trainer.accelerator.process_index * len(prompts)
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": [
            completion(prompt, (first + row) % trainer.num_generations, trainer.state.global_step)
            for row, prompt in enumerate(prompts)
        ],
        "logprobs": None,
    }


def masked(prompts, trainer):
    output = rollout(prompts, trainer)
    output["env_mask"] = [
        [int(prompt[0] in "57")] * len(ids) for prompt, ids in zip(prompts, output["completion_ids"], strict=True)
    ]
    return output


def beyond(prompts, trainer):
    """Process 1 alone samples an id that the teacher lacks."""
    output = rollout(prompts, trainer)
    if trainer.accelerator.process_index == 1:
        output["completion_ids"][0] = [VOCAB + 3, EOS]
    return output


def reward(prompts, completion_ids, **kwargs):
    return [None if sum(ids) % 5 == 0 else float(sum(ids) % 3) for ids in completion_ids]


class Poison(TrainerCallback):
    """After the first step, the teacher of process 1 alone becomes NaN."""

    def __init__(self, teacher):
        self.teacher = teacher

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1:
            with torch.no_grad():
                self.teacher.model.norm.weight.fill_(math.nan)


def served_folder(path: Path, teacher) -> str:
    return str(path / f"served_{os.environ.get('RANK', '0')}_{teacher.config.hidden_size}")


def serve(path: Path, teacher, fault=None) -> RemoteTeacher:
    """A teacher behind a server that lasts as long as this process."""
    server = FakeServer(teacher.eval(), served_folder(path, teacher))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = RemoteTeacher(server.url)
    server.fault = fault
    return remote


def expect_error(path: Path, name: str, trainer) -> None:
    try:
        trainer.train()
    except (ValueError, TeacherServerError) as error:
        (path / f"{name}_{trainer.accelerator.process_index}.txt").write_text(str(error))


def name_teachers(dataset):
    return dataset.add_column("teacher", ["first" if prompt[0] in "13" else "second" for prompt in dataset["prompt"]])


def give_teachers_prompts(dataset):
    return dataset.add_column("teacher_prompt", [prompt * int(prompt[0]) for prompt in dataset["prompt"]])


def with_adapter():
    model = get_peft_model(make_model(spread=0.4), make_lora(target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.7, generator=torch.Generator().manual_seed(len(name)))
    return model


def build(
    output: Path,
    *,
    trainer_class=ConstrainedDistillTrainer,
    model=None,
    teacher=None,
    several=False,
    own_prompts=False,
    served=False,
    rollout=rollout,
    callbacks=(),
    evaluated=(0, 1, 2, 3),
    cost_limit=2.4,
    **settings,
):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with_prompts = give_teachers_prompts if own_prompts else lambda dataset: dataset
    dataset = with_prompts(make_dataset(4))
    if processes == 1:  # what accelerate makes of it for several
        evaluated = [*evaluated, *evaluated][:4]
    if teacher is None and "teacher_adapter_name" not in settings:
        teacher = {"first": make_teacher(), "second": make_teacher(2, hidden_size=20)} if several else make_teacher()
    if served:
        teacher = {name: serve(output.parent, one) for name, one in teacher.items()}
    if model is None:
        model = with_adapter() if "teacher_adapter_name" in settings else make_model(spread=0.4)
    return make_trainer(
        output,
        trainer_class,
        model=model,
        reward_funcs=reward,
        train_dataset=name_teachers(dataset.add_column("completion", ["3", "1#1,77", "", "5"] * 4)),
        teacher_model=teacher,
        rollout_func=masked if rollout == "masked" else rollout,
        callbacks=list(callbacks),
        eval_dataset=name_teachers(with_prompts(make_dataset(1).select(evaluated))),
        shuffle_dataset=False,
        per_device_train_batch_size=ROLLOUTS // processes,
        per_device_eval_batch_size=ROLLOUTS // processes,
        max_steps=3,
        optim="sgd",  # Adam makes whole steps of gradients that are rounding alone
        cost_limit=cost_limit,
        ddp_backend="gloo" if processes > 1 else None,
        **settings,
    )


def main(output: str) -> None:
    torch.set_num_threads(1)
    path = Path(output)
    for teacher in (make_teacher(), make_teacher(2, hidden_size=20)):
        # While no process knows of the others: later only the first one saves.
        save_model(served_folder(path, teacher), teacher, make_tokenizer())
    results = {}
    for name, settings in SETTINGS.items():
        trainer = build(path / name, **settings)
        trainer.train()
        cost = list(trainer._logs["extra"]["cost"])  # of the last step: the order of an evaluation is shuffled
        if name == "dual":
            multipliers = repr(history(trainer, "lagrange_multiplier"))
            (path / f"multiplier_{trainer.accelerator.process_index}.txt").write_text(multipliers)
        evaluation = trainer.evaluate()
        results[name] = {
            "history": trainer.state.log_history,
            "evaluation": evaluation,
            "weights": weights(trainer),
            "cost": cost,
            "processes": trainer.accelerator.num_processes,
        }
    if trainer.accelerator.is_main_process:
        torch.save(results, path / "results.pt")
    if trainer.accelerator.num_processes > 1:
        teacher = make_teacher()
        expect_error(path, "poisoned", build(path / "poisoned", teacher=teacher, callbacks=[Poison(teacher)]))
        refuses = answer(400, {}) if trainer.accelerator.process_index == 1 else None
        expect_error(path, "refused", build(path / "refused", teacher=serve(path, make_teacher(), refuses)))
        teacher_path = path / "teacher"
        if trainer.accelerator.is_main_process:
            save_model(teacher_path, make_teacher(), make_tokenizer())
        trainer.accelerator.wait_for_everyone()
        model = make_model(vocab_size=VOCAB + 8)
        expect_error(path, "beyond", build(path / "beyond", model=model, teacher=str(teacher_path), rollout=beyond))


if __name__ == "__main__":
    import nonfinite_processes
    import resume_processes

    main(sys.argv[1])
    resume_processes.main(Path(sys.argv[1], "resume"))
    nonfinite_processes.main(Path(sys.argv[1], "nonfinite"))
