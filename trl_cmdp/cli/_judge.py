"""`trl-cmdp evaluate --judge`: whose reasoning wins, from the records of two evaluations or more."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..evaluation import Agreement, EvaluationSettings, Rate, RolloutRecord, WinRate
    from ..evaluation.judges import Judge, Judgement, Pair

KEY_VARIABLE = "TRL_CMDP_JUDGE_API_KEY"
PROCESS = "process"
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
    """
    Check the options before anything is read.

    Raises:
        ValueError: If they contradict each other.
    """
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
    evaluations: "Sequence[tuple[EvaluationSettings, list[RolloutRecord]]]",
    arguments: argparse.Namespace,
    output_dir: Path | None,
) -> list[dict[str, Any]]:
    """
    Have the rollouts of each further evaluation judged against those of the first, and write the judgements.

    Args:
        evaluations (`Sequence[tuple[EvaluationSettings, list[RolloutRecord]]]`):
            The evaluations, at least two.
        arguments (`argparse.Namespace`):
            The options.
        output_dir (`Path`, *optional*):
            Folder of the files that the options do not name.

    Returns:
        `list[dict[str, Any]]`: For each further evaluation, kind of rollout (sampled, greedy) and judge, its win rate
        and, for a model, its agreement with the process judge, as they go into summary.json.

    Raises:
        ValueError: If rollouts have no partner, or the judge cannot be used.
    """
    from ..evaluation import agreement, judge_pairs, win_rate
    from ..evaluation.judges import JudgeError, write_judgements
    from ..evaluation.progress import show_progress

    judges = _judges(evaluations[0][0].task, arguments, output_dir)
    path = arguments.judgements or (output_dir / JUDGEMENTS_FILE if output_dir is not None else None)
    rows: list[dict[str, Any]] = []
    judgements: list[Judgement] = []
    for pairs in list(_comparisons(evaluations)):  # a list: unpaired rollouts should be found before a model is asked
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
            row |= _win_rate_json(win_rate(judged))
            if judge.name != PROCESS:
                row["agreement_with_process"] = _agreement_json(agreement(judged, of_process))
            rows.append(row)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(write_judgements(judgements))
        print(f"Judgements are in {path}.")
    return rows


def win_rate_table(rows: Sequence[dict[str, Any]]) -> str:
    """
    Write win rates as GitHub Markdown.

    Args:
        rows (`Sequence[dict[str, Any]]`):
            What [`judge_evaluations`] returned.

    Returns:
        `str`: A table and how to read it, empty if there is no row.
    """
    if not rows:
        return ""
    columns = (
        *("reasoning", "judge", "judged / pairs", "win, %", "tie, %", "loss, %", "orders agree, %"),
        *("agreement with process, %", "kappa", "failures"),
    )
    lines = [columns, (":---", ":---", *["---:"] * 7, ":---")]
    for row in rows:
        agreed = row.get("agreement_with_process")
        lines.append(
            (
                f"{row['student']} against {row['reference']}{', greedy' * row['greedy']}",
                row["judge"],
                f"{row['num_judged']} / {row['num_pairs']}",
                *(_percent(row[name]) for name in ("win", "tie", "loss", "position_consistency")),
                "–" if agreed is None else _percent(agreed["rate"]),
                "–" if agreed is None or agreed["kappa"] is None else f"{agreed['kappa']:.2f}",
                ", ".join(f"{count} {kind}" for kind, count in row["failures"].items()) or "none",
            )
        )
    table = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
    return (
        f"{table}\nRates are over the pairs with a verdict; a tie is a verdict of a tie, verdicts that change with the "
        "order, or one text from both. Intervals at 95%, clustered by problem.\n"
    )


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
    """What judges the steps of an embedded task, `None` for problems in words."""
    if task == "arithmetic":
        from ..tasks import arithmetic

        return arithmetic.valid_steps
    if task == "nested":
        from ..tasks import nested

        return nested.valid_steps
    return None


def _comparisons(
    evaluations: "Sequence[tuple[EvaluationSettings, list[RolloutRecord]]]",
) -> "Iterator[list[Pair]]":
    """Pairs of each further evaluation with the first: sampled rollouts, then greedy ones, where both have them."""
    from ..evaluation import pair_rollouts

    (first, of_first), *others = evaluations
    for greedy in (False, True):
        theirs = [record for record in of_first if record.greedy == greedy]
        for settings, records in others:
            mine = [record for record in records if record.greedy == greedy]
            if mine and theirs:
                yield pair_rollouts(mine, theirs, (settings.name, first.name))


def _win_rate_json(rates: "WinRate") -> dict[str, Any]:
    names = ("win", "tie", "loss", "position_consistency")
    return asdict(rates) | {name: _rate_json(getattr(rates, name)) for name in names}


def _agreement_json(agreed: "Agreement | None") -> dict[str, Any] | None:
    return None if agreed is None else asdict(agreed) | {"rate": _rate_json(agreed.rate)}


def _rate_json(rate: "Rate | None") -> dict[str, Any] | None:
    if rate is None:
        return None
    low, high = rate.interval
    return {"k": rate.k, "n": rate.n, "value": rate.value, "low": low, "high": high}


def _percent(rate: dict[str, Any] | None) -> str:
    return (
        "–" if rate is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * rate[n] for n in ("value", "low", "high")))
    )
