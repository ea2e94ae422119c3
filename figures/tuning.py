"""Choose each rule's learning rate by one protocol, and record the whole grid.

    python figures/tuning.py        completes figures/results/tuning-*.json

A few epochs at a constant rate on the training images less the last 10,000, which measure; one
seed that no recorded run uses. The test set is never looked at. The same grid for every rule of an
experiment; DRTP, whose hidden signal does not shrink as the network learns, also has its feedback
scale chosen.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import bpfree
from bpfree import recipes, results

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SCALES = {"DRTP": (0.001, 0.01, 0.1, 1.0)}
SEED, HOLDOUT = 100, 10_000
EXPERIMENTS = {"mnist-fc": 5, "ekdaa-fc-fashion-mnist": 2}  # how its recipes begin -> epochs


def accuracy(recipe: recipes.Recipe, epochs: int, data: bpfree.data.Data) -> float | None:
    """Validation accuracy in %, or None where training diverged."""
    try:
        run = bpfree.fit(
            recipe.make, data, epochs=epochs, batch_size=recipe.batch_size,
            optimizer=recipe.optimizer, seeds=[SEED],
        )  # fmt: skip
    except FloatingPointError:
        return None
    return round(run.test_accuracy[0, -1].item(), 2)


def tune(experiment: str, epochs: int) -> None:
    """Complete an experiment's grid."""
    file = results.path(f"tuning-{experiment}")
    grid = json.loads(file.read_text())["grid"] if file.exists() else []
    bases = [r for name, r in recipes.RECIPES.items() if name.startswith(f"{experiment}-")]
    data = dataclasses.replace(bpfree.load(bases[0].data).holdout(HOLDOUT), shift=bases[0].shift)
    for base in bases:
        for scale in SCALES.get(base.rule, (None,)):
            options = base.options if scale is None else {"feedback_scale": scale}
            for lr in RATES:
                row = {"recipe": base.name, "lr": lr, "options": options}
                if not any(row.items() <= known.items() for known in grid):
                    recipe = dataclasses.replace(base, lr=lr, options=options)
                    grid.append({**row, "accuracy": accuracy(recipe, epochs, data)})
                    print(grid[-1], file=sys.stderr, flush=True)
                    head = {"seed": SEED, "epochs": epochs, "holdout": HOLDOUT}
                    results.write_json(file, {**head, "grid": grid})


if __name__ == "__main__":
    for experiment, epochs in EXPERIMENTS.items():
        tune(experiment, epochs)
