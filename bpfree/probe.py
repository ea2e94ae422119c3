"""What the audit acts on: a rule or a model, and what its weights meet (chapter 8)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .block import Tensors, aten
from .refuse import check_batch, check_pure
from .rule import Rule, output_error
from .stages import Stages


class Met(TorchDispatchMode):
    """Notes what each weight multiplies on the way up, in any pass: h W^T, or a convolution.

    A weight is known by its values, so that a copy of it counts. W itself, on the way down, does
    not: that is delta W, or the transposed convolution.

    Args:
        weights: matrices and kernels, by name.
        shift: added to all that the weight of this name gives; ("", 0) for none.
    """

    def __init__(self, weights: Tensors, shift: tuple[str, Tensor | float] = ("", 0.0)):
        super().__init__()
        self.weights, self.shift = weights, shift
        self.rows: dict[str, list[Tensor]] = {}  # (samples or patches, fan-in), in order of meeting
        self.outputs: list[Tensor] = []
        self.crossed: set[str] = set()  # met by what a graph of autograd brings from below

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (aten.mm.default, aten.addmm.default):
            h, W = args[-2], args[-1].mT
        elif func is aten.convolution.default and not args[6]:  # not transposed
            h, W = args[:2]
        else:
            return out
        for name, weight in self.weights.items():
            if weight.shape == W.shape and torch.equal(weight, W):
                rows = h if W.dim() == 2 else _patches(h, W, *args[3:6], args[8])
                self.rows.setdefault(name, []).append(rows.detach())
                self.outputs.append(out)
                if _is_made(h):
                    self.crossed.add(name)
                if name == self.shift[0]:
                    out = out + self.shift[1]
        return out


def _patches(h: Tensor, W: Tensor, stride, padding, dilation, groups: int) -> Tensor:
    """What a kernel multiplies, a row each."""
    patches = F.unfold(h, W.shape[2:], dilation, padding, stride)
    return patches.unflatten(1, (groups, -1)).mT.flatten(0, 2)


def _is_made(h: Tensor) -> bool:
    """Whether autograd has recorded how h was made, changes of shape apart."""
    node = h.grad_fn
    while node is not None and ("View" in node.name() or "Transpose" in node.name()):
        node = node.next_functions[0][0]
    return node is not None and "AccumulateGrad" not in node.name()


def unseen(where: str, rows: Tensor, N: Tensor) -> Tensor:
    """N less its part along the rows, of norm 1, among units that are not silent in all of them."""
    size, V = torch.linalg.svd(rows, full_matrices=False)[1:]
    V = V[size > size.amax() * max(rows.shape) * torch.finfo(rows.dtype).eps]
    live = rows.any(0)  # no rule hears a silent unit, so it would hide the effect
    if len(V) == live.sum():
        raise ValueError(
            f"{where} meets {len(rows)} rows of {len(V)} live numbers, which leave no direction "
            "unseen: take fewer samples, smaller images or a wider block"
        )
    free = N.flatten(1) * live
    for _ in range(2):  # the second time takes away the rounding of the first
        free = free - free @ V.T @ V
    return (free / free.norm()).view_as(N)


class OfRule:
    """A rule as the audit sees it."""

    def __init__(self, rule: Rule, x: Tensor, y: Tensor, generator: torch.Generator):
        check_batch(rule, x, y)
        name, L = type(rule).__name__, len(rule.net)
        if type(rule).signals is Rule.signals:
            raise TypeError(
                f"{name} has no signals(self, params, state, trace, error, target): the audit "
                "reads and changes them"
            )
        check_pure(rule, x, y)
        self.rule, self.x, self.y = rule, x, y
        self.generator, self.begin = generator, generator.get_state()
        self.params = {n: p.detach().clone() for n, p in rule.params().items()}
        self.state = {n: s.clone() for n, s in rule.state().items()}
        self.blocks = {f"block {l}": [f"{l - 1}.linear.weight"] for l in range(1, L + 1)}
        self.block_of = {n: int(n.split(".")[0]) for n, _ in rule.net.named_parameters()}
        # what the rule learns from a block by itself, heads say, belongs to it
        own = [[*dict(*s[2:])] for s in self.told()]
        self.block_of |= {name: l for l, names in enumerate(own) for name in names}
        self.learnt = [a + b for a, b in zip(self.blocks.values(), own, strict=True)]

    def _drawn(self, f: Callable) -> Any:
        """f(), with the same draws each time."""
        own, self.rule.generator = self.rule.generator, self.generator
        self.generator.set_state(self.begin)
        try:
            return f()
        finally:
            self.rule.generator = own

    def step(self, params: Tensors, x: Tensor, y: Tensor, met: Any = None, of: Any = None) -> Any:
        """Gradients of an update, after a refresh that has seen the weights ``of``."""

        def update() -> Tensors:
            new = self.rule.refresh(of or self.params, {**self.state}, self.generator)
            with met or nullcontext():
                given = params, {**self.state, **new}, x, y
                return self.rule.update(*given, masks={}, keep_signals=False).grads

        return self._drawn(update)

    @torch.no_grad()
    def told(self, change: Callable = lambda l, t: t) -> list:
        """The rule's signals if ``change`` changed the trace of block l + 1."""

        def signals() -> list:
            passes, state = self.rule.first_pass(self.params, {**self.state}, self.x, {})
            trace: Any = [*passes]
            target = F.one_hot(self.y, self.rule.net.num_classes).to(self.x.dtype)
            error = output_error(trace[-1].h, target)
            trace = [change(l, t) for l, t in enumerate(trace)]
            if self.rule.forward_only:
                trace, error = iter(trace), error[:0]
            return [*self.rule.signals(self.params, state, trace, error, target)]

        return self._drawn(signals)

    def signals(self, *change: Callable) -> list[Tensor]:
        """Their weight gradients."""
        told = zip(self.blocks.values(), self.rule.net, self.told(*change), strict=True)
        return [dict(*own).get(weight, block.outer(delta, r)["weight"])
                for [weight], block, (r, delta, *own) in told]  # fmt: skip

    def forward(self) -> object:
        return self.rule.net.trace(self.params, self.x)


class OfModel:
    """A copy of any model as the audit sees it: how it learns is what fills ``.grad``."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, backward: Callable | None):
        self.model, self.x = copy.deepcopy(model).eval(), x
        self.backward = backward or (lambda model, x, y: F.cross_entropy(model(x), y).backward())
        self.params = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        met = Met({n: p for n, p in self.params.items() if p.dim() > 1})
        self.step(self.params, x, y, met)
        self.blocks: dict[str, list[str]] = {}
        for name in met.rows:
            of = f"stage {int(name.split('.')[0]) + 1}" if isinstance(model, Stages) else name
            self.blocks.setdefault(of.removesuffix(".weight"), []).append(name)
        module = {n.rpartition(".")[0]: l for l, b in enumerate(self.blocks.values()) for n in b}
        self.block_of = {n: module.get(n.rpartition(".")[0], -1) for n in self.params}
        self.learnt = [*self.blocks.values()]

    def step(self, params: Tensors, x: Tensor, y: Tensor, met: Any = None, of: Any = None) -> Any:
        """Gradients of a training step in evaluation mode."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(params[name])
        self.model.zero_grad()
        with met or nullcontext(), torch.enable_grad():
            self.backward(self.model, x, y)
        grads = {n: p.grad for n, p in self.model.named_parameters()}
        return {n: torch.zeros_like(params[n]) if d is None else d for n, d in grads.items()}

    def forward(self) -> object:
        return self.model(self.x)
