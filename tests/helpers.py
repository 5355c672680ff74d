"""Builders shared by the tests: minute models, a character tokenizer, datasets, trainers, and rollouts made by hand."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer
from trl_cmdp.core import token_divergence
from trl_cmdp.evaluation import CellRecord, EvaluationSettings, Outcome, RolloutRecord


CHARACTERS = "0123456789+=,#"
PAD, EOS = 0, 1
FIRST = 2  # id of the first character


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
    seed: int = 0,
    *,
    vocab_size: int = FIRST + len(CHARACTERS),
    hidden_size: int = 8,
    spread: float = 0.02,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """Llama of one layer. A larger `spread` of the initial weights makes its distributions differ more from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_teacher(seed: int = 1, **kwargs) -> LlamaForCausalLM:
    """Teacher of another width, about 1.7 nats per token from a fresh [`make_model`]."""
    return make_model(seed, **{"hidden_size": 12, "spread": 0.6, **kwargs})


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
    """Arguments of a minute run on the CPU: groups of 4, one group per micro-batch."""
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return config_class(str(output_dir), **{**defaults, **kwargs})


def make_trainer(
    output_dir: str | Path,
    trainer_class: type[GRPOTrainer] = ConstrainedDistillTrainer,
    *,
    model: LlamaForCausalLM | None = None,
    reward_funcs: Callable | list[Callable] | None = length_reward,
    train_dataset: Dataset | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    trainer_kwargs: dict | None = None,
    **args,
) -> GRPOTrainer:
    """Trainer on fresh minute models. `trainer_kwargs` go to the trainer, all other keywords to its arguments."""
    config_class = GRPOConfig if trainer_class is GRPOTrainer else trainer_class._config_class
    return trainer_class(
        make_model() if model is None else model,
        reward_funcs,
        make_args(output_dir, config_class, **args),
        make_dataset() if train_dataset is None else train_dataset,
        processing_class=make_tokenizer() if tokenizer is None else tokenizer,
        **(trainer_kwargs or {}),
    )


def run(*args, **kwargs) -> GRPOTrainer:
    """[`make_trainer`], trained."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def history(trainer: GRPOTrainer, name: str) -> list[float]:
    """Every logged value of a metric."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    """Copy of the student's parameters."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def random_completions(count: int, seed: int = 0, longest: int = 6, vocab_size: int = FIRST + len(CHARACTERS)) -> list:
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


def capture_rollouts(trainer: GRPOTrainer, monkeypatch) -> list:
    """What the trainer hands its signal from now on, one entry per generation batch."""
    captured = []
    signal = trainer._signal
    monkeypatch.setattr(trainer, "_signal", lambda rollouts: captured.append(rollouts) or signal(rollouts))
    return captured


def relative_error(value: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """‖value − reference‖/‖reference‖ over all parameters together."""
    difference = math.sqrt(sum((value[name] - reference[name]).double().pow(2).sum().item() for name in reference))
    return difference / math.sqrt(sum(tensor.double().pow(2).sum().item() for tensor in reference.values()))


def dense_costs(student, teacher, batch: dict, temperature: float = 1.0, beta: float = 1.0) -> torch.Tensor:
    """Per-token divergence (B, T) in float64 from the full logits of both models, differentiable by the student's."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    logits = [
        model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -(length + 1) : -1].double()
        for model in (student, teacher)
    ]
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
