"""Stages that learn at once, a process each: what goes up never comes down (chapter 5).

    torchrun --nproc-per-node 2 train.py

    with ranks() as team:                                   # in train.py
        train(split(model, team.size), data, ranks=team, epochs=90, checkpoint="run.ckpt")

Rank k holds stage k. It learns from the loss of its own head and sends its activity on, detached;
nothing is sent back, so it goes on to the next batch at once, where backprop would wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..stages import Stage, Stages
from . import checkpoint as checkpoints
from .fit import OutOfTime, sgd
from .ranks import Above, Ranks, receive

LOOK = 64  # steps after which ranks agree whether to save: each time the pipeline runs empty


class Curves(NamedTuple):
    """How each stage fared, float64 tensors on the CPU."""

    loss: Tensor  # (epochs, K) mean of the stage's own loss over the epoch's batches, in nats
    accuracy: Tensor  # (epochs, K) % of the test set that its head gets right after the epoch


def own_loss(stage: Stage, h: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the stage's own head, the mean over the batch."""
    return F.cross_entropy(stage.scores(h), y)


def train(
    stages: Stages,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 64,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = sgd,
    schedule: Callable[[int], float] | None = None,
    seed: int = 0,
    loss: Callable[[Stage, Tensor, Tensor], Tensor] = own_loss,
    pipeline: bool = True,
    ranks: Ranks = Ranks(),  # noqa: B008  # a tuple of two numbers
    checkpoint: str | os.PathLike | None = None,
    save_every: float = 600.0,
    deadline: float | None = None,
) -> Curves:
    """Train stages by their own losses, in place: a rank per stage, or all in every rank.

    The result is that of one process on the same batches up to rounding, whichever way: but for
    dropout of torch's own, which is each process's, and batch statistics, which are of a share.

    Args:
        stages: the same in all ranks, on the device that this one trains on; rank 0's weights are
            what all begin with, and in the end all have all that was learnt.
        data: a ``Data``, or ``Images``; each epoch leaves out the last, incomplete batch.
        optimizer: ``torch.optim`` class with its settings bound; of each stage for itself.
        schedule: epoch (0, 1, ...) -> factor on the learning rate.
        seed: decides the order of the images, and their augmentation.
        loss: (stage, its activity h, labels y) -> a scalar; it may not reach beyond the stage.
        pipeline: rank k trains stage k; False: each rank trains all stages on its share of every
            batch, and gradients are averaged (one ``Stage`` of a whole model is its backprop).
        ranks: as ``ranks()`` gives them; alone, this process trains all with ``pipeline=False``.
        checkpoint: file that rank 0 writes every ``save_every`` seconds and at the end of each
            epoch; the same call goes on from there, to the bit.
        deadline: ``time.monotonic()`` after which no epoch begins.

    Raises:
        ValueError: for another number of ranks than stages in a pipeline, epochs < 1, a batch
            larger than the training set or not divided by the ranks, or a checkpoint that is
            damaged or of other settings.
        OutOfTime: if the deadline comes first.
        ConnectionError: if another rank is lost; start the same command again.
    """
    n = len(data.train_y)
    if pipeline and (ranks.size != len(stages) or ranks.size < 2):
        raise ValueError(
            f"pipeline needs a rank per stage, at least 2, got {ranks.size} ranks and "
            f"{len(stages)} stages: torchrun --nproc-per-node {max(2, len(stages))}"
        )
    if epochs < 1 or not 1 <= batch_size <= n:
        raise ValueError(
            f"epochs must be at least 1 and batch_size in 1..{n}, got {epochs} and {batch_size}"
        )
    if not pipeline:
        ranks.check_batch_size(batch_size)
    stages.load_state_dict(ranks.first(lambda: tree_map(_on_cpu, stages.state_dict())))
    file = None if checkpoint is None else Path(os.path.expanduser(checkpoint))
    rates = [1.0 if schedule is None else schedule(epoch) for epoch in range(epochs)]
    mine = [stages.train()[ranks.rank]] if pipeline else list(stages.train())
    run = RankRun(mine, data, optimizer, loss, ranks, pipeline)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in run.opt.param_groups]
    settings = [
        repr(stages), dict(stages.state_dict()), type(run.opt).__name__, groups, rates, batch_size,
        seed, loss, pipeline, ranks.size, data.checksum, data.scale, data.shift,
    ]  # fmt: skip
    fingerprint = checkpoints.digest(settings) if file and ranks.rank == 0 else ""
    draws = torch.randint(2**62, (epochs,), generator=torch.Generator().manual_seed(seed)).tolist()
    epoch, step, written = 0, 0, time.monotonic()

    def save() -> None:
        nonlocal written
        parts = ranks.gather(run.state_dict())
        if file and parts:
            checkpoints.save(file, {"parts": parts, "epoch": epoch, "step": step}, fingerprint)
        written = time.monotonic()

    if saved := ranks.first(lambda: checkpoints.load(file, fingerprint) if file else None):
        epoch, step = saved["epoch"], saved["step"]
        run.load_state_dict(saved["parts"])
    while epoch < epochs:
        if ranks.first(partial(bool, deadline is not None and time.monotonic() > deadline)):
            raise OutOfTime(f"stopped after epoch {epoch} of {epochs}")
        for group, setting in zip(run.opt.param_groups, groups, strict=True):
            group["lr"] = rates[epoch] * setting["lr"]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(draws[epoch]))
        whole = order.split(batch_size)[: n // batch_size]
        batches = whole if pipeline else [ranks.share(batch) for batch in whole]
        for x, y in run.flow("train", batches[step:], draws[epoch]):
            run.learn(x, y)
            step += 1
            due = partial(bool, time.monotonic() - written >= save_every)
            if file and step % LOOK == 0 and ranks.first(due):
                save()
        run.end_epoch(step)
        epoch, step = epoch + 1, 0
        if file:
            save()
    learnt = ranks.gather(([tree_map(_on_cpu, s.state_dict()) for s in mine], run.curves))
    everyone = ranks.first(lambda: learnt)
    for stage, state in zip(stages, (s for states, _ in everyone for s in states), strict=False):
        stage.load_state_dict(state)
    parts = [curves for _, curves in (everyone if pipeline else everyone[:1])]
    return Curves(*(torch.cat([torch.stack(part[i]) for part in parts], 1) for i in (0, 1)))


class RankRun:
    """What one rank trains: its stages, their optimiser, and its place in the pipeline."""

    def __init__(self, mine, data, optimizer, loss, ranks, pipeline):
        self.mine, self.data, self.loss, self.ranks = mine, data, loss, ranks
        self.pipeline = pipeline
        self.is_fed = pipeline and ranks.rank > 0  # by the rank below
        self.feeds = pipeline and ranks.rank < ranks.size - 1
        self.params = [p for stage in mine for p in stage.parameters()]
        self.opt = optimizer(self.params)
        self.like = self.params[0]
        self.totals = torch.zeros(len(mine), dtype=torch.float64, device=self.like.device)
        self.curves: tuple[list[Tensor], list[Tensor]] = ([], [])

    def flow(self, part: str, batches: Sequence[Tensor], draw: int) -> Iterator:
        """(x, y) of these batches of indices, where x is what the stage below makes of it."""
        labels = getattr(self.data, f"{part}_y")
        ys = [labels[batch] for batch in batches]
        if self.is_fed:
            xs = receive(self.ranks.rank - 1, [len(y) for y in ys], self.like.device)
        else:
            xs = self.data.batches(part, batches, draw, self.like.dtype)
        self.above = Above(self.ranks.rank + 1) if self.feeds else None
        for x, y in zip(xs, ys, strict=True):
            yield x.to(self.like), y.to(self.like.device)
        if self.above:
            self.above.wait()

    def learn(self, x: Tensor, y: Tensor) -> None:
        """One step of every stage of this rank; its activity is sent before it learns."""
        self.opt.zero_grad()
        losses = []
        for stage in self.mine:
            h = stage(x)
            if self.above:
                self.above.send(h)
            losses.append(self.loss(stage, h, y))
            if losses[-1].requires_grad:  # not of what is frozen
                losses[-1].backward()
            x = h.detach()
        if not self.pipeline:
            learnt = [p for p in self.params if p.grad is not None]
            means = self.ranks.average([p.grad for p in learnt])
            for p, grad in zip(learnt, means, strict=True):
                p.grad = grad
        self.opt.step()
        self.totals += torch.stack(losses).detach()

    @torch.no_grad()
    def end_epoch(self, steps: int) -> None:
        """The epoch's mean losses, and every head on the test set."""
        right, n = torch.zeros_like(self.totals), len(self.data.test_y)
        every = torch.arange(n) if self.pipeline else self.ranks.share(torch.arange(n))
        losses = self.totals / steps
        if not self.pipeline:  # batch statistics are of a share; a sum of their means is exact
            buffers = [b for s in self.mine for b in s.buffers() if b.is_floating_point()]
            for b, mean in zip(buffers, self.ranks.average(buffers), strict=True):
                b.copy_(mean)
        for stage in self.mine:
            stage.eval()
        for x, y in self.flow("test", every.split(256), 0):
            for k, stage in enumerate(self.mine):
                x = stage(x)
                if self.above:
                    self.above.send(x)
                right[k] += (stage.scores(x).argmax(1) == y).sum()
        for stage in self.mine:
            stage.train()
        if not self.pipeline:
            losses, right = self.ranks.average([losses, self.ranks.size * right])
        for curve, value in zip(self.curves, (losses, 100 * right / n), strict=True):
            curve.append(value.cpu())
        self.totals.zero_()

    def state_dict(self) -> dict:
        """Everything that this rank's training reads and writes, on the CPU."""
        state: dict = {"totals": self.totals, "curves": [*self.curves]}
        state["rng"] = self._torchs().get_rng_state()
        if self.pipeline or self.ranks.rank == 0:
            state["stages"] = [dict(stage.state_dict()) for stage in self.mine]
            state["optimizer"] = self.opt.state_dict()
        return tree_map(_on_cpu, state)

    def load_state_dict(self, parts: list[dict]) -> None:
        own = parts[self.ranks.rank]
        shared = own if self.pipeline else parts[0]
        for stage, state in zip(self.mine, shared["stages"], strict=True):
            stage.load_state_dict(state)
        self.opt.load_state_dict(shared["optimizer"])
        self.totals.copy_(own["totals"])
        self.curves = tuple(own["curves"])
        self._torchs().set_rng_state(own["rng"])

    def _torchs(self) -> Any:
        """Where torch's own generator is, from which modules such as ``nn.Dropout`` draw."""
        return torch.cuda if self.like.is_cuda else torch.random


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
