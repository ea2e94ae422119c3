"""What every learning rule shares: one pure update, and signals turned into gradients (chapter 0).

*Learning rules differ in where the teaching signal comes from, and in little else.* A rule says,
for each block l, what its presynaptic activity r_l and its teaching signal delta_l are. This file
does the rest, the same for all:

    grad W_l = delta_l^T r_l / B        W_l <- W_l - eta * grad W_l
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Masks, Tensors, Trace
from .network import Network
from .refuse import check_batch, check_given, check_signal, warn_of_what_rests

# (r_l, delta_l), and gradients by name: of the rule's own parameters that learn from block l, or of
# weights that learn by something else than this outer product
Signal = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensors]


class Update(NamedTuple):
    """What one step of a rule computes, before any weight moves."""

    loss: Tensor  # mean cross-entropy of the batch, a scalar, in nats
    logits: Tensor  # (B, C)
    grads: Tensors  # keyed and shaped like ``Rule.params()``
    signals: list[tuple[Tensor, Tensor]]  # (r_l, delta_l), l = 1..L; [] where not to be kept


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
    forward_only = False  # whether signals are made as the first pass goes, before the output is

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
        self._first: dict[str, float] = {}  # norms of what learnt, at the first of them

    # ---- what a subclass says -------------------------------------------------------------------

    def signals(
        self, params: Tensors, state: Tensors, trace: list[Trace], error: Tensor, target: Tensor
    ) -> Iterable[Signal]:
        """(r_l, delta_l) for l = 1..L in this order; delta_l has the shape of a_l.

        A third element, {parameter: gradient}, is for what the rule learns from block l by itself,
        and for weights whose gradient is no outer product: theirs is replaced. Names are those of
        ``params()``, gradients means over the batch.

        Args:
            params: as ``params()``; read weights here, never from ``self.net``.
            state: as ``state()``; read fixed feedback here, never from ``self``.
            trace: r, a, z, h of every block on this batch. If ``forward_only`` it is an iterator
                that runs the pass: each block's signal is given before the next block computes, so
                that nothing of a block outlives it.
            error: e = softmax(a_L) - y, (B, C). If ``forward_only`` it is empty: the last block's
                signal is its own ``output_error``.
            target: y one-hot, (B, C).
        """
        raise NotImplementedError(f"{type(self).__name__} has no method signals")

    def first_pass(
        self, params: Tensors, state: Tensors, x: Tensor, masks: Masks
    ) -> tuple[Iterable[Trace], Tensors]:
        """The forward pass, and the state, to which it may add what ``signals`` needs of it."""
        return self.net.blockwise(params, x, masks), state

    def refresh(self, params: Tensors, state: Tensors, generator: torch.Generator) -> Tensors:
        """New values of parts of the state, or {}; asked for by ``fit`` before each epoch."""
        return {}

    def beside(self) -> dict[str, tuple[str, float]]:
        """{own parameter: (weight, share)}: what learns beside a weight gets that share of its
        gradient, and rests while the weight is frozen. Own parameters that are not here get theirs
        from ``signals``."""
        return {}

    # ---- what the library does ------------------------------------------------------------------

    def params(self) -> Tensors:
        """Everything that learns: the network's parameters, and the rule's own as ``rule.*``."""
        return {**dict(self.net.named_parameters()), **dict(self.named_parameters("rule"))}

    def learning(self, params: Tensors | None = None) -> Tensors:
        """Those of ``params()`` that learn: not what is frozen, nor what would learn beside it."""
        params, beside = params or self.params(), self.beside()
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
        batch = x.shape[0]
        if masks is None:
            masks = self.net.masks(batch, generator)
        passes, state = self.first_pass(params, state, x, masks)
        # in bfloat16 the errors of a trained network would round to zero
        precise = torch.promote_types(params["0.linear.weight"].dtype, torch.float32)
        target = (y[:, None] == torch.arange(self.net.num_classes, device=y.device)).to(precise)
        logits: deque[Tensor] = deque(maxlen=1)
        if self.forward_only:
            trace: Any = _watched(passes, logits)
            error = target[:0]
        else:
            trace = [*passes]
            logits.append(trace[-1].h)
            error = output_error(trace[-1].h, target)
        signals = iter(check_given(self, self.signals(params, state, trace, error, target)))
        del passes, trace
        grads: Tensors = {}
        kept, wanted = [], len(self.net)
        for l, block in enumerate(self.net):
            signal = next(signals, None)
            if signal is None:
                raise ValueError(f"{type(self).__name__} must give {wanted} signals, gave {l}")
            try:
                r, delta, *own = signal
                paired = r.shape[0] == delta.shape[0]  # which a convolution does not ask
                made = block.outer(delta, r, 1 / batch) if paired else {}
            except Exception:  # most likely of a signal that does not fit, which is said better so
                check_signal(self, l, block, signal)
                raise
            if not made or made["weight"].shape != params[f"{l}.linear.weight"].shape:
                check_signal(self, l, block, signal)
            if keep_signals:
                kept.append((r, delta))
            grads |= {f"{l}.linear.{name}": grad for name, grad in made.items()}
            for gradients in own:
                grads |= gradients
        if next(signals, None) is not None:
            raise ValueError(f"{type(self).__name__} must give {wanted} signals, gave more")
        # new tensors: two parameters must not share a gradient that is added to in place
        grads |= {own: share * grads[name] for own, (name, share) in self.beside().items()}
        for name, p in params.items():
            if name not in grads or grads[name].shape != p.shape:
                got = tuple(grads[name].shape) if name in grads else "none"
                raise ValueError(
                    f"{type(self).__name__} must give {name} a gradient of shape "
                    f"{tuple(p.shape)}, got {got}"
                )
        loss = F.nll_loss(F.log_softmax(logits[0], 1, dtype=precise), y.long())
        return Update(loss, logits[0], grads, kept)

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
        params = self.params()
        learning = self.learning(params)
        warn_of_what_rests(self, learning)
        update = self.update(params, self.state(), x, y, self.generator, keep_signals=False)
        for name, p in learning.items():
            grad = like_parameter(update.grads[name], p)
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        return update.loss


def output_error(logits: Tensor, target: Tensor) -> Tensor:
    """e = softmax(logits) - target, (B, C), in the target's dtype."""
    return F.softmax(logits, 1, dtype=target.dtype) - target


def _watched(passes: Iterable[Trace], last: deque[Tensor]) -> Iterator[Trace]:
    """The same, with the activity of the block that came last within reach."""
    for t in passes:
        last.append(t.h)
        yield t


def like_parameter(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient in the parameter's dtype and memory layout, as autograd leaves it; a fused
    optimiser walks through both as they lie in memory."""
    return grad.to(p.dtype) if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
