"""What a process per stage gains, beside backprop in the same pipeline:

    torchrun --nproc-per-node 2 -m bpfree.experiments.pipeline      writes pipeline-cpu.json

Local losses need nothing from above, so both stages work all the time. Backprop's error must come
down before stage 1 can learn: with a whole batch nothing overlaps, and in M parts (GPipe) a share
1 / (M + 1) of the time is still spent waiting. All arms take turns on the same stages and batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Data
from ..network import mlp
from ..stages import Stage, Stages
from ..training.distributed import RankRun, own_loss
from ..training.ranks import Ranks, ranks
from . import results
from .timing import SGD

WIDTH, LAYERS, BATCH, PARTS = 1024, 4, 128, 4


def stages() -> Stages:
    """Two of equal work: LAYERS blocks of WIDTH units, and a head."""
    g = torch.Generator().manual_seed(0)
    bodies = (nn.Sequential(mlp(*[WIDTH] * (LAYERS + 1), generator=g), nn.ReLU()) for _ in "12")
    return Stages(Stage(body, mlp(WIDTH, 10, generator=g)) for body in bodies)


def data(steps: int) -> Data:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(steps * BATCH, WIDTH, generator=g)
    y = torch.randint(10, (len(x),), generator=g)
    return Data("random", x, y, x[:1], y[:1], 1.0)


def local(steps: int, team: Ranks, pipeline: bool) -> Callable[[], None]:
    """Each stage by its own loss: in a rank each, or both in rank 0 while rank 1 rests."""
    made, where = stages(), team if pipeline else Ranks()
    mine = [made[team.rank]] if pipeline else list(made)
    run = RankRun(mine, data(steps), SGD, own_loss, where, pipeline)

    def epoch() -> None:
        if pipeline or team.rank == 0:
            for x, y in run.flow("train", torch.arange(steps * BATCH).split(BATCH), 0):
                run.learn(x, y)

    return epoch


def backprop(steps: int, team: Ranks, parts: int | None) -> Callable[[], None]:
    """Both stages by the last head's error, which comes down: a batch in so many parts, of which
    each goes up as the next is computed; None: in rank 0 alone."""
    made, given = stages(), data(steps)
    opt = SGD(made.parameters() if parts is None else made[team.rank].parameters())
    batches = list(zip(given.train_x.split(BATCH), given.train_y.split(BATCH), strict=True))

    def first(xs: list[Tensor]) -> None:
        hs, works = [], []
        for x in xs:  # a part is on its way while the next is computed
            hs.append(made[0](x))
            works.append(dist.isend(hs[-1].detach(), 1))
        for work in works:
            work.wait()
        for h in hs:
            delta = torch.empty_like(h)
            dist.recv(delta, 1)
            h.backward(delta)

    def second(ys: list[Tensor]) -> None:
        hs = [torch.empty(len(y), WIDTH) for y in ys]
        works, sent = [dist.irecv(h, 0) for h in hs], []
        for h, y, work in zip(hs, ys, works, strict=True):
            work.wait()
            scores = made[1].scores(made[1](h.requires_grad_()))
            (F.cross_entropy(scores, y) / len(ys)).backward()
            sent.append((h.grad, dist.isend(h.grad, 0)))
        for _, work in sent:
            work.wait()

    def epoch() -> None:
        for x, y in batches:
            opt.zero_grad()
            if parts is not None:
                first(list(x.chunk(parts))) if team.rank == 0 else second(list(y.chunk(parts)))
            elif team.rank == 0:
                F.cross_entropy(made(x), y).backward()
            if parts is not None or team.rank == 0:
                opt.step()

    return epoch


def measure(team: Ranks, steps: int = 10, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Images per second of each arm, the median over rounds; and the median of its ratio, within a
    round, to the same rule in one process.

    Raises:
        ValueError: for another number of ranks than two.
    """
    if team.size != 2:
        raise ValueError(f"the measurement needs two ranks, got {team.size}: torchrun "
                         "--nproc-per-node 2 -m bpfree.experiments.pipeline")  # fmt: skip
    arms = {
        "local, one process": local(steps, team, False),
        "local, pipeline": local(steps, team, True),
        "backprop, one process": backprop(steps, team, None),
        "backprop, pipeline": backprop(steps, team, 1),
        f"backprop, pipeline, {PARTS} parts": backprop(steps, team, PARTS),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, epoch in arms.items():
            dist.barrier()
            start = time.perf_counter()
            epoch()
            dist.barrier()
            if turn:
                times[name].append(time.perf_counter() - start)
    table = {}
    for name, seconds in times.items():
        alone = times[f"{name.partition(',')[0]}, one process"]
        ratio = statistics.median(a / b for a, b in zip(alone, seconds, strict=True))
        per_second = steps * BATCH / statistics.median(seconds)
        table[name] = {"images_per_s": round(per_second), "ratio": round(ratio, 3)}
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks() as team:
        table = measure(team)
        if team.rank == 0:
            for name, row in table.items():
                print(f"{name:28} {row['images_per_s']:7d} images/s {row['ratio']:6.2f}")
            setting = {"width": WIDTH, "layers": LAYERS, "batch": BATCH, "parts": PARTS}
            content = {"arms": table, "setting": setting, **results.manifest("cpu")}
            results.write_json(results.path("pipeline-cpu", results.place()), content)
