"""How often one student's reasoning beats another's on the same problems, and how often two judges agree."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .judges.records import OUTCOMES, Judge, Judgement, Pair
from .rates import Rate
from .rollout_records import RolloutRecord


@dataclass(frozen=True)
class WinRate:
    """Outcomes of a student against another, by one judge. Every interval is clustered by problem."""

    judge: str  # name of the judge
    num_pairs: int  # pairs of rollouts
    num_judged: int  # those with a verdict. The rates are over them
    win: Rate | None  # wins of the first student, `None` where nothing was judged; `tie` and `loss` likewise
    # Ties: verdicts of a tie, verdicts that disagree between the orders, and solutions of the same text
    tie: Rate | None
    loss: Rate | None  # losses
    # Pairs on which both orders agree, over those with a verdict in both. `None` for a judge without orders
    position_consistency: Rate | None
    # How often each kind of failure happened. A retry cured `timeout`, `connection`, `http_429`, `http_5xx`,
    # `bad_answer` and `malformed`, but for the questions that ended in `refused` and `no_reply` (without a reply) or
    # `no_verdict` (with malformed replies alone)
    failures: dict[str, int]


@dataclass(frozen=True)
class Agreement:
    """How often two judges give the same outcome."""

    rate: Rate  # pairs with the same outcome, over those that both judged
    # Cohen's kappa, `None` where both judges gave one and the same outcome throughout: chance alone agrees
    kappa: float | None
    # 95% percentile bootstrap interval over problems. Resamples without a kappa are left out
    kappa_interval: tuple[float, float] | None


def pair_rollouts(
    rollouts: Iterable[RolloutRecord],
    others: Iterable[RolloutRecord],
    students: tuple[str, str] = ("first", "second"),
) -> list[Pair]:
    """
    Pairs the rollouts of two students by problem and sample, greedy with greedy.

    Args:
        rollouts (`Iterable[RolloutRecord]`):
            Rollouts of the student whose win is a win.
        others (`Iterable[RolloutRecord]`):
            Rollouts of the other, of the same problems.
        students (`tuple[str, str]`, *optional*):
            Names of the two, for the records.

    Returns:
        `list[Pair]`: Pairs in the order of problem and sample.

    Raises:
        ValueError: If a rollout has no partner, or has one of another problem.
    """
    mine, theirs = ({record.key: record for record in records} for records in (rollouts, others))
    if not mine or mine.keys() != theirs.keys():
        raise ValueError(
            f"{len(mine.keys() ^ theirs.keys())} rollouts have no partner ({len(mine)} and {len(theirs)} were given): "
            "compare evaluations of the same task, split, seed and numbers of problems and samples, both finished."
        )
    pairs = []
    for key in sorted(mine):
        if mine[key].prompt != theirs[key].prompt:
            raise ValueError(
                f"Problem {key[0]} differs between the two: compare evaluations of the same task, split and seed."
            )
        pairs.append(
            Pair(*key, problem_text(mine[key].prompt), mine[key].completion, theirs[key].completion, students)
        )
    return pairs


def judge_pairs(
    pairs: Sequence[Pair], judge: Judge, on_progress: Callable[[int, int], None] | None = None
) -> list[Judgement]:
    """
    Has all pairs judged.

    Args:
        pairs (`Sequence[Pair]`):
            What [`pair_rollouts`] returned.
        judge ([`Judge`]):
            [`ProcessJudge`] or [`LLMJudge`].
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of judged and of all pairs.

    Returns:
        `list[Judgement]`: Of each pair, in the pairs' order.
    """
    judgements = []
    for judgement in judge.judge(pairs):
        judgements.append(judgement)
        if on_progress is not None:
            on_progress(len(judgements), len(pairs))
    return judgements


def win_rate(judgements: Sequence[Judgement]) -> WinRate:
    """
    Win, tie and loss rates of one judge.

    Args:
        judgements (`Sequence[Judgement]`):
            What [`judge_pairs`] returned, or what was read from its records.

    Returns:
        [`WinRate`]: The rates.

    Raises:
        ValueError: If there is none, a pair is judged twice, or they are of several judges or students.
    """
    judge = _only_judge(judgements)
    judged = [judgement for judgement in judgements if judgement.outcome is not None]
    asked = [judgement for judgement in judged if judgement.orders]
    failures: Counter[str] = Counter()
    for judgement in judgements:
        failures.update(judgement.failures)
    win, tie, loss = (_rate(judged, [judgement.outcome == outcome for judgement in judged]) for outcome in OUTCOMES)
    return WinRate(
        judge,
        len(judgements),
        len(judged),
        win,
        tie,
        loss,
        _rate(asked, [judgement.orders[0] == judgement.orders[1] for judgement in asked]),
        dict(sorted(failures.items())),
    )


def agreement(
    judgements: Sequence[Judgement], others: Sequence[Judgement], num_resamples: int = 2_000, seed: int = 0
) -> Agreement | None:
    """
    Agreement of two judges on the pairs that both judged.

    Args:
        judgements (`Sequence[Judgement]`):
            Judgements of one judge.
        others (`Sequence[Judgement]`):
            Judgements of the other, of the same rollouts.
        num_resamples (`int`, *optional*, defaults to `2_000`):
            Bootstrap samples of kappa's interval.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Agreement`], *optional*: `None` if there is no pair that both judged.
    """
    _only_judge(judgements), _only_judge(others)
    theirs = {judgement.key: judgement.outcome for judgement in others}
    tables: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(3, 3, dtype=torch.float64))
    both: list[Judgement] = []
    same: list[bool] = []
    for judgement in judgements:
        other = theirs.get(judgement.key)
        if judgement.outcome is not None and other is not None:
            both.append(judgement)
            same.append(judgement.outcome == other)
            tables[judgement.problem][OUTCOMES.index(judgement.outcome), OUTCOMES.index(other)] += 1
    rate = _rate(both, same)
    if rate is None:
        return None
    counts = torch.stack(list(tables.values()))  # (problems, 3, 3)
    kappa = _kappa(counts.sum(0))
    interval = None
    if not kappa.isnan():
        generator = torch.Generator().manual_seed(seed)
        resampled = []
        for _ in range(num_resamples):
            draw = torch.randint(len(counts), (len(counts),), generator=generator)
            resampled.append(_kappa(counts[draw].sum(0)))
        low, high = torch.stack(resampled).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        interval = (low, high)
    return Agreement(rate, None if kappa.isnan() else kappa.item(), interval)


def _kappa(table: torch.Tensor) -> torch.Tensor:
    """Cohen's kappa of a table of counts (3, 3), NaN where chance alone agrees."""
    shares = table / table.sum()
    by_chance = shares.sum(0) @ shares.sum(1)
    kappa = (shares.trace() - by_chance) / (1 - by_chance)
    return torch.where(table.max() == table.sum(), torch.nan, kappa)  # one cell holds all: 0/0, or its rounding


def _rate(judgements: Sequence[Judgement], successes: Sequence[bool]) -> Rate | None:
    """Rate of the successes, one a judgement, clustered by problem."""
    problems: dict[int, list[bool]] = defaultdict(list)
    for judgement, success in zip(judgements, successes, strict=True):
        problems[judgement.problem].append(success)
    return Rate.of_clusters(problems.values()) if problems else None


def _only_judge(judgements: Sequence[Judgement]) -> str:
    judges = {judgement.judge for judgement in judgements}
    if len(judges) != 1:
        raise ValueError(f"Judgements of one judge are needed, got {len(judges)}: {', '.join(sorted(judges))}.")
    if len({judgement.key for judgement in judgements}) != len(judgements):
        raise ValueError("A pair is judged twice: are there judgements of several students in one?")
    return judges.pop()


def problem_text(prompt: str | list[dict[str, str]]) -> str:
    """The problem: the prompt, or its last message of the user."""
    if isinstance(prompt, str):
        return prompt
    of_user = [message for message in prompt if message["role"] == "user"]
    return (of_user or prompt)[-1]["content"]
