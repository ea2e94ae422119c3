"""Choose each rule's learning rate by one protocol, and record the whole grid.

    python figures/tuning.py        completes figures/results/tuning-mnist-fc.json

Five epochs at a constant rate on MNIST's training images less the last 10,000, which measure;
one seed that no recorded run uses. The test set is never looked at. The same grid for every rule;
DRTP, whose hidden signal does not shrink as the network learns, also has its feedback scale chosen.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import bpfree
from bpfree import recipes, results

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SCALES = {"DRTP": (0.001, 0.01, 0.1, 1.0)}
SEED, EPOCHS, HOLDOUT = 100, 5, 10_000
FILE = results.path("tuning-mnist-fc")


def accuracy(
    base: recipes.Recipe, lr: float, options: dict, data: bpfree.data.Data
) -> float | None:
    """Validation accuracy in %, or None where training diverged."""
    recipe = dataclasses.replace(base, lr=lr, options=options)
    try:
        run = bpfree.fit(recipe.make, data, epochs=EPOCHS, optimizer=recipe.optimizer, seeds=[SEED])
    except FloatingPointError:
        return None
    return round(run.test_accuracy[0, -1].item(), 2)


def main() -> None:
    data = bpfree.load("mnist").holdout(HOLDOUT)
    grid = json.loads(FILE.read_text())["grid"] if FILE.exists() else []
    for base in (r for name, r in recipes.RECIPES.items() if name.startswith("mnist-fc-")):
        for scale in SCALES.get(base.rule, (None,)):
            options = base.options if scale is None else {"feedback_scale": scale}
            for lr in RATES:
                row = {"recipe": base.name, "lr": lr, "options": options}
                if not any(row.items() <= known.items() for known in grid):
                    grid.append({**row, "accuracy": accuracy(base, lr, options, data)})
                    print(grid[-1], file=sys.stderr, flush=True)
                    head = {"seed": SEED, "epochs": EPOCHS, "holdout": HOLDOUT}
                    results.write_json(FILE, {**head, "grid": grid})


if __name__ == "__main__":
    main()
