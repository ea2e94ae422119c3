"""Several processes are as one: the same gradients, the same end after a kill, and a pipeline that
nothing comes down.

A *world* is a process of its own that imports once and forks the ranks; they meet at a file, so no
port is needed, and each leaves its result in a file.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracles import RULES, generator
from test_images import folder_of_images
from torch import nn

import bpfree
from bpfree import Stage, Stages, recipes, results
from bpfree.experiments import cli, pipeline
from bpfree.experiments.recipe import Recipe
from bpfree.images import Images
from bpfree.training import distributed
from bpfree.training.distributed import train
from bpfree.training.ranks import Ranks, ranks

pytestmark = pytest.mark.processes
SOURCES = [str(Path(__file__).parent), str(Path(bpfree.__file__).parents[1])]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(SOURCES)}
ENV["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see tools/slurm.sh


def python(*args, **options):
    """A new interpreter that imports this package and these tests."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)], env=ENV, text=True,
        cwd=SOURCES[0],  # where no other copy of the package lies
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def world(folder, jobs):
    """What each rank's ``f(ranks, folder)`` gave, for each (f's name, number of ranks) of jobs."""
    process = python("-c", f"import test_distributed as t; t.serve({str(folder)!r}, {jobs!r})")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    files = [[folder / f"{name}.{size}.{rank}" for rank in range(size)] for name, size in jobs]
    return [[torch.load(f, weights_only=False) if f.exists() else None for f in of] for of in files]


def serve(folder, jobs):
    """In the process of a world: fork the ranks of one job after the other."""
    torch.set_num_threads(1)
    digits(), bpfree.mlp(2, 2)  # what PyTorch imports late, in seconds, it imports here once
    torch.vmap(torch.sin)(torch.ones(1))
    torch.optim.SGD([torch.ones(1)]).step()
    for name, size in jobs:
        pids = []
        for rank in range(size):
            if (pid := os.fork()) == 0:
                job(Path(folder), name, rank, size)
            pids.append(pid)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(ends) and (name[:6], ends) != ("killed", [0, -signal.SIGKILL]):
            os._exit(1)


def job(folder, name, rank, size):
    """One rank's life."""
    try:
        meeting = f"file://{folder}/meet.{name}.{size}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
        with ranks() as team:
            result = globals()[name](team, folder)
            torch.save(result, folder / f"{name}.{size}.{rank}")
        if name[:6] != "killed":
            dist.barrier()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(1)


# ---- data parallel -------------------------------------------------------------------------------

KINDS = {
    "backprop": ("backprop", dict(activation="tanh", bias=True)),
    "pepita": ("pepita", dict(activation="relu", dropout=0.4)),
    "dfa": ("dfa", dict(activation="tanh", dropout=0.3, bias=True)),
    "kp": ("kp", dict(activation="tanh")),
}


def make(kind, g):
    rule, options = KINDS[kind]
    return RULES[rule](bpfree.mlp(64, 12, 9, 10, generator=g, **options).double(), generator=g)


@cache
def digits():
    data = bpfree.load()
    few = {"train_x": 100, "train_y": 100, "test_x": 31, "test_y": 31}
    return dataclasses.replace(data, **{k: getattr(data, k)[:n] for k, n in few.items()})


def fitted(team, folder=None, **options):
    """Parameters and curves of every kind of rule after two epochs, seeds in a stack and alone."""
    found = {}
    options = dict(epochs=2, batch_size=24, probe=16, seeds=(0, 1), ranks=team) | options
    for kind in KINDS:
        for vectorize in (False, True):
            run = bpfree.fit(partial(make, kind), digits(), vectorize=vectorize, **options)
            learnt = [{k: p.detach().clone() for k, p in r.params().items()} for r in run.rules]
            curves = {k: v for k, v in vars(run).items() if isinstance(v, torch.Tensor)}
            found[kind, vectorize] = learnt, curves
    return found


