"""Training steps beside those of BioTorch, a library of the field, in one run.

    pip install --no-deps --target FOLDER biotorch==0.0.16
    PYTHONPATH=FOLDER python figures/peer.py        writes figures/results/peer-cpu.json

Same networks, batches, losses and optimiser (torch's SGD with momentum, not fused); each arm takes
turns with autograd's backprop (``bpfree.experiments.timing``), and ratios are to that. The process
keeps freed memory, for all arms, as ``bpfree.fit`` has it. Where a network's matrices lie in
memory, and which arm ran before, moves a ratio by more than a rule's last microseconds do (one
rule, twice in a process of many arms: 1.03 and 1.01). So each arm has processes of its own,
several, beside autograd alone; recorded are the medians over these, and the ratio's quartiles.
BioTorch is no dependency.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from biotorch.module.biomodule import BioModule  # type: ignore[import-not-found]

import bpfree
from bpfree import results
from bpfree.experiments.bench import arm
from bpfree.experiments.timing import compare, plain
from bpfree.training.device import keep_freed_memory

NETWORKS = {(784, 1024, 1024, 1024, 10): 256, (784, 1024, 10): 64}
RULES = {"FeedbackAlignment": "fa", "DirectFeedbackAlignment": "dfa", "SignSymmetry": "usf"}
SGD = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
PROCESSES, ROUNDS, REPEATS = 6, 4, 10


def theirs(mode: str, sizes: tuple[int, ...], batch: int) -> Callable[[], None]:
    """A training step of BioTorch, on the data of ``bench.arm``."""
    g = torch.Generator().manual_seed(0)
    layers = plain(bpfree.mlp(*sizes, generator=g))
    x = torch.rand(batch, sizes[0], generator=g)
    y = torch.randint(0, sizes[-1], (batch,), generator=g)
    model = BioModule(layers, mode=mode, output_dim=sizes[-1])
    opt = SGD([p for n, p in model.named_parameters() if "backward" not in n])

    def step() -> None:
        opt.zero_grad()
        out = model(x, y, F.cross_entropy) if mode == "dfa" else model(x)
        F.cross_entropy(out, y).backward()
        opt.step()

    return step


def process(k: int, name: str, sizes: tuple[int, ...], batch: int) -> dict[str, dict[str, float]]:
    """The arm of this name beside autograd's; which is made first, and runs first, k decides."""
    torch.set_num_threads(1)
    keep_freed_memory()
    rule, _, peer = name.partition(", ")

    def made(key: str) -> Callable[[], None]:
        if key == name and peer:
            return theirs(RULES[rule], sizes, batch)
        return arm(key, lambda g: bpfree.mlp(*sizes, generator=g), batch, "cpu", SGD)[0]

    with contextlib.redirect_stdout(io.StringIO()):  # BioTorch reports each conversion
        arms = {key: made(key) for key in ("autograd", name)[:: 1 - 2 * (k % 2)]}
    return compare(arms, "autograd", ROUNDS, REPEATS)


def main() -> None:
    torch.set_num_threads(1)
    table: dict[str, dict[str, dict[str, float]]] = {}
    fresh = get_context("spawn")
    for sizes, batch in NETWORKS.items():
        rows = table[f"{'-'.join(map(str, sizes))}, batch {batch}"] = {}
        for name in (*RULES, *(f"{rule}, BioTorch" for rule in RULES)):
            with ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as pool:
                jobs = [pool.submit(process, k, name, sizes, batch) for k in range(PROCESSES)]
                found = [job.result() for job in jobs]
            for key in ("autograd", name):  # autograd's own times: those beside the last arm
                medians = {n: statistics.median(f[key][n] for f in found) for n in found[0][key]}
                rows[key] = {n: round(v, 4) for n, v in medians.items()}
            low, _, high = statistics.quantiles(f[name]["ratio"] for f in found)
            rows[name] |= {"from": round(low, 4), "to": round(high, 4)}
            print(sizes, name, rows[name])
    version = importlib.metadata.version("biotorch")
    content = {**results.manifest("cpu"), "biotorch": version, "steps": table}
    results.write_json(results.path("peer-cpu"), content)


if __name__ == "__main__":
    main()
