"""One experiment as data: everything that decides its result, and how to train it."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import network, rules
from ..data import Data, load
from ..rule import Rule
from ..training.fit import Run, fit
from . import released


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One experiment. The learning rate starts at ``lr`` and falls tenfold at each milestone."""

    together: ClassVar[bool] = True  # whether an accelerator can train several seeds at once
    name: str
    data: str  # a name that ``load`` knows
    network: tuple[str, tuple, dict[str, Any]]  # "mlp" or "convnet", its arguments, its keywords
    rule: str  # class name; "module:Class" for one of a reader's own
    options: dict[str, Any]  # the rule's keywords
    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    milestones: tuple[int, ...] = ()  # epochs, counted from 0
    algorithm: str = "sgd"  # or "adam", which takes no momentum
    shifts: int = 0  # pixels by which a training image is moved at most
    flips: bool = False  # whether training images are mirrored at random
    shift: float = 0.0  # added to the inputs, which are in [0, 1] without
    seeds: tuple[int, ...] = (0, 1, 2)
    source: str = "this book"  # paper and table cell, or this book
    paper: str | None = None  # the paper's test accuracy in %, as printed there; None: not verified

    @property
    def length(self) -> str:
        """How long it trains, as tables say it."""
        return str(self.epochs)

    def make(self, generator: torch.Generator) -> Rule:
        """A fresh network and its rule; ``Shuffled`` before a rule's name shuffles its signals."""
        kind, args, keywords = self.network
        net = getattr(network, kind)(*args, **keywords, generator=generator)
        name = self.rule.removeprefix("Shuffled")
        module, _, name = name.rpartition(":")
        where = importlib.import_module(module) if module else rules
        rule = getattr(released if not module and name.startswith("Released") else where, name)
        if self.rule.startswith("Shuffled"):
            rule = rules.shuffled(rule)
        return rule(net, **self.options, generator=generator)

    def optimizer(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """``torch.optim`` with this recipe's settings; fused, in one pass over memory."""
        params = list(params)
        common: dict[str, Any] = dict(lr=self.lr, weight_decay=self.weight_decay, fused=True)
        if self.algorithm == "adam":  # capturable: its count of steps must be on the card to record
            return torch.optim.Adam(params, **common, capturable=params[0].is_cuda)
        return torch.optim.SGD(params, **common, momentum=self.momentum)

    def schedule(self, epoch: int) -> float:
        """Factor on the learning rate in an epoch (0, 1, ...)."""
        return 0.1 ** sum(epoch >= m for m in self.milestones)

    def load(self, root: str | os.PathLike | None = None) -> Data:
        """Its data set, shifted as it says."""
        return dataclasses.replace(load(self.data, root), shift=self.shift)

    def fit(self, data: Data, seeds: Sequence[int], **options: Any) -> Run:
        """``bpfree.fit`` with this recipe's settings."""
        return fit(
            self.make, data, epochs=self.epochs, batch_size=self.batch_size,
            optimizer=self.optimizer, schedule=self.schedule, seeds=seeds, shifts=self.shifts,
            flips=self.flips, **options,
        )  # fmt: skip
