"""Backpropagation as teaching signals (chapter 1): what the other rules are measured against."""

from __future__ import annotations

from torch import Tensor

from ..block import Trace
from ..rule import Rule, Signal


class Backprop(Rule):
    """Backprop: the error descends through the transposed weights (Rumelhart et al. 1986).

        delta_L = e,    delta_l = phi_l'(a_l) * (delta_{l+1} W_{l+1}),    r_l = h_{l-1}

    Its gradients are autograd's. Rules that send the error down the same chain through other
    matrices override ``feedback`` alone.
    """

    def feedback(self, l: int, params: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        """The matrix, shaped like W_l, that carries delta_l down to block l - 1 (l = 2..L)."""
        return params[f"{l - 1}.linear.weight"]

    def signals(self, params, state, trace: list[Trace], error, target) -> list[Signal]:
        deltas = [error]
        for l in range(len(self.net), 1, -1):
            upper, lower = self.net[l - 1], self.net[l - 2]
            v = upper.transpose(deltas[0], self.feedback(l, params, state), trace[l - 2].h)
            deltas.insert(0, lower.local_vjp(v, trace[l - 2]))
        return [(t.r, delta) for t, delta in zip(trace, deltas, strict=True)]
