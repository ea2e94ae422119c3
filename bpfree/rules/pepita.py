"""PEPITA (chapter 3): the error modulates the input, and a second forward pass is the teacher."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch

from ..block import Block, Trace
from ..init import uniform
from ..network import Network
from ..refuse import check_scale, one_of
from ..rule import Rule, Signal, output_error
from .mirroring import factors, mirror


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
            activity): then e F^T cannot strengthen the answer to itself in block 1, which a large F
            or mirroring otherwise turns into a collapse (chapter 3). ``"time-local"`` pairs each
            pass's h_l with the same pass's h_{l-1}, so that no activity waits for the other pass.
        mirroring: batches of noise from which F = Q_1 ... Q_L, then factored, learns the weights
            before each epoch of ``fit`` (see ``refresh``); 0: F is fixed. Buffers ``Q1`` .. ``QL``.
        cheap: block 1 is linear before its activation, so a_1^err = a_1 + e (W_1 F)^T. The C images
            of F ride along in the first pass; the second needs no product with the input. Exact;
            cheaper while C (1/B + 1/n_0) < 1 (in a convolution n_0 is the size of a patch).
        saving: store no activity but compute the first pass again, beside the second: peak memory
            of two consecutive blocks (and of the dropout masks), for one more forward pass
            (MEMPEPITA, Pau & Aymone).

    In bfloat16 the small differences h_l - h_l^err lose digits; a larger ``feedback_scale`` helps.

    Raises:
        ValueError: for an option out of these, a network of one block, or mirroring asked of a
            network that is no product of matrices.
    """

    def __init__(
        self,
        net: Network,
        feedback_scale: float = 0.05,
        output_error: str = "second",
        sign: int = +1,
        conv_scaling: str = "mean",
        presynaptic: str = "second",
        mirroring: int = 0,
        cheap: bool = True,
        saving: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(net, generator)
        one_of("output_error", output_error, ("second", "first"))
        one_of("sign", sign, (+1, -1))
        one_of("conv_scaling", conv_scaling, ("mean", "sum", "released"))
        one_of("presynaptic", presynaptic, ("second", "first", "time-local"))
        check_scale("feedback_scale", feedback_scale)
        if len(net) < 2:
            raise ValueError("PEPITA needs a hidden block, got a network of 1 block")
        if isinstance(mirroring, bool) or not isinstance(mirroring, int) or mirroring < 0:
            raise ValueError(f"mirroring must be a number of batches >= 0, got {mirroring!r}")
        self.output_error, self.sign, self.mirroring = output_error, sign, mirroring
        self.conv_scaling, self.presynaptic = conv_scaling, presynaptic
        self.cheap, self.saving = cheap, saving
        size = math.prod(net.input_shape)
        bound = feedback_scale * math.sqrt(6 / size)
        if mirroring:  # the product has the standard deviation of the uniform draw
            Q = factors(net, bound / math.sqrt(3), generator)
            for l, factor in enumerate(Q, 1):
                self.register_buffer(f"Q{l}", factor)
            feedback = torch.linalg.multi_dot(Q)
        else:
            feedback = uniform((size, net.num_classes), bound, generator).to(net.weights()[0])
        self.register_buffer("F", feedback)

    @torch.no_grad()
    def refresh(self, params, state, generator):
        """Mirror the weights as they are: each factor keeps its norm, and F turns along them."""
        new = {}
        for l, block in enumerate(self.net if self.mirroring else (), 1):
            W, sign = params[f"{l - 1}.linear.weight"], -self.sign if l == 1 else 1
            new[f"Q{l}"] = mirror(state[f"Q{l}"], W, block.act, self.mirroring, sign, generator)
        return new and {**new, "F": torch.linalg.multi_dot([*new.values()])}

    def first_pass(self, params, state, x, masks):
        state, first = {**state, "x": x, "masks": masks}, None
        if self.cheap:
            block, batch = self.net[0], len(x)
            images = state["F"].T.reshape(-1, *x.shape[1:]).to(x.dtype)
            r, a = block.pre(torch.cat([x, images]), params["0.linear.weight"])
            a, state["W1F"] = a[:batch], a[batch:]
            bias = params.get("0.linear.bias")
            if bias is not None:  # added here, since the images of F must not carry it
                a = a + bias.reshape(-1, *[1] * (a.dim() - 2))
            first = block.post(r[:batch], a, masks.get(1))
        passes = self.net.blockwise(params, x, masks, first)
        return list(deque(passes, maxlen=1 if self.saving else None)), state

    def signals(self, params, state, trace, error, target) -> Iterator[Signal]:
        x, masks = state["x"], state["masks"]
        sent = self.sign * error.to(x.dtype)
        x_err = torch.addmm(x.flatten(1), sent, state["F"].T).reshape(x.shape)
        passes = self.net.blockwise(params, x, masks) if self.saving else trace
        for l, (block, t) in enumerate(zip(self.net, passes, strict=True), 1):
            if l == 1 and self.cheap:
                a_err = torch.addmm(t.a.flatten(1), sent, state["W1F"].flatten(1))
                a_err = a_err.reshape(t.a.shape)
                t_err = block.post(x_err.reshape(t.r.shape), a_err, masks.get(1))
            else:
                h_err = x_err if l == 1 else t_err.h
                t_err = self.net.block_trace(l, params, h_err, masks.get(l))
            if l < len(self.net):
                yield self._hidden(block, t, t_err)
        if self.output_error == "second":
            error = output_error(t_err.h, target)
        yield (t if self.presynaptic == "first" else t_err).r, error

    def _hidden(self, block: Block, t: Trace, t_err: Trace) -> Signal:
        """Block l's signal from its two passes."""
        h, h_err = (t.h, t_err.h) if block.pool is None else (t.z, t_err.z)
        scale = 1.0
        if block.is_conv and self.conv_scaling != "sum":
            scale = 1 / math.prod(h.shape[2:])
            if self.conv_scaling == "released":
                scale = -scale / len(h)
        if self.presynaptic == "time-local":
            r, delta = torch.cat([t.r, t_err.r]), torch.cat([h, -h_err])
        else:
            r, delta = t.r if self.presynaptic == "first" else t_err.r, h - h_err
        return r, delta if scale == 1 else delta.mul_(scale)
