"""EKDAA (chapter 4): targets in the place of derivatives, and feedback that learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..block import Trace
from ..network import Network
from ..refuse import check_scale, one_of
from .backprop import Backprop
from .feedback import like_weight


class EKDAA(Backprop):
    """Error-kernel driven activation alignment (Zee, Ororbia, Mali & Nwogu 2023).

    Feedback moves each pre-activation a little. What the unit would then have said is its target,
    and the teaching signal is what it said less that:

        delta_L = e,    delta_l = z_l - f(a_l - beta * u_l),    r_l = h_{l-1}

    with z_l = f(a_l), the activity before pooling and dropout, and u_l = delta_{l+1} E_{l+1}, sent
    through dropout and pool to the units that they chose. Only values of f are used, so any
    elementwise function will do, ``torch.sign`` too. Where f is smooth and E = W, delta_l tends to
    beta^(L-l) times backprop's as beta -> 0 (theorem T7). With signs it is 0 or +-2 at any beta,
    and a network of several such blocks needs a small one.

    Parameters ``E2`` .. ``EL``, which get gamma * grad W_l: pass ``rule.parameters()`` to the
    optimiser. Under plain SGD E_t = (1 - gamma) W_0 + gamma W_t (theorem T8). A weight decay of the
    optimiser decays E beside W, whence E_t - gamma W_t = (1 - lambda)^t (E_0 - gamma W_0) with
    lambda = lr * weight_decay: from any start E comes to point along W; with gamma = 1 that is how
    Kolen-Pollack's B learns.

    Source: arXiv 2206.01820. What the released code does besides is in ``experiments/released.py``.

    Args:
        beta: > 0, step of the target. gamma: >= 0, rate of E relative to that of W.
        start: E_l starts as a copy of the ``"weights"`` W_l as they are now, or ``"random"``, from
            U(+-feedback_scale * sqrt(6 / fan_in)).

    Raises:
        ValueError: for an option out of these.
    """

    def __init__(
        self,
        net: Network,
        beta: float = 0.9,
        gamma: float = 0.1,
        start: str = "weights",
        feedback_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(net, generator)
        check_scale("beta", beta)
        check_scale("feedback_scale", feedback_scale)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")
        one_of("start", start, ("weights", "random"))
        self.beta, self.gamma = beta, gamma
        for l, W in enumerate(net.weights()[1:], 2):
            E = W.clone() if start == "weights" else like_weight(W, feedback_scale, generator)
            setattr(self, f"E{l}", nn.Parameter(E.detach()))

    def feedback(self, l, params, state):
        return params[f"rule.E{l}"]

    def beside(self):
        layers = range(2, len(self.net) + 1)
        return {f"rule.E{l}": (f"{l - 1}.linear.weight", self.gamma) for l in layers}

    def descend(self, l: int, v: Tensor, t: Trace) -> Tensor:
        block = self.net[l - 1]
        # a small difference of activities, which would lose its digits in bfloat16
        a = t.a.to(torch.promote_types(t.a.dtype, torch.float32))
        moved = torch.sub(a, block.unpool(v, t), alpha=self.beta)
        return ((t.z if a.dtype == t.z.dtype else block.act(a)) - block.act(moved)).to(t.a.dtype)
