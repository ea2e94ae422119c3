"""PEPITA (chapter 3): the error modulates the input, and a second forward pass is the teacher."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..block import Block, Trace
from ..network import Network, uniform
from ..rule import Rule, Signal

OUTPUT_ERRORS = ("second", "first")
CONV_SCALINGS = ("mean", "sum", "released")
PRESYNAPTIC = ("second", "first", "time-local")


class PEPITA(Rule):
    """Present the error to perturb the input to modulate activity (Dellaferrera & Kreiman 2022).

    The error e of a first pass on x is projected to the input; a second pass, with the same dropout
    masks, runs on x + e F^T and gives the activities h^err:

        delta_l = h_l - h_l^err  (l < L),    delta_L = e^err,    r_1 = x + e F^T,  r_l = h_{l-1}^err

    In a block with pooling h is the activity before the pool, so that delta_l has the shape of a_l.
    Buffer ``F``, (size of x, C). Source: arXiv 2201.11665.

    Args:
        feedback_scale: F is drawn from U(+-feedback_scale * sqrt(6 / size of x)); > 0.
        output_error: delta_L from the ``"second"`` pass (the released fully connected code) or the
            ``"first"`` (the released convolutional code).
        sign: +1 for x + e F^T, -1 for x - e F^T (the follow-up, arXiv 2302.05440).
        conv_scaling: a kernel's update is the ``"mean"`` over positions, or the ``"sum"``;
            ``"released"`` is the convolutional script's: the mean, divided by the batch once more,
            with the sign reversed.
        presynaptic: r_l from the ``"second"`` pass, or the ``"first"`` (Hebbian in the first pass's
            activity); ``"time-local"`` pairs each pass's h_l with the same pass's h_{l-1}, so that
            no activity has to wait for the other pass.
        cheap: block 1 is linear before its activation, so a_1^err = a_1 + e (W_1 F)^T. The C images
            of F ride along in the first pass; the second needs no product with the input. Exact.

    Raises:
        ValueError: for an option out of these, or a network of one block.
    """

    def __init__(
        self,
        net: Network,
        feedback_scale: float = 0.05,
        output_error: str = "second",
        sign: int = +1,
        conv_scaling: str = "mean",
        presynaptic: str = "second",
        cheap: bool = True,
        generator: torch.Generator | None = None,
    ):
        super().__init__(net, generator)
        options = {
            "output_error": (output_error, OUTPUT_ERRORS),
            "sign": (sign, (+1, -1)),
            "conv_scaling": (conv_scaling, CONV_SCALINGS),
            "presynaptic": (presynaptic, PRESYNAPTIC),
        }
        for name, (given, known) in options.items():
            if given not in known:
                raise ValueError(f"{name} must be one of {known}, got {given!r}")
        if not (math.isfinite(feedback_scale) and feedback_scale > 0):
            raise ValueError(f"feedback_scale must be a positive number, got {feedback_scale}")
        if len(net) < 2:
            raise ValueError("PEPITA needs a hidden block, got a network of 1 block")
        self.output_error, self.sign, self.cheap = output_error, sign, cheap
        self.conv_scaling, self.presynaptic = conv_scaling, presynaptic
        size = math.prod(net.input_shape)
        F = uniform((size, net.num_classes), feedback_scale * math.sqrt(6 / size), generator)
        self.register_buffer("F", F.to(net.weights()[0]))

    def first_pass(self, params, state, x, masks):
        if not self.cheap:
            return super().first_pass(params, state, x, masks)
        block, batch = self.net[0], len(x)
        images = state["F"].T.reshape(-1, *x.shape[1:]).to(x.dtype)
        r, a = block.pre(torch.cat([x, images]), params["0.linear.weight"])
        a, W1F = a[:batch], a[batch:]
        bias = params.get("0.linear.bias")
        if bias is not None:  # added here, since the images of F must not carry it
            a = a + bias.reshape(-1, *[1] * (a.dim() - 2))
        first = block.post(r[:batch], a, masks.get(1))
        return self.net.trace(params, x, masks, first), {**state, "W1F": W1F}

    def signals(self, params, state, trace: list[Trace], error, target) -> list[Signal]:
        sent = self.sign * error
        x = trace[0].r
        x_err = x + (sent @ state["F"].T).reshape(x.shape)
        masks = {l: t.mask for l, t in enumerate(trace, 1) if t.mask is not None}
        first = None
        if self.cheap:
            a_err = trace[0].a + torch.tensordot(sent, state["W1F"], 1)
            first = self.net[0].post(x_err, a_err, trace[0].mask)
        second = self.net.trace(params, x_err, masks, first)
        if self.output_error == "second":
            error = F.softmax(second[-1].h, 1) - target
        return [
            *(self._hidden(*each) for each in zip(self.net, trace[:-1], second, strict=False)),
            (trace[-1].r if self.presynaptic == "first" else second[-1].r, error),
        ]

    def _hidden(self, block: Block, t: Trace, t_err: Trace) -> Signal:
        """Block l's signal from its two passes."""
        h, h_err = (t.h, t_err.h) if block.pool is None else (t.z, t_err.z)
        scale = 1.0
        if block.is_conv and self.conv_scaling != "sum":
            scale = 1 / math.prod(h.shape[2:])
            if self.conv_scaling == "released":
                scale = -scale / len(h)
        if self.presynaptic == "time-local":
            return torch.cat([t.r, t_err.r]), scale * torch.cat([h, -h_err])
        return t.r if self.presynaptic == "first" else t_err.r, scale * (h - h_err)
