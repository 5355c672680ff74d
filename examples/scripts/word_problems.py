"""
Builds the test beds of word problems: data, tokenizer, two teachers and two students, small enough for a CPU.

    python examples/scripts/word_problems.py

The problems are natural language, made from six templates of GSM-Symbolic with two steps and numbers to 50. The teacher
is a Llama trained from scratch on worked solutions. The other models are cut out of it, its first layers with a part of
their neurons, and healed. The students are healed on the prose alone, the results of equations left out: they know how a
solution is written better than how to calculate. All that any model is shown is correct.

1. `problems`: worked solutions to train the models on, problems to compare methods on (`train.jsonl`), and held-out
   problems of the same templates with other names and numbers: `validation.jsonl`, to tune on, and `test.jsonl`.
2. `tokenizer`: byte-pair tokens of the worked solutions, digits apart.
3. `teacher`, and from it `student-rare`, `student-middling` and `teacher-mediocre`: one thread each.
4. `measured.json`, which is printed too: what each model does when sampled at temperature 1 on the problems to tune on,
   and what the rollouts of the students cost.

`benchmarks/experiments/word-problems-*.yaml` are the comparisons on them, for `trl-cmdp compare`. Each stage keeps what
it made: the same command continues where it was stopped, and begins a model again that was not finished.

Processors differ in how they round, and so one builds other models than the next. `--models` takes models that were
built before instead of training them, such as those that the records of `word-problems-*-again` are of:

    python examples/scripts/word_problems.py --models benchmarks/models/word-problems

Needs `pip install "trl-cmdp[math]"`. On two idle cores the script takes about a quarter of an hour.
"""

import argparse
import json
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from datasets import Dataset
from gsm_symbolic_run.processes import run_all
from small_llama import make_llama, make_optimizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from trl_cmdp.evaluation import Rollout, sample_rollouts, score_rollouts
from trl_cmdp.evaluation.judges import valid_steps
from trl_cmdp.tasks import gsm_symbolic


TEMPLATES = (6, 10, 16, 26, 43, 69)
MAX_NUMBER = 50
MAX_COMPLETION_LENGTH = 64
VOCAB_SIZE = 1500
RESULT = re.compile(r"= ?(\d+)")  # of an equation
BATCH_SIZE = 32
# Student, teacher and limit, in nats per token, of each comparison.
BEDS = {
    "rare": ("student-rare", "teacher", 0.35),
    "middling": ("student-middling", "teacher", 0.2),
    "mediocre": ("student-middling", "teacher-mediocre", 0.15),
}


@dataclass(frozen=True)
class Pretraining:
    """The shape of the model that is trained from scratch, and how long that takes."""

    hidden_size: int
    num_layers: int
    steps: int
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Cut:
    """
    A model that is cut out of the teacher and healed.

    Args:
        num_layers (`int`):
            Number of layers that are kept, the first ones.
        num_neurons (`int`):
            Number of neurons that are kept in each MLP, those with the largest weights.
        steps (`int`):
            Optimizer steps of the healing.
        results (`bool`):
            Whether it is healed on the results of equations too, or on all but these.
        learning_rate (`float`):
            Its peak.
    """

    num_layers: int
    num_neurons: int
    steps: int
    results: bool
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Scale:
    """
    What is built.

    Args:
        teacher ([`Pretraining`]):
            How the teacher is made.
        cuts (`dict[str, Cut]`):
            How the other models are made from it.
        solutions (`int`):
            Worked solutions that the models are trained on.
        others (`int`):
            Problems of any template that the tokenizer is trained on beside them.
        train, validation, test (`int`):
            Problems to compare methods on, to tune on, and to report.
    """

    teacher: Pretraining
    cuts: dict[str, Cut]
    solutions: int
    others: int
    train: int
    validation: int
    test: int

    @property
    def model_names(self) -> tuple[str, ...]:
        """Folders of the models."""
        return "teacher", *self.cuts


_FULL = Scale(
    teacher=Pretraining(hidden_size=128, num_layers=4, steps=1200),
    cuts={
        "student-rare": Cut(num_layers=2, num_neurons=256, steps=200, results=False),
        "student-middling": Cut(num_layers=3, num_neurons=512, steps=20, results=False),
        "teacher-mediocre": Cut(num_layers=4, num_neurons=80, steps=20, results=True),
    },
    solutions=16_000,
    others=2000,
    train=4000,
    validation=1000,
    test=3000,
)
# Small enough for a test: models that have learned nothing.
_TINY = Scale(
    teacher=Pretraining(hidden_size=16, num_layers=2, steps=2),
    cuts={name: replace(cut, num_layers=1, num_neurons=32, steps=2) for name, cut in _FULL.cuts.items()},
    solutions=64,
    others=64,
    train=8,
    validation=4,
    test=4,
)
SCALES = {"full": _FULL, "tiny": _TINY}


