"""Processes that train at once on a CPU, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from .device import keep_freed_memory

slot = 0  # of this process among its siblings: the line of its progress bar


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def processes(jobs: int) -> Iterator[Callable[..., Future]]:
    """``submit(f, *args)`` gives the call to the next free of ``jobs`` processes, as a ``Future``.

    Left by an exception, an interrupt say, it ends all of them at once.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads
    slots = spawn.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    pool = ProcessPoolExecutor(jobs, spawn, _start, (spawn.RLock(), slots))

    def submit(f: Callable, *args: Any) -> Future:
        if threading.current_thread() is not threading.main_thread():  # it hears no Ctrl-C
            return pool.submit(f, *args)
        # a process that starts now ignores Ctrl-C for ever: it is for this one to stop all
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return pool.submit(f, *args)
        finally:
            signal.signal(signal.SIGINT, before)

    try:
        yield submit
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()


def _start(lock: Any, slots: Any) -> None:
    """In a new process: one thread, a line for its progress bar, an end with its parent's."""
    global slot
    slot = slots.get()
    tqdm.set_lock(lock)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    keep_freed_memory()
