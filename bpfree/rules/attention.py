"""Next-layer attention (chapter 6): every chain rule is a choice of what an audience attends to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..block import Trace
from ..network import Network
from ..refuse import check_elementwise, one_of
from .backprop import Backprop


def power(W: Tensor, p: float = 2.0) -> Tensor:
    """alpha'(W) = sign(W) |W|^(p-1), the derivative of alpha(W) = |W|^p / p; 0 where W is."""
    return W if p == 2 else W.sign() * W.abs() ** (p - 1)


class NextLayerAttention(Backprop):
    """Neurons that seek the attention of the next layer: our reconstruction of arXiv 2310.09952, of
    which only the abstract could be consulted (Soltani Moakhar et al. 2023).

    The attention that neuron j pays to neuron i below is alpha(w_ji). What i can do for more of it
    when j learns is to take sum_j alpha'(w_ji) delta_j for its own error:

        delta_l = phi_l'(a_l) * (delta_{l+1} M_{l+1}),    M_l = alpha'(W_l),    delta_L = e

    With alpha(w) = |w|^p / p it is backprop for p = 2, sign symmetry for p = 1 (theorem T11). Under
    gradient flow a ReLU or linear neuron without bias is heard as it listens: the sum of what it is
    paid, less |w_i|^2 / 2 of its incoming weights, never changes (theorem T13).

    Args:
        p: exponent, finite, >= 1.
        attention: another alpha, elementwise, in the place of |w|^p / p; torch differentiates it.
        relative: attention is a share of the listener's, alpha(w_ji) / sum_k alpha(w_jk), with k
            over all of j's synapses; alpha must not be negative then.
        scale: ``"none"``, or ``"weights"``: M_l is stretched to the Frobenius norm of W_l, so that
            the signal keeps its size whatever alpha is.
        foresight: eta >= 0 of the audience's plain SGD step; M_l = alpha'(W_l - eta grad W_l) is
            then exact for finite steps, backprop through the weights that follow.
        observed: the error is read off the neuron's own outgoing synapses, as their change divided
            by its activity. Where h_i = 0 they do not change, and it hears nothing. With ReLU that
            is no loss, since there phi' = 0.

    Raises:
        ValueError: for an option out of these, or an attention that is not elementwise.
    """

    def __init__(
        self,
        net: Network,
        p: float = 2.0,
        attention: Callable[[Tensor], Tensor] | None = None,
        relative: bool = False,
        scale: str = "none",
        foresight: float = 0.0,
        observed: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(net, generator)
        if not (math.isfinite(p) and p >= 1):
            raise ValueError(f"p must be a finite number >= 1, got {p}")
        one_of("scale", scale, ("none", "weights"))
        if not (math.isfinite(foresight) and foresight >= 0):
            raise ValueError(f"foresight must be a finite number >= 0, got {foresight}")
        if attention is not None:
            check_elementwise("attention", attention)
        self.p, self.attention, self.relative = p, attention, relative
        self.scale, self.foresight, self.observed = scale, foresight, observed

    def attend(self, W: Tensor) -> Tensor:
        """M = alpha'(W), shaped like W; with ``relative``, that of the shares."""
        if self.attention is None:
            M = power(W, self.p)
        else:
            M = torch.func.vjp(self.attention, W)[1](torch.ones_like(W))[0]
        if self.relative:
            paid = self.attention(W) if self.attention else W.abs() ** self.p / self.p
            whole = paid.flatten(1).sum(1).reshape(-1, *[1] * (W.dim() - 1))
            # one who pays no attention at all is not to be won
            M = torch.where(whole > 0, M * (1 - paid / whole) / whole, 0.0)
        if self.scale == "weights":
            norm = torch.linalg.vector_norm(M)  # none of weights that are all zero
            M = M * torch.where(norm > 0, torch.linalg.vector_norm(W) / norm, 0.0)
        return M

    def feedback(self, l, params, state):
        return self.attend(params[f"{l - 1}.linear.weight"])

    def carry(self, l, delta, params, state, trace):
        if self.foresight:
            name, t = f"{l - 1}.linear.weight", trace[l - 1]
            step = self.net[l - 1].outer(delta, t.r, self.foresight / len(t.r))["weight"]
            params = {**params, name: params[name] - step.to(params[name].dtype)}
        return super().carry(l, delta, params, state, trace)

    def descend(self, l: int, v: Tensor, t: Trace) -> Tensor:
        return super().descend(l, torch.where(t.h != 0, v, 0.0) if self.observed else v, t)