@dataclass(frozen=True)
class Build:
    """
    One run of the script: where it writes, what, the seed of everything drawn, and the folder of the models that are
    taken from there rather than trained.
    """

    folder: Path
    scale: Scale
    seed: int
    models: Path | None = None

    @property
    def settings(self) -> dict:
        """What makes a folder another one, as JSON has it."""
        taken = {"models": str(self.models.resolve())} if self.models else {}
        return json.loads(json.dumps({"seed": self.seed, **asdict(self.scale), **taken}))

    def problems(self, name: str) -> Dataset:
        """One of the sets of problems that [`write_problems`] has made."""
        lines = (self.folder / "problems" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([json.loads(line) for line in lines])


def write_problems(folder: Path, build: Build) -> None:
    """Every set of problems, as JSON lines. No problem is in two of them, and no model sees one of the held-out two."""
    scale, load = build.scale, partial(gsm_symbolic.load_problems, max_number=MAX_NUMBER, templates=TEMPLATES)
    train = load(scale.solutions + scale.train, "train", build.seed)
    held_out = load(scale.validation + scale.test, "validation", build.seed)
    folder.mkdir()
    for problems, numbers in (
        (train, {"solutions": scale.solutions, "train": scale.train}),
        (held_out, {"validation": scale.validation, "test": scale.test}),
    ):
        # Templates with few problems come to their end early in a draw: shuffled, each set has its share of them.
        rows = problems.shuffle(seed=build.seed).to_list()
        for name, number in numbers.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:number]]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            rows = rows[number:]


def make_tokenizer(folder: Path, build: Build) -> None:
    """
    Byte-pair tokens, each digit one of its own, from the problems that the models are trained on, and from those of
    other templates, as six hold too few words for a vocabulary.
    """
    others = gsm_symbolic.load_problems(build.scale.others, "train", build.seed)
    texts = [*build.problems("solutions").to_list(), *others]
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for row in texts for text in _texts(row)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)


def _texts(row: dict[str, str]) -> tuple[str, str]:
    """Prompt and completion of a worked solution."""
    return row["prompt"], f" {row['solution']}"


def make_teacher(folder: Path, build: Build) -> None:
    """A model trained from scratch on whole solutions."""
    torch.manual_seed(build.seed)
    shape, tokenizer = build.scale.teacher, AutoTokenizer.from_pretrained(build.folder / "tokenizer")
    model = make_llama(tokenizer, shape.hidden_size, shape.num_layers, tie_word_embeddings=True)
    train_on_solutions(model, tokenizer, build, shape.steps, shape.learning_rate)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_cut(name: str, folder: Path, build: Build) -> None:
    """The first layers of the teacher with a part of their neurons, healed on solutions."""
    cut, tokenizer = build.scale.cuts[name], AutoTokenizer.from_pretrained(build.folder / "tokenizer")
    model = LlamaForCausalLM.from_pretrained(build.folder / "teacher")
    model.model.layers = model.model.layers[: cut.num_layers]
    for layer in model.model.layers:
        weights = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T)
        sizes = torch.stack([weight.norm(dim=1) for weight in weights]).prod(dim=0)
        kept = sizes.topk(cut.num_neurons).indices.sort().values
        gate, up, down = (torch.nn.Parameter(weight[kept].detach().clone()) for weight in weights)
        layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight = gate, up
        layer.mlp.down_proj.weight = torch.nn.Parameter(down.detach().T.contiguous())
    model.config.update({"num_hidden_layers": cut.num_layers, "intermediate_size": cut.num_neurons})
    train_on_solutions(model, tokenizer, build, cut.steps, cut.learning_rate, results=cut.results)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_on_solutions(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    build: Build,
    steps: int,
    learning_rate: float,
    results: bool = True,
) -> None:
    """Trains a model by next-token prediction on the completions, with or without the results of their equations."""
    # One thread, because matrices this small gain little from more, and the result does not hang on the core count.
    torch.set_num_threads(1)
    rng = random.Random(build.seed)
    solutions = [encode_solution(tokenizer, *_texts(row), results) for row in build.problems("solutions")]
    optimizer, scheduler = make_optimizer(model, learning_rate, steps)
    start, waiting = time.monotonic(), []
    for step in range(1, steps + 1):
        if len(waiting) < BATCH_SIZE:
            waiting = rng.sample(solutions, len(solutions))
        batch, waiting = waiting[:BATCH_SIZE], waiting[BATCH_SIZE:]
        loss = solutions_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - start
            print(f"  step {step}/{steps}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def encode_solution(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, results: bool
) -> tuple[list[int], list[bool]]:
    """Tokens of prompt and completion, and which of them are to be learned."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    encoded = tokenizer(completion + tokenizer.eos_token, return_offsets_mapping=True)
    left_out = set() if results else {i for match in RESULT.finditer(completion) for i in range(*match.span(1))}
    is_target = [start not in left_out for start, _ in encoded["offset_mapping"]]
    return prompt_ids + encoded["input_ids"], [False] * len(prompt_ids) + is_target


def solutions_loss(model: LlamaForCausalLM, batch: Sequence[tuple[list[int], list[bool]]]) -> torch.Tensor:
    """Mean cross-entropy of the tokens to be learned. Padded on the right, which no token before attends to."""
    length = max(len(ids) for ids, _ in batch)
    input_ids = torch.full((len(batch), length), model.config.pad_token_id)
    is_target = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, (ids, targets) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        is_target[row, : len(ids)] = torch.tensor(targets)
    hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
    # Only these are projected: half of the time would go into logits that no loss needs.
    return F.cross_entropy(model.lm_head(hidden[is_target[:, 1:]]), input_ids[:, 1:][is_target[:, 1:]])


def sample(name: str, build: Build) -> tuple[LlamaForCausalLM, list[Rollout]]:
    """A model, and one answer of it to each problem to tune on, sampled at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(build.folder / name)
    model = AutoModelForCausalLM.from_pretrained(build.folder / name)
    prompts = build.problems("validation")["prompt"]
    sampling = {"max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": 250, "seed": build.seed}
    return model, sample_rollouts(model, tokenizer, prompts, **sampling)


