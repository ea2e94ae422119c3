"""What is refused, and how it is said: with the argument's name, what is expected and what came."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn


def one_of(name: str, given: object, known: Collection) -> None:
    """Raise a ValueError that names the argument unless it is one of the known ones."""
    if given not in known:
        raise ValueError(f"{name} must be one of {known}, got {given!r}")


def example(linear: nn.Linear | nn.Conv2d) -> Tensor:
    """Some pre-activation of a block with this linear map."""
    n = len(linear.weight)
    shape = (2, n, 8, 8) if isinstance(linear, nn.Conv2d) else (4, n)
    return torch.linspace(-2, 2, math.prod(shape)).reshape(shape)


def check_function(name: str, f: Callable[[Tensor], Tensor], a: Tensor) -> None:
    """Raise unless f maps a to a tensor of its shape, each time the same, and leaves it alone."""
    z = f(given := a.clone())
    if not torch.equal(given, a):  # rules read a_l after it
        raise ValueError(f"{name} must not work in place, got {f}")
    if not isinstance(z, Tensor) or z.shape != a.shape:
        raise ValueError(f"{name} must give a tensor of its input's shape, got {f}")
    if not torch.allclose(f(a), z, equal_nan=True):
        raise ValueError(f"{name} must depend on its input alone, got {f}")


def check_elementwise(name: str, f: Callable[[Tensor], Tensor]) -> None:
    """Raise unless f maps tensors of any shape, each entry by itself."""
    a = torch.linspace(-1.5, 2, 12, dtype=torch.float64)
    check_function(name, f, a)
    parts = [f(a.view(3, 4)).reshape(-1), torch.cat([f(a[:5]), f(a[5:])]), f(a.flip(0)).flip(0)]
    if not all(torch.allclose(part, f(a), equal_nan=True) for part in parts):
        raise ValueError(f"{name} must be elementwise, got {f}")


def check_scale(name: str, scale: float) -> None:
    """Raise a ValueError that names the argument unless it is a positive finite number."""
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{name} must be a positive finite number, got {scale}")


def check_batch(rule: Any, x: Tensor, y: Tensor) -> None:
    """Raise unless x is a finite float batch and y are class indices that fit the rule's network,
    and that is still the one it was made for."""
    net = rule.net
    for i, (was, now) in enumerate(zip_longest(rule._plan, net.plan()), 1):
        if was != now:
            raise ValueError(
                f"the network is not what {type(rule).__name__} was made for: block {i} was {was}, "
                f"is {now} (weight, bias, activation, pool); make a new rule for it"
            )
    if net[-1].dropout:
        raise ValueError(f"the last block gives logits, without dropout, got {net[-1].dropout}")
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise TypeError(f"x and y must be tensors, got {type(x).__name__} and {type(y).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; scale it: x.float() / 255")
    weight = net[0].linear.weight
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have the weights' dtype {weight.dtype}, got {x.dtype}")
    sample = tuple(x.shape[1:])  # a Linear block flattens its input, so only the size must fit
    fits = sample == net.input_shape
    if not net[0].is_conv and sample:
        fits = math.prod(sample) == math.prod(net.input_shape)
    if not fits or x.shape[0] == 0:
        expected = ", ".join(map(str, net.input_shape))
        raise ValueError(f"x must have shape (B >= 1, {expected}), got {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape {tuple(x.shape[:1])}, got {tuple(y.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y must hold integer class indices, got {y.dtype}")
    low, high = (int(v) for v in y.long().aminmax())
    if low < 0 or high >= net.num_classes:
        raise ValueError(f"labels must be in 0..{net.num_classes - 1}, got {low}..{high}")
    if not math.isfinite(x.sum()) and not torch.isfinite(x).all():  # the sum is the faster test
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"x must be finite, got {bad} NaN or infinite values")


def check_given(rule: Any, signals: Any) -> Any:
    """The same; raise a TypeError if a rule's ``signals`` gives nothing to go through."""
    if not hasattr(signals, "__iter__"):
        got = f"{type(signals).__name__}: is a return missing?" if signals is None else signals
        raise TypeError(f"{type(rule).__name__}.signals must give (r, delta) for each block: {got}")
    return signals


