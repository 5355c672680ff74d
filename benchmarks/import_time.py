"""
How long `import trl_cmdp` and `trl-cmdp --help` take, in fresh processes, beside a bare interpreter.

    python benchmarks/import_time.py   # half a minute; writes benchmarks/results/import_time.json

`python -X importtime -c "import trl_cmdp"` says what the time goes into.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path


COMMANDS = {
    "bare interpreter": ["-c", "pass"],
    "import trl_cmdp": ["-c", "import trl_cmdp"],
    "trl-cmdp --help": ["-m", "trl_cmdp", "--help"],
}
PROCESSES = 20


def main():
    seconds = {name: [] for name in COMMANDS}
    for _ in range(PROCESSES):  # in turn, so that other work on the machine falls on each alike
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    bare = statistics.median(seconds["bare interpreter"])
    results = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        results[name] = {"median": median, "least": min(values), "largest": max(values), "beyond_bare": median - bare}
        print(f"{name:18} {median:.3f} s, {median - bare:.3f} s beyond a bare interpreter")
    record = {
        "command": "python benchmarks/import_time.py",
        "processes": PROCESSES,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "results": results,
    }
    output = Path(__file__).parent / "results" / "import_time.json"
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
