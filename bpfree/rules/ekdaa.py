"""EKDAA (chapter 4): targets in the place of derivatives, and feedback that learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..block import ACTIVATIONS, Activation, Trace, check_function, example, one_of
from ..network import Network
from ..rule import Signal
from .backprop import Backprop
from .feedback import check_scale, like_weight


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

    Source: arXiv 2206.01820. The options after ``feedback_scale`` are peculiarities of the released
    code (tzee/EKDAA-Release), one each, of convolutional blocks only; all are off by default.

    Args:
        beta: > 0, step of the target. gamma: >= 0, rate of E relative to that of W.
        start: E_l starts as a copy of the ``"weights"`` W_l as they are now, or ``"random"``, from
            U(+-feedback_scale * sqrt(6 / fan_in)).
        target: ``"bilinear"``: below a pool the *target* is up-sampled, f(up(pool(a) - beta * v))
            with v = delta_{l+1} E_{l+1}; so delta_l is not zero where the error is.
        target_activation: f, by name or as a function, where the network itself sends a_l up: give
            its convolutional blocks the activation ``"identity"``. A kernel above a block without
            pool then learns from r_l = f(a_{l-1}).
        swap_axes: feedback kernels have height and width exchanged.
        normalise_feedback: delta_{l+1} E_{l+1} is divided by its largest entry, if that exceeds 1.
        normalise_updates: a kernel's update, summed over the batch, is divided likewise.
        scale_updates: a kernel's update is divided by its C_in * C_out.

    The largest entry is one of the whole batch, so with ``normalise_*`` a batch's gradient is not
    the mean of its samples' (theorem T12 fails). Released updates are sums over the batch: their
    learning rate times the batch size is ours.

    Raises:
        ValueError: for an option out of these, or a target_activation that changes the shape,
            works in place or is random.
    """

    def __init__(
        self,
        net: Network,
        beta: float = 0.9,
        gamma: float = 0.1,
        start: str = "weights",
        feedback_scale: float = 1.0,
        target: str = "unpooled",
        target_activation: Activation | None = None,
        swap_axes: bool = False,
        normalise_feedback: bool = False,
        normalise_updates: bool = False,
        scale_updates: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(net, generator)
        check_scale("beta", beta)
        check_scale("feedback_scale", feedback_scale)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")
        one_of("start", start, ("weights", "random"))
        one_of("target", target, ("unpooled", "bilinear"))
        f = target_activation
        if f is not None and not callable(f):
            one_of("target_activation, if not a function,", f, sorted(ACTIVATIONS))
            f = ACTIVATIONS[f][0]
        self.beta, self.gamma, self.target, self.target_activation = beta, gamma, target, f
        self.swap_axes, self.scale_updates = swap_axes, scale_updates
        self.normalise_feedback, self.normalise_updates = normalise_feedback, normalise_updates
        for l, (block, W) in enumerate(zip(net, net.weights(), strict=True), 1):
            if f is not None and block.is_conv:
                check_function("target_activation", f, example(block.linear))
            if swap_axes and block.is_conv and W.shape[2] != W.shape[3]:
                raise ValueError(f"swap_axes needs square kernels, got {block.linear}")
            if l > 1:
                E = W.clone() if start == "weights" else like_weight(W, feedback_scale, generator)
                setattr(self, f"E{l}", nn.Parameter(E.detach()))

    def _f(self, l: int) -> Callable[[Tensor], Tensor]:
        block = self.net[l - 1]
        own = self.target_activation is not None and block.is_conv
        return self.target_activation if own else block.act

    def feedback(self, l, params, state):
        E = params[f"rule.E{l}"]
        return E.transpose(2, 3) if self.swap_axes and E.dim() == 4 else E

    def beside(self):
        layers = range(2, len(self.net) + 1)
        return {f"rule.E{l}": (f"{l - 1}.linear.weight", self.gamma) for l in layers}

    def descend(self, l: int, v: Tensor, t: Trace) -> Tensor:
        block, f = self.net[l - 1], self._f(l)
        if self.normalise_feedback and self.net[l].is_conv:
            v = v / v.amax().clamp(min=1)
        # a small difference of activities, which would lose its digits in bfloat16
        a = t.a.to(torch.promote_types(t.a.dtype, torch.float32))
        if self.target == "bilinear" and block.is_conv and block.pool is not None:
            v = v if t.mask is None else v * t.mask
            moved = torch.sub(block.pool(a), v, alpha=self.beta)
            moved = F.interpolate(moved, a.shape[2:], mode="bilinear")
        else:
            moved = torch.sub(a, block.unpool(v, t), alpha=self.beta)
        as_traced = self.target_activation is None and a.dtype == t.z.dtype
        return ((t.z if as_traced else f(a)) - f(moved)).to(t.a.dtype)

    def signals(self, params, state, trace, error, target) -> list[Signal]:
        signals = super().signals(params, state, trace, error, target)
        for l, block in enumerate(self.net, 1):
            r, delta = signals[l - 1]
            below = self.net[l - 2] if l > 1 and block.is_conv else None
            if self.target_activation is not None and below is not None and below.pool is None:
                t = trace[l - 2]
                r = self._f(l - 1)(t.a)
                r = r if t.mask is None else r * t.mask
            if block.is_conv and self.normalise_updates:
                delta = delta / block.outer(delta, r)["weight"].amax().clamp(min=1)
            if block.is_conv and self.scale_updates:
                delta = delta / math.prod(block.linear.weight.shape[:2])
            signals[l - 1] = r, delta
        return signals