def measure(build: Build) -> dict[str, dict]:
    """What each model does on the problems to tune on, and what the students' rollouts cost."""
    problems = build.problems("validation")
    sampled = {name: sample(name, build) for name in build.scale.model_names}
    measured: dict[str, dict] = {"models": {}, "beds": {}}
    for name, (model, rollouts) in sampled.items():
        completions = [rollout.completion for rollout in rollouts]
        correct = gsm_symbolic.final_answer_reward(completions, problems["answer"])
        valid = [valid_steps(*pair) for pair in zip(problems["prompt"], completions, strict=True)]
        measured["models"][name] = {
            "parameters": model.num_parameters(),
            "problems": len(problems),
            "correct": mean(correct),
            "valid_steps": mean(valid),
            "correct_with_valid_steps": mean(map(min, correct, valid)),
            "truncated": mean(rollout.completion_ids[-1] != model.config.eos_token_id for rollout in rollouts),
            "mean_tokens": mean(len(rollout.completion_ids) for rollout in rollouts),
        }
    for bed, (student, teacher, cost_limit) in BEDS.items():
        scores = score_rollouts(sampled[student][1], sampled[student][0], sampled[teacher][0], batch_size=250)
        costs = torch.tensor([score.mean() for score in scores])
        measured["beds"][bed] = {
            "student": student,
            "teacher": teacher,
            "cost_limit": cost_limit,
            "satisfaction": (costs <= cost_limit).float().mean().item(),
            "mean_cost": costs.mean().item(),
            "cost_quantiles": {level: costs.quantile(level).item() for level in (0.1, 0.5, 0.9)},
        }
    return measured


def make_stage(name: str, build: Build) -> None:
    """Makes the folder of one stage: of the problems, the tokenizer, or a model."""
    _quiet()
    start = time.monotonic()
    unfinished = build.folder / f"{name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    if name == "problems":
        write_problems(unfinished, build)
    elif name == "tokenizer":
        make_tokenizer(unfinished, build)
    elif build.models:
        shutil.copytree(build.models / name, unfinished)
    elif name == "teacher":
        make_teacher(unfinished, build)
    else:
        make_cut(name, unfinished, build)
    unfinished.rename(build.folder / name)  # a stage's folder has its name once all of it is written
    print(f"{name}: {time.monotonic() - start:.0f} s, in {build.folder / name}.", flush=True)


def make_all(build: Build, jobs: int) -> dict[str, dict]:
    """Makes what is missing, and measures the models."""
    settings_file = build.folder / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != build.settings:
        raise SystemExit(f"{build.folder} was made with other settings: choose another --output-dir, or delete it.")
    if build.models:
        absent = [name for name in build.scale.model_names if not (build.models / name / "config.json").exists()]
        if absent:
            raise SystemExit(
                f"--models {build.models} has no {', '.join(absent)}: name a folder that holds all models."
            )
    build.folder.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(json.dumps(build.settings, indent=2) + "\n")
    for stages in (["problems"], ["tokenizer"], ["teacher"], list(build.scale.cuts)):
        missing = [name for name in stages if not (build.folder / name).exists()]
        run_all({name: partial(make_stage, name, build) for name in missing}, jobs)
    _quiet()
    measured = measure(build)
    (build.folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full", help="`tiny` learns nothing (default full)")
    parser.add_argument("--output-dir", type=Path, help="where to write (default outputs/word-problems)")
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights and order (default 0)")
    parser.add_argument("--models", type=Path, help="folder of models to take, rather than train them")
    parser.add_argument("--jobs", type=int, default=2, help="how many models are trained side by side (default 2)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    output_dir = options.output_dir or Path("outputs/word-problems")
    build = Build(output_dir, SCALES[options.scale], options.seed, options.models)
    print(json.dumps(make_all(build, options.jobs), indent=2))


if __name__ == "__main__":
    # Stopped by SIGTERM, this process stops those beside it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
