"""Data sets as tensors: loaded once, checked once, uint8 until the step that uses them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# our name -> torchvision's class
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
NAMES = ("digits", *TORCHVISION)

# torchvision knows the checksums of the archives only; these are of the IDX files inside, which it
# reads unchecked, in the order of its ``resources``
_IDX_MD5 = {
    "MNIST": (
        "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637",
    ),
    "FashionMNIST": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}  # fmt: skip


class DamagedFile(ValueError):
    """A file of a data set whose checksum is wrong; its message names it."""


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set resident on one device.

    Images are (N, channels, height, width), uint8 or floating point; ``scale`` brings them to
    [0, 1], to which ``shift`` is added. Labels are (N,), integers in 0..num_classes-1. What
    ``torch.as_tensor`` takes is converted, NumPy arrays say.

    Raises:
        TypeError, ValueError: for what is not so, by name.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    scale: float
    shift: float = 0.0

    def __post_init__(self):
        for part in ("train", "test"):
            x, y = (self._numbers(f"{part}_{axis}") for axis in "xy")
            if x.dim() < 2 or len(x) == 0:
                raise ValueError(f"{part}_x must be (N >= 1, ...), got {tuple(x.shape)}")
            if x.shape[1:] != self.train_x.shape[1:]:
                raise ValueError(
                    f"test_x must hold samples of train_x's shape {tuple(self.train_x.shape[1:])}, "
                    f"got {tuple(x.shape[1:])}"
                )
            if y.is_floating_point() or y.dtype == torch.bool:
                raise TypeError(f"{part}_y must hold integer class indices, got {y.dtype}")
            if y.shape != (len(x),):
                raise ValueError(f"{part}_y must have shape ({len(x)},), got {tuple(y.shape)}")
            y = y.long()
            object.__setattr__(self, f"{part}_y", y)
            if x.device.type == "cpu":  # elsewhere it would wait for the device
                if y.min() < 0:
                    raise ValueError(f"{part}_y must hold classes >= 0, got {int(y.min())}")
                if x.is_floating_point() and not x.isfinite().all():
                    raise ValueError(f"{part}_x must be finite")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")

    def _numbers(self, name: str) -> Tensor:
        """A field as a tensor of real numbers, from now on."""
        try:
            tensor = torch.as_tensor(getattr(self, name))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be a tensor or an array of numbers: {error}") from error
        if tensor.is_complex():
            raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
        object.__setattr__(self, name, tensor)
        return tensor

    @property
    def num_classes(self) -> int:
        return int(self.train_y.max()) + 1

    @cached_property
    def checksum(self) -> str:
        """sha256 over the four tensors, in the order train_x, train_y, test_x, test_y."""
        digest = hashlib.sha256()
        for t in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(t.cpu().numpy().tobytes())
        return digest.hexdigest()

    def inputs(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images as network input in [shift, 1 + shift]."""
        x = x.to(dtype) * self.scale
        return x + self.shift if self.shift else x

    def batches(
        self, part: str, batches: Iterable[Tensor], draw: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The inputs of "train" or "test" images of these indices, batch by batch. ``draw`` decides
        their augmentation where a set has one; this one has none."""
        x = self.train_x if part == "train" else self.test_x
        return (self.inputs(x[index], dtype) for index in batches)

    def holdout(self, n: int) -> Data:
        """The same training set with its last n samples in the place of the test set.

        For choosing a learning rate: the test set must not be looked at for that.
        """
        if not 0 < n < len(self.train_x):
            raise ValueError(f"n must be in 1..{len(self.train_x) - 1}, got {n}")
        x, y = self.train_x, self.train_y
        return dataclasses.replace(
            self, name=f"{self.name}-holdout{n}",
            train_x=x[:-n], train_y=y[:-n], test_x=x[-n:], test_y=y[-n:],
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Data:
        names = ("train_x", "train_y", "test_x", "test_y")
        return dataclasses.replace(self, **{n: getattr(self, n).to(device) for n in names})


def data_root(root: str | os.PathLike | None = None) -> Path:
    """Folder of the data sets: the argument, else ``BPFREE_DATA``, else the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = root or os.environ.get("BPFREE_DATA") or cache / "bpfree"
    return Path(os.path.expanduser(chosen))  # as it is where there is no such user


def load(
    name: str = "digits",
    root: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> Data:
    """A data set as tensors on ``device``, every file checked against its checksum first.

    Args:
        name: ``"digits"`` (scikit-learn's 8x8 digits, embedded; every fifth image is test), or one
            of torchvision's: ``"mnist"``, ``"fashion-mnist"``, ``"cifar10"``, ``"cifar100"``,
            ``"svhn"`` (its train and test parts).
        root: folder in torchvision's layout; see ``data_root``.
        download: let torchvision fetch what is missing.

    Raises:
        ValueError: for an unknown name, or a file whose checksum is wrong (it is named).
        FileNotFoundError: for a missing file (it is named, with the command that fetches it).
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(NAMES)}")
    if name == "digits":
        return _digits().to(device)
    import torchvision

    dataset = getattr(torchvision.datasets, TORCHVISION[name])
    root = data_root(root)
    splits = ("train", "test") if name == "svhn" else (True, False)
    if download:
        for split in splits:
            dataset(root, split, download=True)
    _check_files(name, dataset, root)
    parts = []
    for split in splits:
        part = dataset(root, split)
        parts += [_images(part.data), part.labels if name == "svhn" else part.targets]
    train_x, train_y, test_x, test_y = parts
    return Data(name, train_x, train_y, test_x, test_y, scale=1 / 255).to(device)


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    y = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(x)) % 5 == 4
    return Data("digits", x[~test], y[~test], x[test], y[test], scale=1 / 16)


def _images(data: Any) -> Tensor:
    """(N, channels, height, width) from what torchvision's classes hold."""
    x = torch.as_tensor(data)
    if x.dim() == 3:  # MNIST: (N, H, W)
        x = x[:, None]
    elif x.shape[-1] == 3:  # CIFAR: (N, H, W, C); SVHN has its channels in front already
        x = x.permute(0, 3, 1, 2)
    return x.contiguous()


def _check_files(name: str, dataset: Any, root: Path) -> None:
    """Raise, naming the file, unless every file of the data set is there and intact."""
    from torchvision.datasets.utils import check_integrity

    if name == "svhn":
        files = [(root / f, md5) for _, f, md5 in map(dataset.split_list.get, ("train", "test"))]
    elif name.startswith("cifar"):
        meta = (dataset.meta["filename"], dataset.meta["md5"])
        lists = [*dataset.train_list, *dataset.test_list, meta]
        files = [(root / dataset.base_folder / file, md5) for file, md5 in lists]
    else:
        raw = [root / dataset.__name__ / "raw" / Path(file).stem for file, _ in dataset.resources]
        files = list(zip(raw, _IDX_MD5[dataset.__name__], strict=True))
    fetch = f"python -c \"import bpfree; bpfree.load('{name}', root='{root}', download=True)\""
    for path, md5 in files:
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no file {path}; fetch the data set with\n  {fetch}")
        if not check_integrity(path, md5):
            raise DamagedFile(
                f"{name}: {path} is damaged (its md5 is not {md5}); delete it, then\n  {fetch}"
            )
