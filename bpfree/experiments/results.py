"""Recorded runs: one JSON file per recipe, written atomically, read (never retyped) by chapters."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..style import label
from ..training.checkpoint import write_atomic
from . import recipes
from .tasks import measures

FORMAT = "bpfree-result/1"
CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = not (CHECKOUT / "pyproject.toml").is_file()
# whose figures/results has the book's records
ROOT = CHECKOUT / "bpfree" if INSTALLED else CHECKOUT
KEYS = {"test_accuracy", "diverged", "seconds", "seeds_together", "device"}  # of each run


def place(folder: str | os.PathLike | None = None) -> Path:
    """Where results are written: ``folder``, by default figures/results of this checkout; without a
    checkout, of the working folder."""
    default = Path("figures" if INSTALLED else ROOT / "figures") / "results"
    return Path(os.path.expanduser(folder or default))


def path(name: str, folder: str | os.PathLike | None = None) -> Path:
    """Where a recipe's result is read: in ``place(folder)``; without a checkout or ``folder``, what
    is not there is the book's, which came with the package."""
    file = place(folder) / f"{name}.json"
    if INSTALLED and not folder and not file.exists():
        return ROOT / "figures" / "results" / file.name
    return file


def read(name: str, folder: str | os.PathLike | None = None) -> dict:
    """A recorded result: ``recipe``, ``data_checksum`` and ``runs`` {seed: curves and manifest}.

    Raises:
        FileNotFoundError: if it was not recorded, with the command that records it.
        ValueError: if the file is not a result of this library, or of another recipe.
    """
    file = path(name, folder)
    if not file.exists():
        raise FileNotFoundError(f"{name} is not recorded; record it with: bpfree run {name}")
    try:
        result = json.loads(file.read_text())
        its, found, runs = result["recipe"], result["format"], result["runs"].values()
        if found != FORMAT:
            raise ValueError(f"expected {FORMAT!r}, got {found!r}")
        if not all(KEYS <= r.keys() and len(r["test_accuracy"]) == its["epochs"] for r in runs):
            raise ValueError("a run is incomplete")
        if its["name"] != name:
            raise ValueError(f"it holds the recipe {its['name']!r}, not {name!r}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a result of bpfree: {error!r}") from error
    return result


def write_json(file: Path, content: dict) -> None:
    """Write all of it or nothing: a reader never sees half a file."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomic(file, lambda f: f.write(text.encode()))


def manifest(device: str, precision: str = "float32", compile: bool = False) -> dict:
    """What a number depends on beside its settings: hardware, versions, commit."""

    def git(*args: str) -> str:
        if not (ROOT / ".git").exists() or shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or None
    if commit and git("status", "--porcelain", "--", "bpfree", "figures/*.py"):
        commit += "+changes"
    cuda = torch.device(device).type == "cuda"
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if cuda else cpu
    how = [name, *[precision] * (precision != "float32"), *["compiled"] * compile]
    return {
        "device": ", ".join(how),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def final(result: dict) -> list[float]:
    """Test accuracy (%) of each seed after its last epoch, never the best one; not of diverged."""
    runs = result["runs"].values()
    return [run["test_accuracy"][-1] for run in runs if run["diverged"] is None]


def frontier(
    name: str, folder: str | os.PathLike | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The rates of a recorded sequence of tasks, rising, and its ``measures`` (seeds, rates) in %;
    NaN where a rate diverged."""
    result = read(name, folder)
    recipe = result["recipe"]
    rates = [*recipe["rates"], recipe["lr"]]
    order = sorted(range(len(rates)), key=rates.__getitem__)
    # null, of what diverged, becomes NaN
    R = torch.from_numpy(np.array([r["matrix"] for r in result["runs"].values()], float))
    return [rates[i] for i in order], measures(R[:, order])


def gain(
    name: str, against: str, folder: str | os.PathLike | None = None
) -> tuple[list[float], torch.Tensor]:
    """By how much one sequence ends above another at equal learning accuracy, in points.

    For each rate of the first, (seeds, rates): its final accuracy less the best that the other has
    at a rate at which it learns at least as much; NaN where there is none. Seeds of both.
    """
    (rates, one), (_, other) = frontier(name, folder), frontier(against, folder)
    n = min(len(one["final"]), len(other["final"]))
    enough = other["learning"][:n, None] >= one["learning"][:n, :, None]
    best = other["final"][:n, None].where(enough, -torch.inf).amax(2)
    return rates, one["final"][:n] - best.where(best.isfinite(), torch.nan)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """'mean ± sd' with the sample standard deviation; the mean alone for one value."""
    if not values:
        return "diverged"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(names: Sequence[str], folder: str | os.PathLike | None = None) -> str:
    """Markdown: a table, paper beside ours, and the command for what is not recorded.

    A recipe that is not recorded has a row only if the paper has a number for it.
    """
    rows = ["| rule | data | network | epochs | paper, % | here, % | seeds | s per seed | device |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    missing = []
    for name in names:
        recipe = recipes.get(name)
        kind, args, keywords = recipe.network
        if kind in ("mlp", "convnet"):
            shape = "-".join(map(str, args if kind == "mlp" else args[1]))
            shape = f"{'conv ' * (kind == 'convnet')}{shape}, {keywords.get('activation', 'relu')}"
        else:
            shape = args[0] if kind == "torchvision_model" else kind
        paper = "none" if recipe.source == "this book" else recipe.paper or "not verified"
        options = "".join(f", {k} {v}" for k, v in recipe.options.items()).replace("_", " ")
        data = f"{recipe.data}, shifts {recipe.shifts}" if recipe.shifts else recipe.data
        head = f"| {label(recipe.rule)}{options} | {data} | {shape} | {recipe.length} | {paper}"
        if not path(name, folder).exists():
            missing.append(name)
            rows += [f"{head} | not run | | | |"] * (recipe.paper is not None)
            continue
        runs = read(name, folder)["runs"]
        seconds = statistics.fmean(r["seconds"] / r["seeds_together"] for r in runs.values())
        devices = "; ".join(sorted({r["device"] for r in runs.values()}))
        kept = final({"runs": runs})
        lost = f" (+ {len(runs) - len(kept)} diverged)" if len(kept) < len(runs) else ""
        rows.append(f"{head} | {spread(kept)} | {len(kept)}{lost} | {seconds:.0f} | {devices} |")
    parts = ["\n".join(rows)] if len(rows) > 2 else []
    if missing:
        parts.append(f"Not run yet: `bpfree run {' '.join(missing)}`")
    return "\n\n".join(parts)
