"""What every learning rule shares: one pure update, and signals turned into gradients (chapter 0).

*Learning rules differ in where the teaching signal comes from, and in nothing else.* A rule says,
for each block l, what its presynaptic activity r_l and its teaching signal delta_l are. This file
does the rest, the same for all:

    grad W_l = delta_l^T r_l / B        W_l <- W_l - eta * grad W_l
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Masks, Tensors, Trace
from .network import Network
from .refuse import check_batch

Signal = tuple[Tensor, Tensor]


class Update(NamedTuple):
    """What one step of a rule computes, before any weight moves."""

    loss: Tensor  # mean cross-entropy of the batch, a scalar, in nats
    logits: Tensor  # (B, C)
    grads: Tensors  # keyed and shaped like ``Rule.params()``
    signals: list[Signal]  # (r_l, delta_l) for l = 1..L; [] where they were not to be kept


class Rule(nn.Module):
    """A learning rule for a network. Subclasses implement ``signals``.

    What a rule keeps fixed (B, D, F) is a buffer; what it learns beside the weights is a parameter.
    So both are saved by ``state_dict`` and moved by ``to``. The network itself is not a submodule:
    ``rule.parameters()`` are only the rule's own. What changes in training belongs in one of these:
    other attributes are not saved, and vectorised seeds share them. A rule that draws at each step
    takes ``self.generator``; its seeds cannot be vectorised.

    Args:
        net: a ``Network`` whose last block is linear and gives (B, C) logits, C >= 2.
        generator: source of the rule's random draws, dropout included; None is torch's default.

    Raises:
        TypeError: if ``net`` is not a ``Network``.
        ValueError: if the last block has an activation, pooling or dropout.
    """

    net: Network

    def __init__(self, net: Network, generator: torch.Generator | None = None):
        super().__init__()
        name = type(self).__name__
        if not isinstance(net, Network):
            raise TypeError(
                f"{name} needs a bpfree.Network (from mlp, convnet or Network(*blocks)), "
                f"got {type(net).__name__}"
            )
        last = net[-1]
        if last.activation != "identity" or last.pool is not None or last.dropout:
            raise ValueError(
                f"{name} needs a last block that gives logits (activation 'identity', no pool, no "
                f"dropout), got activation {last.activation!r}, pool {last.pool}, "
                f"dropout {last.dropout}"
            )
        if len(net.shapes[-1]) != 1 or net.num_classes < 2:
            raise ValueError(f"{name} needs logits of shape (B, C >= 2), got (B, {net.shapes[-1]})")
        self.__dict__["net"] = net  # past nn.Module.__setattr__, which would adopt it
        self.generator, self._plan = generator, net.plan()
        if net.geometry() != net.made_of:
            raise ValueError("a block was exchanged: make a new Network of the blocks")
        self._calls = 0  # of ``backward``
        self._first: Tensors = {}  # what learnt, at the first of them

    # ---- what a subclass says -------------------------------------------------------------------

    def signals(
        self, params: Tensors, state: Tensors, trace: list[Trace], error: Tensor, target: Tensor
    ) -> Iterable[Signal]:
        """(r_l, delta_l) for l = 1..L in this order; delta_l has the shape of a_l.

        Args:
            params: as ``params()``; read weights here, never from ``self.net``.
            state: as ``state()``; read fixed feedback here, never from ``self``.
            trace: r, a, z, h of every block on this batch.
            error: e = softmax(a_L) - y, (B, C).
            target: y one-hot, (B, C).
        """
        raise NotImplementedError

    def first_pass(
        self, params: Tensors, state: Tensors, x: Tensor, masks: Masks
    ) -> tuple[list[Trace], Tensors]:
        """The forward pass, and the state, to which it may add what ``signals`` needs of it."""
        return self.net.trace(params, x, masks), state

    def refresh(self, params: Tensors, state: Tensors, generator: torch.Generator) -> Tensors:
        """New values of parts of the state, or {}; asked for by ``fit`` before each epoch."""
        return {}

    def beside(self) -> dict[str, tuple[str, float]]:
        """{own parameter: (weight, share)}: what learns beside a weight gets that share of its
        gradient, and rests while the weight is frozen. A rule with parameters of its own must
        override it."""
        return {}

    # ---- what the library does ------------------------------------------------------------------

    def params(self) -> Tensors:
        """Everything that learns: the network's parameters, and the rule's own as ``rule.*``."""
        own = {f"rule.{name}": p for name, p in self.named_parameters()}
        return {**dict(self.net.named_parameters()), **own}

    def learning(self) -> Tensors:
        """Those of ``params()`` that learn: not what is frozen, nor what would learn beside it."""
        params, beside = self.params(), self.beside()
        needs = (params[beside[n][0] if n in beside else n] for n in params)
        return {n: p for (n, p), q in zip(params.items(), needs, strict=True)
                if p.requires_grad and q.requires_grad}  # fmt: skip

    def state(self) -> Tensors:
        """Everything that is fixed: the rule's buffers."""
        return dict(self.named_buffers())

    @torch.no_grad()
    def update(
        self,
        params: Tensors,
        state: Tensors,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
        masks: Masks | None = None,
        keep_signals: bool = True,
    ) -> Update:
        """One step's loss, logits, gradients and signals: a pure function, nothing is written.

        Args:
            params, state: as ``params()`` and ``state()`` give them, or doctored copies.
            x: inputs (B, *input_shape), float. y: classes (B,), integers in 0..C-1. Not checked.
            generator: source of dropout masks. masks: the masks themselves, as ``net.masks`` gives.
            keep_signals: return them too; otherwise each is freed when its gradient is there.
        """
        if masks is None:
            masks = self.net.masks(len(x), generator)
        trace, state = self.first_pass(params, state, x, masks)
        logits = trace[-1].h
        # in bfloat16 the errors of a trained network would round to zero
        log_p = F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
        target = (y[:, None] == torch.arange(logits.shape[1], device=y.device)).to(log_p.dtype)
        loss = F.nll_loss(log_p, y.long())
        signals = iter(self.signals(params, state, trace, log_p.exp() - target, target))
        del trace
        grads, kept, wanted = {}, [], len(self.net)
        for l, block in enumerate(self.net):
            signal = next(signals, None)
            if signal is None:
                raise ValueError(f"{type(self).__name__} must give {wanted} signals, gave {l}")
            if keep_signals:
                kept.append(signal)
            r, delta = signal
            for name, grad in block.outer(delta, r, 1 / len(x)).items():
                grads[f"{l}.linear.{name}"] = grad
        if next(signals, None) is not None:
            raise ValueError(f"{type(self).__name__} must give {wanted} signals, gave more")
        # new tensors: two parameters must not share a gradient that is added to in place
        grads |= {own: share * grads[name] for own, (name, share) in self.beside().items()}
        for name, p in params.items():
            got = tuple(grads[name].shape) if name in grads else "none"
            if got != tuple(p.shape):
                raise ValueError(
                    f"{type(self).__name__} must give {name} a gradient of shape "
                    f"{tuple(p.shape)}, got {got}"
                )
        return Update(loss, logits, grads, kept)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Accumulate the rule's gradients into ``.grad``, as ``loss.backward()`` would.

        Args:
            x: inputs (B, *input_shape), floating point, finite. y: classes (B,), in 0..C-1.

        Returns:
            The detached mean cross-entropy of the batch, in nats.

        Raises:
            TypeError, ValueError: for input that is not so; nothing is changed then.
        """
        check_batch(self, x, y)
        learning = self.learning()
        self._warn_of_what_rests(learning)
        update = self.update(
            self.params(), self.state(), x, y, self.generator, keep_signals=False
        )  # fmt: skip
        for name, p in learning.items():
            grad = like_parameter(update.grads[name], p)
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        return update.loss

    def _warn_of_what_rests(self, learning: Tensors) -> None:
        """Once, after ten calls: of what the rule should have learnt while the weights did, but
        nobody stepped. Its gradient piles up, and it trains as another rule."""
        self._calls += 1
        if self._calls == 1 and any(n.startswith("rule.") for n in learning):
            self._first = {n: p.detach().clone() for n, p in learning.items()}
        if self._calls < 10 or not self._first:
            return
        first, self._first = self._first, {}
        rest = {n: p for n, p in learning.items() if n in first and torch.equal(p, first[n])}
        own = [n.removeprefix("rule.") for n, p in rest.items()
               if n.startswith("rule.") and p.grad is not None and p.grad.any()]  # fmt: skip
        if own and any(n not in rest for n in learning if not n.startswith("rule.")):
            warnings.warn(
                f"{type(self).__name__} learns {', '.join(own)} beside the weights, but the "
                "optimiser steps the weights alone: give it [*net.parameters(), "
                "*rule.parameters()]", stacklevel=3,
            )  # fmt: skip


def like_parameter(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient in the parameter's dtype and memory layout, as autograd leaves it; a fused
    optimiser walks through both as they lie in memory."""
    same = grad.stride() == p.stride()
    return grad.to(p.dtype) if same else torch.empty_like(p).copy_(grad)
