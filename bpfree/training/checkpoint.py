"""Files that are whole or not there: atomic writes, and checkpoints that name what is wrong."""

from __future__ import annotations

import functools
import hashlib
import numbers
import os
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .lockstep import Lockstep


def write_atomic(file: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let ``write`` fill a new file and put it in the place of ``file`` at once, or not at all.

    Raises:
        OSError: if the disk is full, say; the old file is untouched then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def digest(tree: Any) -> str:
    """sha256 of nested dicts, lists, tensors and plain values, bit for bit; functions count by
    their code and what they hold, other objects by their kind and attributes."""
    sha, inside = hashlib.sha256(), set()

    def add(value: Any) -> None:
        if id(value) in inside:  # it holds itself
            return
        inside.add(id(value))
        add_new(value)
        inside.remove(id(value))

    def add_new(value: Any) -> None:
        if isinstance(value, dict):
            add([*value.items()])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, (set, frozenset)):
            add(sorted(map(digest, value)))
        elif isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            add([str(value.dtype), value.shape, value.tobytes()])
        elif isinstance(value, types.CodeType):
            add([value.co_code, value.co_names, value.co_consts])
        elif isinstance(value, types.MethodType):
            add([value.__func__, value.__self__])
        elif isinstance(value, functools.partial):
            add([value.func, value.args, value.keywords])
        elif isinstance(value, (str, bytes, numbers.Number, type(None), torch.dtype, range)):
            sha.update(f"{type(value).__name__}:{value!r};".encode())
        else:
            named = value if hasattr(value, "__qualname__") else type(value)
            add(f"{named.__module__}.{named.__qualname__}")
            if isinstance(value, types.FunctionType):
                add([value.__code__, value.__defaults__, value.__kwdefaults__])
                for cell in value.__closure__ or ():
                    with suppress(ValueError):  # it is empty
                        add(cell.cell_contents)
            elif not isinstance(value, (type, torch.nn.Module, torch.Generator)):
                add(getattr(value, "__dict__", None))
            elif isinstance(value, torch.nn.Module):
                add({k: v for k, v in vars(value).items() if not k.startswith("_")})
                add(list(value.children()))

    add(tree)
    return sha.hexdigest()


def _computes(option: object, device: torch.device) -> object:
    """An option; if it is a function of a tensor, also what it makes of small and large numbers,
    since its name, and its code, may stand for another function tomorrow."""
    if not isinstance(option, (types.FunctionType, functools.partial, torch.nn.Module)):
        return option
    a = torch.linspace(-2, 2, 192, device=device)
    try:
        return option, [option(scale * a.view(2, 3, 4, 8)) for scale in (1e-3, 1.0, 1e3)]
    except Exception:  # of whatever kind: it is no function of a tensor
        return option


def fingerprint(lockstep: Lockstep, seeds: list[int], rates: list[float], probe: int) -> str:
    """Of everything that decides a run: a checkpoint of another one must not continue it."""
    rule, data, opt = lockstep.rules[0], lockstep.data, lockstep.opt
    shapes = {name: list(p.shape) for name, p in lockstep.params.items()}
    start = [lockstep.state_dict()[k] for k in ("params", "state", "generators")]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    torchs = {*vars(torch.nn.Module()), "net", "_plan", "_calls", "_first"}
    parts = [
        {**vars(rule), "modules": [*rule.children()]},
        *({**vars(b), "f": b.activation, "pool": b.pool} for b in rule.net),
    ]
    options = [
        {k: _computes(v, lockstep.device) for k, v in part.items() if k not in torchs}
        for part in parts
    ]
    return digest([
        type(rule), type(opt).__name__, repr(rule.net), options, shapes, list(lockstep.learning),
        start, seeds, rates, probe, lockstep.batch_size, lockstep.precision, lockstep.compile,
        groups, data.scale, data.shift, data.checksum, lockstep.changes,
    ])  # fmt: skip


def save(file: Path, content: dict, fingerprint: str) -> None:
    """Write tensors and plain values so that ``load`` can tell damage and foreign files.

    Args:
        content: nested dicts and lists of tensors and plain values; no code is pickled.
        fingerprint: of the settings that the content belongs to.
    """
    whole = {"fingerprint": fingerprint, "digest": digest(content), "content": content}
    write_atomic(file, lambda f: torch.save(whole, f))


def load(file: Path, fingerprint: str) -> dict | None:
    """What ``save`` wrote, or None if there is no file.

    Raises:
        ValueError: if the file is damaged, is none of ours, or belongs to other settings; it is
            left as it is.
    """
    if not file.exists():
        return None
    advice = "move it away to start anew"
    try:
        whole = torch.load(file, weights_only=True, map_location="cpu")
        if not isinstance(whole, dict) or not {"content", "digest", "fingerprint"} <= set(whole):
            raise ValueError("it has no fingerprint")
        theirs, content = whole["fingerprint"], whole["content"]
        if digest(content) != whole["digest"]:
            raise ValueError("its checksum does not match")
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is damaged or no checkpoint ({reason}); {advice}") from error
    if theirs != fingerprint:
        raise ValueError(f"{file} belongs to a run with other settings or data; {advice}")
    return content
