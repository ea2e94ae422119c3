"""Several seeds of one experiment as one: stacked parameters under one vectorised step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .data import Data
from .measure import alignment
from .rule import Rule

Optimizer = torch.optim.Optimizer


class Lockstep:
    """S rules of one shape, trained step by step together on one data set.

    A single rule works on its own tensors. Several work on stacks (S, ...), which ``torch.vmap``
    maps the rule's pure update over, and which an elementwise optimiser moves as they are.
    """

    def __init__(
        self,
        rules: list[Rule],
        generators: list[torch.Generator],
        data: Data,
        batch_size: int,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
    ):
        self.rules, self.generators = rules, generators
        self.data, self.batch_size = data, batch_size
        self.net, self.dtype = rules[0].net, rules[0].net.weights()[0].dtype
        self.params = _stack([r.params() for r in rules])
        self.state = _stack([r.state() for r in rules])
        learning = [name for name, p in rules[0].params().items() if p.requires_grad]
        self.learning = {name: self.params[name] for name in learning}
        self.opt = optimizer(list(self.learning.values()))
        self.rates = [group["lr"] for group in self.opt.param_groups]
        over_seeds = torch.vmap if len(rules) > 1 else lambda f, in_dims=None: f
        self._step = over_seeds(self._one_step)
        self._hits = over_seeds(self._one_hits, in_dims=(0, None, None))
        self._align = over_seeds(self._one_align, in_dims=(0, 0, None, None))

    def _one_step(self, params, state, x, y, masks):
        u = self.rules[0].update(params, state, x, y, masks=masks, keep_signals=False)
        return u.loss, (u.logits.argmax(1) == y).double().mean(), u.grads

    def _one_hits(self, params, x, y):
        return (self.net.trace(params, x)[-1].h.argmax(1) == y).double().sum()

    def _one_align(self, params, state, x, y):
        return tuple(alignment(self.rules[0], x, y, params, state))

    def train(self, rate: float) -> tuple[Tensor, Tensor]:
        """One epoch at ``rate`` times the learning rate: mean loss and accuracy (%), each (S,)."""
        for group, lr in zip(self.opt.param_groups, self.rates, strict=True):
            group["lr"] = rate * lr
        for s, (rule, generator) in enumerate(zip(self.rules, self.generators, strict=True)):
            mine = [self._of_seed(tensors, s) for tensors in (self.params, self.state)]
            for name, value in rule.refresh(*mine, generator).items():
                mine[1][name].copy_(value)
        x, y, size = self.data.train_x, self.data.train_y, self.batch_size
        orders = [torch.randperm(len(x), generator=g) for g in self.generators]
        order = orders[0] if len(orders) == 1 else torch.stack(orders)
        order, steps = order.to(x.device), len(x) // size
        loss = accuracy = 0.0
        for i in range(steps):
            batch = order[..., i * size : (i + 1) * size]
            masks = _stack([self.net.masks(size, g) for g in self.generators])
            inputs = self.data.inputs(x[batch], self.dtype)
            step_loss, hit, grads = self._step(self.params, self.state, inputs, y[batch], masks)
            for name, p in self.learning.items():
                p.grad = grads[name]
            self.opt.step()
            loss, accuracy = loss + step_loss, accuracy + hit
        return self._per_seed(loss / steps), self._per_seed(100 * accuracy / steps)

    def test(self) -> Tensor:
        """Test accuracy in %, (S,)."""
        chunks = zip(self.data.test_x.split(1000), self.data.test_y.split(1000), strict=True)
        hits = sum(self._hits(self.params, self.data.inputs(x, self.dtype), y) for x, y in chunks)
        return self._per_seed(100 * hits / len(self.data.test_y))

    def probe(self, n: int) -> tuple[Tensor, Tensor]:
        """Angle and norm to backprop's update on the first n training images, each (S, L)."""
        x, y = self.data.inputs(self.data.train_x[:n], self.dtype), self.data.train_y[:n]
        angle, norm = self._align(self.params, self.state, x, y)
        return self._per_seed(angle), self._per_seed(norm)

    def _of_seed(self, tensors: dict[str, Tensor], s: int) -> dict[str, Tensor]:
        return tensors if len(self.rules) == 1 else {k: t[s] for k, t in tensors.items()}

    def _per_seed(self, value: Tensor) -> Tensor:
        return (value if len(self.rules) > 1 else value[None]).double().cpu()

    def state_dict(self) -> dict:
        """Everything that a step reads or writes, the generators included."""
        return {
            "params": self.params,
            "state": self.state,
            "optimizer": self.opt.state_dict(),
            "generators": [g.get_state() for g in self.generators],
        }

    def load_state_dict(self, saved: dict) -> None:
        for mine, theirs in ((self.params, saved["params"]), (self.state, saved["state"])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self.opt.load_state_dict(saved["optimizer"])
        for generator, state in zip(self.generators, saved["generators"], strict=True):
            generator.set_state(state)

    def write_back(self) -> None:
        """Give each rule and its network what they have learned."""
        if len(self.rules) > 1:
            for s, rule in enumerate(self.rules):
                for name, p in {**rule.params(), **rule.state()}.items():
                    p.copy_({**self.params, **self.state}[name][s])


def _stack(dicts: list[dict]) -> dict:
    """One dict of stacks (S, ...) from S dicts of tensors; the tensors themselves when S = 1."""
    if len(dicts) == 1:
        return dicts[0]
    return {k: torch.stack([d[k].detach() for d in dicts]) for k in dicts[0]}
