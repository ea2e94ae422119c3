"""Tasks one after the other, what is forgotten of them, and two rules to compare with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import rules
from ..block import Tensors
from ..data import Data
from ..refuse import one_of
from ..rule import output_error

SCENARIOS = ("permuted", "domain", "class", "task")


def tasks(data: Data, n: int, scenario: str, seed: int = 0) -> list[Data]:
    """The n tasks of a scenario (van de Ven & Tolias 2019).

    ``"permuted"``: all classes, the inputs of each task in an order of its own, drawn from the
    seed; the first keeps theirs. Otherwise each has C/n of the C classes: ``"class"`` keeps the
    labels; with ``"domain"`` and ``"task"`` a label is the place within its task, 0..C/n-1.

    Raises:
        ValueError: for an unknown scenario, n < 2, classes that n does not divide, or a task of one
            class whose label is its place: nothing is to be learnt there.
    """
    one_of("scenario", scenario, SCENARIOS)
    classes, g = data.num_classes, torch.Generator().manual_seed(seed)
    if n < 2 or (scenario != "permuted" and classes % n):
        raise ValueError(f"n must be at least 2 and divide the {classes} classes, got {n} tasks")
    if scenario in ("domain", "task") and n == classes:
        raise ValueError(f"a task needs two classes or more, got {n} tasks of {classes} classes")
    found = []
    for t in range(n):
        new: dict[str, Any] = {"name": f"{data.name}, task {t + 1} of {n}"}
        order = torch.randperm(data.train_x[0].numel(), generator=g)
        for part in ("train", "test"):
            x, y = getattr(data, f"{part}_x"), getattr(data, f"{part}_y")
            if scenario != "permuted":
                mine = y // (classes // n) == t
                x, y = x[mine], y[mine]
                y = y if scenario == "class" else y % (classes // n)
            elif t:
                x = x.flatten(1)[:, order.to(x.device)].view_as(x)
            new |= {f"{part}_x": x, f"{part}_y": y}
        found.append(dataclasses.replace(data, **new))
    return found


def measures(R: Tensor) -> dict[str, Tensor]:
    """What a matrix of accuracies says.

    Args:
        R: (..., T + 1, T), test accuracy of each task s = 1..T before training (row 0) and after
            each task t.

    Returns:
        Means over tasks, shape (...); ACC, BWT and FWT are Lopez-Paz & Ranzato's (2017), forgetting
        is Chaudhry et al.'s (2018):

        ``final``       R_Ts, ACC
        ``learning``    R_ss
        ``backward``    R_Ts - R_ss, s < T: BWT
        ``forward``     R_{s-1,s} - R_0s, s > 1: FWT, against the untrained network
        ``forgetting``  max over 1 <= t < T of R_ts - R_Ts, s < T
    """
    now, last = R[..., 1:, :].diagonal(dim1=-2, dim2=-1), R[..., -1, :]
    ahead = R[..., :-1, :].diagonal(dim1=-2, dim2=-1)
    best = R[..., 1:-1, :-1].amax(-2)
    return {
        "final": last.mean(-1),
        "learning": now.mean(-1),
        "backward": (last - now)[..., :-1].mean(-1),
        "forward": (ahead - R[..., 0, :])[..., 1:].mean(-1),
        "forgetting": (best - last[..., :-1]).mean(-1),
    }


class Shrunk(rules.Backprop):
    """The control: backprop whose feedback is W_l times one number per block,

        factor * (norm of W_l at the start / norm of W_l now)^power

    so that the signal shrinks as the weights grow, as it does with shares of attention; with power
    0 hidden blocks are slower from the start.
    """

    def __init__(self, net, power=2.0, factor=1.0, generator=None):
        super().__init__(net, generator)
        self.power, self.factor = power, factor
        for l, W in enumerate(net.weights()[1:], 2):
            self.register_buffer(f"n{l}", W.detach().norm())

    def feedback(self, l, params, state):
        W = super().feedback(l, params, state)
        return W * (self.factor * (state[f"n{l}"] / W.norm()) ** self.power)


class EWC(rules.Backprop):
    """Backprop with elastic weight consolidation (Kirkpatrick et al. 2017), for dense blocks.

    To each gradient is added k (w - w*), where w* is the weight at the end of the last task and the
    stiffness k = min(strength * importance, cap) grows with the Fisher information of all tasks
    before. The penalty alone multiplies w - w* by 1 - eta k at each step: it overshoots for
    eta k > 1 and grows for eta k > 2, so eta cap <= 1 is safe.

    Args:
        strength: lambda >= 0. cap: > 0, for rates up to 1 / cap.
        head: whether the output block is held too.
    """

    def __init__(self, net, strength=100.0, cap=2.0, head=True, generator=None):
        super().__init__(net, generator)
        if any(block.is_conv for block in net):
            raise ValueError("EWC needs dense blocks: Fisher information is a product there")
        self.strength, self.cap = strength, cap
        self.held = [n for n in self.params() if head or not n.startswith(f"{len(net) - 1}.")]
        for i, name in enumerate(self.held):
            p = self.params()[name].detach()
            self.register_buffer(f"importance{i}", torch.zeros_like(p))
            self.register_buffer(f"anchor{i}", p.clone())

    def update(self, params, state, *args, **options):
        u = super().update(params, state, *args, **options)
        for i, name in enumerate(self.held):
            k = (self.strength * state[f"importance{i}"]).clamp(max=self.cap)
            u.grads[name] = u.grads[name] + k * (params[name] - state[f"anchor{i}"])
        return u

    def consolidate(self, params: Tensors, state: Tensors, x: Tensor, g: torch.Generator) -> None:
        """Add the Fisher information of x, mean over samples, classes drawn from the network's own
        probabilities; in place, in ``state``."""
        trace = [*self.net.blockwise(params, x, {})]
        y = torch.multinomial(trace[-1].h.softmax(1), 1, generator=g)[:, 0]
        target = (y[:, None] == torch.arange(self.net.num_classes, device=y.device)).to(x.dtype)
        squares = {}
        signals = self.signals(params, state, trace, output_error(trace[-1].h, target), target)
        for l, (r, delta) in enumerate(signals):
            for name, value in self.net[l].outer(delta**2, r**2, 1 / len(x)).items():
                squares[f"{l}.linear.{name}"] = value
        for i, name in enumerate(self.held):
            state[f"importance{i}"] += squares[name]
            state[f"anchor{i}"].copy_(params[name])
