"""The recipes of chapter 5: leader-follower networks (arXiv 2310.07885)."""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import Recipe

PAPER = "arXiv 2310.07885"


def mnist_fc() -> Iterator[Recipe]:
    """784-256-128-10 on MNIST with the released script's optimiser, batch and number of workers.

    The paper's number is the released log's, 23 of 32 workers leading. The names say the share of
    leaders; the followers' loss has the weight 1, or 0 where they do not name it. "Shifts": images
    are moved by up to two pixels.
    """
    shares = {"100": 1.0, "72": 0.71875, "30": 0.3}
    arms: dict[str, tuple[str, dict]] = {
        "bp": ("Backprop", {}),
        "frozen": ("Frozen", {}),
        "greedy": ("LeaderFollower", {"workers": 1}),
        "shuffled": ("ShuffledLeaderFollower", {"leaders": 1.0}),
        "own-4": ("LeaderFollower", {"workers": 4, "leaders": 1.0, "sees": "own"}),
        "lfnn-l-100-of-8": ("LeaderFollower", {"workers": 8, "leaders": 1.0}),
    }
    for kind, local in (("lfnn-l", True), ("lfnn", False)):
        for share, leaders in shares.items():
            options = {"leaders": leaders, "local": local}
            arms[f"{kind}-{share}"] = "LeaderFollower", {**options, "lambda_follower": 0.0}
            if leaders < 1:
                arms[f"{kind}-{share}-followers"] = "LeaderFollower", options
    # the log's training accuracy is no higher than its test accuracy: something regularised it
    for arm in ("bp", "greedy", "lfnn-l-100", "lfnn-l-72-followers", "lfnn-72-followers"):
        arms[f"{arm}-shifts"] = arms[arm]
    network = ("mlp", (784, 256, 128, 10), {"bias": True})
    for arm, (rule, options) in arms.items():
        yield Recipe(
            f"lfnn-fc-mnist-{arm}", "mnist", network, rule, options, epochs=50, lr=5e-4,
            algorithm="adam", batch_size=128, seeds=(0, 1, 2, 3, 4),
            shifts=2 if arm.endswith("shifts") else 0,
            source=PAPER if rule == "LeaderFollower" else "this book",
            paper="98.80" if arm == "lfnn-l-72-followers" else None,
        )  # fmt: skip


def cifar10_conv() -> Iterator[Recipe]:
    """The paper's convolutional network on CIFAR-10, and one a quarter as wide for a CPU.

    The released script's channels, optimiser, batch, flips and shifts by a tenth. Where it pools
    twice at the top, by maxima and then by the mean, a block has one pool: the mean. Heads read the
    mean over positions.
    """
    arms: dict[str, tuple[str, dict]] = {
        "bp": ("Backprop", {}),
        "lfnn-l-72": ("LeaderFollower", {"leaders": 0.71875, "lambda_follower": 0.0}),
        "lfnn-l-72-followers": ("LeaderFollower", {"leaders": 0.71875}),
        "greedy": ("LeaderFollower", {"workers": 1}),
        "lfnn-72-followers": ("LeaderFollower", {"leaders": 0.71875, "local": False}),
        "frozen": ("Frozen", {}),
    }
    for size, factor, epochs in (("narrow", 4, 30), ("conv", 1, 50)):
        channels = tuple(n // factor for n in (64, 64, 128, 128, 256, 256))
        net = dict(num_classes=10, pool=(1, 2, 1, 2, 1, "mean"), bias=True)
        for arm, (rule, options) in arms.items():
            yield Recipe(
                f"lfnn-{size}-cifar10-{arm}", "cifar10",
                ("convnet", ((3, 32, 32), channels, (256 // factor,)), net), rule, options,
                epochs=epochs, lr=1e-3, algorithm="adam", batch_size=128, shifts=3, flips=True,
                source=PAPER if rule == "LeaderFollower" and factor == 1 else "this book",
                paper="79.05" if (size, arm) == ("conv", "lfnn-l-72-followers") else None,
            )  # fmt: skip
