"""Training steps beside those of BioTorch, a library of the field, in one run.

    pip install --no-deps --target FOLDER biotorch==0.0.16
    PYTHONPATH=FOLDER python figures/peer.py        writes figures/results/peer-cpu.json

Same networks, batches, losses and optimiser (torch's SGD with momentum, not fused); arms take turns
(``bpfree.experiments.timing``), and ratios are to autograd's backprop. The process keeps freed
memory, for all arms, as ``bpfree.fit`` has it. BioTorch is no dependency.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial

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
ROUNDS, REPEATS = 25, 10


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


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    table = {}
    for sizes, batch in NETWORKS.items():

        def network(g: torch.Generator, sizes: tuple[int, ...] = sizes) -> bpfree.Network:
            return bpfree.mlp(*sizes, generator=g)

        arms = {n: arm(n, network, batch, "cpu", SGD)[0] for n in ("autograd", *RULES)}
        arms |= {f"{n}, BioTorch": theirs(mode, sizes, batch) for n, mode in RULES.items()}
        title = f"{'-'.join(map(str, sizes))}, batch {batch}"
        table[title] = compare(arms, "autograd", ROUNDS, REPEATS)
        for name, row in table[title].items():
            print(f"{title}: {name} {row['ratio']}")
    version = importlib.metadata.version("biotorch")
    content = {**results.manifest("cpu"), "biotorch": version, "steps": table}
    results.write_json(results.path("peer-cpu"), content)


if __name__ == "__main__":
    main()
