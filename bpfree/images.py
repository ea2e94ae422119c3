"""Folders of images too large for memory: decoded by worker processes, augmented, the same always.

imagenet/train/n01440764/*.JPEG        a folder per class, below train and val
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .data import data_root

# name -> folder below the root, side of a picture in pixels
FOLDERS = {"tiny-imagenet": ("tiny-imagenet-200", 64), "imagenet": ("imagenet", 224)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, in [0, 1]


class Images:
    """An ``ImageFolder`` that ``training.distributed.train`` takes in the place of a ``Data``.

    To train: a random crop of 8 % to all of the picture, resized, and mirrored or not; to test: the
    shorter side resized to 8/7 of ``side``, the centre cut out. Both are standard, and normalised
    by ImageNet's means. What befalls a picture is decided by its number and the epoch's draw, so
    any number of ranks and of workers, and a run that goes on after a kill, see the same ones.

    Args:
        name: ``"tiny-imagenet"`` or ``"imagenet"`` below ``root``, or the path of a folder with
            ``train`` and ``val``, each an ``ImageFolder`` with the same classes.
        root: see ``bpfree.data.data_root``.
        side: of the square that the network sees, in pixels; None: 64 and 224, a path's 224.
        workers: processes that decode; 0: this one does.

    Raises:
        FileNotFoundError: if a folder is missing (it is named).
        ValueError: if side < 1, workers < 0, or train and val have other classes.
    """

    scale = shift = None  # what a ``Data`` is scaled by: here each channel has its own

    def __init__(
        self,
        name: str,
        root: str | os.PathLike | None = None,
        side: int | None = None,
        workers: int = 4,
    ):
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        below, usual = FOLDERS.get(name, (name, 224))
        self.side, self.workers = usual if side is None else side, workers
        if self.side < 1 or workers < 0:
            raise ValueError(f"side must be >= 1 and workers >= 0, got {side} and {workers}")
        self.name, self.folder = name, data_root(root) / below
        last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        crop = [transforms.RandomResizedCrop(self.side), transforms.RandomHorizontalFlip()]
        centre = [transforms.Resize(self.side * 8 // 7), transforms.CenterCrop(self.side)]
        self.parts = {}
        for part, at, steps in (("train", "train", crop), ("test", "val", centre)):
            if not (self.folder / at).is_dir():
                raise FileNotFoundError(
                    f"{name}: no folder {self.folder / at}; it must hold a folder of pictures for "
                    "each class (ImageNet's own tar files, unpacked and sorted by class)"
                )
            self.parts[part] = ImageFolder(self.folder / at, transforms.Compose([*steps, *last]))
        if self.parts["train"].classes != self.parts["test"].classes:
            raise ValueError(f"{self.folder}: train and val must have the same classes")
        self.train_y, self.test_y = (torch.tensor(part.targets) for part in self.parts.values())

    @property
    def num_classes(self) -> int:
        return len(self.parts["train"].classes)

    @cached_property
    def checksum(self) -> str:
        """sha256 of the pictures' paths and sizes in bytes, and of ``side``: to read all of them
        would take as long as an epoch."""
        digest = hashlib.sha256(f"{self.side}".encode())
        for images in self.parts.values():
            for path, _ in images.samples:
                size = os.path.getsize(path)
                digest.update(f"{Path(path).relative_to(self.folder)} {size}\n".encode())
        return digest.hexdigest()

    def batches(
        self,
        part: str,
        batches: Sequence[Tensor],
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:
        """The inputs (B, 3, side, side) of "train" or "test" pictures of these indices, batch by
        batch, the next ones decoded meanwhile. ``draw`` decides the augmentation."""
        indices = [[(draw, int(i)) for i in batch] for batch in batches]
        loader: Any = DataLoader(
            _Decoded(self.parts[part]), batch_sampler=indices, num_workers=self.workers,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(), generator=torch.Generator(),  # not torch's own
        )  # fmt: skip
        return (x.to(dtype) for x in loader)


class _Decoded(torch.utils.data.Dataset):
    """Pictures by (draw, index)."""

    def __init__(self, images: Any):
        self.images = images

    def __getitem__(self, which: tuple[int, int]) -> Tensor:
        draw, index = which
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
            torch.default_generator.manual_seed((draw + 2654435761 * index) % 2**63)
            return self.images[index][0]
