"""What is particular to an accelerator: one launch a step, its own random numbers, its precision.

A step of a small network is dozens of kernels of a few microseconds, and launching each takes the
host as long as it takes the card. So a step is recorded once, as a CUDA graph, and replayed.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

PRECISIONS = ("float32", "tf32", "bf16")
WARM_UP = 3  # calls before recording, in which libraries allocate and choose their kernels


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


class Replay:
    """``f`` with its kernels recorded at the fourth call, and replayed from then on.

    Args:
        f: works in place on tensors that stay where they are, returns nothing, and asks the host
            for no tensor's value. Numbers that are not tensors are recorded as they are.
        device: the one that all of this is on.
    """

    def __init__(self, f: Callable[..., None], device: torch.device):
        self.f, self.device, self.calls, self.inputs, self.graph = f, device, 0, None, None

    def __call__(self, *args: Tensor | dict) -> None:
        with torch.cuda.device(self.device):
            if self.inputs is None:
                self.inputs, self.side = tree_map(torch.clone, args), torch.cuda.Stream()
            for mine, theirs in zip(tree_leaves(self.inputs), tree_leaves(args), strict=True):
                mine.copy_(theirs)
            self.calls += 1
            if self.calls <= WARM_UP:
                # as recording will be: not on the default stream
                self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side):
                    self.f(*self.inputs)
                torch.cuda.current_stream().wait_stream(self.side)
                return
            if self.graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.side):
                    self.f(*self.inputs)
                self.graph = graph
            self.graph.replay()


def generator_on(device: torch.device, source: torch.Generator) -> torch.Generator:
    """``source`` itself on its own device, else a generator there, seeded by what it draws next."""
    if source.device.type == device.type:
        return source
    copy = torch.Generator(source.device)
    seed = int(torch.randint(2**62, (), generator=copy.set_state(source.get_state())))
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def global_draws_from(source: torch.Generator, device: torch.device) -> Iterator[None]:
    """What draws from torch's own generators, the CPU's and the device's, draws as ``source``
    decides; they are what they were afterwards. For modules that take no generator."""
    seed = int(torch.randint(2**62, (), generator=source, device=source.device))
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def keep_freed_memory() -> None:
    """Let the C library, if it is glibc, keep what tensors free, for the next ones.

    By default glibc gives large blocks back to the system, which hands them out again page by page,
    each zeroed first: a fifth of a step with large activities on a CPU, or more (appendix). The
    setting is the whole process's, so it is for programs, not for libraries: ``bpfree`` uses it.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1)


def _fp32_settings() -> list:
    """What holds the precision of float32 products; [] before PyTorch 2.9, which had two flags."""
    b = torch.backends
    if not hasattr(b, "fp32_precision"):
        return []
    return [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv]


@contextmanager
def _without_advice() -> Iterator[None]:
    """PyTorch 2.9 warns of the older names, which say what the newer ones do not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings", UserWarning)
        yield


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """``"float32"``, on the device too; ``"tf32"``: products of factors with 11 significant bits;
    ``"bf16"``: autocast, 8 bits. Convolutions are deterministic. All is restored afterwards,
    whether the caller had set it by torch's older or newer names."""
    cudnn, settings, tf32 = torch.backends.cudnn, _fp32_settings(), name == "tf32"
    before = [s.fp32_precision for s in settings]
    flags = cudnn.benchmark, cudnn.deterministic
    older = None
    # the older names cannot say what was set by the newer ones
    with suppress(RuntimeError), _without_advice():
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32

    def choose(matmul: str, conv: bool, newer: list[str]) -> None:
        with _without_advice():
            torch.set_float32_matmul_precision(matmul)
            cudnn.allow_tf32 = conv
        for setting, value in zip(settings, newer, strict=True):
            setting.fp32_precision = value

    choose("high" if tf32 else "highest", tf32, ["tf32" if tf32 else "ieee"] * len(settings))
    cudnn.benchmark, cudnn.deterministic = False, True
    try:  # a recorded step must not keep the cast weights of another
        with torch.autocast(device.type, torch.bfloat16, name == "bf16", cache_enabled=False):
            yield
    finally:
        choose(*(older or ("highest", True)), before)
        cudnn.benchmark, cudnn.deterministic = flags
