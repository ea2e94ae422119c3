"""Training, with one seed or several at once, and nothing to learn beside PyTorch (chapter 0)."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import Data
from ..rule import Rule
from . import checkpoint as checkpoints
from .check import check_rule, check_settings, check_update
from .lockstep import Lockstep, Optimizer
from .ranks import Ranks

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class OutOfTime(Exception):
    """Training stopped at the end of an epoch, since its time was up; the checkpoint has it all."""


@dataclasses.dataclass
class Run:
    """What ``fit`` returns: the trained rules and their curves, float64 tensors on the CPU."""

    rules: list[Rule]  # one per seed; the network is ``rule.net``
    train_loss: Tensor  # (S, epochs) mean cross-entropy over the epoch's batches, in nats
    train_accuracy: Tensor  # (S, epochs) % over the epoch's batches, dropout on
    test_accuracy: Tensor  # (S, epochs) % after the epoch
    angle: Tensor  # (S, epochs + 1, L) degrees to backprop's update, before and after each epoch
    norm: Tensor  # (S, epochs + 1, L) norm relative to backprop's update
    diverged: list[int | None]  # per seed: the epoch (1, 2, ...) whose loss was out of range
    seconds: float  # of training, all seeds, interruptions not counted


# Nats. Half a batch's samples would have logits over 2^24, where float32 has no two numbers less
# than a nat apart and knows no probability but 0 and 1. Recorded runs that came back had seen 2^10.
LARGEST_LOSS = 2.0**24


class Diverged(FloatingPointError):
    """The loss of a seed was not finite, or over ``LARGEST_LOSS``. ``run`` has the curves of all
    seeds, NaN from there on."""

    def __init__(self, message: str, run: Run):
        super().__init__(message)
        self.run = run


def fit(
    make: Callable[[torch.Generator], Rule],
    data: Data,
    *,
    epochs: int,
    batch_size: int = 64,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] = sgd,
    schedule: Callable[[int], float] | None = None,
    seeds: Sequence[int] = (0,),
    vectorize: bool | None = None,
    probe: int = 0,
    shifts: int = 0,
    flips: bool = False,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    compile: bool = False,
    progress: bool | dict[str, Any] = False,
    checkpoint: str | os.PathLike | None = None,
    save_every: float = 600.0,
    deadline: float | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  # a tuple of two numbers
) -> Run:
    """Train ``make(generator)`` on ``data`` once per seed.

    Each seed has its own generator, from which its initial weights, feedback, batch order and
    dropout come; so its result is the same, up to rounding, whether it is trained alone or with
    others. A seed whose mean loss in an epoch is not finite, or over 2^24 nats, stops; the others
    go on to their end.

    Args:
        make: builds a network and returns its rule, drawing only from the generator given.
        epochs: passes over the training set; each leaves out the last, incomplete batch.
        optimizer: ``torch.optim`` class with its settings bound, such as
            ``partial(torch.optim.SGD, lr=0.1)``. It must be elementwise for vectorised seeds.
        schedule: epoch (0, 1, ...) -> factor on the learning rate.
        vectorize: train all seeds in one batched step. None: only on an accelerator, since on a
            CPU one seed already fills the cores.
        probe: number of training images on which the alignment with backprop is measured after
            each epoch (0: not measured; ``angle`` and ``norm`` are then empty).
        shifts, flips: each training image is moved by up to so many pixels, zeros at the border; or
            mirrored left to right with probability 1/2.
        device: where to train; the rules come back to where they were made. On a GPU the step is
            recorded as a CUDA graph: an optimiser that counts its steps (Adam) must be given
            ``capturable=True``.
        precision: of the training step: ``"float32"``, ``"tf32"`` or ``"bf16"``; measures are taken
            in float32.
        compile: hand the step to ``torch.compile`` first; a quarter of a minute, so for long runs.
        progress: show a progress bar; or the keywords of ``tqdm`` for one.
        checkpoint: file written after each epoch, from which the same call resumes to the bit. One
            file per seed, ``NAME.seedN``, where seeds are trained one after the other.
        save_every: seconds after which it is written within an epoch too.
        deadline: ``time.monotonic()`` by which to stop, at the end of an epoch; a seed's first
            epoch is begun unless it has passed.
        ranks: processes that make this call together, as ``training.ranks.ranks()`` gives them:
            each trains on its share of every batch, and all end with the same rules. Rank 0's
            checkpoint and deadline count.

    Raises:
        ValueError: for epochs < 1, an unknown precision, no or repeated seeds, a batch larger than
            the training set or not divided by the ranks, fewer classes than the data, one network
            for several seeds, a rule whose update reads itself or writes to what it is given, or a
            checkpoint that is damaged, foreign, or of other settings.
        OutOfTime: if the deadline comes first.
        Diverged: a ``FloatingPointError``, at the end, if a seed stopped for its loss.
        OSError: if a checkpoint cannot be written (the one before it is whole), or a rank is lost.
    """
    seeds = check_settings(data, epochs, batch_size, seeds, probe, precision, shifts, flips)
    if not save_every >= 0:
        raise ValueError(f"save_every must be a number of seconds >= 0, got {save_every!r}")
    ranks.check_batch_size(batch_size)
    if vectorize is None:
        vectorize = torch.device(device).type != "cpu"
    rates = [1.0 if schedule is None else schedule(epoch) for epoch in range(epochs)]
    groups = [seeds] if vectorize else [[seed] for seed in seeds]
    data, rules, parts, seconds = data.to(device), [], [], 0.0
    look = progress if isinstance(progress, dict) else {"disable": not progress}
    with tqdm(total=epochs * len(groups), unit="epoch", **look) as bar:
        for group in groups:
            generators = [torch.Generator().manual_seed(seed) for seed in group]
            made = [make(generator) for generator in generators]
            for rule in made:
                check_rule(rule, data, rules + made)
                home = rule.net.weights()[0].device
                rule.to(device).net.to(device).train()
                check_update(rule, data, batch_size)
            lockstep = Lockstep(
                made, generators, data, batch_size, optimizer, precision, compile,
                ranks=ranks, changes=(shifts, flips),
            )  # fmt: skip
            file = None if checkpoint is None else Path(os.path.expanduser(checkpoint))
            if file and len(groups) > 1:
                file = file.with_name(f"{file.name}.seed{group[0]}")
            mark = checkpoints.fingerprint(lockstep, group, rates, probe) if file else ""
            curves, spent = train_group(
                lockstep, group, rates, probe, file, mark, deadline, bar, save_every, ranks
            )
            for rule in made:
                rule.to(home).net.to(home)
            rules, parts, seconds = rules + made, [*parts, curves], seconds + spent
    return gathered(Run, rules, parts, seconds, seeds)


def gathered(kind: type[Run], rules: list, parts: list, seconds: float, seeds: list, **more) -> Run:
    """The groups' curves as one ``kind`` of ``Run``; raises ``Diverged`` if a seed has."""
    joined = [torch.cat(c) for c in zip(*parts, strict=True)]
    diverged = [None if bad < 0 else int(bad) for bad in joined.pop().tolist()]
    run = kind(rules, *joined, diverged, seconds, **more)
    if any(diverged):
        where = [f"seed {s} in epoch {e}" for s, e in zip(seeds, diverged, strict=True) if e]
        raise Diverged(f"training diverged: {', '.join(where)}", run)
    return run


