"""Training, with one seed or several at once, and nothing to learn beside PyTorch (chapter 0)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .data import Data
from .measure import alignment
from .rule import Rule

Optimizer = torch.optim.Optimizer
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@dataclasses.dataclass
class Run:
    """What ``fit`` returns: the trained rules and their curves, float64 tensors on the CPU."""

    rules: list[Rule]  # one per seed; the network is ``rule.net``
    train_loss: Tensor  # (S, epochs) mean cross-entropy over the epoch's batches, in nats
    train_accuracy: Tensor  # (S, epochs) % over the epoch's batches, dropout on
    test_accuracy: Tensor  # (S, epochs) % after the epoch
    angle: Tensor  # (S, epochs + 1, L) degrees to backprop's update, before and after each epoch
    norm: Tensor  # (S, epochs + 1, L) norm relative to backprop's update
    seconds: float


def fit(
    make: Callable[[torch.Generator], Rule],
    data: Data,
    *,
    epochs: int,
    batch_size: int = 64,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] = sgd,
    schedule: Callable[[int], float] | None = None,
    seeds: Sequence[int] = (0,),
    vectorize: bool | None = None,
    probe: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Run:
    """Train ``make(generator)`` on ``data`` once per seed.

    Each seed has its own generator, from which its initial weights, feedback, batch order and
    dropout come; so its result is the same whether it is trained alone or with others.

    Args:
        make: builds a network and returns its rule, drawing only from the generator given.
        epochs: passes over the training set; each leaves out the last, incomplete batch.
        optimizer: ``torch.optim`` class with its settings bound, such as
            ``partial(torch.optim.SGD, lr=0.1)``. It must be elementwise for vectorised seeds.
        schedule: epoch (0, 1, ...) -> factor on the learning rate.
        vectorize: train all seeds in one batched step. None: only on an accelerator, since on a
            CPU one seed already fills the cores.
        probe: number of training images on which the alignment with backprop is measured after
            each epoch (0: not measured; ``angle`` and ``norm`` are then empty).
        progress: show a progress bar.

    Raises:
        ValueError: for epochs < 1, no or repeated seeds, or a batch larger than the training set.
        FloatingPointError: when the loss of a seed is no longer finite.
    """
    seeds = list(seeds)
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct, at least one, got {seeds}")
    if not 1 <= batch_size <= len(data.train_x):
        raise ValueError(f"batch_size must be in 1..{len(data.train_x)}, got {batch_size}")
    if vectorize is None:
        vectorize = torch.device(device).type != "cpu"
    start, data = time.perf_counter(), data.to(device)
    groups = [seeds] if vectorize else [[seed] for seed in seeds]
    bar = tqdm(total=epochs * len(groups), disable=not progress, unit="epoch")
    rules, curves = [], []
    with bar:
        for group in groups:
            generators = [torch.Generator().manual_seed(seed) for seed in group]
            made = [make(generator) for generator in generators]
            for rule in made:
                rule.to(device).net.to(device)
            curves.append(
                _fit_group(made, generators, group, data, epochs, batch_size, optimizer, schedule,
                           probe, bar)
            )  # fmt: skip
            rules += made
    joined = (torch.cat(c).double().cpu() for c in zip(*curves, strict=True))
    return Run(rules, *joined, seconds=time.perf_counter() - start)


def _fit_group(
    rules: list[Rule],
    generators: list[torch.Generator],
    seeds: list[int],
    data: Data,
    epochs: int,
    batch_size: int,
    optimizer: Callable,
    schedule: Callable | None,
    probe: int,
    bar: tqdm,
) -> tuple[Tensor, ...]:
    """Train S rules of one shape in lockstep; returns the curves of ``Run``, S first."""
    rule, S = rules[0], len(rules)
    rule.net.train()
    # a single seed works on its own tensors; several on stacks, which vmap maps the rule over
    over_seeds = torch.vmap if S > 1 else lambda f, in_dims=None: f
    params, state = _stack([r.params() for r in rules]), _stack([r.state() for r in rules])
    opt = optimizer(list(params.values()))
    plan = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(opt, schedule)
    dtype = rule.net.weights()[0].dtype
    steps = len(data.train_x) // batch_size

    def step(params, state, x, y, masks):
        u = rule.update(params, state, x, y, masks=masks)
        return u.loss, (u.logits.argmax(1) == y).double().mean(), u.grads

    def hits(params, x, y):
        return (rule.net.trace(params, x)[-1].h.argmax(1) == y).double().sum()

    def probed(params, state):
        x, y = data.inputs(data.train_x[:probe], dtype), data.train_y[:probe]
        return tuple(alignment(rule, x, y, params, state))

    step, hits = over_seeds(step), over_seeds(hits, in_dims=(0, None, None))
    probed = over_seeds(probed)
    losses, accuracies, tests, probes = [], [], [], []
    with torch.no_grad():
        if probe:
            probes.append([p.reshape(S, -1) for p in probed(params, state)])
        for epoch in range(epochs):
            orders = [torch.randperm(len(data.train_x), generator=g) for g in generators]
            order = _join(orders).to(data.train_x.device)
            loss = accuracy = 0.0
            for i in range(steps):
                batch = order[..., i * batch_size : (i + 1) * batch_size]
                x, y = data.inputs(data.train_x[batch], dtype), data.train_y[batch]
                masks = _stack([rule.net.masks(batch_size, g) for g in generators])
                step_loss, step_accuracy, grads = step(params, state, x, y, masks)
                for name, p in params.items():
                    p.grad = grads[name]
                opt.step()
                loss, accuracy = loss + step_loss, accuracy + step_accuracy
            if plan is not None:
                plan.step()
            losses.append((loss / steps).reshape(S))
            accuracies.append((100 * accuracy / steps).reshape(S))
            if not losses[-1].isfinite().all():
                bad = [s for s, v in zip(seeds, losses[-1].tolist(), strict=True) if v - v != 0]
                raise FloatingPointError(f"training diverged in epoch {epoch + 1} for seeds {bad}")
            chunks = zip(data.test_x.split(1000), data.test_y.split(1000), strict=True)
            correct = sum(hits(params, data.inputs(x, dtype), y) for x, y in chunks)
            tests.append((100 * correct / len(data.test_y)).reshape(S))
            if probe:
                probes.append([p.reshape(S, -1) for p in probed(params, state)])
            bar.update()
        if S > 1:
            for s, r in enumerate(rules):
                for name, p in r.params().items():
                    p.copy_(params[name][s])
    probes = [torch.stack(c, 1) for c in zip(*probes, strict=True)] or [torch.empty(S, 0)] * 2
    return (*(torch.stack(c, 1) for c in (losses, accuracies, tests)), *probes)


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def _stack(dicts: list[dict]) -> dict:
    """One dict of stacks (S, ...) from S dicts of tensors; the tensors themselves when S = 1."""
    if len(dicts) == 1:
        return dicts[0]
    return {k: torch.stack([d[k].detach() for d in dicts]) for k in dicts[0]}
