"""A fair clock, and the networks that are timed: arms take turns, ratios are taken within a round.

A time alone says little on a shared machine. So every arm takes its turn in every round, and what
is reported is the median over rounds of the ratio to a base in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..network import Network, convnet, mlp

# name -> network (from a generator) and batch size; the first are the peers' of the field
NETWORKS: dict[str, tuple[Callable[[torch.Generator], Network], int]] = {
    "784-1024-10": (lambda g: mlp(784, 1024, 10, dropout=0.1, generator=g), 64),
    "3072-1024-10": (lambda g: mlp(3072, 1024, 10, dropout=0.1, generator=g), 64),
    "784-1024x3-10": (lambda g: mlp(784, 1024, 1024, 1024, 10, generator=g), 256),
    "784-512x5-10": (lambda g: mlp(784, *[512] * 5, 10, generator=g), 1024),
    "3x32x32-conv32-10": (lambda g: convnet(
        (3, 32, 32), (32,), kernel_size=5, padding=0, num_classes=10, generator=g), 50),
    "3x32x32-conv64x3-128x3-128-10": (lambda g: convnet(  # EKDAA's
        (3, 32, 32), (64, 64, 64, 128, 128, 128), (128,), pool=(1, 2, 1, 2, 1, 2),
        activation="tanh", init="glorot", num_classes=10, generator=g), 50),
}  # fmt: skip
MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "identity": nn.Identity}
SGD = partial(torch.optim.SGD, lr=1e-4, momentum=0.9, fused=True)
TURN = 1.0  # seconds, about the most that an arm has in a round


def plain(net: Network) -> nn.Sequential:
    """The same network, same weights, of torch's own modules, as written for autograd."""
    layers: list[nn.Module] = []
    for block in net:
        layers += [] if block.is_conv else [nn.Flatten()]
        layers += [block.linear, MODULES[block.activation]()]
        layers += [block.pool] if block.pool else []
        layers += [nn.Dropout(block.dropout)] if block.dropout else []
    return nn.Sequential(*layers)


def _seconds(f: Callable, repeats: int, device: str) -> float:
    wait = torch.get_device_module(device).synchronize
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    wait(device)
    return (time.perf_counter() - start) / repeats


def compare(
    arms: dict[str, Callable],
    base: str,
    rounds: int,
    repeats: int,
    device: str = "cpu",
    per: int = 1,
) -> dict[str, dict[str, float]]:
    """Milliseconds of each arm (median, min) and its ratio to ``base``, round by round.

    In a round an arm is called ``repeats`` times, or fewer where that would take long. A call makes
    ``per`` steps; the times are of one.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for f in arms.values():  # warm-up: allocations and the library's own choices
        _seconds(f, 2, device)
    slowest = max([_seconds(f, 1, device) for f in arms.values()])
    repeats = max(1, min(repeats, int(TURN / slowest)))
    for _ in range(rounds):
        for name, f in arms.items():
            times[name].append(1e3 / per * _seconds(f, repeats, device))
    ratios = {k: [a / b for a, b in zip(t, times[base], strict=True)] for k, t in times.items()}
    return {
        name: {
            "median_ms": round(statistics.median(t), 4),
            "min_ms": round(min(t), 4),
            "ratio": round(statistics.median(ratios[name]), 3),
        }
        for name, t in times.items()
    }
