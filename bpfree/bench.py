"""Step times and memory of every rule beside autograd's backprop, in one process, interleaved.

A time alone says little on a shared machine. So every arm takes its turn in every round, and what
is reported is the median over rounds of the ratio to autograd in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from . import results, rules
from .data import Data
from .lockstep import Lockstep
from .measure import peak_memory
from .network import Network, convnet, mlp
from .rule import Rule

# name -> network (from a generator) and batch size; the first are the peers' of the field
NETWORKS: dict[str, tuple[Callable[[torch.Generator], Network], int]] = {
    "784-1024-10": (lambda g: mlp(784, 1024, 10, dropout=0.1, generator=g), 64),
    "3072-1024-10": (lambda g: mlp(3072, 1024, 10, dropout=0.1, generator=g), 64),
    "784-1024x3-10": (lambda g: mlp(784, 1024, 1024, 1024, 10, generator=g), 256),
    "784-512x5-10": (lambda g: mlp(784, *[512] * 5, 10, generator=g), 1024),
    "3x32x32-conv32-10": (
        lambda g: convnet(
            (3, 32, 32), (32,), kernel_size=5, padding=0, num_classes=10, generator=g
        ),
        50,
    ),
    # EKDAA's network, a quarter as wide
    "3x32x32-conv16x3-32x3-32-10": (
        lambda g: convnet(
            (3, 32, 32), (16, 16, 16, 32, 32, 32), (32,), pool=(1, 2, 1, 2, 1, 2),
            activation="tanh", init="glorot", num_classes=10, generator=g,
        ),
        50,
    ),
}  # fmt: skip
RULES: dict[str, type[Rule]] = {
    name: getattr(rules, name)
    for name in ("Backprop", "FeedbackAlignment", "SignSymmetry", "KolenPollack",
                 "DirectFeedbackAlignment", "DRTP", "PEPITA", "EKDAA")
}  # fmt: skip
DEPTHS, WIDTH, DEPTH_BATCH = (4, 16, 64), 256, 64


def _arm(name: str, network: Callable, batch: int, device: str) -> tuple[Callable, ...]:
    """A training step on random data; its backward half alone; the gradients that this leaves."""
    g = torch.Generator().manual_seed(0)
    net = network(g).to(device)
    x = torch.rand(batch, *net.input_shape, generator=g).to(device)
    y = torch.randint(0, net.num_classes, (batch,), generator=g).to(device)
    rule = None if name == "autograd" else RULES[name](net, generator=g).to(device)
    own = [] if rule is None else [*rule.parameters()]
    opt = torch.optim.SGD([*net.parameters(), *own], lr=1e-4, momentum=0.9)

    def backward() -> None:
        if rule is None:
            F.cross_entropy(net(x, net.masks(batch, g)), y).backward()
        else:
            rule.backward(x, y)

    def step() -> None:
        opt.zero_grad()
        backward()
        opt.step()

    return step, backward, lambda: [p.grad for p in (*net.parameters(), *own)]


def _seconds(f: Callable, repeats: int, device: str) -> float:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    if cuda:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def compare(
    arms: dict[str, Callable], base: str, rounds: int, repeats: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Milliseconds of each arm (median, min, max) and its ratio to ``base``, round by round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for f in arms.values():  # warm-up: allocations and the library's own choices
        _seconds(f, 2, device)
    for _ in range(rounds):
        for name, f in arms.items():
            times[name].append(1e3 * _seconds(f, repeats, device))
    return {
        name: {
            "median_ms": round(statistics.median(t), 4),
            "min_ms": round(min(t), 4),
            "max_ms": round(max(t), 4),
            "ratio": round(
                statistics.median(a / b for a, b in zip(t, times[base], strict=True)), 3
            ),
        }
        for name, t in times.items()
    }


def steps(device: str = "cpu", rounds: int = 15, repeats: int = 10) -> dict:
    """Per network: step times of autograd and every rule, and images per second."""
    table = {}
    for title, (network, batch) in NETWORKS.items():
        made = {n: _arm(n, network, batch, device)[0] for n in ("autograd", *RULES)}
        rows = compare(made, "autograd", rounds, repeats, device)
        for row in rows.values():
            row["images_per_s"] = round(1e3 * batch / row["median_ms"])
        table[f"{title}, batch {batch}"] = rows
    return table


def memory() -> dict:
    """Peak activity memory (MB) of one backward pass, by rule and number of hidden layers.

    Everything alive at once that the pass made, less the gradients of the weights, which any rule
    must leave behind. Layers have equal width.
    """
    table = {}
    for name in ("autograd", *RULES):
        table[name] = {}
        for depth in DEPTHS:
            sizes = [WIDTH] * (depth + 1)
            arm = _arm(name, lambda g, s=sizes: mlp(*s, 10, generator=g), DEPTH_BATCH, "cpu")
            table[name][depth] = round(peak_memory(*arm[1:]) / 1e6, 3)
    return table


def seeds(device: str = "cpu", counts: tuple[int, ...] = (1, 10), rounds: int = 5) -> dict:
    """Milliseconds per step of S seeds at once, on 784-1024-10, and the ratio to one seed."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (640, 1, 28, 28), generator=g, dtype=torch.uint8)
    y = torch.randint(0, 10, (640,), generator=g)
    data = Data("random", x, y, x, y, 1 / 255).to(device)
    arms = {}
    for count in counts:
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        made = [rules.FeedbackAlignment(mlp(784, 1024, 10, generator=g), generator=g)
                for g in generators]  # fmt: skip
        for rule in made:
            rule.to(device).net.to(device)
        group = Lockstep(made, generators, data, 64, lambda p: torch.optim.SGD(p, 0.01, 0.9))
        arms[str(count)] = torch.no_grad()(lambda group=group: group.train(1.0))
    table = compare(arms, str(counts[0]), rounds, 1, device)
    for row in table.values():
        for key in ("median_ms", "min_ms", "max_ms"):
            row[key] = round(row[key] / 10, 4)  # ten steps an epoch
    return table


def run(device: str = "cpu", folder: str | Path | None = None) -> dict:
    """Measure everything and write it as ``bench-DEVICE.json``."""
    content = {
        "steps": steps(device),
        "memory_MB": memory(),
        "memory_setting": {"width": WIDTH, "batch": DEPTH_BATCH},
        "seeds": seeds(device),
        **results.manifest(device),
    }
    results.write_json(results.path(f"bench-{torch.device(device).type}", folder), content)
    return content


def table(content: dict) -> str:
    """The step times as a Markdown table: rules down, networks across, ratios to autograd."""
    titles = list(content["steps"])
    lines = ["| rule | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for name in ("autograd", *RULES):
        cells = []
        for title in titles:
            row = content["steps"][title][name]
            ms = f" ({row['median_ms']:.2f} ms)" if name == "autograd" else ""
            cells.append(f"{row['ratio']:.2f}{ms}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
