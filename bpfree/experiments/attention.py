"""The recipes of chapter 6: next-layer attention, our reconstruction of arXiv 2310.09952."""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import Recipe

ARMS: dict[str, tuple[str, dict]] = {
    "bp": ("Backprop", {}),  # p = 2
    "p-1": ("NextLayerAttention", {"p": 1.0, "scale": "weights"}),
    "p-1.5": ("NextLayerAttention", {"p": 1.5, "scale": "weights"}),
    "p-3": ("NextLayerAttention", {"p": 3.0, "scale": "weights"}),
    "relative": ("NextLayerAttention", {"relative": True}),
    "frozen": ("Frozen", {}),
    "shuffled": ("ShuffledNextLayerAttention", {"p": 1.5, "scale": "weights"}),
}
# the best of the grid in figures/tuning.py, arm by arm
RATES: dict[str, tuple[float, ...]] = {
    "mnist": (0.3, 0.3, 0.3, 0.3, 1.0, 0.3, 0.003),
    "fashion-mnist": (0.3, 0.3, 0.1, 0.1, 0.3, 0.3, 0.01),
    "cifar10": (0.03, 0.03, 0.03, 0.03, 0.03, 0.1, 0.01),
}


def accuracy() -> Iterator[Recipe]:
    """Two hidden layers on three data sets, plain SGD, as the derivation has it.

    Which sets, networks and numbers the paper has is not known to us. Feedback has the size of the
    weights whatever p is; shares have their own.
    """
    for data, rates in RATES.items():
        n, width = (3072, 512) if data == "cifar10" else (784, 256)
        network = ("mlp", (n, width, width, 10), {"bias": True})
        for (arm, (rule, options)), lr in zip(ARMS.items(), rates, strict=True):
            yield Recipe(
                f"attention-{data}-{arm}", data, network, rule, options, epochs=30, lr=lr,
                momentum=0.0, milestones=(20, 27),
                seeds=(0, 1, 2) if data == "cifar10" else (0, 1, 2, 3, 4),
                source="this book" if rule in ("Frozen", "Backprop") else "arXiv 2310.09952",
            )  # fmt: skip
