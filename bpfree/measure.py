"""What is measured: how close a rule is to backprop, what memory it takes, and what it meets."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .block import Tensors
from .refuse import check_batch
from .rule import Rule
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
    rule: Rule, x: Tensor, y: Tensor, params: Tensors | None = None, state: Tensors | None = None
) -> Alignment:
    """Angle and relative norm of a rule's update against backprop's, without dropout.

    Angle alone hides a signal that points right and has no length, so both are given.

    Args:
        x, y: as for ``rule.backward``.
        params, state: the rule's own by default; a slice of stacks under ``torch.vmap``.
    """
    if params is None or state is None:
        check_batch(rule, x, y)
        params, state = rule.params(), rule.state()
    y, weights = y.long(), {n: params[n] for n, _ in rule.net.named_parameters()}
    ours = rule.update(params, state, x, y, masks={}).grads
    theirs = Backprop(rule.net).update(weights, {}, x, y, masks={}).grads
    names = [f"{l}.linear.weight" for l in range(len(rule.net))]
    return Alignment(
        torch.stack([angle(ours[n], theirs[n]) for n in names]),
        torch.stack([ours[n].double().norm() / theirs[n].double().norm() for n in names]),
    )


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
