"""Step times and memory of every rule beside autograd's backprop, and what the engine gains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rules
from ..data import Data
from ..measure import peak_memory
from ..network import Network, mlp
from ..style import RULES as LOOKS
from ..training.device import can_record, generator_on
from ..training.lockstep import Lockstep
from . import results
from .local import heads
from .timing import NETWORKS, SGD, compare, plain

RULES = {n: getattr(rules, n) for n in LOOKS if hasattr(rules, n) and n != "Frozen"}
DEPTHS, WIDTH, DEPTH_BATCH = (4, 16, 64), 256, 64
STEPS = 10  # an epoch's, where epochs are timed


def arm(
    name: str,
    network: Callable[[torch.Generator], Network],
    batch: int,
    device: str,
    optimizer: Callable = SGD,
    layout: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> tuple[Callable[[], None], Callable[[], object], Callable[[], list]]:
    """A training step on random data; its backward half alone; the gradients that this leaves.

    ``name`` is a rule's, built with ``options``, or "autograd".
    """
    g = torch.Generator().manual_seed(0)
    net = network(g).to(device, memory_format=layout)
    x = torch.rand(batch, *net.input_shape, generator=g).to(device)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    y = torch.randint(0, net.num_classes, (batch,), generator=g).to(device)
    learned = [*net.parameters()]
    if name == "autograd":
        modules = plain(net)
    else:
        rule = RULES[name](net, generator=g, **options).to(device)
        rule.generator = generator_on(torch.device(device), g)  # as autograd's arm draws dropout
        learned += rule.parameters()
    opt = optimizer(learned)

    def backward() -> None:
        if name == "autograd":
            F.cross_entropy(modules(x), y).backward()
        else:
            rule.backward(x, y)

    def step() -> None:
        opt.zero_grad()
        backward()
        opt.step()

    return step, backward, lambda: [p.grad for p in learned]


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

    def peak(name: str, depth: int) -> float:
        sizes = [WIDTH] * (depth + 1)
        made = arm(name, lambda g: mlp(*sizes, 10, generator=g), DEPTH_BATCH, "cpu")
        return round(peak_memory(*made[1:]) / 1e6, 3)

    return {name: {depth: peak(name, depth) for depth in DEPTHS} for name in ("autograd", *RULES)}


def random_data() -> Data:
    """STEPS batches of 64 images of MNIST's shape."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (64 * STEPS, 1, 28, 28), generator=g, dtype=torch.uint8)
    y = torch.randint(0, 10, (64 * STEPS,), generator=g)
    return Data("random", x, y, x, y, 1 / 255)


def epoch(count: int, device: str, **options: bool) -> Callable[[], object]:
    """STEPS training steps of ``count`` seeds of PEPITA at once, on 784-1024-10 and random data."""
    network, batch = NETWORKS["784-1024-10"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    made = [rules.PEPITA(network(g), generator=g) for g in generators]
    for rule in made:
        rule.to(device).net.to(device)
    group = Lockstep(made, generators, random_data().to(device), batch, SGD, **options)
    return torch.no_grad()(lambda: group.train(1.0))


def autograd_epoch(device: str) -> Callable[[], None]:
    """The same of backprop, in the loop that one would write, with the data on the device."""
    network, batch = NETWORKS["784-1024-10"]
    g = torch.Generator().manual_seed(0)
    net, data = plain(network(g)).to(device), random_data().to(device)
    opt = SGD(net.parameters())

    def run() -> None:
        for index in torch.randperm(len(data.train_y), generator=g).to(device).split(batch):
            opt.zero_grad()
            logits = net(data.inputs(data.train_x[index]))
            F.cross_entropy(logits, data.train_y[index]).backward()
            opt.step()

    return run


def seeds(device: str = "cpu", rounds: int = 5) -> dict:
    """Milliseconds per step of ten seeds at once, and the ratio to one seed."""
    arms = {str(count): epoch(count, device) for count in (1, 10)}
    return compare(arms, "1", rounds, 1, device, STEPS)


def engine(device: str = "cpu", rounds: int = 5) -> dict:
    """Milliseconds per step of PEPITA in ``fit``, each way of launching it, beside autograd's."""
    ways = {"launched": dict(record=False), "compiled": dict(record=False, compile=True)}
    if can_record(torch.device(device)):
        ways |= {"replayed": {}, "compiled and replayed": dict(compile=True)}
    arms = {"autograd": autograd_epoch(device)}
    arms |= {name: epoch(1, device, **options) for name, options in ways.items()}
    return compare(arms, "autograd", rounds, 1, device, STEPS)


def released(device: str = "cpu", rounds: int = 5) -> dict:
    """Two habits of released implementations, restated, beside what this library does instead.

    PEPITA's convolutional script sums a kernel's update in a loop over the output's positions; all
    scripts let a DataLoader make each batch of images on the host and copy it.
    """
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

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

    host = random_data()
    images, labels, resident = host.train_x[:, 0].numpy(), host.train_y.tolist(), host.to(device)

    def collate(indices: list[int]) -> tuple[Tensor, Tensor]:
        x = torch.stack([to_tensor(Image.fromarray(images[i])) for i in indices])
        return x, torch.tensor([labels[i] for i in indices])

    loader = torch.utils.data.DataLoader(range(len(labels)), 64, shuffle=True, collate_fn=collate)

    def gather() -> None:
        for index in torch.randperm(len(labels), generator=g).to(device).split(64):
            resident.inputs(resident.train_x[index]), resident.train_y[index]

    updates = {"one convolution": lambda: block.outer(delta, r), "loop over positions": loop}
    batches = {
        "resident tensors": gather,
        "DataLoader": lambda: [(x.to(device), y.to(device)) for x, y in loader],
    }
    return {
        "kernel update": compare(updates, "one convolution", rounds, 1, device),
        "batch of 64": compare(batches, "resident tensors", rounds, 1, device, STEPS),
    }


def run(device: str = "cpu", folder: str | Path | None = None) -> dict:
    """Measure everything and write it as ``bench-DEVICE.json``."""
    content = {
        "steps": steps(device),
        "memory_MB": memory(),
        "memory_setting": {"width": WIDTH, "batch": DEPTH_BATCH},
        "seeds": seeds(device),
        "engine": engine(device),
        "heads": heads(device),
        "released": released(device),
        **results.manifest(device),
    }
    name = f"bench-{torch.device(device).type}"
    results.write_json(results.path(name, results.place(folder)), content)
    return content


def table(content: dict) -> str:
    """Rules down, networks across: ratios of step times to autograd's; then memory. Markdown."""
    networks = content["steps"].values()
    head = ["rule", *content["steps"], f"peak memory of {max(DEPTHS)} layers, MB"]
    lines = [head, ["---"] * len(head)]
    for name in ("autograd", *RULES):
        cells = [f"{rows[name]['ratio']:.2f}" for rows in networks]
        if name == "autograd":
            cells = [f"1.00 ({rows[name]['median_ms']:.2f} ms)" for rows in networks]
        lines.append([name, *cells, f"{max(content['memory_MB'][name].values()):.1f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
