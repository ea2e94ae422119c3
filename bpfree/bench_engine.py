"""What the engine gains: seeds at once, recorded steps, resident data; part of ``bpfree bench``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rules
from .data import Data
from .device import can_record
from .lockstep import Lockstep
from .timing import NETWORKS, SGD, compare, plain

STEPS = 10  # an epoch's, where epochs are timed


def _random_data() -> Data:
    """STEPS batches of 64 images of MNIST's shape."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (64 * STEPS, 1, 28, 28), generator=g, dtype=torch.uint8)
    y = torch.randint(0, 10, (64 * STEPS,), generator=g)
    return Data("random", x, y, x, y, 1 / 255)


def _epoch(count: int, device: str, **options: bool) -> Callable[[], object]:
    """STEPS training steps of ``count`` seeds of PEPITA at once, on 784-1024-10 and random data."""
    network, batch = NETWORKS["784-1024-10"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    made = [rules.PEPITA(network(g), generator=g) for g in generators]
    for rule in made:
        rule.to(device).net.to(device)
    data = _random_data().to(device)
    group = Lockstep(made, generators, data, batch, SGD, **options)
    return torch.no_grad()(lambda: group.train(1.0))


def _autograd_epoch(device: str) -> Callable[[], None]:
    """The same of backprop, in the loop that one would write, with the data on the device."""
    network, batch = NETWORKS["784-1024-10"]
    g = torch.Generator().manual_seed(0)
    net, data = plain(network(g)).to(device), _random_data().to(device)
    opt = SGD(net.parameters())

    def epoch() -> None:
        for index in torch.randperm(len(data.train_y), generator=g).to(device).split(batch):
            opt.zero_grad()
            logits = net(data.inputs(data.train_x[index]))
            F.cross_entropy(logits, data.train_y[index]).backward()
            opt.step()

    return epoch


def _per_step(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        arm: {k: v if k == "ratio" else round(v / STEPS, 4) for k, v in row.items()}
        for arm, row in table.items()
    }


def seeds(device: str = "cpu", counts: tuple[int, ...] = (1, 10), rounds: int = 5) -> dict:
    """Milliseconds per step of S seeds at once, and the ratio to one seed."""
    arms = {str(count): _epoch(count, device) for count in counts}
    return _per_step(compare(arms, str(counts[0]), rounds, 1, device))


def engine(device: str = "cpu", rounds: int = 5) -> dict:
    """Milliseconds per step of PEPITA in ``fit``, each way of launching it, beside autograd's."""
    ways = {"launched": dict(record=False), "compiled": dict(record=False, compile=True)}
    if can_record(torch.device(device)):
        ways |= {"replayed": {}, "compiled and replayed": dict(compile=True)}
    arms = {name: _epoch(1, device, **options) for name, options in ways.items()}
    arms = {"autograd": _autograd_epoch(device), **arms}
    return _per_step(compare(arms, "autograd", rounds, 1, device))


class _Images(torch.utils.data.Dataset):
    """A data set as torchvision's are: one PIL image at a time, made a tensor when it is asked."""

    def __init__(self, data: Data):
        self.images, self.labels = data.train_x[:, 0].numpy(), data.train_y.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image
        from torchvision.transforms.functional import to_tensor

        return to_tensor(Image.fromarray(self.images[i])), self.labels[i]


def released(device: str = "cpu", rounds: int = 5) -> dict:
    """Two habits of released implementations, restated, beside what this library does instead.

    PEPITA's convolutional script sums a kernel's update in a loop over the output's positions; all
    scripts let a DataLoader make each batch on the host and copy it.
    """
    g = torch.Generator().manual_seed(0)
    network, batch = NETWORKS["3x32x32-conv32-10"]
    block, side = network(g)[0].to(device), 28
    r = torch.rand(batch, 3, 32, 32, generator=g).to(device)
    delta = torch.rand(batch, 32, side, side, generator=g).to(device)

    def loop() -> Tensor:
        update = torch.zeros(32, 75, device=device)
        for i in range(side):
            for j in range(side):
                update += delta[:, :, i, j].T @ r[:, :, i : i + 5, j : j + 5].flatten(1)
        return update

    data = _random_data()
    loader = torch.utils.data.DataLoader(_Images(data), 64, shuffle=True)
    resident = data.to(device)

    def gather() -> None:
        order = torch.randperm(len(resident.train_y), generator=g).to(device)
        for index in order.split(64):
            resident.inputs(resident.train_x[index]), resident.train_y[index]

    updates = {"one convolution": lambda: block.outer(delta, r), "loop over positions": loop}
    batches = {
        "resident tensors": gather,
        "DataLoader": lambda: [(x.to(device), y.to(device)) for x, y in loader],
    }
    return {
        "kernel update": compare(updates, "one convolution", rounds, 1, device),
        "batch of 64": _per_step(compare(batches, "resident tensors", rounds, 1, device)),
    }
