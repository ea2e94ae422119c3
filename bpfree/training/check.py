"""What ``fit`` asks of its arguments, and of a rule, before it trains."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence

from ..data import Data
from ..refuse import check_batch, check_pure, one_of
from ..rule import Rule
from .device import PRECISIONS, precision


def check_settings(
    data: Data, epochs: int, batch_size: int, seeds: Sequence[int], probe: int, precision: str,
    shifts: int, flips: bool,
) -> list[int]:  # fmt: skip
    """The seeds as a list; raises a ValueError that names what is out of its range."""
    if not isinstance(epochs, numbers.Integral) or epochs < 1:
        raise ValueError(f"epochs must be a whole number, at least 1, got {epochs!r}")
    if isinstance(seeds, int) or not len(seeds) or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be a list, distinct, at least one, got {seeds!r}")
    seeds = [operator.index(seed) for seed in seeds]
    if not 0 <= probe <= len(data.train_x):
        raise ValueError(f"probe must be in 0..{len(data.train_x)}, got {probe!r}")
    if not isinstance(batch_size, numbers.Integral) or not 1 <= batch_size <= len(data.train_x):
        raise ValueError(f"batch_size must be in 1..{len(data.train_x)}, got {batch_size!r}")
    one_of("precision", precision, PRECISIONS)
    if isinstance(shifts, bool) or not isinstance(shifts, numbers.Integral) or shifts < 0:
        raise ValueError(f"shifts must be a whole number of pixels, at least 0, got {shifts!r}")
    if (shifts or flips) and data.train_x.dim() != 4:
        raise ValueError(
            "shifts and flips need images (N, channels, height, width), got samples of shape "
            f"{tuple(data.train_x.shape[1:])}"
        )
    return seeds


def check_rule(rule: Rule, data: Data, rules: list[Rule]) -> None:
    """Raise unless ``rule`` fits the data, and shares no network with the others of ``rules``."""
    if not isinstance(rule, Rule):
        raise TypeError(f"make must return a rule, got {type(rule).__name__}")
    if rule.net.num_classes < data.num_classes:
        raise ValueError(
            f"the network has {rule.net.num_classes} classes, {data.name} has {data.num_classes}"
        )
    first = data.inputs(data.train_x[:1], rule.net.weights()[0].dtype)
    # one image stands for all: they share a shape
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        check_batch(rule, first.expand(len(x), *first.shape[1:]), y)
    mine = {id(p) for p in rule.params().values()}
    if sum(bool(mine & {id(p) for p in other.params().values()}) for other in rules) > 1:
        raise ValueError("make must build a new network for each seed, got the same one twice")


def check_update(rule: Rule, data: Data, batch_size: int) -> None:
    """``check_pure`` on the first batch."""
    x = data.inputs(data.train_x[:batch_size], rule.net.weights()[0].dtype)
    with precision("float32", x.device):  # deterministic convolutions
        check_pure(rule, x, data.train_y[:batch_size])