def gradients(team, folder=None):
    """Each rule's gradient on a batch that the ranks share, averaged."""
    data, found = digits(), {}
    x, y = data.inputs(data.train_x[:24], torch.float64), data.train_y[:24]
    for kind in KINDS:
        rule = make(kind, generator(3))
        masks = {l: team.share(m) for l, m in rule.net.masks(24, generator(5)).items()}
        u = rule.update(rule.params(), rule.state(), team.share(x), team.share(y), masks=masks)
        found[kind] = dict(zip(u.grads, team.average([*u.grads.values()]), strict=True))
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """All that needs no kill, in one world."""
    jobs = [("gradients", 2), ("gradients", 4), ("fitted", 2), ("fitted", 4), ("piped", 2),
            ("piped", 3), ("shared", 2), ("refused", 2), ("lost", 2), ("whole", 2),
            ("killed_data", 2), ("killed_pipe", 2), ("resumed", 2), ("recorded", 2),
            ("pictures", 2), ("measured", 2)]  # fmt: skip
    folder = tmp_path_factory.mktemp("world")
    folder_of_images(folder / "images")
    found = dict(zip(jobs, world(folder, jobs), strict=True))
    return {**found, "folder": folder}


close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", [2, 4])
def test_the_mean_of_the_ranks_gradients_is_that_of_the_joined_batch(size, worlds):
    alone = gradients(Ranks())
    for kind, grads in alone.items():
        assert all(g.abs().max() > 1e-6 for g in grads.values()), kind
        for theirs in worlds["gradients", size]:
            close(theirs[kind], grads)
            assert all(torch.equal(g, worlds["gradients", size][0][kind][k])
                       for k, g in theirs[kind].items())  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_fit_on_ranks_is_fit_in_one_process(size, worlds):
    alone = fitted(Ranks())
    for theirs in worlds["fitted", size]:
        for key, (learnt, curves) in alone.items():
            close(theirs[key][0], learnt)
            torch.testing.assert_close(theirs[key][1], curves, rtol=1e-9, atol=1e-5)


# ---- stages --------------------------------------------------------------------------------------


def stages(n=2, seed=0, dropout=0.0, width=64):
    """n stages of a small network in float64."""
    g, made = generator(seed), []
    for _ in range(n):
        body = nn.Sequential(
            nn.Flatten(), bpfree.mlp(width, 12, 12, activation="tanh", generator=g),
            nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(dropout),
        )  # fmt: skip
        made.append(Stage(body, bpfree.mlp(12, 10, bias=True, generator=g)))
        width = 12
    return Stages(made).double()


SETTINGS = dict(epochs=3, batch_size=8, schedule=lambda epoch: 0.5**epoch)


def weights(modules):
    return {k: v.clone() for k, v in modules.state_dict().items()}


def piped(team, folder=None):
    """Stages after training, each rank's own to begin with; and what they said of it."""
    torch.manual_seed(team.rank)
    parts = stages(max(2, team.size), seed=team.rank)
    curves = train(parts, digits(), pipeline=team.size > 1, ranks=team, **SETTINGS)
    return weights(parts), tuple(curves)


def shared(team, folder=None):
    """The same with all stages in each rank, without batch statistics."""
    parts = stages()
    for stage in parts:
        stage.body[2] = nn.Identity()
    curves = train(parts, digits(), pipeline=False, ranks=team, **SETTINGS)
    return weights(parts), tuple(curves)


@pytest.mark.parametrize("size", [2, 3])
def test_a_pipeline_is_one_process(size, worlds):
    parts = stages(size)
    before = weights(parts)
    curves = train(parts, digits(), pipeline=False, **SETTINGS)
    after = weights(parts)
    moved = [k for k in after if not torch.equal(before[k], after[k])]
    assert len(moved) == len(after)
    for theirs, told in worlds["piped", size]:
        close(theirs, after)
        close(told, tuple(curves))


def test_a_frozen_stage_rests_and_the_next_learns():
    parts = stages()
    parts[0].requires_grad_(False)
    before = {k: p.clone() for k, p in parts.named_parameters()}
    train(parts, digits(), pipeline=False, **SETTINGS)
    moved = {k[0] for k, p in parts.named_parameters() if not torch.equal(p, before[k])}
    assert moved == {"1"}


