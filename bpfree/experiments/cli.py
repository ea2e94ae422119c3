"""The command ``bpfree``: list the recorded experiments, run them, report them."""

from __future__ import annotations

import argparse
import codecs
import math
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

import torch
from tqdm import tqdm

from ..data import DamagedFile
from ..training.device import PRECISIONS, keep_freed_memory
from ..training.fit import OutOfTime
from ..training.ranks import Ranks, ranks
from ..training.workers import cores
from . import bench, recipes, results
from .recipe import Recipe
from .record import assist, record, record_at_once

PLAIN = defaultdict(lambda: "?", {ord("±"): "+-"})  # of what we print beyond ASCII


def _seeds(text: str) -> list[int]:
    """'0:3' is 0, 1, 2; '5' is 5; '0,4' is 0 and 4."""
    start, colon, stop = text.partition(":")
    try:
        seeds = [*range(int(start), int(stop))] if colon else [int(s) for s in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(
            f"seeds must look like 0:3, 5 or 0,4, all distinct; got {text!r}"
        )
    return seeds


def _count(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


def _device(text: str) -> str:
    """A device that this machine has, the CPU or an NVIDIA GPU."""
    try:
        if torch.device(text).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {reason}") from error
    return text


def _duration(text: str) -> float:
    """'9m', '90s', '1.5h' as seconds."""
    try:
        seconds = float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]
    except (ValueError, LookupError):
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"a time must look like 90s, 9m or 1.5h; got {text!r}")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bpfree", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    names, device, folder = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    names.add_argument("names", nargs="*", metavar="NAME", help="recipes, as `bpfree list` says")
    device.add_argument("--device", type=_device, default="cpu", help="cpu or cuda (default: cpu)")
    folder.add_argument(
        "--results", metavar="DIR",
        help="default: figures/results of the checkout; without one, of this folder, and what is"
        " not there is read from the package",
    )  # fmt: skip

    def command(name: str, does: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=does, parents=[*parents, folder])

    command("list", "the recipes, and which are recorded")
    command("report", "the table of the paper's numbers and ours", names)
    command("bench", "step times and memory of each rule beside autograd", device)
    run = command("run", "train what is not recorded yet, and record it", names, device)
    run.add_argument("--all", action="store_true", help="every recipe, by priority")
    run.add_argument(
        "--budget", type=_duration, metavar="TIME",
        help="such as 9m, 90s or 2h: no epoch but a seed's first is begun that would end later; the"
        " same command goes on from there",
    )  # fmt: skip
    run.add_argument(
        "--jobs", type=_count, metavar="N",
        help="seeds trained at once on a CPU, a process and a thread each (default: all cores; 1:"
        " in this process, with PyTorch's threads)",
    )  # fmt: skip
    run.add_argument("--seeds", type=_seeds, help="0:3, 5 or 0,4 (default: the recipe's)")
    run.add_argument(
        "--save-every", type=_duration, metavar="TIME", default=600.0,
        help="checkpoints within an epoch (default: 10m), beside that after each",
    )  # fmt: skip
    run.add_argument("--precision", choices=PRECISIONS, default="float32")
    run.add_argument("--compile", action="store_true", help="torch.compile the step: for long runs")
    run.add_argument("--data", metavar="DIR", help="folder of the data sets (else BPFREE_DATA)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _list(args: argparse.Namespace) -> None:
    width = max(map(len, recipes.RECIPES))
    for name, recipe in recipes.RECIPES.items():
        found = results.path(name, args.results).exists()
        done = ", ".join(results.read(name, args.results)["runs"]) if found else ""
        state = f"seeds {done}" if done else "not recorded"
        print(f"{name:{width}}  {recipe.epochs:4d} epochs  {state}")


def _run(args: argparse.Namespace) -> None:
    """Under ``torchrun`` all ranks come here: the first runs what is to be run, the others help."""
    with ranks(args.device) as team:
        if team.rank > 0:
            return assist(team, args.data)
        try:
            _run_all(args, team)
        except OutOfTime:
            team.first(lambda: None)
            raise
        team.first(lambda: None)


def _run_all(args: argparse.Namespace, team: Ranks) -> None:
    if args.all == bool(args.names):
        raise ValueError("name the recipes to run, or say --all, not both (bpfree list)")
    chosen = [recipes.get(name) for name in dict.fromkeys(args.names or recipes.RECIPES)]
    on_cpu = torch.device(args.device).type == "cpu"
    if args.jobs and not on_cpu:
        raise ValueError("--jobs is for a CPU: a GPU trains all seeds of a recipe at once")
    if args.jobs and team.size > 1:
        raise ValueError(f"--jobs is for one process, got {team.size} that torchrun started")
    options = dict(
        data_root=args.data, device=args.device, precision=args.precision, compile=args.compile,
        folder=args.results, progress=not args.quiet, save_every=args.save_every,
        deadline=None if args.budget is None else time.monotonic() + args.budget,
    )  # fmt: skip
    if results.INSTALLED:
        _say(f"results go to {results.place(args.results).resolve()}")
    late = None
    if on_cpu and team.size == 1 and (jobs := args.jobs or cores()) > 1:
        ended = record_at_once(chosen, args.seeds, jobs, **options)
    else:
        options |= {"ranks": team}
        ended = ((r, _attempt(r, args.seeds or r.seeds, options)) for r in chosen)
    with closing(ended):
        for recipe, result in ended:
            late = late or (result if isinstance(result, OutOfTime) else None)
            if isinstance(result, dict):
                accuracy = results.spread(results.final(result))
                unit = "" if accuracy == "diverged" else " %"
                count = len(result["runs"])
                told = f"{accuracy}{unit} over {count} seeds" if count else "no seed recorded yet"
                _say(f"{recipe.name}: {told}")
            elif args.all and isinstance(result, (FileNotFoundError, DamagedFile)):
                _say(f"{recipe.name}: not run, {result}")
            elif not isinstance(result, OutOfTime):
                raise result
    if late:
        raise late


def _say(line: str) -> None:
    """A line above the progress bars, now."""
    tqdm.write(line)
    sys.stdout.flush()


def _attempt(recipe: Recipe, seeds: Sequence[int], options: dict) -> dict | Exception:
    """The record, or what kept one from it."""
    try:
        return record(recipe, seeds, **options)
    except Exception as error:
        return error


def _write_what_the_terminal_knows() -> None:
    """Output in an encoding without a character has "+-" for the plus-minus sign, else "?"."""
    codecs.register_error("bpfree", lambda e: (e.object[e.start : e.end].translate(PLAIN), e.end))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file of its own kind may stand there
            stream.reconfigure(errors="bpfree")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Exit status 2: a mistake or a full disk, told in one line; 3: out of time."""
    _write_what_the_terminal_knows()
    args = _parser().parse_args(argv)
    keep_freed_memory()
    if threading.current_thread() is threading.main_thread():  # a batch system's end is Ctrl-C too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.command == "list":
            _list(args)
        elif args.command == "run":
            _run(args)
        elif args.command == "bench":
            print(bench.table(bench.run(args.device, args.results)))
        else:
            print(results.table(args.names or list(recipes.RECIPES), args.results))
        sys.stdout.flush()
        return 0
    except OutOfTime as error:
        status, told = 3, f"{error}; the same command goes on from there"
    except BrokenProcessPool:
        status, told = 2, ("a process that trained was killed (out of memory?); the same command "
                           "goes on from there")  # fmt: skip
    except KeyboardInterrupt:
        status, told = 130, "interrupted; `bpfree run` goes on where it was"
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        status, told = 2, str(error)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # no C++ compiler, mostly
        status, told = 2, f"cannot compile the step: {str(error).splitlines()[0]}"
    print(f"bpfree: {told}", file=sys.stderr)
    return status
