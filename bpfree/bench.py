"""Step times and memory of every rule beside autograd's backprop, in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import bench_engine, results, rules
from .device import generator_on
from .measure import peak_memory
from .network import Network, mlp
from .rule import Rule
from .timing import NETWORKS, SGD, compare, plain

RULES: dict[str, type[Rule]] = {
    name: getattr(rules, name)
    for name in ("Backprop", "FeedbackAlignment", "SignSymmetry", "KolenPollack",
                 "DirectFeedbackAlignment", "DRTP", "PEPITA", "EKDAA")
}  # fmt: skip
DEPTHS, WIDTH, DEPTH_BATCH = (4, 16, 64), 256, 64


def arm(
    name: str,
    network: Callable[[torch.Generator], Network],
    batch: int,
    device: str,
    optimizer: Callable = SGD,
    layout: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> tuple[Callable[[], None], Callable[[], None], Callable[[], list]]:
    """A training step on random data; its backward half alone; the gradients that this leaves.

    ``name`` is a rule's, built with ``options``, or "autograd".
    """
    g = torch.Generator().manual_seed(0)
    net = network(g).to(device, memory_format=layout)
    x = torch.rand(batch, *net.input_shape, generator=g).to(device)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    y = torch.randint(0, net.num_classes, (batch,), generator=g).to(device)
    rule = None if name == "autograd" else RULES[name](net, generator=g, **options).to(device)
    if rule is not None:  # dropout is drawn where autograd's arm draws it
        rule.generator = generator_on(torch.device(device), g)
    own = [] if rule is None else [*rule.parameters()]
    opt = optimizer([*net.parameters(), *own])
    modules = plain(net)

    def backward() -> None:
        if rule is None:
            F.cross_entropy(modules(x), y).backward()
        else:
            rule.backward(x, y)

    def step() -> None:
        opt.zero_grad()
        backward()
        opt.step()

    return step, backward, lambda: [p.grad for p in (*net.parameters(), *own)]


def steps(device: str = "cpu", rounds: int = 15, repeats: int = 10) -> dict:
    """Per network: step times of autograd and every rule, and images per second."""
    table = {}
    for title, (network, batch) in NETWORKS.items():
        made = {n: arm(n, network, batch, device)[0] for n in ("autograd", *RULES)}
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
            made = arm(name, lambda g, s=sizes: mlp(*s, 10, generator=g), DEPTH_BATCH, "cpu")
            table[name][depth] = round(peak_memory(*made[1:]) / 1e6, 3)
    return table


def run(device: str = "cpu", folder: str | Path | None = None) -> dict:
    """Measure everything and write it as ``bench-DEVICE.json``."""
    content = {
        "steps": steps(device),
        "memory_MB": memory(),
        "memory_setting": {"width": WIDTH, "batch": DEPTH_BATCH},
        "seeds": bench_engine.seeds(device),
        "engine": bench_engine.engine(device),
        "released": bench_engine.released(device),
        **results.manifest(device),
    }
    results.write_json(results.path(f"bench-{torch.device(device).type}", folder), content)
    return content


def table(content: dict) -> str:
    """Rules down, networks across: ratios of step times to autograd's; then memory. Markdown."""
    titles = list(content["steps"])
    deep = f"peak memory of {max(DEPTHS)} layers, MB"
    lines = [
        "| rule | " + " | ".join([*titles, deep]) + " |",
        "|---|" + "---|" * len([*titles, deep]),
    ]
    for name in ("autograd", *RULES):
        cells = []
        for title in titles:
            row = content["steps"][title][name]
            ms = f" ({row['median_ms']:.2f} ms)" if name == "autograd" else ""
            cells.append(f"{row['ratio']:.2f}{ms}")
        cells.append(f"{max(content['memory_MB'][name].values()):.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
