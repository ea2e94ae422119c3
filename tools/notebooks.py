"""Make the chapters' notebooks from their text twins, with the outputs of a fresh run.

    python tools/notebooks.py [NAME ...]     write and run these pages (default: all); a folder's
                                             name stands for its pages
    python tools/notebooks.py --check        exit 1 unless each notebook is its twin

The twin of chapters/FOLDER/NAME.ipynb, chapters/text/FOLDER/NAME.md, is edited and reviewed.
``{{ repository }}`` in it stands for the address in _config.yml, the only place where that is
written.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "chapters"
LONGEST = 120  # seconds of one core that a page may take


def repository() -> str:
    import yaml

    return yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]


def notebook(twin: Path) -> Path:
    """The notebook whose twin this is."""
    return (CHAPTERS / twin.relative_to(CHAPTERS / "text")).with_suffix(".ipynb")


def render(twin: Path, adapt: Callable[[str], str] = str):
    """The twin as a notebook without outputs."""
    import jupytext

    text = adapt(twin.read_text()).replace("{{ repository }}", repository())
    nb = jupytext.reads(text, fmt="md:myst")
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(nb.cells):
        cell["id"] = f"cell-{i}"  # jupytext draws ids at random
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def seconds() -> float:
    """Of processor time, of this program's children that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def run(twin: Path) -> float:
    """Write the notebook, and return the seconds that its kernel took."""
    import nbformat
    from nbclient import NotebookClient

    nb, path, start = render(twin), notebook(twin), seconds()
    path.parent.mkdir(exist_ok=True)
    # coalesced: how often the kernel flushed its output must not show
    settings = dict(timeout=600, kernel_name="python3", coalesce_streams=True)
    NotebookClient(nb, **settings, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in nb.cells:
        cell.metadata.pop("execution", None)  # timestamps
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("execution", None)
    nb.metadata["language_info"] = {"name": "python"}
    nbformat.validate(nb)
    nbformat.write(nb, path)
    return seconds() - start


def differs(twin: Path) -> str | None:
    """What sets the notebook apart from its twin, or None."""
    import nbformat

    path = notebook(twin)
    if not path.exists():
        return f"{path.name} is missing"
    ours, theirs = render(twin).cells, nbformat.read(path, 4).cells
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if (a.cell_type, a.source, dict(a.metadata)) != (b.cell_type, b.source, dict(b.metadata)):
            return f"{path.name}: cell {i} is not its twin's"
    return (
        None if len(ours) == len(theirs) else f"{path.name}: {len(theirs)} cells, not {len(ours)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    twins = sorted((CHAPTERS / "text").glob("*/*.md"))
    if args.names:
        wanted = {re.sub(r"\.(md|ipynb)$", "", Path(n).name) for n in args.names}
        if missing := wanted - {name for t in twins for name in (t.stem, t.parent.name)}:
            parser.error(f"no twin for {', '.join(sorted(missing))}")
        twins = [t for t in twins if wanted & {t.stem, t.parent.name}]
    if args.check:
        problems = [p for p in map(differs, twins) if p]
        print("\n".join(problems) or f"{len(twins)} notebooks are their twins'")
        return bool(problems)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the book shows was computed on a CPU
    slow = 0
    for twin in twins:
        spent = run(twin)
        slow += spent > LONGEST
        print(f"{spent:4.0f} s  {notebook(twin).relative_to(ROOT)}", flush=True)
    if slow:
        print(f"{slow} pages take more than {LONGEST} s of one core")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
