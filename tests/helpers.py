"""Builders shared by the tests: minute models, a character tokenizer, datasets, trainers, and rollouts made by hand."""

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.core import token_divergence
from trl_cmdp.evaluation import CellRecord, EvaluationSettings, Outcome, RolloutRecord


CHARACTERS = "0123456789+=,#"
PAD, EOS = 0, 1
FIRST = 2  # id of the first character
VOCAB = FIRST + len(CHARACTERS)
LIMIT = 2.4  # about half of the rollouts of `make_scripted_trainer` violate it
METRICS = [
    "constraint/cost",
    "constraint/cost_max",
    "constraint/limit",
    "constraint/satisfaction_rate",
    "constraint/unjudged_frac",
    "constraint/violated_token_frac",
    "teacher/divergence",
    "distill_loss",
    "reward",
]
# Arguments of a minute run on the CPU: groups of 4, one group per micro-batch.
MINUTE_RUN = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def make_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Tokenizer of single characters: `<pad>` is 0, `<eos>` is 1."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(
    seed: int = 0, *, spread: float = 0.02, dtype: torch.dtype = torch.float32, **config
) -> LlamaForCausalLM:
    """Llama of one layer. A larger `spread` of the initial weights makes its distributions differ more from uniform."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": spread,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).to(dtype)


def make_teacher(seed: int = 1, **kwargs) -> LlamaForCausalLM:
    """Teacher of another width, about 1.7 nats per token from a fresh [`make_model`]."""
    return make_model(seed, **{"hidden_size": 12, "spread": 0.6, **kwargs})


def save_model(path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """The folder, with the model's checkpoint and the tokenizer's, if there is one."""
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return str(path)


def make_lora(**kwargs) -> LoraConfig:
    """Adapter of rank 2 on two of the projections."""
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **kwargs})


def make_dataset(copies: int = 8) -> Dataset:
    """Prompts with an answer column."""
    return Dataset.from_dict(
        {"prompt": ["1+2=", "3+4=", "5+6=", "7+8="] * copies, "answer": ["3", "7", "11", "15"] * copies}
    )


def length_reward(completions: list[str], **kwargs) -> list[float]:
    """Reward without meaning that differs between rollouts: 1 if the length is a multiple of three."""
    return [float(len(completion) % 3 == 0) for completion in completions]


def make_args(
    output_dir: str | Path, config_class: type[GRPOConfig] = ConstrainedDistillConfig, **kwargs
) -> GRPOConfig:
    """
    Arguments of a minute run. The constrained method's are those of the paper: one limit from the first step on, and no
    third place, so that what is inside the limit is GRPO. tests/trainers/test_constrained_variants.py has the schedule
    of the limit and tests/trainers/test_unrewarded_distillation.py the third place, at their defaults too.
    """
    of_paper = {"cost_limit_schedule": "constant", "unrewarded_distill_coef": 0.0}
    defaults = of_paper if config_class is ConstrainedDistillConfig else {}
    return config_class(str(output_dir), **{**MINUTE_RUN, **defaults, **kwargs})


def make_trainer(
    output_dir: str | Path,
    trainer_class: type[GRPOTrainer] = ConstrainedDistillTrainer,
    *,
    model: PreTrainedModel | str | None = None,
    reward_funcs: Callable | list[Callable] | None = length_reward,
    train_dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **kwargs,
) -> GRPOTrainer:
    """Trainer on fresh minute models. Keywords that the trainer takes go to it, all others to its arguments."""
    config_class = GRPOConfig if trainer_class is GRPOTrainer else trainer_class._config_class
    taken = inspect.signature(trainer_class).parameters
    return trainer_class(
        make_model() if model is None else model,
        reward_funcs,
        make_args(output_dir, config_class, **{name: value for name, value in kwargs.items() if name not in taken}),
        make_dataset() if train_dataset is None else train_dataset,
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
        **{name: value for name, value in kwargs.items() if name in taken},
    )


def make_scripted_trainer(
    output_dir: str | Path,
    trainer_class: type[GRPOTrainer] = ConstrainedDistillTrainer,
    *,
    completions: Sequence[Sequence[int]] | None = None,
    env_mask: Sequence[Sequence[int]] | None = None,
    **kwargs,
) -> GRPOTrainer:
    """[`make_trainer`] with a teacher, on completions made by hand: eight, in two micro-batches, unless others are given."""
    completions = random_completions(8) if completions is None else completions
    defaults = {
        "model": make_model(spread=0.4),
        "teacher_model": make_teacher(),
        "rollout_func": scripted(completions, env_mask),
        "cost_limit": LIMIT,
        "gradient_accumulation_steps": max(1, len(completions) // 4),
    }
    if trainer_class is ConstrainedDistillTrainer:
        defaults["violation_distill_coef"] = 1.0  # the divergence's gradient is then as large as the reward's
    return make_trainer(output_dir, trainer_class, **{**defaults, **kwargs})


def run(*args, **kwargs) -> GRPOTrainer:
    """[`make_trainer`], trained."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def flags(options: dict[str, object]) -> list[str]:
    """Options as a command line gives them."""
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def run_python(*arguments: str | Path, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Another Python process, which imports what this one does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def run_processes(count: int, script: Path, *arguments: str | Path) -> None:
    """A script in several processes that know of one another. One that waits for another for ever fails here."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(count), "--rdzv_backend", "c10d")
    done = run_python(*launcher, "--rdzv_endpoint", "localhost:0", script, *arguments, timeout=150 * count)
    assert done.returncode == 0, done.stderr


def history(trainer: GRPOTrainer, name: str) -> list[float]:
    """Every logged value of a metric."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def metrics(trainer: GRPOTrainer) -> dict[str, float]:
    """What the trainer would log now, of all rollouts and losses since it last did."""
    trainer.log({})
    return trainer.state.log_history[-1]


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    """Copy of the student's parameters."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def same_weights(trainer: GRPOTrainer, other: GRPOTrainer) -> bool:
    """Whether the students are equal, bit for bit."""
    found, expected = weights(trainer), weights(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def random_completions(count: int, seed: int = 0, longest: int = 6, vocab_size: int = VOCAB) -> list:
    """Completions of ragged lengths; those shorter than `longest` end with EOS, as sampled ones do."""
    generator = torch.Generator().manual_seed(seed)
    completions = []
    for index in range(count):
        length = 1 + (index * 5 + seed) % longest
        tokens = torch.randint(FIRST, vocab_size, (length,), generator=generator).tolist()
        completions.append(tokens if length == longest else [*tokens[:-1], EOS])
    return completions


def scripted(completions: Sequence[Sequence[int]], env_mask: Sequence[Sequence[int]] | None = None) -> Callable:
    """`rollout_func` that hands out these completions, in the order of the rows of one generation batch."""

    def rollout(prompts, trainer):
        output = {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": [list(ids) for ids in completions[: len(prompts)]],
            "logprobs": None,
        }
        if env_mask is not None:
            output["env_mask"] = [list(mask) for mask in env_mask[: len(prompts)]]
        return output

    return rollout


def make_settings(**changes) -> EvaluationSettings:
    """Settings of a small evaluation on the arithmetic task, with `changes`."""
    settings = {
        "name": "student",
        "student": "student",
        "teacher": "teacher",
        "task": "arithmetic",
        "num_problems": 2,
        "num_samples": 2,
        "greedy": True,
        "max_new_tokens": 8,
        "batch_size": 4,
        "cost_limit": 0.25,
        "versions": {},
        "git_commit": None,
    }
    return EvaluationSettings(**{**settings, **changes})


def make_rows(count: int, group: int = 4) -> list[dict[str, str]]:
    """Rows of a generation batch: each prompt `group` times."""
    dataset = make_dataset()
    return [dataset[index // group] for index in range(count)]


def micro_batches(trainer: GRPOTrainer, rows: list[dict]) -> list[dict[str, torch.Tensor]]:
    """One accumulation window of micro-batches, made by the trainer's own code."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batches = []
    for _ in range(trainer.args.gradient_accumulation_steps):
        batches.append(trainer._prepare_inputs([dict(row) for row in rows]))
        trainer._step += 1
    return batches


def loss_and_gradients(trainer: GRPOTrainer, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients that one optimizer step would see: the sum over the micro-batches."""
    trainer.model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        total += loss.item()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    trainer.model.zero_grad()
    return total, gradients


class CreatedShapes(TorchDispatchMode):
    """Context that records the shape of every tensor that an operator makes, views of its arguments left out."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(tensor.shape))
        return out


def capture_rollouts(trainer: GRPOTrainer, monkeypatch) -> list:
    """What the trainer hands its signal from now on, one entry per generation batch."""
    captured = []
    signal = trainer._signal
    monkeypatch.setattr(trainer, "_signal", lambda rollouts: captured.append(rollouts) or signal(rollouts))
    return captured


def gradients_of(value: torch.Tensor, model) -> dict[str, torch.Tensor]:
    """Autograd of a scalar by the model's trainable parameters."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(value, list(trainable.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(trainable, gradients, strict=True))


def relative_error(value: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """‖value − reference‖/‖reference‖ over all parameters together."""
    difference = math.sqrt(sum((value[name] - reference[name]).double().pow(2).sum().item() for name in reference))
    return difference / math.sqrt(sum(tensor.double().pow(2).sum().item() for tensor in reference.values()))


def dense_logits(model, batch: dict) -> torch.Tensor:
    """Full logits (B, T, V) in float64 at which the completion's tokens were sampled, differentiable."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    return model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -(length + 1) : -1].double()


def dense_logps(model, batch: dict, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (B, T) in float64 of the completion's tokens, differentiable."""
    logps = (dense_logits(model, batch) / temperature).log_softmax(-1)
    return logps.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def dense_costs(student, teacher, batch: dict, temperature: float = 1.0, beta: float = 1.0) -> torch.Tensor:
    """Per-token divergence (B, T) in float64 from the full logits of both models, differentiable by the student's."""
    logits = dense_logits(student, batch), dense_logits(teacher, batch)
    shared = min(logits[0].size(-1), logits[1].size(-1))
    return token_divergence(logits[0][..., :shared], logits[1][..., :shared], beta=beta, temperature=temperature)


def make_rollout(problem: int = 0, sample: int = 0, costs: Sequence[float] | None = None, **changes) -> RolloutRecord:
    """A rollout made by hand, with a token for each of its costs."""
    tokens = changes.pop("tokens", [f"t{index} " for index in range(3 if costs is None else len(costs))])
    values = {
        "greedy": False,
        "prompt": f"{problem} + 1 =",
        "answer": str(problem + 1),
        "difficulty": None,
        "completion": "".join(tokens),
        "completion_ids": list(range(len(tokens))),
        "truncated": False,
        "right": True,
    }
    return RolloutRecord(problem=problem, sample=sample, costs=costs, tokens=tokens, **{**values, **changes})


def make_cell(
    method: str = "constrained", seed: int = 0, outcomes: Sequence[tuple] = ((1, 1, 0.1, 3),), **changes
) -> CellRecord:
    """The record of a cell of a comparison, made by hand; its limit is 0.25."""
    values = {
        "trainer": "constrained",
        "task": "arithmetic",
        "settings": {"cost_limit": 0.25},
        "config": {},
        "versions": {"python": "3"},
        "git_commit": None,
        "git_dirty": False,
        "wall_s": 10.0,
        "cpu_s": 8.0,
        "peak_memory_mb": 500.0,
        "history": [],
    }
    rows = [Outcome(*outcome) for outcome in outcomes]
    return CellRecord(method=method, seed=seed, outcomes=rows, **{**values, **changes})


def write_records(path: Path, settings: EvaluationSettings, rollouts: Sequence[RolloutRecord]) -> Path:
    """A records file, as `trl-cmdp evaluate` leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line.to_json()}\n" for line in (settings, *rollouts)))
    return path


def run_without_models(*arguments: object) -> str:
    """Output of a command in a process of its own, which fails if it loads a library of models."""
    script = (
        "import sys; from trl_cmdp.cli import main; code = main(sys.argv[1:]);"
        "assert not {'transformers', 'datasets', 'trl'} & {name.split('.')[0] for name in sys.modules}; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_line(capsys) -> str:
    """The one line that a command wrote about a mistake."""
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("trl-cmdp ")
    assert ": error: " in line
    return line


def token_factors(trainer: GRPOTrainer, batch: dict) -> torch.Tensor:
    """
    Factor (B, T) of each token in TRL's loss, read off its gradient: the loss adds beta·KL to each token's policy loss,
    and with a reference of twice the student's probability, d(KL)/d(reference log-probability) is exactly 1.
    """
    with torch.no_grad():
        logps = dense_logps(trainer.model, batch, trainer.temperature)
    reference = (logps + math.log(2)).requires_grad_()
    beta, trainer.beta = trainer.beta, 1.0
    try:
        loss = GRPOTrainer._compute_loss(trainer, trainer.model, {**batch, "ref_per_token_logps": reference})
    finally:
        trainer.beta = beta
    return torch.autograd.grad(loss, reference)[0]


def assert_gradient_is_dense(
    trainer: GRPOTrainer,
    batches: list[dict],
    *,
    costs: Callable = dense_costs,
    coefficient: float = 1.0,
    tolerance: float = 1e-5,
) -> None:
    """
    Loss and gradients are those of TRL's own loss, as it is without us, plus coefficient·Σ factor·weight·cost over all
    tokens, from full logits in float64. `costs` is what is differentiated, given what [`dense_costs`] is.
    """
    loss, gradients = loss_and_gradients(trainer, batches)
    own_batches = [{name: value for name, value in batch.items() if name != "divergence_weights"} for batch in batches]
    own_loss, own = loss_and_gradients(trainer, own_batches)
    distilled = coefficient * sum(
        (
            token_factors(trainer, batch)
            * batch["divergence_weights"]
            * costs(trainer.model, trainer.teacher_model, batch, trainer.temperature, trainer.args.teacher_beta)
        ).sum()
        for batch in batches
    )
    divergence = gradients_of(distilled, trainer.model)
    expected = {name: own[name] + divergence[name] for name in own}
    assert math.isclose(loss, own_loss + distilled.item(), rel_tol=tolerance, abs_tol=tolerance)
    assert relative_error(gradients, expected) < tolerance
    # Neither part is so small that its absence would not be seen.
    assert min(relative_error(own, expected), relative_error(divergence, expected)) > 2 * tolerance
