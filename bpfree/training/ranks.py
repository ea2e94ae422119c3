"""Processes that train one thing together: who they are, and what they tell each other.

``torchrun`` starts them, on one host or on several; each is a *rank*, 0 .. size - 1. What one does
alone the ranks do as well, each on its share of every batch: ``Ranks()`` is one process by itself,
and none of its methods communicates.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
AHEAD = 2  # batches that a rank may be ahead of what the next one has taken


class Ranks(NamedTuple):
    """This process among those that train together. ``ranks()`` makes one.

    Every method but ``share`` must be called by all ranks, in the same order.

    Raises:
        ConnectionError: if another rank is lost.
    """

    rank: int = 0
    size: int = 1

    def share(self, batch: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of a batch: equal parts in the order of ranks, as far as they go."""
        return batch.tensor_split(self.size, dim)[self.rank]

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over ranks of each tensor, the same bits on all; in one message, and therefore
        added up in the precision of the first."""
        if self.size == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([t.detach().reshape(-1).to(tensors[0].dtype) for t in tensors])
        with told():
            dist.all_reduce(flat)
        parts = (flat / self.size).split([t.numel() for t in tensors])
        return [p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks; the others make nothing."""
        if self.size == 1:
            return make()
        made: list[Any] = [make() if self.rank == 0 else None]
        with told():
            dist.broadcast_object_list(made)
        return made[0]

    def gather(self, mine: T) -> list[T]:
        """What each rank has, in the order of ranks, on rank 0; [] on the others."""
        if self.size == 1:
            return [mine]
        every: Any = [None] * self.size if self.rank == 0 else None
        with told():
            dist.gather_object(mine, every)
        return every or []

    def check_batch_size(self, batch_size: int) -> None:
        """ValueError unless each rank gets as many samples as the others."""
        if batch_size % self.size:
            raise ValueError(
                f"batch_size must be a multiple of the number of ranks ({self.size}), "
                f"got {batch_size}"
            )


@contextmanager
def ranks(device: torch.device | str = "cpu") -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, or the group that the caller has initialised;
    without either, be one process by itself.

    Args:
        device: what they train on: gloo carries what is on CPUs, NCCL what is on cards. On "cuda"
            each process of a host gets a card of its own, which "cuda" means from now on.

    Raises:
        ConnectionError: if they cannot meet.
    """
    mine = dist.is_torchelastic_launched() and not dist.is_initialized()
    if mine:
        cards = torch.device(device).type == "cuda"
        if cards:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with told():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
    finally:
        if mine:
            dist.destroy_process_group()


@contextmanager
def told() -> Iterator[None]:
    """Around messages to other ranks: that one of them is lost is an error of its own kind."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise nothing more precise
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(f"another rank was lost, or cannot be reached: {reason}") from error


class Above:
    """The rank that this one sends a run of batches to, without waiting for it unless it is far
    behind."""

    def __init__(self, rank: int):
        self.rank, self.first = rank, True
        self.sent: deque[tuple[Tensor, Any]] = deque()

    def send(self, h: Tensor) -> None:
        """Give it the activity (B, ...) of a batch; what becomes of h afterwards is our affair."""
        h = h.detach().clone(memory_format=torch.contiguous_format)
        with told():
            if self.first:
                dist.send_object_list([(h.shape[1:], h.dtype)], self.rank)
                self.first = False
            self.sent.append((h, dist.isend(h, self.rank)))
        self.wait(AHEAD)

    def wait(self, left: int = 0) -> None:
        """Until it has taken all but so many."""
        while len(self.sent) > left:
            with told():
                self.sent.popleft()[1].wait()


def receive(source: int, sizes: Iterable[int], device: torch.device) -> Iterator[Tensor]:
    """What the rank ``source`` sends: activities of batches of these sizes, the next ones under way
    while one is used."""
    waiting: deque[tuple[Tensor, Any]] = deque()
    header: list[Any] = [None]

    def next_one() -> Tensor:
        h, work = waiting.popleft()
        with told():
            work.wait()
        return h

    for i, size in enumerate(sizes):
        with told():
            if i == 0:
                dist.recv_object_list(header, source)
            shape, dtype = header[0]
            h = torch.empty(size, *shape, dtype=dtype, device=device)
            waiting.append((h, dist.irecv(h, source)))
        if len(waiting) > AHEAD:
            yield next_one()
    while waiting:
        yield next_one()
