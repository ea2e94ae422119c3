"""The locality audit: what each block's update depends on, measured by intervention (chapter 8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .block import Tensors
from .measure import peak_memory
from .probe import Met, OfModel, OfRule, unseen
from .rule import Rule

# question -> what is changed, everything else held
QUESTIONS = {
    "transport": "weights above, in directions that no activity of the batch meets",
    "locking": "all that learns above, in directions of every kind",
    "output": "the output, and the error with it",
    "label": "the labels",
    "others": "the other samples: what is not a sum over samples",
    "refresh": "weights above, where feedback is refreshed between epochs",
    "graph": "nothing: 1 if a graph of autograd leads on from it to the block above",
    "own": "its own activity h, its derivative held",
    "sweep": "what the blocks above keep for their derivative, on the way down",
}
READS, IGNORES = 1e-9, 1e-11  # relative changes; rounding is below the second, in float64


class Audit(dict):
    """{question: effect on each block's update, (L,)}: relative changes, 0 where there is none.

    ``blocks``: their names. ``cost``: "passes", what a weight met in an update; "macs" and
    "memory", peak, of an update; all over those of the forward pass.
    """

    def __init__(
        self, name: str, blocks: list[str], effects: dict[str, list[float]], cost: dict[str, float]
    ):
        super().__init__(effects)
        self.name, self.blocks, self.cost = name, blocks, cost

    def depends(self, question: str) -> list[bool]:
        """Whether each block's update depends on it; ValueError for an effect too small to say."""
        effects = self[question]
        if unclear := [v for v in effects if not (v > READS or v < IGNORES)]:
            raise ValueError(f"{question}: an effect of {unclear[0]:.1e} is neither one nor none")
        return [v > READS for v in effects]

    def drops(self) -> dict[str, bool]:
        """Which of backprop's four demands (chapter 1) no hidden block makes, of those measured."""
        asked = {
            "transposed weights": ["transport"], "a backward phase": ["sweep", "graph"],
            "stored activities, a frozen network": ["locking"], "a global error": ["output"],
        }  # fmt: skip
        return {demand: not any(v for q in questions for v in self.depends(q)[:-1])
                for demand, questions in asked.items() if self.keys() >= {*questions}}  # fmt: skip

    def taught(self) -> list[str]:
        """By what the labels reach each block: "global error", "local error", "target", or ""."""
        own = self.depends("own") if "own" in self else [True] * len(self.blocks)
        heard = zip(self.depends("label"), self.depends("output"), own, strict=True)
        return [
            "" if not label else "global error" if out else "local error" if of_own else "target"
            for label, out, of_own in heard
        ]

    def table(self) -> str:
        """Markdown: a row per question, a column per block."""
        rows = [f"| {self.name}: depends on | {' | '.join(self.blocks)} |"]
        rows.append("|---" * (len(self.blocks) + 1) + "|")
        for question, effects in self.items():
            cells = [f"{v:.2g}" if yes else "no"
                     for v, yes in zip(effects, self.depends(question), strict=True)]  # fmt: skip
            rows.append(f"| {QUESTIONS[question]} | {' | '.join(cells)} |")
        return "\n".join(rows)

    __str__ = table

    def plot(self, ax: Any) -> None:
        """Grey where a block depends on it; the size of the effect is written in."""
        ax.imshow([self.depends(q) for q in self], cmap="Greys", vmin=0, vmax=2, aspect="auto")
        ax.set(xticks=range(len(self.blocks)), yticks=range(len(self)), yticklabels=[*self])
        ax.set_xticklabels(self.blocks, rotation=0 if len(self.blocks) < 6 else 90)
        ax.grid(False)
        for i, effects in enumerate(self.values()):
            for l, v in enumerate(effects):
                ax.text(l, i, f"{v:.1g}" if v > READS else "", ha="center", va="center", fontsize=8)


def audit(
    rule: nn.Module,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
    backward: Callable[[Any, Tensor, Tensor], object] | None = None,
) -> Audit:
    """What each block's update depends on, for one batch, without dropout.

    Every answer is an intervention: one thing is changed, all else held; the effect is the relative
    change of the gradients of the block's weight, or of its heads if that is larger. For weight
    transport each weight above moves only in directions N with N h = 0 for all that it meets
    (h W^T and convolutions), in all passes; that nothing on the way up changed is asserted.

    Of a rule "refresh", "graph", "own" and "sweep" are asked too; the last one needs two hidden
    blocks, the upper one with a derivative that it must keep.

    Args:
        rule: a ``Rule``, your own too; or any model, converted by ``convert``, say, or ``Stages``.
            Both in float64. Blocks are those of the network, a model's weights in the order in
            which they are met, or stages. A model's own weights must do all that classifies.
        x, y: few samples, so that such directions are left: fewer than the units of each hidden
            block; for convolutions, patches of a batch count as samples.
        generator: of the interventions and of the rule's own draws; None starts at 0.
        backward: how a model learns, (model, x, y) -> anything, it fills ``.grad``; None: by
            cross-entropy. For stages, ``bpfree.training.stages.backward``.

    Raises:
        TypeError, ValueError: for a batch or a network that is not so, and a rule that reads past
            ``params`` and ``state``.
        AssertionError: if something on the way up changed, though nothing could.
    """
    model = rule.net if isinstance(rule, Rule) else rule
    if not isinstance(model, nn.Module):
        made = f"the class itself: {rule.__name__}(net)" if isinstance(rule, type) else ""
        raise TypeError(f"the audit takes a Rule or a model, got {made or type(rule).__name__}")
    tensors = {"x": x, **dict(model.named_parameters())}
    tensors |= {f"rule.{n}": t for n, t in (*rule.named_parameters(), *rule.named_buffers())}
    if others := [f"{n} in {t.dtype}" for n, t in tensors.items()
                  if t.is_floating_point() and t.dtype != torch.float64]:  # fmt: skip
        raise TypeError("the audit needs float64 to tell an effect from rounding: net.double(), "
                        f"rule.double(), x.double(); got {', '.join(others[:3])}"
                        )  # fmt: skip
    g = generator or torch.Generator().manual_seed(0)
    it = OfRule(rule, x, y, g) if isinstance(rule, Rule) else OfModel(rule, x, y, backward)
    params, blocks, L = it.params, [*it.blocks.values()], len(it.blocks)
    if L < 2 or len(x) < 2:
        raise ValueError(f"the audit needs 2 blocks and 2 samples, got {L} and {len(x)}")
    noise = torch.Generator().manual_seed(1 + g.initial_seed())
    *_, last = names = [name for block in blocks for name in block]
    y2 = (y + 1) % len(params[last])

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=noise, dtype=like.dtype).to(like.device)

    def met(params: Tensors = params, *shift: Any) -> Met:
        return Met({name: params[name] for name in names}, *shift)

    def effects(after: Tensors) -> list[float]:
        return [max(_effect(base[n], after[n]) for n in learnt) for learnt in it.learnt]

    up, seen = met(), met()
    with up:
        it.forward()
    base = it.step(params, x, y, seen)
    if bad := [n for n in names if not base[n].isfinite().all()]:
        raise ValueError(f"the update of {', '.join(bad)} is not finite, and cannot be compared")
    if max(effects(it.step(params, x, y))) > READS:
        raise ValueError(f"{type(rule).__name__} does not repeat itself: it must draw from "
                         "self.generator alone")  # fmt: skip

    transport, refresh = [0.0] * L, [0.0] * L
    for name, k in [(n, above) for above in range(1, L) for n in blocks[above]]:
        where = name if isinstance(it, OfModel) else [*it.blocks][k]
        N = unseen(where, torch.cat(seen.rows[name]), random(params[name]))
        moved = {**params, name: params[name] + N * (params[name].norm().item() or 1.0)}
        after = it.step(moved, x, y, again := met(moved))
        for old, new in zip(seen.outputs, again.outputs, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9)
        transport[:k] = map(max, transport, effects(after)[:k])
        if isinstance(it, OfRule):
            refresh[:k] = map(max, refresh, effects(it.step(params, x, y, of=moved))[:k])

    locking = []
    for k in range(L):
        other = {n: random(p) * (p.std(correction=0).item() or 1.0)
                 for n, p in params.items() if it.block_of.get(n, -1) > k}  # fmt: skip
        locking.append(effects(it.step({**params, **other}, x, y))[k])

    shift = random(params[last].flatten(1)[:, 0]).reshape(-1, *[1] * (params[last].dim() - 2))
    both, rest, one = (
        it.step(params, torch.cat([a[:1], b[1:]]), torch.cat([c[:1], d[1:]]))
        for (a, c), (b, d) in [
            ((x.roll(1, 0), y2), (x.roll(1, 0), y2)), ((x, y), (x.roll(1, 0), y2)),
            ((x.roll(1, 0), y2), (x, y)),
        ]
    )  # fmt: skip
    found = {
        "transport": transport, "locking": locking,
        "output": effects(it.step(params, x, y, met(params, (last, shift)))),
        "label": effects(it.step(params, x, y2)),
        # of a sum over samples the mixed second difference is zero
        "others": effects({n: 2 * d + both[n] - rest[n] - one[n] for n, d in base.items()}),
    }  # fmt: skip
    if isinstance(it, OfRule):
        found |= {"refresh": refresh, **_asked_of_a_rule(it, met, random)}

    def macs(f: Callable) -> int:
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    update = partial(it.step, params, x, y)
    cost = {
        "passes": max(sum(map(len, seen.rows[n])) / sum(map(len, up.rows[n])) for n in up.rows),
        "macs": macs(update) / macs(it.forward),
        "memory": peak_memory(update) / peak_memory(it.forward),
    }
    return Audit(type(rule).__name__, [*it.blocks], found, cost)


def _asked_of_a_rule(it: OfRule, met: Callable, random: Callable) -> dict[str, list[float]]:
    """Effects of what is changed in the trace, and whether autograd was there."""
    L, none = len(it.blocks), it.signals()
    leaves = {n: p.clone().requires_grad_() for n, p in it.params.items()}
    it.step(leaves, it.x, it.y, seen := met(leaves))

    def trace(change: Callable) -> list[float]:
        changed = (it.signals(partial(change, k)) for k in range(L))
        return [_effect(none[k], after[k]) for k, after in enumerate(changed)]

    found = {
        "graph": [float(f"{l}.linear.weight" in seen.crossed) for l in range(1, L + 1)],
        "own": trace(lambda k, l, t: t._replace(h=random(t.h)) if l == k else t),
    }
    if any(block.activation != "identity" for block in [*it.rule.net][1:-1]):
        found["sweep"] = trace(lambda k, l, t: t._replace(a=random(t.a), z=random(t.z))
                               if k < l < L - 1 else t)  # fmt: skip
    return found


def _effect(before: Tensor, after: Tensor) -> float:
    """Relative change; of nothing into something it is infinite."""
    change, size = (after - before).norm().item(), before.norm().item()
    return change / size if size else math.inf if change else 0.0
