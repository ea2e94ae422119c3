"""Choose each rule's learning rate by one protocol, and record the whole grid.

    python figures/tuning.py        completes figures/results/tuning-*.json

A few epochs on the training images less the last 10,000, which measure; one seed that no recorded
run uses. The test set is never looked at. The same rates for every arm of an
experiment. Two arms also have an option chosen: DRTP, whose hidden signal does not shrink as the
network learns, its feedback scale; and EKDAA with signs, whose does not shrink with beta, its beta.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import bpfree
from bpfree import recipes, results
from bpfree.experiments.recipe import Recipe

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SCALES = tuple({"feedback_scale": scale} for scale in (0.001, 0.01, 0.1, 1.0))
BETAS = tuple({"beta": beta} for beta in (0.3, 0.1, 0.03))
STRENGTHS = tuple({"strength": s, "head": True} for s in (1.0, 10.0, 100.0, 1000.0))
FIRST_TASKS = dict(rates=(), count=5, epochs=5)
EKDAA_FC = (
    dict(epochs=5, milestones=(3, 4)), (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    {"ekdaa-sign": ({}, *BETAS), "ekdaa-sign-1-hidden": ({}, *BETAS[:1])},
)  # fmt: skip
FIVE = dict(epochs=5, milestones=())
# how its recipes' names begin -> what is shorter than in the recipe, rates, and for some arms the
# options to choose from
EXPERIMENTS = {
    "mnist-fc": (FIVE, RATES, {"drtp": SCALES, "drtp-relu": SCALES}),
    "ekdaa-fc-fashion-mnist": EKDAA_FC,
    "ekdaa-fc-cifar10": EKDAA_FC,
    "ekdaa-narrow-fashion-mnist": (
        dict(epochs=2, milestones=()), (0.01, 0.03, 0.1, 0.3), {"ekdaa-sign": BETAS[:2]},
    ),
    "attention-mnist": (FIVE, RATES, {}),
    "attention-fashion-mnist": (FIVE, RATES, {}),
    "attention-cifar10": (FIVE, RATES, {}),
    "continual-permuted-mnist-ewc": (FIRST_TASKS, (0.1, 0.3), {"": STRENGTHS}),
    "continual-split-mnist-ewc": (FIRST_TASKS, (0.1, 0.3), {"": STRENGTHS}),
    "forward-cifar10-fg-a": (dict(epochs=3), (0.00005, 0.00015, 0.0005, 0.0015), {}),
    "forward-cifar10-fg-w": (dict(epochs=3), (0.00005, 0.00015, 0.0005, 0.0015), {}),
}  # fmt: skip
SEED, HOLDOUT = 100, 10_000


def accuracy(recipe: Recipe, data: bpfree.data.Data) -> float | None:
    """Validation accuracy in %, or None where training diverged."""
    try:
        run = recipe.fit(data, [SEED])
    except FloatingPointError:
        return None
    return round(run.test_accuracy[0, -1].item(), 2)


def tune(experiment: str) -> None:
    """Complete an experiment's grid."""
    shorter, rates, choices = EXPERIMENTS[experiment]
    file = results.path(f"tuning-{experiment}")
    grid = json.loads(file.read_text())["grid"] if file.exists() else []
    bases = [r for name, r in recipes.RECIPES.items() if f"{name}-".startswith(f"{experiment}-")]
    data = bases[0].load().holdout(HOLDOUT)
    for base in bases:
        arm = base.name.removeprefix(experiment).removeprefix("-")
        for options in choices.get(arm, (base.options,)):
            for lr in rates:
                row = {"recipe": base.name, "lr": lr, "options": options}
                if not any(row.items() <= known.items() for known in grid):
                    recipe = dataclasses.replace(base, lr=lr, options=options, **shorter)
                    grid.append({**row, "accuracy": accuracy(recipe, data)})
                    print(grid[-1], file=sys.stderr, flush=True)
                    head = dict(
                        seed=SEED, **shorter, holdout=HOLDOUT, **results.manifest("cpu"),
                    )  # fmt: skip
                    results.write_json(file, {**head, "grid": grid})


if __name__ == "__main__":
    for experiment in EXPERIMENTS:
        tune(experiment)