def test_stages_on_shares_of_a_batch_are_one_process(worlds):
    expected, curves = shared(Ranks())
    for theirs, told in worlds["shared", 2]:
        close(theirs, expected)
        close(told, curves)


def pictures(team, folder):
    """A folder of images, by workers: in a pipeline and on shares of a batch, or in one process."""
    images, found = Images(str(folder / "images"), side=10, workers=1), []
    for piped in (False, team.size > 1):
        parts = stages(width=300)
        for stage in parts:
            stage.body[2] = nn.Identity()
        curves = train(parts, images, epochs=2, batch_size=4, pipeline=piped, ranks=team)
        found.append((weights(parts), tuple(curves)))
    return found


def test_folders_of_images_are_trained_on_by_ranks_as_by_one_process(worlds):
    expected = pictures(Ranks(), worlds["folder"])
    assert expected[0][1][0].shape == (2, 2)
    for theirs in worlds["pictures", 2]:
        close(theirs, expected)


# ---- what is refused -----------------------------------------------------------------------------


def refused(team, folder):
    """What two ranks are told."""

    def said(f):
        with pytest.raises(ValueError) as error:
            f()
        return str(error.value)

    fit = partial(bpfree.fit, partial(make, "dfa"), digits(), epochs=1, ranks=team)
    return [
        said(lambda: fit(batch_size=25)),
        said(lambda: train(stages(), digits(), epochs=1, batch_size=9, pipeline=False, ranks=team)),
        said(lambda: train(stages(3), digits(), epochs=1, ranks=team)),
    ]  # fmt: skip


def test_what_ranks_cannot_share_is_refused_by_name_by_all(worlds):
    for batch, again, few in worlds["refused", 2]:
        assert "batch_size must be a multiple of the number of ranks (2), got 25" in batch
        assert "batch_size must be a multiple of the number of ranks (2), got 9" in again
        assert "a rank per stage, at least 2, got 2 ranks and 3 stages" in few
        assert "torchrun --nproc-per-node 3" in few


@pytest.mark.parametrize("count", [1, 2])
def test_a_pipeline_of_one_process_is_refused(count):
    with pytest.raises(ValueError, match=f"at least 2, got 1 ranks and {count} stages"):
        train(stages(count), digits(), epochs=1)


@pytest.mark.parametrize("changes, said", [
    ({"epochs": 0}, "epochs must be at least 1"), ({"batch_size": 101}, "got 1 and 101"),
])  # fmt: skip
def test_a_misuse_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        train(stages(), digits(), pipeline=False, **{"epochs": 1, **changes})


def lost(team, folder):
    """What the survivor of two is told."""
    if team.rank == 1:
        torch.save(None, folder / "lost.2.1")
        os._exit(0)
    with pytest.raises(ConnectionError) as error:
        [team.average([torch.ones(3)]) for _ in range(1000)]
    torch.save(str(error.value), folder / "lost.2.0")
    os._exit(0)


def test_the_loss_of_a_rank_is_an_error_of_its_own_kind(worlds):
    told, _ = worlds["lost", 2]
    assert told.startswith("another rank was lost")


# ---- a rank that is killed -----------------------------------------------------------------------


def data_parallel(team, folder):
    """A rule with dropout on shares of a batch, saved before every step."""
    settings = dict(epochs=3, batch_size=10, checkpoint=folder / "data.ckpt", save_every=0)
    run = bpfree.fit(partial(make, "pepita"), digits(), ranks=team, **settings)
    return {k: p.detach() for k, p in run.rules[0].params().items()}, run.train_loss


def pipelined(team, folder):
    """Stages with torch's own dropout, saved after every fourth step."""
    torch.manual_seed(team.rank)
    distributed.LOOK = 4
    parts, settings = stages(dropout=0.3), dict(checkpoint=folder / "pipe.ckpt", save_every=0)
    curves = train(parts, digits(), ranks=team, **settings, **SETTINGS)
    return weights(parts), curves.loss


def whole(team, folder):
    return [way(team, folder / "whole") for way in (data_parallel, pipelined)]


