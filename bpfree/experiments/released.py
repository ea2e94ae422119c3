"""What a released program does besides its paper's rule (chapter 4), to be measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block import ACTIVATIONS, Activation, Trace
from ..network import Network
from ..refuse import check_function, example, one_of
from ..rule import Signal
from ..rules.ekdaa import EKDAA


class ReleasedEKDAA(EKDAA):
    """EKDAA with peculiarities of its released code (tzee/EKDAA-Release), one an option.

    All are of convolutional blocks only, and off by default.

    Args:
        target: ``"bilinear"``: below a pool the *target* is up-sampled, f(up(pool(a) - beta * v))
            with v = delta_{l+1} E_{l+1}; so delta_l is not zero where the error is.
        target_activation: f, by name or as a function, where the network itself sends a_l up: give
            its convolutional blocks the activation ``"identity"``. A kernel above a block without
            pool then learns from r_l = f(a_{l-1}).
        swap_axes: feedback kernels have height and width exchanged.
        normalise_feedback: delta_{l+1} E_{l+1} is divided by its largest entry, if that exceeds 1.
        normalise_updates: a kernel's update, summed over the batch, is divided likewise.
        scale_updates: a kernel's update is divided by its C_in * C_out.
        options: of ``EKDAA``.

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
        target: str = "unpooled",
        target_activation: Activation | None = None,
        swap_axes: bool = False,
        normalise_feedback: bool = False,
        normalise_updates: bool = False,
        scale_updates: bool = False,
        **options: Any,
    ):
        super().__init__(net, **options)
        one_of("target", target, ("unpooled", "bilinear"))
        f = target_activation
        if f is not None and not callable(f):
            one_of("target_activation, if not a function,", f, sorted(ACTIVATIONS))
            f = ACTIVATIONS[f][0]
        self.target, self.target_activation, self.swap_axes = target, f, swap_axes
        self.normalise_feedback, self.normalise_updates = normalise_feedback, normalise_updates
        self.scale_updates = scale_updates
        for block in (block for block in net if block.is_conv):
            if f is not None:
                check_function("target_activation", f, example(block.linear))
            height, width = block.linear.weight.shape[2:]
            if swap_axes and height != width:
                raise ValueError(f"swap_axes needs square kernels, got {block.linear}")

    def _f(self, l: int) -> Callable[[Tensor], Tensor]:
        block, f = self.net[l - 1], self.target_activation
        return f if f is not None and block.is_conv else block.act

    def feedback(self, l, params, state):
        E = super().feedback(l, params, state)
        return E.transpose(2, 3) if self.swap_axes and E.dim() == 4 else E

    def descend(self, l: int, v: Tensor, t: Trace) -> Tensor:
        block, f = self.net[l - 1], self._f(l)
        if self.normalise_feedback and self.net[l].is_conv:
            v = v / v.amax().clamp(min=1)
        a = t.a.to(torch.promote_types(t.a.dtype, torch.float32))
        if self.target == "bilinear" and block.is_conv and block.pool is not None:
            v = v if t.mask is None else v * t.mask
            moved = torch.sub(block.pool(a), v, alpha=self.beta)
            moved = F.interpolate(moved, a.shape[2:], mode="bilinear")
        else:
            moved = torch.sub(a, block.unpool(v, t), alpha=self.beta)
        return (f(a) - f(moved)).to(t.a.dtype)

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
