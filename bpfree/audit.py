"""The locality audit: what each block's update depends on, measured by intervention (chapter 7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .block import Tensors
from .measure import Met, peak_memory, rows, saved
from .refuse import check_batch, check_pure
from .rule import Rule, output_error

# question -> what is changed, everything else held
QUESTIONS = {
    "transport": "weights above, in directions that no activity of the batch meets",
    "refresh": "the same, where it refreshes its feedback between epochs",
    "sweep": "what the blocks above keep for their derivative, on the way down",
    "locking": "all weights above, in directions of every kind",
    "error": "the output error",
    "output": "the output",
    "label": "the labels",
    "others": "the label of another sample",
    "graph": "nothing: 1 if autograd keeps weights of a block above",
}
READS, IGNORES = 1e-9, 1e-11  # relative changes; rounding is below the second, in float64


class Audit(dict):
    """{question: effect on each block's update, (L,)}: relative changes, 0 where there is none.

    ``cost``: "passes", how many samples each block's weights met, over the batch size; "macs" and
    "memory" of an update, over those of the forward pass.
    """

    def __init__(self, name: str, effects: dict[str, list[float]], cost: dict[str, float]):
        super().__init__(effects)
        self.name, self.cost = name, cost

    def depends(self, question: str) -> list[bool]:
        """Whether each block's update depends on it; ValueError for an effect too small to say."""
        effects = self[question]
        if unclear := [v for v in effects if not (v > READS or v < IGNORES)]:
            raise ValueError(f"{question}: an effect of {unclear[0]:.1e} is neither one nor none")
        return [v > READS for v in effects]

    def drops(self) -> dict[str, bool]:
        """Which of backprop's four demands (chapter 1) no hidden block makes."""
        asked = {
            "transposed weights": ["transport"], "a backward phase": ["sweep"],
            "stored activities, a frozen network": ["locking"],
            "a global error": ["error", "output"],
        }  # fmt: skip
        makes = {d: [v for q in qs for v in self.depends(q)[:-1]] for d, qs in asked.items()}
        return {demand: not any(found) for demand, found in makes.items()}

    def table(self) -> str:
        """Markdown: a row per question, a column per block."""
        blocks = range(1, len(self["label"]) + 1)
        rows = [f"| {self.name}: depends on | {' | '.join(f'block {l}' for l in blocks)} |"]
        rows.append("|---" * (len(blocks) + 1) + "|")
        for question, effects in self.items():
            cells = [f"{v:.2g}" if yes else "no"
                     for v, yes in zip(effects, self.depends(question), strict=True)]  # fmt: skip
            rows.append(f"| {QUESTIONS[question]} | {' | '.join(cells)} |")
        return "\n".join(rows)

    def plot(self, ax: Any) -> None:
        """Dark where a block depends on it; the size of the effect is written in."""
        ax.imshow([self.depends(q) for q in self], cmap="Greys", vmin=0, vmax=2, aspect="auto")
        ax.set(xticks=range(len(self["label"])), yticks=range(len(self)), yticklabels=[*self])
        ax.set_xticklabels([f"{l}" for l in range(1, len(self["label"]) + 1)])
        ax.set_xlabel("block")
        ax.grid(False)
        for i, effects in enumerate(self.values()):
            for l, v in enumerate(effects):
                ax.text(l, i, f"{v:.1g}" if v > READS else "", ha="center", va="center", fontsize=8)


def audit(rule: Rule, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Audit:
    """What each block's update depends on, for one batch, without dropout.

    Every answer is an intervention on the pure ``update`` or ``signals``: one thing is changed, all
    else held, and the relative change of the block's weight gradient is the effect. For weight
    transport W_m, m > l, is moved only in directions that are orthogonal to every input that it
    meets, in all passes; that nothing on the way up changed is asserted.

    Args:
        rule: on a network of at least three blocks, in float64.
        x, y: few samples, so that such directions are left: fewer than the units of each hidden
            block; for convolutions, patches of a batch count as samples.
        generator: of the interventions and of the rule's own draws; None starts at 0.

    Raises:
        TypeError, ValueError: for a batch or a network that is not so, and a rule that reads past
            ``params`` and ``state``.
        AssertionError: if a pass upwards changed, though none could.
    """
    check_batch(rule, x, y)
    net, L, name = rule.net, len(rule.net), type(rule).__name__
    if type(rule).signals is Rule.signals:
        raise TypeError(f"{name} has no signals: the audit reads and changes them")
    if net.weights()[0].dtype != torch.float64:
        raise TypeError(f"the audit needs float64 to tell an effect from rounding: net.double(), "
                        f"rule.double(), x.double(); got {net.weights()[0].dtype}")  # fmt: skip
    if L < 3 or len(x) < 2:
        raise ValueError(f"the audit needs 3 blocks and 2 samples, got {L} and {len(x)}")
    check_pure(rule, x, y)
    g = generator or torch.Generator().manual_seed(0)
    begin, own = g.get_state(), rule.generator
    params = {n: p.detach().clone() for n, p in rule.params().items()}
    state = {n: s.clone() for n, s in rule.state().items()}
    weight = [f"{l}.linear.weight" for l in range(L)]

    def drawn(f: Callable) -> Any:
        """f with the same draws each time."""
        g.set_state(begin)
        rule.generator = g
        try:
            return f()
        finally:
            rule.generator = own

    def step(params: Tensors, y: Tensor = y, of: Tensors = params) -> Any:
        """An update, after a refresh that has seen the weights ``of``."""

        def f() -> Any:
            return rule.update(
                params, {**state, **rule.refresh(of, {**state}, g)}, x, y, masks={}
            )  # fmt: skip

        return drawn(f)

    @torch.no_grad()
    def signals(change: Callable) -> list[Tensor]:
        """Weight gradients from signals whose (trace, error) ``change`` may have changed."""
        passes, more = rule.first_pass(params, {**state}, x, {})
        trace = [*passes]
        target = F.one_hot(y, net.num_classes).to(x.dtype)
        trace, error = change(trace, output_error(trace[-1].h, target))
        given = (iter(trace), error[:0]) if rule.forward_only else (trace, error)
        found = drawn(lambda: [*rule.signals(params, more, *given, target)])
        return [net[l].outer(s[1], s[0])["weight"] for l, s in enumerate(found)]

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=noise, dtype=like.dtype)

    noise = torch.Generator().manual_seed(1 + g.initial_seed())
    met = Met([params[n] for n in weight])
    with met:
        base = step(params)
    grads = [base.grads[n] for n in weight]
    none = signals(lambda trace, error: (trace, error))

    transport, refresh = [0.0] * L, [0.0] * L
    for m in range(1, L):
        W, inputs = params[weight[m]], rows(net[m], met.inputs[m])
        null = torch.linalg.svd(inputs)[2][torch.linalg.matrix_rank(inputs) :]
        if not len(null):
            raise ValueError(
                f"block {m + 1} meets {len(inputs)} rows of {inputs.shape[1]} numbers, which leave "
                "no direction unseen: take fewer samples, or a wider block"
            )
        N = (random(W.flatten(1)) @ null.T @ null).view_as(W)
        moved = {**params, weight[m]: W + N * (W.norm() / N.norm())}
        again = Met([moved[n] for n in weight])
        with again:
            after = step(moved)
        for old, new in zip(sum(met.inputs, []), sum(again.inputs, []), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(after.logits, base.logits, rtol=1e-9, atol=1e-9)
        for effects, found in ((transport, after), (refresh, step(params, of=moved))):
            effects[:m] = map(
                max, effects, map(_effect, grads[:m], (found.grads[n] for n in weight))
            )

    def turned(l: int) -> Callable:
        """The hidden blocks above l have kept something else for their derivative."""

        def change(trace, error):
            return [t._replace(a=random(t.a), z=random(t.z)) if l < k < L - 1 else t
                    for k, t in enumerate(trace)], error  # fmt: skip

        return change

    def exchanged(l: int) -> Tensors:
        """Another network above block l."""
        above = {n: p for n, p in params.items() if n[0].isdigit() and int(n.split(".")[0]) > l}
        return {**params, **{n: random(p) * p.std() for n, p in above.items()}}

    sweep = [_effect(none[l], signals(turned(l))[l]) for l in range(L)]
    locking = [_effect(grads[l], step(exchanged(l)).grads[weight[l]]) for l in range(L)]
    wrong = signals(lambda trace, error: (trace, error + random(error)))
    last = signals(lambda trace, error: (
        [*trace[:-1], trace[-1]._replace(a=random(trace[-1].a), h=random(trace[-1].h))], error,
    ))  # fmt: skip
    relabelled, one = step(params, (y + 1) % net.num_classes), y.clone()
    one[1:] = (one[1:] + 1) % net.num_classes
    first, alone = (u.signals for u in (base, step(params, one)))
    kept = saved(step, params, weight)
    with FlopCounterMode(display=False) as all_, torch.no_grad():
        step(params)
    with FlopCounterMode(display=False) as up, torch.no_grad():
        net.trace(params, x)
    cost = {
        "passes": max(sum(map(len, inputs)) for inputs in met.inputs) / len(x),
        "macs": all_.get_total_flops() / up.get_total_flops(),
        "memory": peak_memory(
            lambda: rule.update(params, state, x, y, masks={}, keep_signals=False)
        )
        / peak_memory(lambda: net.trace(params, x)),
    }
    return Audit(name, {
        "transport": transport, "refresh": refresh, "sweep": sweep, "locking": locking,
        "error": [*map(_effect, none, wrong)], "output": [*map(_effect, none, last)],
        "label": [_effect(a, relabelled.grads[n]) for a, n in zip(grads, weight, strict=True)],
        "others": [_effect(a[1][0], b[1][0]) for a, b in zip(first, alone, strict=True)],
        "graph": [float(any(m > l for m in kept)) for l in range(L)],
    }, cost)  # fmt: skip


def _effect(before: Tensor, after: Tensor) -> float:
    """Relative change; of nothing into something it is infinite."""
    change, size = (after - before).norm().item(), before.norm().item()
    return change / size if size else math.inf if change else 0.0
