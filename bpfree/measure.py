"""What is measured: how close a rule is to backprop, what memory it takes, what fools a network."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .rule import Rule, check_batch
from .rules.backprop import Backprop


class Alignment(NamedTuple):
    """A rule's weight gradients beside backprop's on the same batch, per block l = 1..L."""

    angle: Tensor  # (L,) degrees in [0, 180]; below 90 a small step lowers the loss
    norm: Tensor  # (L,) ratio of Frobenius norms, rule / backprop


def angle(u: Tensor, v: Tensor) -> Tensor:
    """Angle in degrees between two tensors of one shape, as vectors; NaN if either is zero."""
    u, v = u.flatten().double(), v.flatten().double()
    u, v = u / u.norm(), v / v.norm()
    # Kahan's form: the arc cosine of the dot product loses half the digits near 0 and 180
    return torch.rad2deg(2 * torch.atan2((u - v).norm(), (u + v).norm()))


def alignment(
    rule: Rule,
    x: Tensor,
    y: Tensor,
    params: dict[str, Tensor] | None = None,
    state: dict[str, Tensor] | None = None,
) -> Alignment:
    """Angle and relative norm of a rule's update against backprop's, without dropout.

    Angle alone hides a signal that points right and has no length, so both are given.

    Args:
        x, y: as for ``rule.backward``.
        params, state: the rule's own by default; a slice of stacks under ``torch.vmap``.
    """
    if params is None:
        check_batch(rule.net, x, y)
    params = rule.params() if params is None else params
    state = rule.state() if state is None else state
    y, weights = y.long(), {n: params[n] for n, _ in rule.net.named_parameters()}
    ours = rule.update(params, state, x, y, masks={}).grads
    theirs = Backprop(rule.net).update(weights, {}, x, y, masks={}).grads
    names = [f"{l}.linear.weight" for l in range(len(rule.net))]
    return Alignment(
        torch.stack([angle(ours[n], theirs[n]) for n in names]),
        torch.stack([ours[n].double().norm() / theirs[n].double().norm() for n in names]),
    )


@torch.enable_grad()
def fgsm(
    net: nn.Module, x: Tensor, y: Tensor, epsilon: float, bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Adversarial examples by the fast gradient sign method (Goodfellow et al. 2015, 1412.6572).

        x + epsilon * sign(d loss / d x), clipped to the range of inputs

    They are made by autograd, whatever rule has trained the network. A network whose activation
    has no derivative gives x back: attack it with another network's examples.

    Args:
        net: any module that gives logits (B, C). x, y: a batch as for ``Rule.backward``.
        epsilon: >= 0, in the units of x. bounds: smallest and largest input.

    Raises:
        ValueError: for epsilon out of range, or x out of bounds.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be a finite number >= 0, got {epsilon}")
    low, high = bounds
    if not (x.min() >= low and x.max() <= high):
        raise ValueError(f"x must be in {bounds}, got {float(x.min()):.4g}..{float(x.max()):.4g}")
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y.long()), x)
    return (x + epsilon * slope.sign()).clamp(low, high).detach()


class _Ledger(TorchDispatchMode):
    """Notes each tensor storage that operators make while it is on, and when it is freed."""

    def __init__(self):
        super().__init__()
        self.entries: list[tuple[int, int]] = []  # (number of the storage, bytes gained or lost)
        self.numbers = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                storage = t.untyped_storage()
                if storage not in self.numbers:
                    number, size = len(self.entries), storage.nbytes()
                    self.numbers[storage] = number
                    self.entries.append((number, size))
                    weakref.finalize(storage, self.entries.append, (number, -size))
        return out


def peak_memory(f: Callable[[], object], without: Callable[[], list[Tensor]] = list) -> int:
    """Most bytes of tensors alive at once that ``f`` has made, on any device.

    Counted from the operators' outputs, so it is exact and repeatable; what an operator allocates
    and frees inside itself is not seen.

    Args:
        without: called after ``f``; the tensors it gives, gradients say, are not counted.
    """
    with _Ledger() as ledger:
        f()
    left_out = {ledger.numbers.get(t.untyped_storage()) for t in without()}
    live = peak = 0
    for number, size in ledger.entries:
        live += 0 if number in left_out else size
        peak = max(peak, live)
    return peak
