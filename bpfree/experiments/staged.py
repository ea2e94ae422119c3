"""Recipes of models in stages: end to end, deeply supervised, and by local losses alone."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data import Data
from ..images import FOLDERS, Images
from ..stages import Stage, Stages, split
from ..training import distributed
from ..training.device import precision as precision_of
from ..training.ranks import Ranks
from ..training.stages import StagesRun, fit_stages
from . import zoo
from .recipe import Recipe


@dataclasses.dataclass(frozen=True)
class StagesRecipe(Recipe):
    """A model of ``zoo`` in stages; ``options`` are n, the number of stages, and the ``local`` and
    ``weights`` of ``training.stages.backward``."""

    together: ClassVar[bool] = False
    cosine: bool = False  # the learning rate falls to zero along half a cosine

    def make(self, generator: torch.Generator) -> Stages:  # type: ignore[override]
        """A fresh model in stages."""
        kind, args, keywords = self.network
        model = getattr(zoo, kind)(*args, **keywords, generator=generator)
        return split(model, self.options["n"], generator=generator)

    def schedule(self, epoch: int) -> float:
        if self.cosine:
            return (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return super().schedule(epoch)

    def load(self, root: str | os.PathLike | None = None) -> Data | Images:  # type: ignore[override]
        """Its data set: tensors, or a folder of images, which worker processes read."""
        return Images(self.data, root) if self.data in FOLDERS else super().load(root)

    def fit(  # type: ignore[override]
        self, data: Data | Images, seeds: Sequence[int], *, probe: int = 0, compile: bool = False,
        save_every: float = 600.0, ranks: Ranks = Ranks(), **options: Any,  # noqa: B008
    ) -> StagesRun:  # fmt: skip
        """``fit_stages`` with this recipe's settings; ``probe`` is for rules. Folders of images are
        shared out among the ranks, with their own, standard augmentation."""
        if compile:
            raise ValueError(f"{self.name} is not compiled: stages are trained one by one")
        if isinstance(data, Images):
            return self._fit_images(data, *seeds, save_every=save_every, ranks=ranks, **options)
        if ranks.size > 1:
            raise ValueError(f"{self.name} is trained by one process, got {ranks.size} ranks: "
                             "its data fit one's memory")  # fmt: skip
        how = {k: self.options[k] for k in ("local", "weights")}
        return fit_stages(
            self.make, data, epochs=self.epochs, batch_size=self.batch_size,
            optimizer=self.optimizer, schedule=self.schedule, seeds=seeds, **how,
            shifts=self.shifts, flips=self.flips, **options,
        )  # fmt: skip

    def _fit_images(
        self, images: Images, seed: int, *, device: str = "cpu", precision: str = "float32",
        progress: object = None, **options: Any,
    ) -> StagesRun:  # fmt: skip
        """One seed, by local losses (of a single stage: end to end)."""
        stages, start = self.make(torch.Generator().manual_seed(seed)).to(device), time.monotonic()
        weights = self.options["weights"] or (1.0,) * len(stages)
        for stage, weight in zip(stages, weights, strict=True):
            stage.loss_weight = weight
        with precision_of(precision, torch.device(device)):
            curves = distributed.train(
                stages, images, epochs=self.epochs, batch_size=self.batch_size, seed=seed,
                optimizer=self.optimizer, schedule=self.schedule, loss=_weighted, pipeline=False,
                **options,
            )  # fmt: skip
        loss, accuracy = (c.double()[None] for c in curves)
        none = torch.empty(1, 0).double()
        return StagesRun(
            [stages], loss[..., -1], torch.full_like(loss[..., -1], torch.nan), accuracy[..., -1],  # type: ignore[list-item]
            none, none, [None], time.monotonic() - start, loss, accuracy,
        )  # fmt: skip


def _weighted(stage: Stage, h: Tensor, y: Tensor) -> Tensor:
    return stage.loss_weight * distributed.own_loss(stage, h, y)


def _arms(*numbers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """End to end, then for each number of stages all losses summed, and local: inner ones count
    half, as in the released code."""
    yield "end-to-end", {"n": 1, "local": False, "weights": None}
    for arm, local in (("summed", False), ("local", True)):
        for n in numbers:
            yield f"{arm}-{n}", {"n": n, "local": local, "weights": (0.5,) * (n - 1) + (1.0,)}


_SETTINGS: dict[str, Any] = dict(
    rule="Stages", lr=0.1, weight_decay=5e-4, batch_size=128, shifts=4, flips=True
)
# test accuracy (%) on CIFAR-10 in the released logs
_LOGS = {
    ("resnet50", "local-2"): "94.45", ("resnet50", "local-4"): "95.01",
    ("resnet101", "local-2"): "94.36", ("resnet101", "local-4"): "95.19",
}  # fmt: skip


def small() -> Iterator[StagesRecipe]:
    """Chapter 5: what a CPU can train; the released code's settings but for the epochs."""
    for arm, options in _arms(2, 4):
        yield StagesRecipe(
            f"lfnn-resnet8-cifar10-{arm}", "cifar10", ("resnet8", (10,), {}), options=options,
            epochs=30, milestones=(20, 27), **_SETTINGS,
        )  # fmt: skip


def large() -> Iterator[StagesRecipe]:
    """Chapter 5: the paper's models, which need a GPU. Whether its ResNets on CIFAR-10 began with a
    3x3 convolution is not known to us."""
    sets = {"cifar10": (10, 32, 200), "tiny-imagenet": (200, 64, 100), "imagenet": (1000, 224, 90)}
    cells = {  # model and data -> numbers of stages, learning rate, momentum and decay
        ("resnet50", "cifar10"): ((2, 4), 0.1),
        ("resnet101", "cifar10"): ((2, 4), 0.1),
        ("resnet152", "cifar10"): ((4,), 0.1),
        ("vgg16_bn", "cifar10"): ((4,), 0.05),
        ("resnet50", "tiny-imagenet"): ((4,), 0.1),
        ("vit_b_16", "tiny-imagenet"): ((4,), 0.01),
        ("resnet50", "imagenet"): ((4,), 0.1),
    }
    for (model, data), (numbers, lr) in cells.items():
        classes, side, epochs = sets[data]
        for arm, options in _arms(*numbers):
            if not arm.startswith("summed"):
                paper = _LOGS.get((model, arm)) if data == "cifar10" else None
                yield StagesRecipe(
                    f"lfnn-{model.replace('_', '-')}-{data}-{arm}", data,
                    ("torchvision_model", (model, classes, side), {}), options=options,
                    epochs=epochs, cosine=True, seeds=(0,), paper=paper,
                    source="arXiv 2310.07885, released logs" if paper else "this book",
                    **{**_SETTINGS, "lr": lr, "shifts": side // 8},
                )  # fmt: skip
