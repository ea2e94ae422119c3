"""Stages that learn by losses of their own (arXiv 2310.07885), each graph freed before the next."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data import Data
from ..stages import Stages
from .check import check_settings
from .course import Course
from .fit import Run, gathered, sgd, train_group
from .lockstep import Optimizer


def backward(
    stages: Stages,
    x: Tensor,
    y: Tensor,
    local: bool = True,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Accumulate the gradients of every stage's loss into ``.grad``.

        h_k = body_k(h_{k-1}),    loss_k = CE(head_k(h_k), y)

    ``local``: no gradient crosses from a stage to the one before; what stage k needs for its own is
    freed before stage k + 1 runs, so memory is that of the largest stage. Otherwise the sum of all
    losses is differentiated end to end (deep supervision), through everything at once.

    Args:
        x, y: a batch, and its classes (B,).
        weights: of the losses, >= 0, by default 1. What has none learns nothing of its own:
            ``local=False`` with weights 0, .., 0, 1 is backprop.

    Returns:
        The losses (n,), unweighted, detached, in nats.

    Raises:
        ValueError: if the weights are not so.
    """
    return _backward(stages, x, y, local, _checked(stages, weights))[0]


def _checked(stages: Stages, weights: Sequence[float] | None) -> list[float]:
    weights = [1.0] * len(stages) if weights is None else list(weights)
    if (
        len(weights) != len(stages)
        or not all(0 <= w < math.inf for w in weights)
        or not any(weights)
    ):
        raise ValueError(f"weights must be {len(stages)} finite numbers >= 0, one for each stage, "
                         f"not all 0, got {weights}")  # fmt: skip
    return weights


def _backward(stages, x, y, local, weights) -> tuple[Tensor, Tensor]:
    """The losses (n,), and the last stage's scores (B, C)."""
    losses, total, h = [], 0.0, x
    for weight, stage in zip(weights, stages, strict=True):
        with torch.set_grad_enabled(not local or weight > 0):  # a graph ends by its backward pass
            h = stage(h.detach() if local else h)
            scores = stage.scores(h)
        # in bfloat16 the errors of a trained network would round to zero
        loss = F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), y)
        losses.append(loss.detach())
        if weight and local and loss.requires_grad:  # not of what is frozen
            (weight * loss).backward()
        elif weight and not local:
            total = total + weight * loss
        del loss
    if not local:
        total.backward()
    return torch.stack(losses), scores.detach()


@dataclasses.dataclass
class StagesRun(Run):
    """A ``Run`` whose rules are ``Stages``: its curves are those of the last stage, and here are
    those of all; NaN where a seed had diverged."""

    stage_loss: Tensor  # (S, epochs, n) mean cross-entropy over the epoch's batches, in nats
    stage_accuracy: Tensor  # (S, epochs, n) test accuracy in % after the epoch


def fit_stages(
    make: Callable[[torch.Generator], Stages],
    data: Data,
    *,
    epochs: int,
    batch_size: int = 128,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] = sgd,
    schedule: Callable[[int], float] | None = None,
    seeds: Sequence[int] = (0,),
    local: bool = True,
    weights: Sequence[float] | None = None,
    shifts: int = 0,
    flips: bool = False,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    progress: bool | dict[str, Any] = False,
    checkpoint: str | os.PathLike | None = None,
    deadline: float | None = None,
) -> StagesRun:
    """Train ``make(generator)`` on ``data`` once per seed, one after the other, as ``fit`` does.

    Args:
        make: builds ``Stages``, drawing only from the generator given. Their dropout draws from it
            too, and so do the changes to the images.
        local, weights: of ``backward``.
        shifts, flips: each training image is moved by up to so many pixels; or mirrored, or not.
        epochs, batch_size, optimizer, schedule, seeds, device, precision, progress, checkpoint,
            deadline: of ``fit``.

    Raises:
        ValueError, OutOfTime, Diverged, OSError: as ``fit`` does; TypeError for no ``Stages``.
    """
    seeds = check_settings(data, epochs, batch_size, seeds, 0, precision, shifts, flips)
    rates = [1.0 if schedule is None else schedule(epoch) for epoch in range(epochs)]
    data, made, parts, courses, seconds = data.to(device), [], [], [], 0.0
    look = progress if isinstance(progress, dict) else {"disable": not progress}
    with tqdm(total=epochs * len(seeds), unit="epoch", **look) as bar:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            stages = make(generator)
            _check(stages, data, made)
            stages.to(device)
            step = partial(_backward, local=local, weights=_checked(stages, weights))
            settings = stages, generator, data, batch_size, optimizer, precision
            course = Course(*settings, step, (shifts, flips))
            file = None if checkpoint is None else Path(os.path.expanduser(checkpoint))
            if file and len(seeds) > 1:
                file = file.with_name(f"{file.name}.seed{seed}")
            what = [seed, rates, local, step.keywords, shifts, flips]
            mark = course.fingerprint(what) if file else ""
            curves, spent = train_group(course, [seed], rates, 0, file, mark, deadline, bar)
            made, parts, seconds = [*made, stages], [*parts, curves], seconds + spent
            courses.append(course.seen_until(epochs))
    more = dict(zip(("stage_loss", "stage_accuracy"), torch.stack(courses, 1), strict=True))
    return gathered(StagesRun, made, parts, seconds, seeds, **more)


def _check(stages: Stages, data: Data, made: list[Stages]) -> None:
    """Raise unless they are ``Stages`` of their own that fit the data."""
    if not isinstance(stages, Stages):
        raise TypeError(f"make must return Stages, got {type(stages).__name__}")
    mine = {id(p) for p in stages.parameters()}
    if any(mine & {id(p) for p in other.parameters()} for other in made):
        raise ValueError("make must build a new model for each seed, got the same one twice")
    device, dtype = next(stages.parameters()).device, next(stages.parameters()).dtype
    h = data.inputs(data.train_x[:1].to(device), dtype)
    stages.eval()
    with torch.no_grad():
        for i, stage in enumerate(stages, 1):
            h = stage(h)
            scores = tuple(stage.scores(h).shape)
            if len(scores) != 2 or scores[1] < data.num_classes:
                raise ValueError(f"stage {i} must give scores (B, C >= {data.num_classes}), the "
                                 f"classes of {data.name}, got {scores}")  # fmt: skip
