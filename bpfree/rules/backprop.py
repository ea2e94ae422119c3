"""Backpropagation as teaching signals (chapter 1): what the other rules are measured against."""

from __future__ import annotations

from torch import Tensor

from ..block import Tensors, Trace
from ..rule import Rule, Signal


class Backprop(Rule):
    """Backprop: the error descends through the transposed weights (Rumelhart et al. 1986).

        delta_L = e,    delta_l = phi_l'(a_l) * (delta_{l+1} W_{l+1}),    r_l = h_{l-1}

    Its gradients are autograd's. Rules that send the error down the same chain through other
    matrices override ``feedback`` alone; those that need no derivative, ``descend``; those whose
    matrix depends on the error that it carries, ``carry``.
    """

    def feedback(self, l: int, params: Tensors, state: Tensors) -> Tensor:
        """The matrix, shaped like W_l, that carries delta_l down to block l - 1 (l = 2..L)."""
        return params[f"{l - 1}.linear.weight"]

    def carry(self, l: int, delta: Tensor, params: Tensors, state: Tensors, trace: list[Trace]):
        """What arrives at h_{l-1} of delta_l, shaped like it."""
        M = self.feedback(l, params, state)
        return self.net[l - 1].transpose(delta, M, trace[l - 2].h)

    def descend(self, l: int, v: Tensor, t: Trace) -> Tensor:
        """delta_l from the feedback v that arrived at h_l: through the block's own derivative."""
        return self.net[l - 1].local_vjp(v, t)

    def signals(self, params, state, trace: list[Trace], error, target) -> list[Signal]:
        deltas = [error]
        for l in range(len(self.net), 1, -1):
            v = self.carry(l, deltas[0], params, state, trace)
            deltas.insert(0, self.descend(l - 1, v, trace[l - 2]))
        return [(t.r, delta) for t, delta in zip(trace, deltas, strict=True)]