def resumed(team, folder):
    """Where it goes on, and the end."""
    rule, pipe = (
        torch.load(folder / f, weights_only=True)["content"] for f in ("data.ckpt", "pipe.ckpt")
    )
    dist.barrier()
    steps = [(rule["epoch"], rule["lockstep"]["epoch"]["step"]), (pipe["epoch"], pipe["step"])]
    torch.rand(team.rank + 1)
    return steps, [way(team, folder) for way in (data_parallel, pipelined)]


def die_at(owner, name, count, team):
    """The call of that number, counted from 1, kills its process if that is rank 1."""
    calls, original = iter(range(1, 10**9)), getattr(owner, name)

    def counted(*args):
        if next(calls) == count and team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(owner, name, counted)


def killed_data(team, folder):
    die_at(Ranks, "average", 17, team)  # an epoch has ten steps and a test
    with pytest.raises(ConnectionError):
        data_parallel(team, folder)


def killed_pipe(team, folder):
    die_at(distributed.RankRun, "learn", 19, team)  # an epoch has twelve steps
    with pytest.raises(ConnectionError):
        pipelined(team, folder)


def test_after_the_kill_of_a_rank_the_same_calls_come_to_the_same_end(worlds):
    for (steps, theirs), expected in zip(worlds["resumed", 2], worlds["whole", 2], strict=True):
        assert steps == [(1, 5), (1, 4)]  # each in the middle of its second epoch
        for (learnt, loss), (all_of_it, losses) in zip(theirs, expected, strict=True):
            assert all(torch.equal(learnt[k], p) for k, p in all_of_it.items())
            assert torch.equal(loss, losses)


# ---- the command ---------------------------------------------------------------------------------

SMALL = Recipe(
    "small", "digits", ("mlp", (64, 12, 10), {"dropout": 0.2}), "PEPITA", {}, epochs=3, lr=0.05,
    seeds=(0, 1),
)  # fmt: skip


def recorded(team, folder):
    """`bpfree run` in a world that has met already."""
    recipes.RECIPES["small"] = SMALL
    return cli.main(["run", "small", "--quiet", "--results", str(folder / "runs")])


def numbers(folder):
    runs = results.read("small", folder)["runs"]
    return {s: {k: v for k, v in r.items() if k != "seconds"} for s, r in runs.items()}


COMMAND = """if True:
    import os, sys
    import test_distributed as t
    t.recipes.RECIPES["small"] = t.SMALL
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        t.die_at(t.Ranks, "average", 50, t.Ranks(int(os.environ["RANK"]), 2))
    sys.exit(t.cli.main(["run", "small", "--quiet", *sys.argv[1:]]))
"""


def test_torchrun_starts_the_command_again_and_it_records_what_it_would_have(
    worlds, tmp_path, tmp_path_factory
):
    (tmp_path / "command.py").write_text(COMMAND)
    process = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        tmp_path / "command.py", "--results", tmp_path, "--save-every=0.001s",
    )  # fmt: skip
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "another rank was lost" in out or "exitcode: -9" in out
    assert worlds["recorded", 2] == [0, 0]
    reference = worlds["folder"] / "runs"
    assert numbers(tmp_path) == numbers(reference)
    assert {run["ranks"] for run in numbers(reference).values()} == {2}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["command.py", "small.json"]


def measured(team, folder):
    """The benchmark, small."""
    pipeline.WIDTH, pipeline.BATCH = 8, 16
    return pipeline.measure(team, steps=2, rounds=1)


def test_the_benchmark_has_every_arm_and_its_ratio_to_one_process(worlds):
    table, _ = worlds["measured", 2]
    assert [*table] == [
        "local, one process", "local, pipeline", "backprop, one process", "backprop, pipeline",
        "backprop, pipeline, 4 parts",
    ]  # fmt: skip
    assert all(row["images_per_s"] > 0 and row["ratio"] > 0 for row in table.values())
    assert table["local, one process"]["ratio"] == table["backprop, one process"]["ratio"] == 1


def test_the_benchmark_refuses_one_process():
    with pytest.raises(ValueError, match="needs two ranks, got 1"):
        pipeline.measure(Ranks())
