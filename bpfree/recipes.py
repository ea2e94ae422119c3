"""The recorded experiments, as data: everything that decides a result, and the paper's number.

``bpfree list`` shows them, ``bpfree run NAME`` trains them (``results.record``).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch

from . import network, rules
from .rule import Rule


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One experiment. The learning rate starts at ``lr`` and falls tenfold at each milestone."""

    name: str
    data: str  # a name that ``load`` knows
    network: tuple[str, tuple, dict[str, Any]]  # "mlp" or "convnet", its arguments, its keywords
    rule: str  # class name
    options: dict[str, Any]  # the rule's keywords
    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    milestones: tuple[int, ...] = ()  # epochs, counted from 0
    seeds: tuple[int, ...] = (0, 1, 2)
    source: str = "this book"  # paper and table cell, or this book
    paper: str | None = None  # the paper's test accuracy in %, as printed there; None: not verified

    def make(self, generator: torch.Generator) -> Rule:
        """A fresh network and its rule; ``Shuffled`` before a rule's name shuffles its signals."""
        kind, args, keywords = self.network
        net = getattr(network, kind)(*args, **keywords, generator=generator)
        rule = getattr(rules, self.rule.removeprefix("Shuffled"))
        if self.rule.startswith("Shuffled"):
            rule = rules.shuffled(rule)
        return rule(net, **self.options, generator=generator)

    @property
    def optimizer(self) -> partial:
        """``torch.optim.SGD`` with this recipe's settings bound."""
        keywords = dict(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return partial(torch.optim.SGD, **keywords)

    def schedule(self, epoch: int) -> float:
        """Factor on the learning rate in an epoch (0, 1, ...)."""
        return 0.1 ** sum(epoch >= m for m in self.milestones)


def _mnist_fc() -> list[Recipe]:
    """Chapter 2: one hidden layer of 1,024 units on MNIST, each rule with its tuned rate.

    Rates, and DRTP's feedback scale, are the best of the grid in figures/tuning.py on a validation
    split. DRTP is made for bounded activations, so it has tanh, and backprop and frozen hidden
    layers are trained with tanh too; DRTP with ReLU shows what becomes of it there.
    """
    # the root mean square of He's weights, so that the signal keeps its size
    he = round(math.sqrt(2 / 1024), 4)
    arms = {
        "bp": ("Backprop", {}, "relu", 0.1, 0.0),
        "fa": ("FeedbackAlignment", {}, "relu", 0.1, 0.0),
        "sign-symmetry": ("SignSymmetry", {"scale": he}, "relu", 0.1, 0.0),
        "kolen-pollack": ("KolenPollack", {}, "relu", 0.1, 1e-4),
        "dfa": ("DirectFeedbackAlignment", {}, "relu", 0.1, 0.0),
        "drtp-relu": ("DRTP", {"feedback_scale": 0.1}, "relu", 0.1, 0.0),
        "frozen": ("Frozen", {}, "relu", 0.1, 0.0),
        "fa-shuffled": ("ShuffledFeedbackAlignment", {}, "relu", 0.1, 0.0),
        "bp-tanh": ("Backprop", {}, "tanh", 0.1, 0.0),
        "drtp": ("DRTP", {"feedback_scale": 0.1}, "tanh", 0.1, 0.0),
        "frozen-tanh": ("Frozen", {}, "tanh", 0.1, 0.0),
    }
    return [
        Recipe(
            name=f"mnist-fc-{arm}",
            data="mnist",
            network=("mlp", (784, 1024, 10), {"activation": activation}),
            rule=rule,
            options=options,
            epochs=30,
            lr=lr,
            weight_decay=weight_decay,
            milestones=(20, 27),
        )
        for arm, (rule, options, activation, lr, weight_decay) in arms.items()
    ]


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _mnist_fc()}


def get(name: str) -> Recipe:
    """The recipe of that name; ValueError, naming those nearest, if there is none."""
    if name not in RECIPES:
        import difflib

        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise ValueError(f"unknown recipe {name!r}; did you mean {', '.join(near)}? (bpfree list)")
    return RECIPES[name]
