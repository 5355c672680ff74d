"""
How long the command line takes to say something, in fresh processes, beside a bare interpreter: the import, the help, a
mistyped option, and the help of a training command.

    python benchmarks/import_time.py                              # a minute; writes benchmarks/results/import_time.json
    python benchmarks/import_time.py --before COMMIT --processes 3   # the package at a commit too, in turn with this one

Beside the seconds on the wall stand those of the processor, which other work on the machine changes less.
`python -X importtime -c "import trl_cmdp"` says what the time goes into.
"""

import argparse
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
COMMANDS = {
    "bare interpreter": ["-c", "pass"],
    "import trl_cmdp": ["-c", "import trl_cmdp"],
    "trl-cmdp --help": ["-m", "trl_cmdp", "--help"],
    "a mistyped option": [
        "-m",
        "trl_cmdp",
        "constrained",
        "--model_name_or_path",
        "org/student",
        "--cost_limt",
        "0.2",
    ],
    "trl-cmdp constrained --help": ["-m", "trl_cmdp", "constrained", "--help"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=20, help="of each command")
    parser.add_argument("--before", metavar="COMMIT", help="measure the package at this commit too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {"now": ROOT}
        if arguments.before:
            archive = subprocess.run(
                ["git", "archive", arguments.before, "trl_cmdp"], cwd=ROOT, check=True, stdout=subprocess.PIPE
            )
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
                files.extractall(folder, filter="data")
            checkouts["before"] = Path(folder)
        results = measure(checkouts, arguments.processes)
    record = {
        "command": " ".join(["python", "benchmarks/import_time.py", *sys.argv[1:]]),
        "processes": arguments.processes,
        "python": platform.python_version(),
        "CPUs": os.cpu_count(),
        "load": os.getloadavg()[0],
        "results": results,
    }
    (ROOT / "benchmarks" / "results" / "import_time.json").write_text(json.dumps(record, indent=2) + "\n")


def measure(checkouts: dict[str, Path], processes: int) -> dict:
    """Seconds of each command with the package of each checkout."""
    taken = {(when, name): [] for when in checkouts for name in COMMANDS}
    for _ in range(processes):  # in turn, so that other work on the machine falls on each alike
        for (when, name), seconds in taken.items():
            environment = {**os.environ, "PYTHONPATH": str(checkouts[when])}
            start, used = time.perf_counter(), processor_seconds()
            # A mistyped option exits with 2.
            subprocess.run(
                [sys.executable, *COMMANDS[name]],
                cwd=checkouts[when],  # where `-m` looks first
                env=environment,
                check=False,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            seconds.append((time.perf_counter() - start, processor_seconds() - used))
    results = {}
    for (when, name), seconds in taken.items():
        wall, processor = zip(*seconds, strict=True)
        row = {"median": statistics.median(wall), "least": min(wall), "largest": max(wall)}
        row["processor"] = statistics.median(processor)
        row["beyond_bare"] = row["median"] - statistics.median(wall for wall, _ in taken[when, "bare interpreter"])
        results.setdefault(when, {})[name] = row
        print(f"{when:7}{name:28} {row['median']:7.3f} s, of the processor {row['processor']:.3f} s")
    return results


def processor_seconds() -> float:
    """Of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
