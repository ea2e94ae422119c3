"""What is measured about a rule: how close its update is to backprop's (chapter 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    params = rule.params() if params is None else params
    state = rule.state() if state is None else state
    ours = rule.update(params, state, x, y, masks={}).grads
    theirs = Backprop(rule.net).update(params, {}, x, y, masks={}).grads
    names = [f"{l}.linear.weight" for l in range(len(rule.net))]
    return Alignment(
        torch.stack([angle(ours[n], theirs[n]) for n in names]),
        torch.stack([ours[n].double().norm() / theirs[n].double().norm() for n in names]),
    )
