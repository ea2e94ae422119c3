"""Feedback alignment and its relatives (chapter 2): the transposed weights replaced.

The first three send the error down block by block and differ from backprop in one matrix; the
last two broadcast from the output to every block at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..init import uniform
from ..network import Network
from ..refuse import check_scale, one_of
from ..rule import Rule
from .backprop import Backprop


def like_weight(weight: Tensor, scale: float, generator: torch.Generator | None) -> Tensor:
    """A random matrix of the shape, device and dtype of W_l: U(+-scale * sqrt(6 / fan_in))."""
    bound = scale * math.sqrt(6 / weight[0].numel())
    return uniform(weight.shape, bound, generator).to(weight)


class FeedbackAlignment(Backprop):
    """FA: fixed random feedback (Lillicrap et al. 2016, doi:10.1038/ncomms13276).

        delta_l = phi_l'(a_l) * (delta_{l+1} B_{l+1}),    B_{l+1} fixed, shaped like W_{l+1}

    Buffers ``B2`` .. ``BL``. With B_l = W_l it is backprop exactly (theorem T1).

    Args:
        feedback_scale: B_l is drawn from U(+-feedback_scale * sqrt(6 / fan_in)); > 0.
    """

    kind: type[Tensor] = nn.Buffer  # B_l is fixed

    def __init__(
        self, net: Network, feedback_scale: float = 1.0, generator: torch.Generator | None = None
    ):
        super().__init__(net, generator)
        check_scale("feedback_scale", feedback_scale)
        for l, weight in enumerate(net.weights()[1:], 2):
            setattr(self, f"B{l}", self.kind(like_weight(weight, feedback_scale, generator)))

    def feedback(self, l, params, state):
        return state[f"B{l}"]


class SignSymmetry(Backprop):
    """Sign symmetry: the weights' signs with other magnitudes (Liao, Leibo & Poggio 2016).

        delta_l = phi_l'(a_l) * (delta_{l+1} (sign(W_{l+1}) * S_{l+1}))

    Buffers ``S2`` .. ``SL``. Source: arXiv 1510.05067.

    Args:
        magnitude: ``"unit"``: S is the constant ``scale`` (uniform sign symmetry). ``"fixed"``:
            S_l = |N_l|, N_l fixed, drawn from U(+-scale * sqrt(6 / fan_in)).
        scale: > 0. With ``"unit"`` a width of n multiplies the signal by about sqrt(n); in deep
            networks sqrt(2 / fan_in), the root mean square of He's weights, keeps its size.
    """

    def __init__(
        self,
        net: Network,
        magnitude: str = "unit",
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(net, generator)
        one_of("magnitude", magnitude, ("unit", "fixed"))
        check_scale("scale", scale)
        fixed = magnitude == "fixed"
        for l, W in enumerate(net.weights()[1:], 2):
            S = like_weight(W, scale, generator).abs() if fixed else W.new_tensor(scale)
            self.register_buffer(f"S{l}", S)

    def feedback(self, l, params, state):
        return torch.sign(params[f"{l - 1}.linear.weight"]) * state[f"S{l}"]


class KolenPollack(FeedbackAlignment):
    """Kolen-Pollack: feedback that learns to be the weights (Kolen & Pollack 1994).

    As FA, but B_l is a parameter and receives the same gradient as W_l. Give the optimiser a
    weight decay: under plain SGD, B_t - W_t = (1 - lambda)^t (B_0 - W_0) with
    lambda = lr * weight_decay (theorem T2), so that B converges to W without reading it.

    Parameters ``B2`` .. ``BL``; pass ``rule.parameters()`` to the optimiser. Source: Akrout et al.
    2019, arXiv 1904.05391, section 3.

    Args:
        feedback_scale: of B_l's random start, as for FA.
    """

    kind = nn.Parameter  # B_l learns

    def feedback(self, l, params, state):
        return params[f"rule.B{l}"]

    def beside(self):
        return {f"rule.B{l}": (f"{l - 1}.linear.weight", 1.0) for l in range(2, len(self.net) + 1)}


class DirectFeedbackAlignment(Rule):
    """DFA: the output error is broadcast to every block (Nokland 2016, arXiv 1609.01596).

        delta_l = phi_l'(a_l) * (e D_l),    D_l fixed, (C, size of h_l),    delta_L = e

    Buffers ``D1`` .. ``D{L-1}``. In a deep linear network D_l = W_L ... W_{l+1} makes it backprop
    (theorem T3).

    Args:
        feedback_scale: D_l is drawn from U(+-feedback_scale * sqrt(6 / size of h_l)); > 0.
    """

    def __init__(
        self, net: Network, feedback_scale: float = 1.0, generator: torch.Generator | None = None
    ):
        super().__init__(net, generator)
        check_scale("feedback_scale", feedback_scale)
        for l, shape in enumerate(net.shapes[:-1], 1):
            size = math.prod(shape)
            D = uniform((net.num_classes, size), feedback_scale * math.sqrt(6 / size), generator)
            self.register_buffer(f"D{l}", D.to(net.weights()[0]))

    def broadcast(self, error: Tensor, target: Tensor) -> Tensor:
        """What is sent to every hidden block, (B, C)."""
        return error

    def signals(self, params, state, trace, error, target):
        sent = self.broadcast(error, target)
        deltas = []
        for l, (block, t) in enumerate(zip(self.net, trace[:-1], strict=False), 1):
            v = (sent @ state[f"D{l}"].to(sent.dtype)).reshape(t.h.shape)
            deltas.append(block.local_vjp(v, t))
        return [(t.r, delta) for t, delta in zip(trace, [*deltas, error], strict=True)]


class DRTP(DirectFeedbackAlignment):
    """Direct random target projection: the target is broadcast, the error never (Frenkel et al.
    2021, doi:10.3389/fnins.2021.629892).

        delta_l = phi_l'(a_l) * (y D_l),    y one-hot,    delta_L = e

    So a hidden block can be updated before the output exists. The signal does not vanish as the
    network learns: with ReLU the weights grow for ever, at any scale; bounded activations stop it.
    """

    def broadcast(self, error, target):
        return target
