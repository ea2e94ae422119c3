"""Several seeds of one experiment as one: stacked parameters under one vectorised step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..block import Masks, Tensors
from ..data import Data
from ..measure import alignment
from ..rule import Rule, like_parameter
from .device import Replay, can_record, generator_on, precision

Optimizer = torch.optim.Optimizer
AHEAD = 64  # steps for which an accelerator draws dropout masks at once


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
        precision: str = "float32",
        compile: bool = False,
        record: bool | None = None,  # None: wherever the device can
    ):
        self.rules, self.device = rules, data.train_x.device
        self.precision, self.compile = precision, compile
        self.generators = [generator_on(self.device, g) for g in generators]
        self.data, self.batch_size = data, batch_size
        self.net, self.dtype = rules[0].net, rules[0].net.weights()[0].dtype
        self.params = _stack([r.params() for r in rules])
        self.state = _stack([r.state() for r in rules])
        self.learning = {name: self.params[name] for name in rules[0].learning()}
        if not self.learning:
            raise ValueError("nothing learns: no parameter of the network or the rule needs a grad")
        self.opt = optimizer(list(self.learning.values()))
        self.rates = [group["lr"] for group in self.opt.param_groups]
        self.rate, self.replay = None, None
        self.record = can_record(self.device) if record is None else record
        self.totals = torch.zeros(2, len(rules), dtype=torch.float64, device=self.device)
        over_seeds = torch.vmap if len(rules) > 1 else lambda f, in_dims=None: f
        self._step = over_seeds(self._one_step)
        if compile:
            self._step = torch.compile(self._step)
        self._logits = over_seeds(lambda p, x: self.net.trace(p, x)[-1].h, in_dims=(0, None))
        self._align = over_seeds(lambda p, s, x, y: tuple(alignment(rules[0], x, y, p, s)),
                                 in_dims=(0, 0, None, None))  # fmt: skip

    def _one_step(self, params, state, x, y, masks):
        u = self.rules[0].update(params, state, x, y, masks=masks, keep_signals=False)
        return u.loss, (u.logits.argmax(1) == y).double().mean(), u.grads

    def train(self, rate: float) -> tuple[Tensor, Tensor]:
        """One epoch at ``rate`` times the learning rate: mean loss and accuracy (%), each (S,)."""
        if rate != self.rate:  # a number, so a recorded step has it for ever
            self.rate, self.replay = rate, Replay(self._advance, self.device)
            for group, lr in zip(self.opt.param_groups, self.rates, strict=True):
                group["lr"] = rate * lr
        for s, (rule, generator) in enumerate(zip(self.rules, self.generators, strict=True)):
            mine = [self._of_seed(tensors, s) for tensors in (self.params, self.state)]
            for name, value in rule.refresh(*mine, generator).items():
                mine[1][name].copy_(value)
        advance, ahead = (self.replay, AHEAD) if self.record else (self._advance, 1)
        n, size = len(self.data.train_x), self.batch_size
        order = _join([torch.randperm(n, generator=g, device=g.device) for g in self.generators])
        steps, of_batch = n // size, order.dim() - 1
        self.totals.zero_()
        with precision(self.precision, self.device):
            for i in range(steps):
                if i % ahead == 0:
                    count = size * min(ahead, steps - i)
                    drawn = _stack([self.net.masks(count, g) for g in self.generators])
                start = i % ahead * size
                masks = {l: m.narrow(of_batch, start, size) for l, m in drawn.items()}
                advance(order[..., i * size : (i + 1) * size], masks)
        loss, accuracy = (self.totals / steps).cpu()
        return loss, 100 * accuracy

    def _advance(self, batch: Tensor, masks: Masks) -> None:
        """One step on the images (S, B) of that number; in place, and nothing asks the host."""
        inputs = self.data.inputs(self.data.train_x[batch], self.dtype)
        y = self.data.train_y[batch]
        loss, hit, grads = self._step(self.params, self.state, inputs, y, masks)
        for name, p in self.learning.items():
            p.grad = like_parameter(grads[name], p)
        self.opt.step()
        self.totals += torch.stack([loss.double(), hit]).reshape(2, -1)

    def test(self) -> Tensor:
        """Test accuracy in %, (S,)."""
        chunks = self.data.test_x.split(1000)
        with precision("float32", self.device):
            logits = (self._logits(self.params, self.data.inputs(x, self.dtype)) for x in chunks)
            guess = torch.cat([batch.argmax(-1) for batch in logits], -1)
        right = (guess == self.data.test_y).double().sum(-1)
        return self._per_seed(100 * right / len(self.data.test_y))

    def finite(self) -> Tensor:
        """Whether all that a seed has learnt is finite, (S,)."""
        seeds = len(self.rules)
        sums = [p.reshape(seeds, -1).double().sum(1) for p in self.params.values()]
        return torch.stack(sums).sum(0).isfinite().cpu()

    def probe(self, n: int) -> tuple[Tensor, Tensor]:
        """Angle and norm to backprop's update on the first n training images, each (S, L)."""
        x, y = self.data.inputs(self.data.train_x[:n], self.dtype), self.data.train_y[:n]
        with precision("float32", self.device):
            angle, norm = self._align(self.params, self.state, x, y)
        return self._per_seed(angle), self._per_seed(norm)

    def _of_seed(self, tensors: Tensors, s: int) -> Tensors:
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
        self.rate = None
        for generator, state in zip(self.generators, saved["generators"], strict=True):
            generator.set_state(state)

    def write_back(self) -> None:
        """Give each rule and its network what they have learned, and the card its memory back."""
        self.replay = None  # it and this object refer to each other
        if len(self.rules) > 1:
            for s, rule in enumerate(self.rules):
                for name, p in {**rule.params(), **rule.state()}.items():
                    p.copy_({**self.params, **self.state}[name][s])


def _stack(dicts: list[dict]) -> dict:
    """One dict of stacks (S, ...) from S dicts of tensors; the tensors themselves when S = 1."""
    return {k: _join([d[k] for d in dicts]) for k in dicts[0]}


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack([t.detach() for t in tensors])