def check_signal(rule: Any, l: int, block: Any, signal: Any) -> None:
    """Raise unless a rule's signal for block l + 1 has two tensors that fit the block, row by row:
    (B, n_in) and (B, n_out), or images of so many channels."""
    said = f"{type(rule).__name__}'s signal for block {l + 1}"
    if not (isinstance(signal, (tuple, list)) and len(signal) > 1):
        raise TypeError(f"{said} must be a tuple (r, delta), got {type(signal).__name__}")
    r, delta = signal[:2]
    if not (isinstance(r, Tensor) and isinstance(delta, Tensor)):
        kinds = f"{type(r).__name__} and {type(delta).__name__}"
        raise TypeError(f"{said} must be two tensors (r, delta), got {kinds}")
    n_out, n_in = block.linear.weight.shape[:2]
    n_in *= block.linear.groups if block.is_conv else 1
    fits = r.dim() == delta.dim() == (4 if block.is_conv else 2) and r.shape[0] == delta.shape[0]
    if not (fits and r.shape[1] == n_in and delta.shape[1] == n_out):
        more = ", ..." if block.is_conv else ""
        raise ValueError(
            f"{said} must be r of shape (B, {n_in}{more}) and delta of shape (B, {n_out}{more}), "
            f"like the block's r and a, got {tuple(r.shape)} and {tuple(delta.shape)}"
        )


def warn_of_what_rests(rule: Any, learning: dict[str, Tensor]) -> None:
    """Once, after ten calls: of what the rule should have learnt while the weights did, but
    nobody stepped. Its gradient piles up, and it trains as another rule."""
    rule._calls += 1
    if rule._calls not in (1, 10) or not any(n.startswith("rule.") for n in learning):
        return
    # a norm stands for the values, of which a copy would double the memory of the network
    norms = {n: torch.linalg.vector_norm(p.detach(), dtype=torch.float64).item()
             for n, p in learning.items() if p.numel()}  # fmt: skip
    first, rule._first = rule._first, norms
    if rule._calls == 1:
        return
    rest = {n: p for n, p in learning.items() if n in first and first[n] == norms[n]}
    own = [n.removeprefix("rule.") for n, p in rest.items()
           if n.startswith("rule.") and p.grad is not None and p.grad.any()]  # fmt: skip
    if own and any(n not in rest for n in learning if not n.startswith("rule.")):
        warnings.warn(
            f"{type(rule).__name__} learns {', '.join(own)} beside the weights, but the "
            "optimiser steps the weights alone: give it [*net.parameters(), "
            "*rule.parameters()]", stacklevel=3,
        )  # fmt: skip


@torch.no_grad()
def check_pure(rule: Any, x: Tensor, y: Tensor) -> None:
    """Raise unless the rule's update reads only what it is given, and writes none of it.

    Anything else would be silently wrong: vectorised seeds share the first rule's own tensors, and
    the audit changes what it gives.
    """
    name, own = type(rule).__name__, {**rule.params(), **rule.state()}
    kept = {key: t.clone() for key, t in own.items()}
    params, state = ({k: kept[k].clone() for k in part} for part in (rule.params(), rule.state()))
    given = {"x": x, **params, **state}
    versions = {key: t._version for key, t in given.items()}
    drawn = None if rule.generator is None else rule.generator.get_state()

    def grads() -> dict[str, Tensor]:
        found = rule.update(params, state, x, y, masks={}, keep_signals=False).grads
        if drawn is not None:  # a rule that draws draws the same, and again in training
            rule.generator.set_state(drawn)
        return found

    first = grads()
    if wrote := [key for key, t in given.items() if t._version != versions[key]]:
        raise ValueError(f"{name} must not write to what its update is given, wrote to {wrote}")
    others = [k for k, t in own.items() if t.is_floating_point() and 0 not in t.stride()]
    try:
        for key in others:
            own[key].mul_(-1e3).add_(1)  # large, so that what contributes little is seen too
        second = grads()
    finally:
        for key in others:
            own[key].copy_(kept[key])
    for key in first:  # a card may add in another order; what is NaN in both is equal
        u, v = (grads[key].nan_to_num() for grads in (first, second))
        if (u - v).norm() > 1e-3 * u.norm():
            raise ValueError(
                f"{name} must read weights from params and feedback from state, not self, and draw "
                "from self.generator alone"
            )
