"""
A newcomer's first trained student and its report: the commands of the README's "Install", timed on a fresh checkout.

    python benchmarks/newcomer.py   # some minutes; writes benchmarks/results/newcomer.json
    PIP_CONSTRAINT=$PWD/constraints.txt python benchmarks/newcomer.py   # a CPU build of torch, versions of development

A copy of the working tree in a temporary folder, an empty home and caches, a new environment. The commands are read
from the README, so they are what a reader types. The script itself needs no package.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
INSTALL = re.compile(r"^## Install\n.*?^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What would lead back to this checkout, or to what was downloaded before.
FOREIGN = ("PYTHON", "VIRTUAL_ENV", "HF_", "XDG_", "TORCH", "PIP_CACHE")


def readme_commands():
    """Commands of the first block of "Install"."""
    block = INSTALL.search((ROOT / "README.md").read_text())[1]
    commands = [line.partition("#")[0].strip() for line in block.splitlines()]
    return [command for command in commands if command]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "newcomer.json")
    arguments = parser.parse_args()

    steps = []
    with tempfile.TemporaryDirectory() as folder:
        home, checkout = Path(folder, "home"), Path(folder, "trl-cmdp")
        home.mkdir()
        skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "site")
        shutil.copytree(ROOT, checkout, ignore=skipped)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        environment |= {"HOME": str(home), "PATH": f"{home / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        for command in (f"{sys.executable} -m venv {home / 'venv'}", *readme_commands()):
            print(f"$ {command}", flush=True)
            start = time.monotonic()
            subprocess.run(command, shell=True, cwd=checkout, env=environment, check=True)
            shown = command if steps else "python -m venv"
            steps.append({"command": shown, "seconds": round(time.monotonic() - start, 1)})
        for name in ("outputs/demo/student/model.safetensors", "outputs/demo/report/report.html"):
            if not (checkout / name).is_file():
                raise SystemExit(f"The commands of the README left no {name}.")
        listing = subprocess.run(
            "trl-cmdp env", shell=True, env=environment, check=True, capture_output=True, text=True
        )

    seconds = round(sum(step["seconds"] for step in steps), 1)
    for step in steps:
        print(f"{step['seconds']:8.1f} s  {step['command']}")
    print(f"{seconds:8.1f} s  together, on {os.cpu_count()} cores")
    record = {
        "command": "python benchmarks/newcomer.py",
        "constrained": "PIP_CONSTRAINT" in environment,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[2],
        "environment": dict(line[2:].split(": ", 1) for line in listing.stdout.splitlines()),
        "steps": steps,
        "seconds": seconds,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
