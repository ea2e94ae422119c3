"""The recipes of chapter 5: leader-follower networks (arXiv 2310.07885)."""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import Recipe

PAPER = "arXiv 2310.07885"


def mnist_fc() -> Iterator[Recipe]:
    """784-256-128-10 on MNIST with the released script's optimiser, batch and number of workers.

    The paper's number is the released log's, 23 of 32 workers leading. The names say the share of
    leaders and the weight of the followers' loss, which is 1 where they say "followers" alone.
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
    network = ("mlp", (784, 256, 128, 10), {"bias": True})
    for arm, (rule, options) in arms.items():
        yield Recipe(
            f"lfnn-fc-mnist-{arm}", "mnist", network, rule, options, epochs=50, lr=5e-4,
            algorithm="adam", batch_size=128, seeds=(0, 1, 2, 3, 4),
            source=PAPER if rule == "LeaderFollower" else "this book",
            paper="98.80" if arm == "lfnn-l-72-followers" else None,
        )  # fmt: skip
