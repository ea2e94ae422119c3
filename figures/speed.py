"""What each step of the appendix on speed gains, and the ceilings of one thread of this CPU.

    python figures/speed.py        writes figures/results/speed-cpu.json

``steps``: one training step of PEPITA beside the same with one thing undone. ``pieces``: that thing
by itself. Arms take turns in one process (``bpfree.experiments.timing``), ratios are to the first
arm, what the library does. What the C library does with freed memory is a property of a process,
so two others take turns for that; this one keeps it, as ``bpfree`` does.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree import Block, Network, results
from bpfree.experiments import bench
from bpfree.experiments.timing import NETWORKS, SGD, compare
from bpfree.training.device import keep_freed_memory

FC, CONV = "784-1024-10", "3x32x32-conv32-10"
ROUNDS, REPEATS = 15, 5
# Matrices show the one ceiling, copies of pieces of an array beyond all caches the other. Either
# takes about a millisecond, so that on a machine in use the best of CALLS was not interrupted.
SIDE, COPIED, PIECES, CALLS = 512, 2**20, 64, 100


def training_step(title: str, name: str = "PEPITA", **options: Any) -> Callable[[], None]:
    """A training step on random data, of a rule or of backprop by "autograd"."""
    return bench.arm(name, *NETWORKS[title], "cpu", **options)[0]


def undone(step: Callable[[], None], target: object, name: str, by: Callable) -> Callable[[], None]:
    """``step`` with ``target.name`` replaced."""

    def run() -> None:
        with patch.object(target, name, by):
            step()

    return run


def drawn_by_torch(net: Network, batch: int, generator: torch.Generator) -> dict[int, Tensor]:
    """``net.masks``, one draw a unit."""
    return {
        l: torch.empty(batch, *shape).bernoulli_(1 - block.dropout, generator=generator)
        / (1 - block.dropout)
        for l, (block, shape) in enumerate(zip(net, net.shapes, strict=True), 1)
        if block.dropout
    }


def separate(m: Tensor, u: Tensor, v: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """``torch.addmm`` as three passes: the product, its multiple, the sum."""
    product = u @ v
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else m + product


def steps() -> dict:
    """What is undone -> arms, the library's first."""
    fc, conv = training_step(FC), training_step(CONV)
    last = torch.channels_last
    table = {
        "pooling by views": {
            "views": conv,
            "torch's": undone(conv, Block, "_is_tiling", lambda block: False),
        },
        "dropout from 16 bits": {
            "a quarter of a draw": fc,
            "a draw each": undone(fc, Network, "masks", drawn_by_torch),
        },
        "products that scale and add": {
            "in the product": fc,
            "passes of their own": undone(fc, torch, "addmm", separate),
        },
        "cheap second pass": {
            "cheap": fc,
            "two full passes": training_step(FC, cheap=False),
        },
        "cheap second pass, convolution": {
            "cheap": conv,
            "two full passes": training_step(CONV, cheap=False),
        },
        "fused SGD": {
            "fused": fc,
            "for each": training_step(FC, optimizer=partial(SGD, fused=False)),
        },
        "channels last, PEPITA": {
            "contiguous, by views": conv,
            "channels last, torch's": undone(
                training_step(CONV, layout=last), Block, "_is_tiling", lambda block: False
            ),
        },
        "channels last, autograd": {
            "contiguous": training_step(CONV, "autograd"),
            "channels last": training_step(CONV, "autograd", layout=last),
        },
    }
    return {name: turns(arms) for name, arms in table.items()}


