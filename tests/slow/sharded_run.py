"""
Scores rollouts and trains on them with student and teacher whole in one process, or sharded by FSDP2 over several, and
saves what came of it. Started by test_sharded.py.

    torchrun --nproc_per_node 2 sharded_run.py OUTPUT
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from helpers import FIRST, PAD, VOCAB, make_args, make_model, make_teacher, random_completions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx

from trl_cmdp.teachers import LocalTeacher
from trl_cmdp.trainers.engine.forward import DivergenceRequest, StudentForward
from trl_cmdp.trainers.engine.scoring import RolloutScorer


ROLLOUTS, PROMPT, LENGTH, STEPS = 8, 4, 6, 2

SETTINGS = {
    "fused": {},
    "separate": {"fused": False},
    "recomputed": {"teacher_hidden_memory_mb": 1e-6},
    "in_tiles": {"divergence_memory_mb": 1e-6},
    "one_process_violates": {"violators": slice(ROLLOUTS // 2, None)},
    "resharded": {"reshard": True},  # both heads are sharded again by the time that they are read outside of a forward
    "resharded_separate": {"reshard": True, "fused": False},
    "tied": {"tied": True},
    # Each process has rollouts of one teacher alone, and both gather both.
    "several_teachers": {"several": True},
    "several_recomputed": {"several": True, "teacher_hidden_memory_mb": 1e-6},
}


def shard(model, reshard: bool) -> None:
    """In the units of accelerate's FSDP2: layers, embeddings, final norm with head, and what is left."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if embeddings.weight is head.weight:
        tail = [model.model.norm, embeddings, head]
    else:
        fully_shard(embeddings, mesh=mesh)
        tail = [model.model.norm, head]
    fully_shard(tail, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)


def make_models(tied: bool, several: bool):
    student, teachers = make_model(spread=0.4), {"first": make_teacher()}
    if several:
        teachers["second"] = make_teacher(2, hidden_size=20)
    if tied:
        for model in (student, *teachers.values()):
            model.config.tie_word_embeddings = True
            model.tie_weights()
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return student, {name: teacher.eval().requires_grad_(False) for name, teacher in teachers.items()}


def make_inputs() -> dict[str, torch.Tensor]:
    """Rollouts of ragged lengths, some with padded prompts."""
    generator = torch.Generator().manual_seed(0)
    prompt_mask = torch.ones(ROLLOUTS, PROMPT, dtype=torch.long)
    prompt_mask[::3, 0] = 0
    inputs = {
        "prompt_ids": torch.randint(FIRST, VOCAB, (ROLLOUTS, PROMPT), generator=generator),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.full((ROLLOUTS, LENGTH), PAD),
        "completion_mask": torch.zeros(ROLLOUTS, LENGTH, dtype=torch.long),
        "teacher_index": torch.zeros(ROLLOUTS, dtype=torch.long),
        "advantages": torch.randn(ROLLOUTS, 1, generator=generator),
    }
    for row, completion in enumerate(random_completions(ROLLOUTS, longest=LENGTH)):
        inputs["completion_ids"][row, : len(completion)] = torch.tensor(completion)
        inputs["completion_mask"][row, : len(completion)] = 1
    return inputs


def policy_and_divergence(student, forward, scorer, inputs, token_weight: float) -> torch.Tensor:
    """The loss of the trainer, on policy: −Σ A·log π + Σ w·D, in one forward."""
    mask = inputs["completion_mask"]
    request = DivergenceRequest(
        scorer.weighted_states(inputs, inputs["weights"] != 0),
        inputs["weights"] * token_weight,
    )
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention_mask = torch.cat([inputs["prompt_mask"], mask], 1)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :PROMPT] = -100
    with forward.answering(request):
        outputs = student(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    logps = outputs.log_probs[:, -LENGTH:]
    return -((logps - logps.detach()).exp() * inputs["advantages"] * mask).sum() * token_weight + request.loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    output: Path,
    *,
    tied: bool = False,
    several: bool = False,
    reshard: bool = False,
    fused: bool = True,
    violators: slice = slice(None),
    **settings,
) -> dict:
    args = make_args(output, **settings)
    accelerator = Accelerator(cpu=True)  # of the state that the arguments have set up
    processes, rank = accelerator.num_processes, accelerator.process_index
    student, teachers = make_models(tied, several)
    add_fused_lm_head(student, temperature=args.temperature, outputs=("log_probs", "entropy"))
    if processes > 1:
        for model in (student, *teachers.values()):
            shard(model, reshard)
    forward = StudentForward(student, args, maybe_gather_lm_head_ctx, fused)
    local_teachers = {name: LocalTeacher(teacher, accelerator) for name, teacher in teachers.items()}
    scorer = RolloutScorer(local_teachers, forward, accelerator, args)
    inputs = make_inputs()
    if several:
        inputs["teacher_index"][ROLLOUTS // 2 :] = 1
    token_weight = processes / inputs["completion_mask"].sum().item()  # FSDP averages over processes
    inputs["weights"] = torch.zeros(ROLLOUTS, LENGTH)
    inputs["weights"][violators] = inputs["completion_mask"][violators].float()
    own = slice(rank * ROLLOUTS // processes, (rank + 1) * ROLLOUTS // processes)
    inputs = {name: values[own] for name, values in inputs.items()}
    mask = inputs["completion_mask"].bool()

    sizes = {
        f"{model}.{name}": [
            parameter.numel(),
            parameter.to_local().numel() if isinstance(parameter, DTensor) else None,
        ]
        for model, module in {"student": student, **teachers}.items()
        for name, parameter in module.named_parameters()
    }
    steps = []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for step in range(STEPS):
        scores, kept = scorer.score(
            student, inputs, mask, most_tokens=ROLLOUTS * LENGTH, batch_size=2, log_probs=True, step=step
        )
        inputs.pop("teacher_hidden", None)
        if kept is not None:
            inputs["teacher_hidden"] = scorer.weighted_hidden(kept, inputs["weights"], mask)
        loss = policy_and_divergence(student, forward, scorer, inputs, token_weight)
        loss.backward()
        steps.append(
            {
                "kept": kept is not None,
                "scores": {name: accelerator.gather(values) for name, values in scores.items()},
                "loss": accelerator.gather(loss.detach()).mean().item(),
                "gradients": {name: whole(parameter.grad) for name, parameter in student.named_parameters()},
            }
        )
        optimizer.step()
        optimizer.zero_grad()
    return {"processes": processes, "sizes": sizes, "steps": steps}


def main(output: str) -> None:
    torch.set_num_threads(1)
    results = {name: train(Path(output), **settings) for name, settings in SETTINGS.items()}
    if PartialState().is_main_process:
        torch.save(results, Path(output, "results.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
