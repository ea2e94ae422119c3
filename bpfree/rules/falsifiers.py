"""Two learners that must lose (chapter 1): an accuracy is worth its distance to them.

A rule that does not beat frozen hidden layers has taught its hidden layers nothing. A rule that
does not beat its own shuffled signal owes its accuracy to something other than that signal.
"""

from __future__ import annotations

import torch

from ..rule import Rule


class Frozen(Rule):
    """Only the last block learns, on random features: delta_L = e, delta_l = 0 below.

    A weight decay of the optimiser would move the others too: give it none.
    """

    def signals(self, params, state, trace, error, target):
        return [*((t.r, torch.zeros_like(t.a)) for t in trace[:-1]), (trace[-1].r, error)]


def shuffled(rule: type[Rule]) -> type[Rule]:
    """The same rule, except that each sample's hidden teaching signals are another sample's.

    Signals move by one place along the batch, whose order is random in training. Their sizes and
    their mean over the batch stay; what is lost is which sample they belong to. A batch of one
    sample stays as it is.
    """

    class Shuffled(rule):  # type: ignore[valid-type, misc]  # a class made from a class
        def signals(self, *args):
            *hidden, last = super().signals(*args)
            batch = len(args[-1])  # a rule of two passes may have two rows per sample
            for i, (r, d, *own) in enumerate(hidden):
                hidden[i] = r, d.unflatten(0, (-1, batch)).roll(1, 1).flatten(0, 1), *own
            return [*hidden, last]

    Shuffled.__name__ = Shuffled.__qualname__ = f"Shuffled{rule.__name__}"
    return Shuffled