def pieces() -> dict:
    """The piece of a step by itself -> arms, the library's first."""
    g = torch.Generator().manual_seed(0)
    network, batch = NETWORKS[CONV]
    block = network(g)[0]
    z = torch.rand(batch, 32, 28, 28, generator=g)
    last = z.contiguous(memory_format=torch.channels_last)
    net, size = NETWORKS[FC][0](g), NETWORKS[FC][1]
    x, delta = torch.rand(size, 784, generator=g), torch.randn(size, 1024, generator=g)
    out = torch.zeros(1)
    pool = partial(F.max_pool2d, kernel_size=2)
    table = {
        "pooling": {
            "views": lambda: block._largest(block._largest(z, -2), -1),
            "torch's, contiguous": lambda: pool(z),
            "torch's, channels last": lambda: pool(last),
            "change of layout": lambda: z.contiguous(memory_format=torch.channels_last),
        },
        "dropout mask": {
            "a quarter of a draw": lambda: net.masks(size, g),
            "bernoulli_": lambda: drawn_by_torch(net, size, g),
            "F.dropout": lambda: F.dropout(delta, 0.1),
        },
        "finite": {
            "of the sum": lambda: bool(torch.isfinite(x.sum())),
            "of each": lambda: bool(torch.isfinite(x).all()),
        },
        "outer product over B": {
            "in the product": lambda: torch.addmm(out, delta.T, x, beta=0, alpha=1 / size),
            "pass of its own": lambda: separate(out, delta.T, x, beta=0, alpha=1 / size),
        },
    }
    return {name: turns(arms, repeats=20) for name, arms in table.items()}


def turns(arms: dict[str, Callable], repeats: int = REPEATS) -> dict:
    return compare(arms, next(iter(arms)), ROUNDS, repeats)


def _worker(title: str, keep: bool, pipe) -> None:
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    step = training_step(title)
    while pipe.recv():
        step()
        pipe.send(True)


@contextlib.contextmanager
def process(title: str, keep: bool) -> Iterator[Callable[[], None]]:
    """A function that lets another process make one training step."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_worker, args=(title, keep, theirs))
    worker.start()
    theirs.close()  # so that a worker's death is an end of the pipe, not a wait for ever

    def step() -> None:
        ours.send(True)
        ours.recv()

    try:
        yield step
    finally:
        with contextlib.suppress(BrokenPipeError):
            ours.send(False)
        worker.join()


def freed_memory() -> dict:
    """A step in a process that keeps what it frees, and in one that gives it back."""
    table = {}
    for title in (CONV, FC):
        with process(title, True) as kept, process(title, False) as given_back:
            table[title] = turns({"kept": kept, "given back": given_back})
    return table


def roofline() -> dict:
    """The best that one thread did: operations per second of a matrix product, and of one of the
    step's size; bytes per second, read and written, of a copy; and the seconds of a step of one
    seed and of ten, as ``fit`` makes it."""
    g = torch.Generator().manual_seed(0)
    u, v = torch.rand(SIDE, SIDE, generator=g), torch.rand(SIDE, SIDE, generator=g)
    x, W = torch.rand(64, 784, generator=g), torch.rand(1024, 784, generator=g)
    source, target = torch.rand(2, PIECES, COPIED, generator=g)
    piece = itertools.cycle(range(PIECES))
    with patch.object(bench, "STEPS", 1):
        seeds = {count: bench.epoch(int(count), "cpu") for count in ("1", "10")}
    arms = {
        "product": lambda: u @ v,
        "small product": lambda: x @ W.T,
        "copy": lambda: target[i := next(piece)].copy_(source[i]),
        **seeds,
    }
    best = {name: row["min_ms"] / 1e3 for name, row in compare(arms, "copy", CALLS, 1).items()}
    return {
        "operations_per_s": 2 * SIDE**3 / best["product"],
        "operations_per_s_small": 2 * x.numel() * len(W) / best["small product"],
        "bytes_per_s": 2 * source[0].nbytes / best["copy"],
        "step_s": {count: best[count] for count in seeds},
    }


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    content = {
        "freed_memory": freed_memory(),
        "steps": steps(),
        "pieces": pieces(),
        "roofline": roofline(),
        **results.manifest("cpu"),
    }
    results.write_json(results.path("speed-cpu"), content)


if __name__ == "__main__":
    main()
