"""Run the pages as Colab would, and record what that took.

    python3.12 tools/colab.py [NAME ...]     recorded in figures/results/colab.json

An environment of the versions in tools/colab.txt is made in _build/colab (5 GB, and a network for
pip), in which bpfree is not installed. Each page of what is committed then stands alone in an empty
folder, and its first cell fetches the book: git is told to take a clone for the address there.
Exit status 1 if a cell fails or takes more than ``CELL`` seconds, a page more than ``PAGE``, if an
output is not the book's, or if a package of Colab's was replaced, or would be by `pip install`.
Seconds are the processors', all threads together: an idle machine's clock shows fewer. The number
of threads is OMP_NUM_THREADS.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tools" / "colab.txt"
RECORD = ROOT / "figures" / "results" / "colab.json"
PLACE = ROOT / "_build" / "colab"
PYTHON = PLACE / "env" / "bin" / "python"
CELL, PAGE = 60, 180  # seconds


def run_page(path: Path) -> dict:
    """Run a notebook in the current folder; called inside the environment."""
    import nbformat
    import psutil
    from nbclient import NotebookClient

    def spent() -> tuple[float, float]:
        """Seconds of wall clock, and of processors by the kernel and what it has run."""
        return time.monotonic(), sum(psutil.Process(client.km.provisioner.pid).cpu_times()[:4])

    nb, took = nbformat.read(path, 4), {}
    shown = [_text(cell) for cell in nb.cells]

    def begin(cell, cell_index):
        took[cell_index] = spent()

    def end(cell, cell_index, **reply):
        took[cell_index] = [b - a for a, b in zip(took[cell_index], spent(), strict=True)]

    client = NotebookClient(
        nb, timeout=20 * CELL, kernel_name="python3", coalesce_streams=True,
        on_cell_execute=begin, on_cell_executed=end,
    )  # fmt: skip
    client.execute()
    wall, processors = zip(*took.values(), strict=True)
    return {
        "seconds": round(sum(processors), 1),
        "slowest_cell": round(max(processors), 1),
        "wall_seconds": round(sum(wall), 1),
        "cells": len(wall),
        "other_outputs": [i for i, cell in enumerate(nb.cells) if _text(cell) != shown[i]],
    }


def _text(cell) -> list[str]:
    """The outputs that nbval compares, pictures aside."""
    if "nbval-ignore-output" in cell.metadata.get("tags", []):
        return []
    texts = [o.get("text") or o.get("data", {}) for o in cell.get("outputs", [])]
    texts = [
        t if isinstance(t, str) else t.get("text/markdown", t.get("text/plain")) for t in texts
    ]
    return [t for t in texts if t and not t.startswith("<Figure")]


def pip(*args: str) -> str:
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def packages() -> set[str]:
    return set(pip("freeze", "--all").split())


def surroundings(address: str, book: Path) -> dict[str, str]:
    """The variables of a page's process: of ours, none that tells where bpfree or data is."""
    ours = ("PYTHON", "BPFREE", "JUPYTER", "MPL")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    git = {f"url.file://{book}.insteadOf": address, "safe.directory": "*"}
    settings = {
        f"GIT_CONFIG_{field}_{i}": text
        for i, pair in enumerate(git.items())
        for field, text in zip(("KEY", "VALUE"), pair, strict=True)
    }
    return {**keep, **settings, "GIT_CONFIG_COUNT": str(len(git))}


def main(names: list[str]) -> int:
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", PLACE / "env"], check=True)
    pip("install", "--quiet", "-r", str(PINS))
    before, book, folders = packages(), PLACE / "book", PLACE / "pages"
    for old in (book, folders):
        shutil.rmtree(old, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", ROOT, book], check=True)
    (address,) = re.findall(r"^  url: (\S+)", (book / "_config.yml").read_text(), flags=re.M)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=book, check=True, capture_output=True, text=True
    ).stdout.strip()
    pages, problems = {}, []
    for path in sorted(book.glob("chapters/[0-9]*/*.ipynb")):
        if names and path.stem not in names:
            continue
        folder = folders / path.stem
        folder.mkdir(parents=True)
        shutil.copy(path, folder)
        done = subprocess.run(
            [PYTHON, Path(__file__).resolve(), "--inside", path.name], cwd=folder,
            env=surroundings(address, book), capture_output=True, text=True,
        )  # fmt: skip
        shutil.rmtree(folder / "bpfree-book", ignore_errors=True)
        if done.returncode:
            problems.append(f"{path.stem}: {done.stderr[-3000:]}")
            print(problems[-1], flush=True)
            continue
        page = json.loads(done.stdout.splitlines()[-1])
        pages[path.stem] = {**page, "commit": commit}
        print(path.stem, page, flush=True)
        if page["seconds"] > PAGE or page["slowest_cell"] > CELL or page["other_outputs"]:
            problems.append(f"{path.stem}: {page}")
    after = packages()
    plan = json.loads(pip("install", "--quiet", "--dry-run", "--report", "-", str(book)))
    would_add = [p["metadata"]["name"] for p in plan["install"]]
    problems += [f"replaced: {p}" for p in before - after]
    problems += [f"pip install would replace {n}" for n in would_add if n != "bpfree"]
    runtime, version = re.search(r"runtime (\S+): Python (\S+),", PINS.read_text()).groups()
    pins = [p for p in PINS.read_text().split("\n") if p and not p.startswith("#")]
    record = {
        "runtime": runtime,
        "runtime_python": version,
        "python": platform.python_version(),
        "versions": dict(p.split("==") for p in pins),
        "not_of_the_list": sorted(before - set(pins)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as cores"),
        "note": "Seconds of the processors, all threads together, the fetching of the book"
        " included; wall_seconds were measured beside other work on the same two cores.",
        "limits": {"cell": CELL, "page": PAGE},
        "packages_added": sorted(after - before),
        "packages_replaced": sorted(before - after),
        "pip_install_would_add": would_add,
        "pages": pages,
    }
    print("\n".join(problems) or f"{len(pages)} pages run as in Colab's {runtime}")
    if not problems:
        if names and RECORD.exists():
            record["pages"] = {**json.loads(RECORD.read_text())["pages"], **pages}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return bool(problems)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(run_page(Path(sys.argv[2]))))
    else:
        sys.exit(main(sys.argv[1:]))
