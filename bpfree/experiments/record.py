"""Training what is not recorded yet: seed by seed, on a CPU as many at once as it has cores."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..training import workers
from ..training.checkpoint import digest
from ..training.fit import Diverged, OutOfTime, Run
from ..training.ranks import Ranks
from .recipe import Recipe
from .results import FORMAT, manifest, path, place, read, write_json

PROBE = 512  # training images on which alignment with backprop is measured


def record(
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    data_root: str | os.PathLike | None = None,
    device: str = "cpu",
    precision: str = "float32",
    compile: bool = False,
    folder: str | os.PathLike | None = None,
    progress: bool | dict[str, Any] = False,
    save_every: float = 600.0,
    deadline: float | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  # a tuple of two numbers
) -> dict:
    """Train the seeds of a recipe that are not recorded yet, and add them to its file.

    What is under way is in a checkpoint beside it, written after each epoch: the same call goes on
    from there, to the same bits. On an accelerator all missing seeds are trained at once, on a CPU
    one after the other, each recorded when it ends. Each run says on which device, and in which
    precision, it was made: one file may hold several. A seed that another process is training is
    left to it. Of several ranks the first records, while the others ``assist``.

    Raises:
        ValueError: if the file there, or a checkpoint, was made by other settings or is damaged; it
            is left as it is.
        OutOfTime: if ``deadline`` (``time.monotonic()``) comes first.
        OSError: if the disk is full; what was recorded before stays.
    """
    folder = place(folder)
    file = path(recipe.name, folder)
    result = _so_far(recipe, folder)
    for seed in result["runs"]:  # of a kill between the record and the removal of its checkpoint
        file.with_name(f"{recipe.name}.{seed}.ckpt").unlink(missing_ok=True)
    missing = [seed for seed in seeds if str(seed) not in result["runs"]]
    if not missing:
        return result
    if deadline is not None and time.monotonic() > deadline:
        raise OutOfTime(f"stopped before seeds {missing} of {recipe.name}")
    data = recipe.load(data_root)
    if result["data_checksum"] not in (None, data.checksum):
        raise ValueError(f"{file} was recorded on other data than {recipe.data} in {data_root}")
    made = manifest(device, precision, compile)  # before training: of the code that trains
    file.parent.mkdir(parents=True, exist_ok=True)
    how = dict(probe=PROBE, device=device, precision=precision, compile=compile)
    together = recipe.together and torch.device(device).type != "cpu"
    for group in [missing] if together else [[seed] for seed in missing]:
        which = group[0] if len(group) == 1 else digest(group)[:16]  # names have 255 bytes at most
        checkpoint = file.with_name(f"{recipe.name}.{which}.ckpt")
        try:
            with _lock(checkpoint, timeout=0):
                if all(str(seed) in _so_far(recipe, folder)["runs"] for seed in group):
                    continue  # recorded by another process while this one trained others
                ranks.first(partial(tuple, (recipe, group, how, data.checksum)))
                try:
                    run = recipe.fit(
                        data, group, progress=progress, checkpoint=checkpoint, deadline=deadline,
                        save_every=save_every, ranks=ranks, **how,
                    )  # fmt: skip
                except Diverged as error:  # a result too
                    run = error.run
                made |= {"seconds": round(run.seconds, 1), "seeds_together": len(group)}
                made |= {"ranks": ranks.size} if ranks.size > 1 else {}
                new = {str(seed): {**_curves(run, i), **made} for i, seed in enumerate(group)}
                with _lock(file):  # others may add theirs to the same file
                    result = _so_far(recipe, folder)
                    runs = {**result["runs"], **new}
                    result["runs"] = dict(sorted(runs.items(), key=lambda item: int(item[0])))
                    write_json(file, {**result, "data_checksum": data.checksum})
                checkpoint.unlink()
        except Timeout:
            tqdm.write(f"{recipe.name}: another process is training seed {group}")
    return _so_far(recipe, folder)


def assist(ranks: Ranks, data_root: str | os.PathLike | None = None) -> None:
    """What the others do while the first rank records: train with it what it says, until it says
    that there is no more (None).

    Raises:
        ValueError: if the data set that this rank finds is another.
    """
    while job := ranks.first(lambda: None):
        recipe, group, how, checksum = job
        data = recipe.load(data_root)
        if data.checksum != checksum:
            raise ValueError(f"rank {ranks.rank} has other data than rank 0 as {recipe.data}")
        with suppress(Diverged, OutOfTime):  # it is for the first to tell
            recipe.fit(data, group, ranks=ranks, **how)


def _lock(file: Path, timeout: float = -1) -> FileLock:
    """Holds off other processes that would write this file; ends with its process. It is a file
    itself, where no reader of results sees it."""
    name = f"bpfree-{digest([str(file.resolve())])[:32]}.lock"
    return FileLock(Path(tempfile.gettempdir()) / name, timeout)


def _so_far(recipe: Recipe, folder: str | os.PathLike | None) -> dict:
    """What is recorded of a recipe, none of it if there is no file; ValueError if the file there is
    of other settings."""
    optional = [f for f in dataclasses.fields(recipe) if f.default is not dataclasses.MISSING]
    both = dataclasses.asdict(recipe), {f.name: f.default for f in optional}
    settings, defaults = json.loads(json.dumps(both))  # tuples as the file gives them back
    file = path(recipe.name, folder)
    if not file.exists():
        return {"format": FORMAT, "recipe": settings, "data_checksum": None, "runs": {}}
    result = read(recipe.name, folder)
    # a field that did not exist when the file was recorded had its default's effect
    was = {**defaults, **result["recipe"]}
    free = {"seeds", "source", "paper"}  # they decide no number
    if changed := [k for k, now in settings.items() if k not in free and now != was.get(k)]:
        said = ", ".join(f"{k}={was.get(k)!r} (now {settings[k]!r})" for k in changed)
        raise ValueError(f"{file} was recorded with {said}; move it away to record anew")
    return {**result, "recipe": settings}


def _curves(run: Run, i: int) -> dict:
    """The i-th seed's curves as JSON numbers; what is not a number (NaN) becomes null."""

    def plain(v):
        if isinstance(v, list):
            return [plain(u) for u in v]
        return round(v, 4) if math.isfinite(v) else None

    curves = {k: plain(v[i].tolist()) for k, v in vars(run).items() if isinstance(v, torch.Tensor)}
    return {**curves, "diverged": run.diverged[i]}


