"""The recipes of chapter 7: forward gradients beside backprop and greedy local losses."""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import Recipe

ARMS: dict[str, tuple[str, dict]] = {
    "bp": ("Backprop", {}),
    "greedy": ("LeaderFollower", {"workers": 1}),
    "fg-a": ("ForwardGradient", {"perturb": "activities"}),
    "fg-w": ("ForwardGradient", {"perturb": "weights"}),
    "frozen": ("Frozen", {}),
}
SETTING: dict = dict(lr=5e-4, algorithm="adam", batch_size=128)


def mnist() -> Iterator[Recipe]:
    """Chapter 5's network and setting; its other arms are recorded there as lfnn-fc-mnist-*."""
    for arm in ("fg-a", "fg-w"):
        rule, options = ARMS[arm]
        yield Recipe(
            f"forward-mnist-{arm}", "mnist", ("mlp", (784, 256, 128, 10), {"bias": True}),
            rule, options, epochs=50, **SETTING,
        )  # fmt: skip


def cifar10() -> Iterator[Recipe]:
    """The same hidden blocks on colour images, for ten epochs; one rate for all arms."""
    for arm, (rule, options) in ARMS.items():
        yield Recipe(
            f"forward-cifar10-{arm}", "cifar10", ("mlp", (3072, 256, 128, 10), {"bias": True}),
            rule, options, epochs=10, **SETTING,
        )  # fmt: skip
