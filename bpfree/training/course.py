"""One seed of a model in stages, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..data import Data
from ..stages import Stages
from .augment import augment, draw_moves
from .checkpoint import digest
from .device import generator_on, global_draws_from, precision
from .lockstep import Optimizer


class Course:
    """One seed's stages in training: what ``train_group`` asks of a ``Lockstep``.

    Args:
        step: (stages, x, y) -> losses (n,) and the last stage's scores; accumulates gradients.
        changes: (shift, flip) of ``draw_moves``.
    """

    def __init__(
        self,
        stages: Stages,
        generator: torch.Generator,
        data: Data,
        batch_size: int,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        precision: str,
        step: Callable[[Stages, Tensor, Tensor], tuple[Tensor, Tensor]],
        changes: tuple[int, bool],
    ):
        self.stages, self.data, self.batch_size = stages, data, batch_size
        self.device, self.precision = data.train_x.device, precision
        self.step, self.changes = step, changes
        self.generator = generator_on(self.device, generator)
        learning = [p for p in stages.parameters() if p.requires_grad]
        self.opt, self.dtype = optimizer(learning), learning[0].dtype
        self.rates = [group["lr"] for group in self.opt.param_groups]
        self.seen: list[list[Tensor]] = []  # of each epoch: losses and test accuracies, (n,)

    def train(self, rate: float, pause: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
        """One epoch: the last stage's mean loss, and its accuracy in %, each (1,). ``pause`` is
        not called: an epoch is not saved in its middle."""
        for group, lr in zip(self.opt.param_groups, self.rates, strict=True):
            group["lr"] = rate * lr
        self.stages.train()
        draws = self.generator
        order = torch.randperm(len(self.data.train_x), generator=draws, device=self.device)
        steps = len(order) // self.batch_size
        losses = torch.zeros(len(self.stages), dtype=torch.float64, device=self.device)
        hits = torch.zeros((), dtype=torch.float64, device=self.device)
        with (
            torch.enable_grad(), precision(self.precision, self.device),
            global_draws_from(draws, self.device),  # dropout
        ):  # fmt: skip
            for batch in order.split(self.batch_size)[:steps]:
                x, y = self.data.train_x[batch], self.data.train_y[batch]
                if any(self.changes):
                    x = augment(x, draw_moves(len(x), *self.changes, draws), self.changes[0])
                x = self.data.inputs(x, self.dtype)
                self.opt.zero_grad()
                loss, scores = self.step(self.stages, x, y)
                self.opt.step()
                losses += loss
                hits += (scores.argmax(1) == y).double().mean()
        self.seen.append([(losses / steps).cpu()])
        return self.seen[-1][0][-1:].clone(), (100 * hits / steps).cpu()[None]

    def test(self) -> Tensor:
        """Test accuracy of the last stage in %, (1,); of all of them in ``seen``."""
        self.stages.eval()
        right = torch.zeros(len(self.stages), dtype=torch.float64, device=self.device)
        with precision("float32", self.device):
            for h, y in zip(self.data.test_x.split(500), self.data.test_y.split(500), strict=True):
                h = self.data.inputs(h, self.dtype)
                for i, stage in enumerate(self.stages):
                    h = stage(h)
                    right[i] += (stage.scores(h).argmax(1) == y).sum()
        self.seen[-1].append((100 * right / len(self.data.test_y)).cpu())
        return self.seen[-1][1][-1:].clone()

    def finite(self) -> Tensor:
        sums = [p.double().sum() for p in self.stages.parameters()]
        return torch.stack(sums).sum().isfinite().cpu()[None]

    def state_dict(self) -> dict:
        return {"stages": self.stages.state_dict(), "optimizer": self.opt.state_dict(),
                "generator": self.generator.get_state(), "seen": self.seen}  # fmt: skip

    def load_state_dict(self, saved: dict) -> None:
        self.stages.load_state_dict(saved["stages"])
        self.opt.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.seen = saved["seen"]

    def fingerprint(self, more: list) -> str:
        """Of everything that decides a run, at its start."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        data = [self.data.scale, self.data.shift, self.data.checksum]
        rest = [type(self.opt).__name__, groups, self.batch_size, self.precision]
        return digest([repr(self.stages), self.state_dict(), rest, data, more])

    def seen_until(self, epochs: int) -> Tensor:
        """Losses and test accuracies of all stages, (2, epochs, n); NaN after a divergence."""
        seen = torch.full((2, epochs, len(self.stages)), torch.nan, dtype=torch.float64)
        if self.seen:
            seen[:, : len(self.seen)] = torch.stack([torch.stack(pair, 0) for pair in self.seen], 1)
        return seen

    def write_back(self) -> None:
        """The stages themselves were trained."""
