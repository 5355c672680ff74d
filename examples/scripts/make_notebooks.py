"""
Executes the notebooks' sources and writes each with its outputs.

    python examples/scripts/make_notebooks.py
    python examples/scripts/make_notebooks.py quickstart choosing_the_limit

The source of a notebook is `examples/notebooks/NAME.py` (percent format); `NAME.ipynb` beside it is made from it.
Needs `pip install --group notebooks`, and `qlora_quantised_teacher` and `teacher_that_sees_more` what `demo_llm.py` needs.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(source: Path, parameters: dict[str, Any] | None = None) -> nbformat.NotebookNode:
    """
    Run a notebook from its source, in a kernel of its own and in its own folder.

    Args:
        source (`Path`):
            Source in percent format.
        parameters (`dict[str, Any]`, *optional*):
            Values that replace those of the cell tagged `parameters`.

    Returns:
        `nbformat.NotebookNode`: The notebook with its outputs.

    Raises:
        ValueError: If that cell does not assign a parameter.
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # random ones would change with every run
    if parameters:
        place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        lines = notebook.cells[place].source.splitlines()
        if unknown := [name for name in parameters if not any(line.startswith(f"{name} = ") for line in lines)]:
            raise ValueError(f"{source.name} has no parameter {', '.join(unknown)}.")
        code = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(code, id="parameters"))
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(source.parent)}},
    )
    # Libraries warn of their own renamings, with the paths that they are installed in.
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"})
    for cell in notebook.cells:  # on some processors bitsandbytes names a kernel that it can do without
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if "kernels-community" not in output.get("text", "")]
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    names = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"notebooks (default: all of {', '.join(names)})")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no such notebook: {', '.join(sorted(unknown))}")
    for name in options.names or names:
        start = time.monotonic()
        notebook = execute(NOTEBOOKS / f"{name}.py")
        path = NOTEBOOKS / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{name}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
