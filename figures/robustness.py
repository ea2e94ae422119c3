"""Are the networks of chapter 4 robust to adversarial examples that were made against another?

    python figures/robustness.py      completes figures/results/robustness-*.json

The attacker is backprop's recipe with a seed that no other run uses: its own weights, its own
order. Its FGSM examples of the whole test set are shown to each arm, and so are images changed as
much with random signs: only what is lost beyond these is owed to the attack. Runs that are not
recorded yet are recorded on the way.
"""

from __future__ import annotations

import json
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree import recipes, results
from bpfree.data import Data
from bpfree.experiments.recipe import Recipe
from bpfree.experiments.record import PROBE, record
from bpfree.training.device import keep_freed_memory

EXPERIMENT = "ekdaa-fc-fashion-mnist"  # how the names of its recipes begin
ATTACKER, SEEDS = 50, (0, 1, 2)
LEVELS = (0, 2, 4, 8, 16, 32)  # epsilon in grey levels, of 255


def trained(recipe: Recipe, seed: int, data: Data, folder: str | None = None) -> nn.Module:
    """The network of a recorded run; ``record`` finds its checkpoint, and trains nothing."""
    checkpoint = results.path(f"{recipe.name}.{seed}", folder).with_suffix(".ckpt")
    run = recipe.fit(data, [seed], probe=PROBE, checkpoint=checkpoint)
    record(recipe, [seed], folder=folder)
    return run.rules[0].net.eval()


@torch.enable_grad()
def fgsm(
    net: nn.Module, x: Tensor, y: Tensor, epsilon: float, bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Adversarial examples by the fast gradient sign method (Goodfellow et al. 2015, 1412.6572).

        x + epsilon * sign(d loss / d x), clipped to the range of inputs

    They are made by autograd, whatever rule has trained the network. A network whose activation
    has no derivative gives x back: attack it with another network's examples.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be a finite number >= 0, got {epsilon}")
    low, high = bounds
    if not (x.min() >= low and x.max() <= high):
        raise ValueError(f"x must be in {bounds}, got {float(x.min()):.4g}..{float(x.max()):.4g}")
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y.long()), x)
    return (x + epsilon * slope.sign()).clamp(low, high).detach()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return round(100 * (net(x).argmax(1) == y).double().mean().item(), 2)


def shown(attacker: nn.Module, data: Data) -> dict[str, list[Tensor]]:
    """The test set at each level: attacked, and with noise."""
    x, y = data.inputs(data.test_x), data.test_y
    bounds = (data.shift, 1 + data.shift)
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(ATTACKER)) * 2 - 1
    return {
        "attack": [fgsm(attacker, x, y, level / 255, bounds) for level in LEVELS],
        "noise": [(x + level / 255 * signs).clamp(*bounds) for level in LEVELS],
    }


def main() -> None:
    keep_freed_memory()
    file = results.path(f"robustness-{EXPERIMENT}")
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    arms = {name: r for name, r in recipes.RECIPES.items() if name.startswith(EXPERIMENT)}
    data = arms[f"{EXPERIMENT}-bp"].load()
    attacker = arms[f"{EXPERIMENT}-bp"].fit(data, [ATTACKER]).rules[0].net.eval()
    inputs = shown(attacker, data)
    for seed in SEEDS:
        for name, recipe in arms.items():
            row = {"recipe": name, "seed": seed}
            if any(row.items() <= known.items() for known in rows):
                continue
            net, y = trained(recipe, seed, data), data.test_y
            rows.append(
                {**row, **{k: [accuracy(net, x, y) for x in xs] for k, xs in inputs.items()}}
            )
            print(rows[-1], file=sys.stderr, flush=True)
            head = {"attacker": ATTACKER, "levels": LEVELS, **results.manifest("cpu")}
            results.write_json(file, {**head, "rows": rows})


if __name__ == "__main__":
    main()
