"""`trl-cmdp evaluate --judge`: whose reasoning wins, from the records of two evaluations or more."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_whole
from .._messages import say
from ._tasks import EMBEDDED_TASKS, load_task


if TYPE_CHECKING:
    from ..evaluation import Agreement, WinRate
    from ..evaluation.judges import Judge, Judgement, Pair
    from ..evaluation.summary import Evaluation

KEY_VARIABLE = "TRL_CMDP_JUDGE_API_KEY"
PROCESS = "process"
_SHOWN_REASONS = 3  # for which a model gave no reply
JUDGEMENTS_FILE, REPLIES_FILE = "judgements.jsonl", "judge_replies.jsonl"


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command."""
    judge = parser.add_argument_group("judge", "win, tie and loss of the reasoning, against the first of --records")
    judge.add_argument(
        "--judge",
        metavar="process|URL",
        help=f"the process judge, or an OpenAI-compatible endpoint; its key is read from {KEY_VARIABLE}",
    )
    judge.add_argument("--judge_model", metavar="NAME", help="model at the endpoint")
    judge.add_argument("--judge_cache", type=Path, metavar="FILE", help=f"replies (default: {REPLIES_FILE})")
    judge.add_argument("--judgements", type=Path, metavar="FILE", help=f"judgements (default: {JUDGEMENTS_FILE})")


def check_judge_arguments(arguments: argparse.Namespace) -> None:
    """Check the options before anything is read. Those that contradict each other are a `ValueError`."""
    if arguments.judge is None:
        for name in ("judge_model", "judge_cache", "judgements"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} needs --judge.")
        return
    if len(arguments.records or ()) < 2:
        raise ValueError("--judge compares evaluations: give --records of two or more.")
    if arguments.judge == PROCESS and (arguments.judge_model or arguments.judge_cache):
        raise ValueError("--judge process asks no model: leave --judge_model and --judge_cache out.")
    if arguments.judge != PROCESS and arguments.judge_model is None:
        raise ValueError("--judge_model is needed: the model at the judge's endpoint.")


def judge_evaluations(
    evaluations: "Sequence[Evaluation]",
    arguments: argparse.Namespace,
    output_dir: Path | None,
) -> list[dict[str, Any]]:
    """
    Judge the rollouts of each further evaluation against those of the first, and write the judgements.

    Returned are, for each further evaluation, kind of rollout (sampled, greedy) and judge, its win rate and, for a
    model, its agreement with the process judge, as they are written into summary.json. Rollouts without a partner and
    a judge that cannot be used are a `ValueError`.
    """
    from ..evaluation import agreement, judge_pairs, win_rate
    from ..evaluation.judges import JudgeError, LLMJudge, write_judgements
    from ..evaluation.progress import show_progress

    judges = _judges(evaluations[0][0].task, arguments, output_dir)
    path = arguments.judgements or (output_dir / JUDGEMENTS_FILE if output_dir is not None else None)
    rows: list[dict[str, Any]] = []
    judgements: list[Judgement] = []
    for pairs in list(_comparisons(evaluations)):  # a list, to find unpaired rollouts before a model is asked
        student, reference = pairs[0].students
        of_process: list[Judgement] = []
        for judge in judges:
            try:
                with show_progress(f"{judge.name}: {student} against {reference}") as progress:
                    judged = judge_pairs(pairs, judge, progress)
            except JudgeError as error:
                raise ValueError(str(error)) from error
            judgements += judged
            of_process = of_process or judged  # the process judge is the first
            row = {"student": student, "reference": reference, "greedy": pairs[0].greedy}
            row |= _as_json(win_rate(judged))
            if judge.name != PROCESS:
                agreed = agreement(judged, of_process)
                row["agreement_with_process"] = agreed and _as_json(agreed)
            rows.append(row)
    for judge in judges:
        if isinstance(judge, LLMJudge):
            for reason, count in judge.reasons.most_common(_SHOWN_REASONS):
                say(f"{judge.name} left questions unanswered ({count}): {reason}", error=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write_judgements(judgements))
        say(f"Judgements are in {path}.")
    return rows


def _judges(task: str, arguments: argparse.Namespace, output_dir: Path | None) -> "list[Judge]":
    """The process judge, which costs nothing, and the model after it if there is one."""
    from ..evaluation.judges import ChatEndpoint, LLMJudge, ProcessJudge

    judges: list[Judge] = [ProcessJudge(_valid_steps(task))]
    if arguments.judge != PROCESS:
        chat = ChatEndpoint(arguments.judge, arguments.judge_model, os.environ.get(KEY_VARIABLE) or None)
        cache = arguments.judge_cache or (output_dir / REPLIES_FILE if output_dir is not None else None)
        judges.append(LLMJudge(chat, cache))
    return judges


def _valid_steps(task: str) -> Any:
    """The function that checks the steps of an embedded task, `None` for problems in words."""
    return load_task(task).valid_steps if task in EMBEDDED_TASKS else None


def _comparisons(evaluations: "Sequence[Evaluation]") -> "Iterator[list[Pair]]":
    """Pairs of each further evaluation with the first: sampled rollouts, then greedy ones, where both have them."""
    from ..evaluation import pair_rollouts

    (first, of_first), *others = evaluations
    for greedy in (False, True):
        theirs = [record for record in of_first if record.greedy == greedy]
        for settings, records in others:
            mine = [record for record in records if record.greedy == greedy]
            if mine and theirs:
                yield pair_rollouts(mine, theirs, (settings.name, first.name))


def _as_json(figures: "WinRate | Agreement") -> dict[str, Any]:
    """The figures, with each rate as its counts, value and interval."""
    from ..evaluation import Rate

    rates = {name: rate for name, rate in vars(figures).items() if isinstance(rate, Rate)}
    return asdict(figures) | {
        name: {"k": rate.k, "n": rate.n, "value": rate.value, "low": rate.interval[0], "high": rate.interval[1]}
        for name, rate in rates.items()
    }
