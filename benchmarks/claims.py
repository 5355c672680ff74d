"""
What the committed comparisons say of the claims in docs/comparison.md, from their records alone.

    python benchmarks/claims.py            # writes benchmarks/results/claims.md and prints it

First table: whether a method holds on a test bed. It does where at least 95% of its rollouts are within the limit, and
no other such method is ahead of it by more than a point: the paired 95% interval of the difference in correct answers,
or in valid ones, lies above +0.01. Two methods are compared on the seeds that both were run on; a method that was run on
fewer than the bed has says on how many. Of word problems it reads the runs of 400 steps, whose curves level off, on the
models that are kept and on an earlier set (docs/test_beds.md). Second table: what reward alone does to the reasoning, by
the process judge, beside the constrained method: with its defaults, or with a constant limit where it was run with that
alone. An answer is preferred where its steps are valid and the other's to the same problem are not. Third table: word
problems under half the limit, for which the constrained method was trained again and the others, on the same seeds, need
not be: a fixed weight, imitation and reward alone do not read the limit.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean

from trl_cmdp._files import write_whole
from trl_cmdp.evaluation import CellRecord, Comparison, MethodSummary, compare_methods, read_records


RESULTS = Path(__file__).parent / "results"
BEDS = {
    "arithmetic": "chained sums",
    "nested": "nested expressions",
    "chains": "longer chains",
    "word-problems-middling-again": "word problems, middling",
    "word-problems-rare-again": "word problems, rare",
    "word-problems-mediocre-again": "word problems, mediocre teacher",
    "word-problems-middling-long": "middling, earlier models",
    "word-problems-rare-long": "rare, earlier models",
    "word-problems-mediocre-long": "mediocre teacher, earlier models",
}
OURS = ("constrained", "constant-limit")  # the first that was run stands for the constrained method
MARGIN = 0.01


def records_of(bed: str) -> list[CellRecord]:
    """Committed records of a test bed, none where there are none yet."""
    path = RESULTS / bed / "records.jsonl"
    return read_records(path.read_text()) if path.exists() else []


def lead(records: list[CellRecord], ahead: MethodSummary, behind: MethodSummary) -> str | None:
    """By how much one method is ahead of another in correct or in valid answers, where that is beyond the margin."""
    seeds = ahead.right.by_seed.keys() & behind.right.by_seed.keys()
    if not seeds or not any(
        mean(of.by_seed[seed] - other.by_seed[seed] for seed in seeds) > MARGIN
        for of, other in ((ahead.right, behind.right), (ahead.valid, behind.valid))
    ):
        return None  # no interval can lie above the margin
    both = [record for record in records if record.method in (ahead.method, behind.method)]
    rows = {row.method: row for row in compare_methods(both, reference=behind.method).methods}
    row = rows[ahead.method]
    for what, difference in (("correct", row.right_difference), ("valid", row.valid_difference)):
        if difference.low > MARGIN:
            return f"{ahead.method} {difference.value:+.3f} {what}"
    return None


def number_of_seeds(n: int) -> str:
    return f"{n} seed{'s' * (n > 1)}"


def verdicts(records: list[CellRecord], comparison: Comparison) -> dict[str, str]:
    """Of each trained method on one bed: "holds", or why it does not, and on how many seeds if the bed has more."""
    rows = [row for row in comparison.methods if row.trainer != "none"]
    most = max(len(row.right.by_seed) for row in rows)
    said = {}
    for row in rows:
        if row.feasible:
            others = [other for other in rows if other.feasible and other is not row]
            others.sort(key=lambda other: -len(other.right.by_seed))  # names the lead on the most seeds
            leads = (lead(records, other, row) for other in others)
            said[row.method] = next((found for found in leads if found), "holds")
        else:
            said[row.method] = f"{row.satisfaction.value:.3f} inside"
        if len(row.right.by_seed) < most:
            said[row.method] += f" ({number_of_seeds(len(row.right.by_seed))})"
    return said


def preferences(records: list[CellRecord], method: str, other: str) -> tuple[int, int, int]:
    """Problems on which one method's steps alone are valid, the other's alone, and all that both answered."""
    cells = {(record.method, record.seed): record for record in records}
    seeds = [seed for name, seed in cells if name == method and (other, seed) in cells]
    counts: Counter[tuple[int | None, int | None]] = Counter()
    for seed in seeds:
        pairs = zip(cells[method, seed].outcomes, cells[other, seed].outcomes, strict=True)
        counts.update((mine.valid, theirs.valid) for mine, theirs in pairs)
    return counts[1, 0], counts[0, 1], counts.total()


def under_half_the_limit(bed: str) -> list[CellRecord]:
    """Records of the constrained method under half a bed's limit, and of those that would be the same under any."""
    tight = [record for record in records_of(bed.removesuffix("-long") + "-half") if record.trainer == "constrained"]
    if not tight:
        return []
    limit, task, seeds = tight[0].cost_limit, tight[0].task, {record.seed for record in tight}
    return tight + [
        replace(record, task=task, settings=record.settings | {"cost_limit": limit})
        for record in records_of(bed)
        if record.seed in seeds
        and (record.trainer in ("gkd", "minillm", "grpo") or record.config.get("multiplier") == "fixed")
    ]


