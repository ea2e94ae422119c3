"""Several seeds at once: the records of one at a time, none lost, one interrupt for all."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_checkpoint import SMALL

from bpfree import recipes, results
from bpfree.experiments import cli
from bpfree.experiments.record import record, record_at_once
from bpfree.training.fit import OutOfTime
from bpfree.training.workers import processes

pytestmark = pytest.mark.processes
SHORT = dataclasses.replace(SMALL, name="short", epochs=2, seeds=(0, 1, 2))
OTHER = dataclasses.replace(SHORT, name="other", rule="PEPITA", seeds=(0, 1))


def numbers(name, folder):
    runs = results.read(name, folder)["runs"]
    return {s: {k: v for k, v in r.items() if k != "seconds"} for s, r in runs.items()}


def test_seeds_at_once_have_the_records_of_seeds_one_at_a_time(tmp_path):
    ended = list(record_at_once([SHORT, OTHER], None, 2, folder=tmp_path / "at-once"))
    assert {recipe.name: len(result["runs"]) for recipe, result in ended} == {
        "short": 3,
        "other": 2,
    }
    for recipe in (SHORT, OTHER):
        record(recipe, recipe.seeds, folder=tmp_path / "in-turn")
        at_once, in_turn = (numbers(recipe.name, tmp_path / f) for f in ("at-once", "in-turn"))
        assert list(at_once) == [str(s) for s in recipe.seeds]
        assert at_once == in_turn
        assert {r["device"] for r in at_once.values()} == {"CPU, 1 thread"}
    assert sorted(f.name for f in (tmp_path / "at-once").iterdir()) == ["other.json", "short.json"]


def test_a_rule_of_a_readers_own_is_recorded_by_module_and_class(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import bpfree\n\n\nclass Mine(bpfree.FeedbackAlignment):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine, theirs, shuffled = (
        dataclasses.replace(SHORT, name=rule.replace(":", "-"), rule=rule, seeds=(0, 1))
        for rule in ("mine:Mine", "FeedbackAlignment", "Shuffledmine:Mine")
    )
    assert not [e for _, e in record_at_once([mine, theirs, shuffled], None, 2, folder=tmp_path)
                if isinstance(e, Exception)]  # fmt: skip
    curves = [results.final(results.read(r.name, tmp_path)) for r in (mine, theirs, shuffled)]
    assert curves[0] == curves[1] != curves[2]
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        dataclasses.replace(mine, rule="nowhere:Mine").make(torch.Generator())


COMMAND = """if True:
    import dataclasses, signal, sys
    from bpfree import recipes
    from bpfree.experiments import cli
    from bpfree.experiments.recipe import Recipe
    if __name__ == "__main__":  # a process for a seed imports this file too
        small = Recipe("small", "digits", ("mlp", (64, 32, 10), {}), "Backprop", {}, EPOCHS, 0.05)
        recipes.RECIPES["small"] = small
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        sys.exit(cli.main(["run", "small", "--jobs=2", "--seeds=0:4", *sys.argv[1:]]))
"""


@pytest.fixture
def command(tmp_path):
    """Starts `bpfree run` on a recipe of so many epochs, in a process group of its own."""
    started = []

    def start(epochs, *args):
        file = tmp_path / f"command-{len(started)}.py"
        file.write_text(COMMAND.replace("EPOCHS", str(epochs)))
        argv = [sys.executable, str(file), "--results", str(tmp_path / "results"), *args]
        started.append(
            subprocess.Popen(
                argv,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_two_commands_that_record_one_recipe_at_once_lose_no_seed(command, tmp_path):
    both = [command(3, "--quiet") for _ in range(2)]
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert list(results.read("small", tmp_path / "results")["runs"]) == ["0", "1", "2", "3"]


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for two minutes")


def test_one_interrupt_stops_all_and_loses_nothing(command, tmp_path):
    folder = tmp_path / "results"
    process = command(10**6)
    wait_for(lambda: len(list(folder.glob("small.*.ckpt"))) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C: to the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "small 0" in err  # a bar each
    assert "small 1" in err
    assert err.rstrip().endswith("bpfree: interrupted; `bpfree run` goes on where it was")
    assert "Traceback" not in err
    epochs = [torch.load(f, weights_only=True)["content"]["epoch"] for f in folder.glob("*.ckpt")]
    assert len(epochs) == 2
    assert min(epochs) >= 1
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        wait_for(lambda: os.killpg(process.pid, 0))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_command_that_is_ended_from_outside(how, command, tmp_path):
    folder = tmp_path / "results"
    process = command(10**6, "--quiet")
    wait_for(lambda: len(list(folder.glob("small.*.ckpt"))) == 2)
    os.kill(process.pid, how)  # it alone
    process.wait(timeout=60)
    assert process.returncode == (130 if how == signal.SIGTERM else -signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.killpg(process.pid, 0))


def test_a_process_that_is_killed_is_told_of_in_a_line(command, tmp_path):
    process = command(10**6, "--quiet")
    wait_for(lambda: len(list((tmp_path / "results").glob("small.*.ckpt"))) == 2)
    listed = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"],
                            capture_output=True, text=True, check=True)  # fmt: skip
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("bpfree: a process that trained was killed")
    assert err.count("\n") == 1


def test_a_budget_holds_in_every_process(tmp_path):
    """That a run stops in its middle is tested with one process; this is about who is told."""
    given = dict(folder=tmp_path, deadline=time.monotonic())
    ended = dict((recipe.name, r) for recipe, r in record_at_once([SHORT, OTHER], None, 2, **given))
    assert {name: type(r) for name, r in ended.items()} == {"short": OutOfTime, "other": OutOfTime}
    assert not list(tmp_path.iterdir())


def test_processes_are_started_from_any_thread():
    with ThreadPoolExecutor(1) as thread, processes(1) as submit:
        assert thread.submit(lambda: submit(abs, -1).result()).result() == 1


def test_what_is_not_there_is_told_for_each_recipe_or_ends_the_command(
    tmp_path, monkeypatch, capsys
):
    lacking = dataclasses.replace(SHORT, name="lacking", data="mnist")
    monkeypatch.setattr(recipes, "RECIPES", {"lacking": lacking, "short": SHORT})
    monkeypatch.setenv("BPFREE_DATA", str(tmp_path / "nowhere"))
    args = ["--quiet", "--jobs=2", "--results", str(tmp_path)]
    assert cli.main(["run", "--all", *args]) == 0
    printed = capsys.readouterr().out
    assert "lacking: not run" in printed
    assert "short: " in printed
    assert cli.main(["run", "lacking", *args]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5", ""])
def test_malformed_jobs_are_refused(jobs, capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--all", f"--jobs={jobs}"])
    assert repr(jobs) in capsys.readouterr().err


def test_a_terminal_that_knows_only_ascii_gets_ascii(tmp_path):
    file = tmp_path / "ascii.py"
    file.write_text(COMMAND.replace("EPOCHS", "1"))
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(file), "--quiet", "--results", str(tmp_path)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    assert "small: " in done.stdout
    assert "+-" in done.stdout
    report = [sys.executable, "-m", "bpfree", "report", "mnist-fc-bp"]
    done = subprocess.run(report, env=env, capture_output=True, text=True, check=True)
    assert "+-" in done.stdout
    assert done.stdout.isascii()