# ---- several seeds at once on a CPU --------------------------------------------------------------


def record_at_once(
    recipes: Sequence[Recipe],
    seeds: Sequence[int] | None,
    jobs: int,
    *,
    folder: str | os.PathLike | None = None,
    **options: Any,
) -> Iterator[tuple[Recipe, dict | Exception]]:
    """``record`` with ``jobs`` seeds at once, of one recipe or of several: a process and a thread
    each, the first recipes first.

    Yields each recipe when its last seed has ended, with its record or what kept one from it. Where
    the caller stops early, an interrupt say, all processes end at once; their checkpoints stay.
    """
    folder = place(folder)
    left: dict[str, set[Future]] = {}
    failed: dict[str, Exception] = {}
    with workers.processes(jobs) as submit:
        for recipe in recipes:
            known = _so_far(recipe, folder)["runs"]
            missing = [s for s in seeds or recipe.seeds if str(s) not in known]
            left[recipe.name] = {submit(_one, recipe, seed, folder, options) for seed in missing}
        named = {recipe.name: recipe for recipe in recipes}
        owner = {future: name for name, futures in left.items() for future in futures}
        for name in [name for name, futures in left.items() if not futures]:
            yield named[name], _so_far(named[name], folder)
        for future in as_completed(owner):
            name = owner[future]
            if (error := future.exception()) is not None:
                failed.setdefault(name, error)
            left[name].discard(future)
            if not left[name]:
                yield named[name], failed.get(name) or _so_far(named[name], folder)


def _one(recipe: Recipe, seed: int, folder: str | os.PathLike | None, options: dict) -> None:
    bar = {"position": workers.slot, "desc": f"{recipe.name} {seed}", "leave": False}
    options |= {"progress": bar if options.get("progress") else False}
    record(recipe, [seed], folder=folder, **options)