def half_limit_table() -> list[str]:
    """Lines of the third table."""
    lines = [
        "| test bed | half its limit | method | inside | correct | valid | correct minus the constrained method's |",
        "| :--- | ---: | :--- | ---: | ---: | ---: | ---: |",
    ]
    for bed, name in BEDS.items():
        records = under_half_the_limit(bed)
        rows = compare_methods(records).methods if records else []
        for row in sorted(rows, key=lambda row: -row.satisfaction.value):
            figures = [of.text() for of in (row.satisfaction, row.right, row.valid)]
            figures.append(row.right_difference.text("+.3f") if row.right_difference else "–")
            lines.append(f"| {name} | {records[0].cost_limit:g} | {row.method} | {' | '.join(figures)} |")
    return lines


def tables() -> str:
    """The three tables as markdown."""
    beds = {bed: records for bed in BEDS if (records := records_of(bed))}
    comparisons = {bed: compare_methods(records) for bed, records in beds.items()}
    said = {bed: verdicts(records, comparisons[bed]) for bed, records in beds.items()}
    methods = dict.fromkeys(method for verdict in said.values() for method in verdict)
    seeds = {bed: len({record.seed for record in records}) for bed, records in beds.items()}
    lines = [
        f"| method | {' | '.join(f'{BEDS[bed]} ({number_of_seeds(seeds[bed])})' for bed in beds)} | holds on |",
        "| :--- |" + " :--- |" * (len(beds) + 1),
    ]
    held = {method: sum(said[bed].get(method, "").startswith("holds") for bed in beds) for method in methods}
    for method in sorted(methods, key=lambda name: (name != OURS[0], name != OURS[1], -held[name])):
        run = sum(method in verdict for verdict in said.values())
        cells = [said[bed].get(method, "not run") for bed in beds]
        lines.append(f"| {method} | {' | '.join(cells)} | {held[method]} of {run} |")
    lines += [
        "",
        "| test bed | GRPO inside | constrained inside | constrained preferred | GRPO preferred | problems |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for bed, records in beds.items():
        rows = {row.method: row for row in comparisons[bed].methods}
        method = next((name for name in OURS if name in rows), None)
        if "grpo" in rows and method is not None:
            ours, theirs, problems = preferences(records, method, "grpo")
            inside = " | ".join(f"{rows[name].satisfaction.value:.3f}" for name in ("grpo", method))
            lines.append(f"| {BEDS[bed]} | {inside} | {ours} | {theirs} | {problems} |")
    return "\n".join([*lines, "", *half_limit_table()]) + "\n"


if __name__ == "__main__":
    text = tables()
    write_whole(RESULTS / "claims.md", text)
    print(text)
