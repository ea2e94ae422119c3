"""Chapter 6: recipes of tasks one after the other, at several rates of learning."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from ..data import Data
from ..network import mlp
from ..rule import Rule
from ..training import checkpoint as checkpoints
from ..training.check import check_rule, check_settings, check_update
from ..training.fit import Run, gathered, train_group
from ..training.lockstep import Lockstep
from ..training.ranks import Ranks
from . import attention
from .recipe import Recipe
from .tasks import EWC, Shrunk, tasks


class TaskSequence(Lockstep):
    """One rule on one task after the other: an epoch is a pass over the next task.

    With ``heads`` each task has an output block of its own, all from one start; it is put in place
    where its task is trained or tested.
    """

    def __init__(self, rule: Rule, g, sequence: list[Data], heads: bool, *args):
        super().__init__([rule], [g], sequence[0], *args)
        self.sequence, self.rows = sequence, []
        last = [n for n in self.params if heads and n.startswith(f"{len(self.net) - 1}.")]
        self.heads = [{n: self.params[n].clone() for n in last} for _ in sequence]
        self.at = 0

    def turn(self, t: int) -> None:
        """Put the head of task t in place, and its data."""
        for name, value in self.heads[self.at].items():
            value.copy_(self.params[name])
        for name, value in self.heads[t].items():
            self.params[name].copy_(value)
        self.at, self.data = t, self.sequence[t]

    def row(self) -> None:
        """Accuracy on all tasks (T,), those to come included; the task stays."""
        now, found = self.at, []
        for t in range(len(self.sequence)):
            self.turn(t)
            found.append(super().test()[0])
        self.turn(now)
        self.rows.append(torch.stack(found))

    def train(self, rate, pause=lambda: None):
        if not self.rows:
            self.row()
        self.turn(len(self.rows) - 1)
        found = super().train(rate, pause)
        if isinstance(rule := self.rules[0], EWC) and self.finite().all():
            x = self.data.inputs(self.data.train_x[:2000], self.dtype)
            rule.consolidate(self.params, self.state, x, self.generators[0])
        return found

    def test(self):
        """Mean accuracy on the tasks so far (1,)."""
        self.row()
        return self.rows[-1][: len(self.rows) - 1].mean()[None]

    def state_dict(self):
        return {**super().state_dict(), "rows": self.rows, "heads": self.heads, "at": self.at}

    def load_state_dict(self, saved):
        super().load_state_dict(saved)
        self.rows, self.heads = saved["rows"], saved["heads"]
        self.at, self.data = saved["at"], self.sequence[saved["at"]]


@dataclasses.dataclass
class ContinualRun(Run):
    """A ``Run`` of one seed, whose epochs are the tasks at each rate in turn, ``lr`` last."""

    matrix: torch.Tensor  # (1, rates, T + 1, T) accuracies in %, NaN from where a rate diverged


@dataclasses.dataclass(frozen=True)
class ContinualRecipe(Recipe):
    """A sequence of tasks at several rates, from one start. ``epochs`` is tasks times rates; ``lr``
    comes last, and is what a table of single rates shows."""

    together: ClassVar[bool] = False
    rates: tuple[float, ...] = ()  # all but lr
    scenario: str = "permuted"
    count: int = 2  # tasks
    images: int | None = None  # of the training set, from the first; None: all

    @property
    def length(self) -> str:
        return f"{self.count} tasks, at the rate {self.lr}"

    def load(self, root: str | os.PathLike | None = None) -> Data:
        data = super().load(root)
        few = {k: getattr(data, k)[: self.images] for k in ("train_x", "train_y")}
        return dataclasses.replace(data, **few)

    def make(self, generator: torch.Generator) -> Rule:
        if self.rule not in ("EWC", "Shrunk"):
            return super().make(generator)
        _, args, keywords = self.network
        rule = EWC if self.rule == "EWC" else Shrunk
        return rule(mlp(*args, **keywords, generator=generator), **self.options)

    def fit(  # type: ignore[override]
        self, data: Data, seeds: Sequence[int], *, device: torch.device | str = "cpu",
        precision: str = "float32", compile: bool = False, progress: Any = False, probe: int = 0,
        checkpoint: str | os.PathLike | None = None, save_every: float = 600.0,
        deadline: float | None = None, ranks: Ranks = Ranks(),  # noqa: B008
    ) -> ContinualRun:  # fmt: skip
        """Train one seed at every rate. A checkpoint per rate; the last one bears the given name.
        ``probe`` is for rules on one task.

        Raises:
            ValueError: as ``tasks`` and ``bpfree.fit`` do, for several seeds or ranks, ``epochs``
                that are not tasks times rates, and a task of fewer images than a batch.
        """
        if len(seeds) != 1 or ranks.size > 1:
            raise ValueError(f"{self.name} is trained seed by seed, by one process, "
                             f"got {len(seeds)} seeds and {ranks.size} ranks")  # fmt: skip
        rates = (*self.rates, self.lr)
        if self.epochs != self.count * len(rates):
            raise ValueError(f"epochs must be {self.count} tasks times {len(rates)} rates, "
                             f"got {self.epochs}")  # fmt: skip
        sequence = tasks(data.to(device), self.count, self.scenario, seeds[0])
        smallest = min(sequence, key=lambda task: len(task.train_x))
        check_settings(smallest, self.epochs, self.batch_size, seeds, 0, precision, 0, False)
        parts, matrices, made, spent = [], [], [], 0.0
        look = progress if isinstance(progress, dict) else {"disable": not progress}
        with tqdm(total=self.epochs, unit="task", **look) as bar:
            for rate in rates:
                g = torch.Generator().manual_seed(seeds[0])
                rule = self.make(g)
                rule.to(device).net.to(device)
                for task in sequence:
                    check_rule(rule, task, [])
                check_update(rule, sequence[0], self.batch_size)
                run = TaskSequence(
                    rule, g, sequence, self.scenario == "task", self.batch_size,
                    dataclasses.replace(self, lr=1.0).optimizer, precision, compile, False,
                )  # fmt: skip
                file = Path(checkpoint).expanduser() if checkpoint else None
                if file and rate != rates[-1]:
                    file = file.with_name(f"{file.name}.{rate}")
                steps = [rate] * self.count
                mark = checkpoints.fingerprint(run, [*seeds], steps, 0) if file else ""
                mark += self.scenario  # two of them share their first task
                curves, seconds = train_group(
                    run, [*seeds], steps, 0, file, mark, deadline, bar, save_every
                )  # fmt: skip
                R = torch.full((self.count + 1, self.count), torch.nan).double()
                whole = run.rows[: int(curves[-1]) if curves[-1] > 0 else None]
                R[: len(whole)] = torch.stack(whole)
                parts.append(curves)
                matrices.append(R)
                made, spent = [rule], spent + seconds
        bad = [curves.pop() for curves in parts][-1]
        joined = [torch.cat(c, 1) for c in zip(*parts, strict=True)]
        if checkpoint:
            for rate in self.rates:
                Path(f"{Path(checkpoint).expanduser()}.{rate}").unlink(missing_ok=True)
        return gathered(
            ContinualRun, made, [[*joined, bad]], spent, [*seeds],
            matrix=torch.stack(matrices)[None],
        )  # fmt: skip


# and 0.1; on CIFAR-10, where those above 0.03 diverge, a tenth of each
RATES = (0.03, 0.2, 0.3, 0.5)
ARMS: dict[str, tuple[str, dict]] = {
    "bp": ("Backprop", {}),
    "ewc": ("EWC", {}),
    "shrunk": ("Shrunk", {}),
    **{arm: attention.ARMS[arm] for arm in ("relative", "frozen", "p-1", "p-1.5", "p-3")},
    "fa": ("FeedbackAlignment", {}),
    "dfa": ("DirectFeedbackAlignment", {}),
}
# is it enough that hidden blocks are slower from the start?
SLOWER = {
    "half": ("Shrunk", {"power": 0.0, "factor": 0.5}),
    "quarter": ("Shrunk", {"power": 0.0, "factor": 0.25}),
}


def benchmarks() -> Iterator[ContinualRecipe]:
    """Chapter 6: forgetting against learning, over a sweep of rates that is the same for all arms.
    Plain SGD, one pass over each task, batches of 64. So that rates compare, feedback has the size
    of the weights: p's is stretched to it, FA's and DFA's is drawn as large as He's; shares have
    their own. "Short": half as many tasks, and images."""
    five = [*ARMS][:5]
    cells = {  # data, scenario, tasks, sizes, arms
        "permuted-mnist": ("mnist", "permuted", 10, (784, 256, 256, 10), ARMS | SLOWER),
        "permuted-mnist-short": ("mnist", "permuted", 5, (784, 256, 256, 10), ARMS | SLOWER),
        "split-mnist": ("mnist", "domain", 5, (784, 256, 256, 2), ARMS),
        "split-fashion-mnist": ("fashion-mnist", "domain", 5, (784, 256, 256, 2), ARMS),
        "split-cifar10": ("cifar10", "domain", 5, (3072, 256, 256, 2), ARMS),
        "split-mnist-class": ("mnist", "class", 5, (784, 256, 256, 10), five),
        "split-mnist-task": ("mnist", "task", 5, (784, 256, 256, 2), five),
    }
    for name, (data, scenario, count, sizes, arms) in cells.items():
        for arm in arms:
            rule, options = (ARMS | SLOWER)[arm]
            part = 10 if data == "cifar10" else 1
            if arm == "ewc":  # strengths from figures/tuning.py
                strength = 100.0 if scenario == "permuted" else 1000.0
                options = {"strength": strength, "head": scenario != "task"}
            yield ContinualRecipe(
                f"continual-{name}-{arm}", data, ("mlp", sizes, {"bias": True}), rule, options,
                epochs=count * (len(RATES) + 1), lr=0.1 / part, momentum=0.0, seeds=(0, 1, 2, 3, 4),
                source="arXiv 2310.09952" if rule == "NextLayerAttention" else "this book",
                rates=tuple(rate / part for rate in RATES), scenario=scenario, count=count,
                images=30_000 if name.endswith("short") else None,
            )  # fmt: skip