@torch.no_grad()
def train_group(
    lockstep: Lockstep,
    seeds: list[int],
    rates: list[float],
    probe: int,
    file: Path | None,
    fingerprint: str,
    deadline: float | None,
    bar: tqdm,
    save_every: float = math.inf,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> tuple[list[Tensor], float]:
    """Train a group to the end, from its checkpoint if there is one.

    Returns the curves of ``Run`` in their order, then the epoch of divergence or -1, and seconds.
    """
    names = ("loss", "accuracy", "test", "angle", "norm")
    curves: dict[str, list[Tensor]] = {name: [] for name in names}
    epoch, spent, bad = 0, 0.0, torch.full((len(seeds),), -1)
    file = file if ranks.rank == 0 else None

    def save() -> None:
        nonlocal clock, spent
        spent += time.monotonic() - clock
        if file:
            content = {"lockstep": lockstep.state_dict(), "epoch": epoch, "spent": spent}
            checkpoints.save(file, {**content, "bad": bad, "curves": curves}, fingerprint)
        clock = time.monotonic()

    def pause() -> None:
        if file and time.monotonic() - clock >= save_every:
            save()

    if saved := ranks.first(lambda: checkpoints.load(file, fingerprint) if file else None):
        lockstep.load_state_dict(saved["lockstep"])
        epoch, spent, bad, curves = (saved[k] for k in ("epoch", "spent", "bad", "curves"))
        bar.update(epoch)
    elif probe:
        for name, value in zip(("angle", "norm"), lockstep.probe(probe), strict=True):
            curves[name].append(value)
    clock, longest = time.monotonic(), 0.0  # when it was last written
    while epoch < len(rates) and (bad < 0).any():
        start = time.monotonic()
        if ranks.first(partial(bool, deadline is not None and start + longest > deadline)):
            raise OutOfTime(f"stopped after epoch {epoch} of {len(rates)} of seeds {seeds}")
        values = [*lockstep.train(rates[epoch], pause), lockstep.test()]
        values += lockstep.probe(probe) if probe else []
        epoch += 1
        for name, value in zip(names, values, strict=False):
            value[bad >= 0] = torch.nan  # a seed that has stopped, though its stack goes on
            curves[name].append(value)
        sound = (values[0] <= LARGEST_LOSS) & lockstep.finite()
        bad[~sound & (bad < 0)] = epoch
        longest = max(longest, time.monotonic() - start)
        save()
        bar.update()
    lockstep.write_back()
    bar.update(len(rates) - epoch)
    for values in filter(None, curves.values()):  # a run that diverged ends early
        values += [torch.full_like(values[-1], torch.nan)] * (len(rates) - epoch)
    empty = torch.empty(len(seeds), 0).double()
    return [*(torch.stack(v, 1) if v else empty for v in curves.values()), bad], spent
