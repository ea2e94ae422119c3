"""Several seeds of one experiment as one: stacked parameters under one vectorised step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..block import Masks, Tensors
from ..data import Data
from ..measure import alignment
from ..rule import Rule, like_parameter
from .augment import augment, draw_moves
from .device import Replay, can_record, generator_on, precision
from .ranks import Ranks

Optimizer = torch.optim.Optimizer
AHEAD = 64  # steps for which an accelerator draws dropout masks at once


class Lockstep:
    """S rules of one shape, trained step by step together on one data set.

    A single rule works on its own tensors. Several work on stacks (S, ...), which ``torch.vmap``
    maps the rule's pure update over, and which an elementwise optimiser moves as they are.

    With ``ranks`` each batch is shared out among processes. All of them draw the whole batch's
    order and masks, so a step is that of one process, up to rounding, for every rule whose gradient
    is the mean of its samples' (theory, T12).
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
        ranks: Ranks = Ranks(),  # noqa: B008  # a tuple of two numbers
        changes: tuple[int, bool] = (0, False),  # (shift, flip) of ``draw_moves``
    ):
        self.rules, self.device, self.ranks = rules, data.train_x.device, ranks
        self.precision, self.compile, self.changes = precision, compile, changes
        # the sources, on the CPU for every device, draw what an epoch begins with: so what has no
        # dropout learns the same on each, up to rounding
        self.sources = generators
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
        # messages between ranks are launched one by one
        self.record = can_record(self.device) and ranks.size == 1 if record is None else record
        self.order, self.step = None, 0  # of the epoch under way, if there is one
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

    def train(self, rate: float, pause: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor]:
        """One epoch at ``rate`` times the learning rate: mean loss and accuracy (%), each (S,).

        ``pause`` is called now and then, where ``state_dict`` has all that the rest depends on.
        """
        if rate != self.rate:  # a number, so a recorded step has it for ever
            self.rate, self.replay = rate, Replay(self._advance, self.device)
            for group, lr in zip(self.opt.param_groups, self.rates, strict=True):
                group["lr"] = rate * lr
        n, size = len(self.data.train_x), self.batch_size
        if self.order is None:
            self._begin(n)
        advance, ahead = (self.replay, AHEAD) if self.record else (self._advance, 1)
        steps, of_batch, share = n // size, self.order.dim() - 1, self.ranks.share
        with precision(self.precision, self.device):
            for i in range(self.step, steps):
                if i % ahead == 0:
                    self.step = i
                    pause()
                    count = size * min(ahead, steps - i)
                    drawn = _stack([self._draws(count, g) for g in self.generators])
                start = i % ahead * size
                mine = {l: share(m.narrow(of_batch, start, size), of_batch)
                        for l, m in drawn.items()}  # fmt: skip
                advance(share(self.order[..., i * size : (i + 1) * size], of_batch), mine)
        self.order, self.step = None, 0
        loss, accuracy = (self.totals / steps).cpu()
        return loss, 100 * accuracy

    def _begin(self, n: int) -> None:
        """What an epoch over n images starts with: fresh feedback, a new order, no loss yet."""
        for s, (rule, generator) in enumerate(zip(self.rules, self.sources, strict=True)):
            mine = [self._of_seed(tensors, s) for tensors in (self.params, self.state)]
            for name, value in rule.refresh(*mine, generator).items():
                mine[1][name].copy_(value)
        self.order = _join([torch.randperm(n, generator=g) for g in self.sources]).to(self.device)
        self.totals.zero_()

    def _draws(self, n: int, generator: torch.Generator) -> Masks:
        """Dropout masks for n samples, and as number 0 what befalls their images."""
        moves = {0: draw_moves(n, *self.changes, generator)} if any(self.changes) else {}
        return {**moves, **self.net.masks(n, generator)}

    def _advance(self, batch: Tensor, drawn: Masks) -> None:
        """One step on the images (S, B) of that number; in place, and nothing asks the host."""
        masks = {l: mask for l, mask in drawn.items() if l}
        x, y = self.data.train_x[batch], self.data.train_y[batch]
        if drawn.keys() - masks.keys():
            x = augment(x, drawn[0], self.changes[0])
        inputs = self.data.inputs(x, self.dtype)
        loss, hit, grads = self._step(self.params, self.state, inputs, y, masks)
        mean = self.ranks.average([*(grads[name] for name in self.learning), loss, hit])
        for p, grad in zip(self.learning.values(), mean, strict=False):
            p.grad = like_parameter(grad, p)
        self.opt.step()
        loss, hit = mean[-2:]
        self.totals += torch.stack([loss.double(), hit]).reshape(2, -1)

    def test(self) -> Tensor:
        """Test accuracy in %, (S,)."""
        x, y = (self.ranks.share(t) for t in (self.data.test_x, self.data.test_y))
        chunks = x.split(1000)
        with precision("float32", self.device):
            logits = (self._logits(self.params, self.data.inputs(x, self.dtype)) for x in chunks)
            guess = torch.cat([batch.argmax(-1) for batch in logits], -1)
        right = (guess == y).double().sum(-1)
        right = self.ranks.size * self.ranks.average([right])[0]  # whole numbers: exact
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

    def _all_generators(self) -> list[torch.Generator]:
        """Each once: on the CPU the two lists are one."""
        return list({id(g): g for g in (*self.sources, *self.generators)}.values())

    def state_dict(self) -> dict:
        """Everything that a step reads or writes, the generators included."""
        middle = {"order": self.order, "step": self.step, "totals": self.totals}
        return {
            "params": self.params,
            "state": self.state,
            "optimizer": self.opt.state_dict(),
            "generators": [g.get_state() for g in self._all_generators()],
            **({} if self.order is None else {"epoch": middle}),
        }

    def load_state_dict(self, saved: dict) -> None:
        for mine, theirs in ((self.params, saved["params"]), (self.state, saved["state"])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self.opt.load_state_dict(saved["optimizer"])
        self.rate = None
        for generator, state in zip(self._all_generators(), saved["generators"], strict=True):
            generator.set_state(state)
        if middle := saved.get("epoch"):
            self.order, self.step = middle["order"].to(self.device), middle["step"]
            self.totals.copy_(middle["totals"])

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
