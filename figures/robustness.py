"""Are the networks of chapter 4 robust to adversarial examples that were made against another?

    python figures/robustness.py      completes figures/results/robustness-*.json

The attacker is backprop's recipe with a seed that no other run uses: its own weights, its own
order. Its FGSM examples of the whole test set are shown to each arm, and so are images changed as
much with random signs: only what is lost beyond these is owed to the attack.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn

from bpfree import measure, recipes, results
from bpfree.data import Data
from bpfree.device import keep_freed_memory

EXPERIMENT = "ekdaa-fc-fashion-mnist"  # how the names of its recipes begin
ATTACKER, SEEDS = 50, (0, 1, 2)
LEVELS = (0, 2, 4, 8, 16, 32)  # epsilon in grey levels, of 255


def trained(name: str, seed: int, data: Data) -> nn.Module:
    return recipes.get(name).fit(data, [seed]).rules[0].net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return round(100 * (net(x).argmax(1) == y).double().mean().item(), 2)


def shown(attacker: nn.Module, data: Data) -> dict[str, list[Tensor]]:
    """The test set at each level: attacked, and with noise."""
    x, y = data.inputs(data.test_x), data.test_y
    bounds = (data.shift, 1 + data.shift)
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(ATTACKER)) * 2 - 1
    return {
        "attack": [measure.fgsm(attacker, x, y, level / 255, bounds) for level in LEVELS],
        "noise": [(x + level / 255 * signs).clamp(*bounds) for level in LEVELS],
    }


def main() -> None:
    keep_freed_memory()
    file = results.path(f"robustness-{EXPERIMENT}")
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    data = recipes.get(f"{EXPERIMENT}-bp").load()
    inputs = shown(trained(f"{EXPERIMENT}-bp", ATTACKER, data), data)
    for seed in SEEDS:
        for name in recipes.RECIPES:
            row = {"recipe": name, "seed": seed}
            if not name.startswith(EXPERIMENT) or any(row.items() <= r.items() for r in rows):
                continue
            net = trained(name, seed, data)
            found = {
                kind: [accuracy(net, x, data.test_y) for x in xs] for kind, xs in inputs.items()
            }
            rows.append({**row, **found})
            print(rows[-1], file=sys.stderr, flush=True)
            head = {"attacker": ATTACKER, "levels": LEVELS, **results.manifest("cpu")}
            results.write_json(file, {**head, "rows": rows})


if __name__ == "__main__":
    main()
