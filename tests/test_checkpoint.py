"""Interrupted runs: the same bits as without the interruption, and nothing finished is lost."""

import dataclasses
import json
import math
import os
import random
import signal
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import bpfree
from bpfree import recipes, results
from bpfree.experiments import cli
from bpfree.experiments.recipe import Recipe
from bpfree.experiments.released import ReleasedEKDAA
from bpfree.training import checkpoint
from bpfree.training import fit as train

pytestmark = pytest.mark.processes
SMALL = Recipe(
    name="small",
    data="digits",
    network=("mlp", (64, 32, 10), {"dropout": 0.2}),
    rule="KolenPollack",
    options={},
    epochs=6,
    lr=0.05,
    weight_decay=1e-3,
    milestones=(4,),
    seeds=(0, 1),
)
MIRRORED = dataclasses.replace(SMALL, rule="PEPITA", options={"mirroring": 2})
NOT_COMPARED = ("seconds",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "small", SMALL)
    return tmp_path


def curves(folder):
    runs = results.read("small", folder)["runs"]
    return {s: {k: v for k, v in r.items() if k not in NOT_COMPARED} for s, r in runs.items()}


def run(folder, *args):
    return cli.main(["run", "small", "--quiet", "--jobs=1", "--results", str(folder), *args])


def fitted(recipe=SMALL, shift=0.0, **changes):
    """A short vectorised run; its trained parameters and loss."""
    keywords = dict(epochs=4, seeds=(0, 1), vectorize=True, batch_size=128, probe=32)
    keywords |= dict(optimizer=partial(torch.optim.Adam, lr=1e-3)) | changes
    data = dataclasses.replace(bpfree.load(), shift=shift)
    return bpfree.fit(recipe.make, data, **keywords)


def bits(a):
    return {
        f"{i}.{name}": p.detach().clone()
        for i, rule in enumerate(a.rules)
        for name, p in {**rule.params(), **rule.state()}.items()
    }


def interrupt(monkeypatch, after):
    """Let training stop as if its time were up after so many epochs."""
    epochs = iter(range(10**6))
    original = train.Lockstep.train

    def limited(self, *args):
        if next(epochs) >= after:
            raise train.OutOfTime("test")
        return original(self, *args)

    monkeypatch.setattr(train.Lockstep, "train", limited)


def test_fifty_kills_at_random_moments_change_no_bit(folder, tmp_path_factory):
    run(tmp_path_factory.mktemp("warm"))  # imports and caches are not to be timed
    whole = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    run(whole)
    duration = time.monotonic() - start
    rng, kills, finished, limit = random.Random(0), 0, 0, min(0.6 * duration, 0.5)
    expected = curves(whole)
    target = folder / "0"
    while kills < 50:
        pid = os.fork()
        if pid == 0:
            # tqdm's own lock is shared with this process: killed with it, a child would hold it
            tqdm.set_lock(threading.RLock())
            os._exit(run(target))
        time.sleep(rng.uniform(0, limit))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            limit *= 1.05  # on a machine that is busier by now
        else:  # it had ended: compare, and start another
            finished += 1
            assert curves(target) == expected
            assert not list(target.glob("*.ckpt"))
            target = folder / str(finished)
    assert run(target) == 0
    assert curves(target) == expected
    assert finished + 1 >= 2  # runs did end between kills, so kills also met resumed ones


@pytest.mark.parametrize("recipe", [SMALL, MIRRORED], ids=lambda r: r.rule)
@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
def test_resumed_parameters_and_curves_are_those_of_an_uninterrupted_run(
    tmp_path, monkeypatch, after, vectorize, recipe
):
    train_it = partial(fitted, recipe, vectorize=vectorize)
    whole = train_it()
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(train.OutOfTime):
            train_it(checkpoint=tmp_path / "c")
    resumed = train_it(checkpoint=tmp_path / "c")
    for name, p in bits(whole).items():
        assert torch.equal(p, bits(resumed)[name]), name
    for field in ("train_loss", "train_accuracy", "test_accuracy", "angle", "norm"):
        assert torch.equal(getattr(whole, field), getattr(resumed, field)), field


def test_finished_checkpoint_trains_nothing_again(tmp_path, monkeypatch):
    first = fitted(checkpoint=tmp_path / "c")
    interrupt(monkeypatch, after=0)
    again = fitted(checkpoint=tmp_path / "c")
    assert torch.equal(first.train_loss, again.train_loss)


def test_checkpoint_holds_no_pickled_code(tmp_path):
    fitted(checkpoint=tmp_path / "c")
    whole = torch.load(tmp_path / "c", weights_only=True)
    assert set(whole["content"]["lockstep"]) == {"params", "state", "optimizer", "generators"}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": partial(torch.optim.Adam, lr=2e-3)},
        {"schedule": lambda epoch: 0.5},
        {"seeds": (0, 2)},
        {"batch_size": 64},
        {"epochs": 5},
        {"recipe": MIRRORED},
        {"shift": -0.5},
    ],
    ids=lambda c: next(iter(c)),
)
def test_checkpoint_of_other_settings_is_refused_and_left_alone(tmp_path, changes):
    file = tmp_path / "c"
    fitted(checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="other settings or data"):
        fitted(checkpoint=file, **changes)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [{"sign": -1}, {"presynaptic": "first"}, {"mirroring": 2}],
    ids=lambda o: next(iter(o)),
)
def test_checkpoint_of_other_options_of_the_rule_is_refused_and_left_alone(tmp_path, options):
    pepita, file = dataclasses.replace(SMALL, rule="PEPITA", options={}), tmp_path / "c"
    fitted(pepita, epochs=2, checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="other settings or data"):
        fitted(dataclasses.replace(pepita, options=options), epochs=2, checkpoint=file)
    assert file.read_bytes() == before


def test_options_held_in_a_dict_or_a_tensor_are_settings_too(tmp_path, few_digits):
    class Scaled(bpfree.Backprop):
        def __init__(self, net, options):
            super().__init__(net)
            self.scale = options

    def train(options, file):
        make = lambda g: Scaled(bpfree.mlp(64, 8, 10, generator=g), options)  # noqa: E731
        bpfree.fit(make, few_digits, epochs=1, checkpoint=tmp_path / file)

    pairs = (
        ({"a": 1}, {"a": 2}), (torch.ones(1), torch.zeros(1)), ({"f": [torch.tanh]}, {"f": [abs]}),
    )  # fmt: skip
    for i, (options, other) in enumerate(pairs):
        train(options, str(i))
        train(options, str(i))
        with pytest.raises(ValueError, match="other settings"):
            train(other, str(i))


def test_attributes_with_an_underscore_are_settings_too(tmp_path, few_digits):
    class Private(bpfree.Backprop):
        def __init__(self, net, k):
            super().__init__(net)
            self._k = k

    def train(k):
        make = lambda g: Private(bpfree.mlp(64, 8, 10, generator=g), k)  # noqa: E731
        bpfree.fit(make, few_digits, epochs=1, checkpoint=tmp_path / "c")

    train(1)
    with pytest.raises(ValueError, match="other settings"):
        train(2)


def test_functions_and_scales_are_settings_too(tmp_path, few_digits):
    def train(factor, scale=few_digits.scale):
        def make(g):
            net = bpfree.mlp(64, 8, 10, activation=lambda a: factor * a, generator=g)
            return bpfree.Backprop(net)

        data = dataclasses.replace(few_digits, scale=scale)
        bpfree.fit(make, data, epochs=1, checkpoint=tmp_path / "c")

    train(2.0)
    train(2.0)
    for other in ({"factor": 3.0}, {"factor": 2.0, "scale": 0.01}):
        with pytest.raises(ValueError, match="other settings"):
            train(**other)


class Scaled(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, a):
        return torch.tanh(self.k * a)


def scale(k, a):
    return k * a


OPTIONS = {  # a number -> an option that differs with it alone
    "function": lambda k: lambda a: torch.tanh(k * a),
    "far from zero": lambda k: lambda a: a.clamp(-1000 * k, 1000 * k),
    "default argument": lambda k: lambda a, b=k: a * b,
    "of no tensor": lambda k: lambda: k,
    "partial": lambda k: partial(scale, k),
    "method": lambda k: Scaled(k).forward,
    "module": Scaled,
    "in a list": lambda k: [lambda a: k * a],
    "in a dict": lambda k: {"f": lambda a: k * a},
    "array": lambda k: np.array([k]),
    "object": lambda k: SimpleNamespace(k=k),
    "set": lambda k: {"blocks": {2.0, k}},
    "range": lambda k: range(int(k)),
    "dtype": lambda k: torch.float32 if k > 0 else torch.float64,
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_of_a_rule_counts_by_what_it_holds_and_computes(kind, tmp_path, few_digits):
    class WithOption(bpfree.Backprop):
        def __init__(self, net, option):
            super().__init__(net)
            self.option = option

    def train(k):
        def make(g):
            return WithOption(bpfree.mlp(64, 8, 10, generator=g), OPTIONS[kind](k))

        bpfree.fit(make, few_digits, epochs=1, checkpoint=tmp_path / "c")

    train(1.0)
    train(1.0)
    with pytest.raises(ValueError, match="other settings"):
        train(-1.0 if kind != "far from zero" else 1.5)


@pytest.mark.parametrize("what", ["activation", "frozen", "rates"])
def test_modules_what_learns_and_rates_of_groups_are_settings_too(what, tmp_path, few_digits):
    def train(other):
        def make(g):
            f = Scaled(0.5 if other and what == "activation" else 1.0)
            net = bpfree.mlp(64, 10, 10, 10, activation=f, generator=g)
            if what == "frozen":
                net[1 + other].linear.weight.requires_grad_(False)
            return bpfree.Backprop(net)

        def sgd(params):
            rates = (0.1, 0.01) if other and what == "rates" else (0.01, 0.1)
            first, *rest = params
            groups = [{"params": p, "lr": lr} for p, lr in zip(([first], rest), rates, strict=True)]
            return torch.optim.SGD(groups, lr=0.1)

        bpfree.fit(make, few_digits, epochs=1, optimizer=sgd, checkpoint=tmp_path / "c")

    train(False)
    train(False)
    with pytest.raises(ValueError, match="other settings"):
        train(True)


def test_another_target_of_ekdaa_is_not_taken_up(tmp_path, few_digits):
    def train(f):
        def make(g):
            net = bpfree.convnet((1, 8, 8), (3,), num_classes=10, trunk="identity", generator=g)
            return ReleasedEKDAA(net, target_activation=f)

        bpfree.fit(make, few_digits, epochs=1, checkpoint=tmp_path / "c")

    train(lambda a: torch.tanh(a))
    with pytest.raises(ValueError, match="other settings"):
        train(lambda a: torch.tanh(-a))


def test_damaged_or_foreign_checkpoint_is_named_and_left_alone(tmp_path):
    file = tmp_path / "c"
    checkpoint.save(file, {"w": torch.arange(1000.0)}, "f")
    good = file.read_bytes()
    place = good.index(torch.arange(1000.0).numpy().tobytes()[:400]) + 200
    flipped = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    torch.save({"w": torch.zeros(3)}, tmp_path / "foreign")
    foreign = (tmp_path / "foreign").read_bytes()
    for content in (good[: len(good) // 2], b"", b"hello", flipped, foreign):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(file)):
            checkpoint.load(file, "f")
        assert file.read_bytes() == content


def test_checkpoint_round_trips_every_kind_of_value(tmp_path):
    content = {"a": [torch.tensor(1.5, dtype=torch.bfloat16), None, 3], "b": {"c": torch.empty(0)}}
    checkpoint.save(tmp_path / "c", content, "f")
    assert checkpoint.digest(checkpoint.load(tmp_path / "c", "f")) == checkpoint.digest(content)
    assert checkpoint.load(tmp_path / "nothing", "f") is None


def test_full_disk_is_one_clear_error_and_loses_nothing(folder, monkeypatch, capsys):
    run(folder, "--seeds", "0")
    before = results.path("small", folder).read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    assert run(folder) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert results.path("small", folder).read_bytes() == before
    assert [f.name for f in folder.iterdir()] == ["small.json"]
    monkeypatch.undo()
    monkeypatch.setitem(recipes.RECIPES, "small", SMALL)
    assert run(folder) == 0
    assert list(curves(folder)) == ["0", "1"]


def test_budget_stops_in_time_and_the_same_command_goes_on(folder, tmp_path_factory, capsys):
    whole = tmp_path_factory.mktemp("whole")
    run(whole)
    slices = 0
    while (status := run(folder, "--budget", "0.05s")) == 3:
        slices += 1
        assert "the same command goes on from there" in capsys.readouterr().err
    assert status == 0
    assert slices >= 2
    assert curves(folder) == curves(whole)


def test_all_works_through_recipes_and_says_which_lack_data(folder, monkeypatch, capsys):
    lacking = dataclasses.replace(SMALL, name="lacking", data="mnist")
    monkeypatch.setattr(recipes, "RECIPES", {"lacking": lacking, "small": SMALL})
    monkeypatch.setenv("BPFREE_DATA", str(folder / "nowhere"))
    args = ["run", "--all", "--quiet", "--jobs=1", "--results", str(folder)]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "lacking: not run" in printed
    assert "small: " in printed
    before = results.path("small", folder).read_bytes()
    assert cli.main(args) == 0
    assert results.path("small", folder).read_bytes() == before


@pytest.mark.parametrize("args", [[], ["small", "--all"]])
def test_run_wants_names_or_all(args, folder, capsys):
    assert cli.main(["run", *args]) == 2
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["9", "m", "", "-1s", "nans", "infs", "9x"])
def test_malformed_budget_is_refused(budget, capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--all", f"--budget={budget}"])
    assert repr(budget) in capsys.readouterr().err


def test_diverged_run_stops_and_is_recorded_as_diverged(folder, monkeypatch, capsys):
    wild = dataclasses.replace(SMALL, lr=1e20, rule="Backprop")
    monkeypatch.setitem(recipes.RECIPES, "small", wild)
    assert run(folder, "--seeds", "0") == 0
    one = results.read("small", folder)["runs"]["0"]
    assert one["diverged"] == 1
    assert one["train_loss"] == [None] * SMALL.epochs
    assert results.final(results.read("small", folder)) == []
    assert "small: diverged" in capsys.readouterr().out
    text = json.dumps(json.loads(results.path("small", folder).read_text()), allow_nan=False)
    assert "NaN" not in text


def test_one_diverged_seed_does_not_stop_or_change_the_others():
    def make(generator):
        rule = SMALL.make(generator)
        if generator.initial_seed() == 1:
            with torch.no_grad():
                rule.net[0].linear.weight.fill_(torch.nan)
        return rule

    common = dict(epochs=3, batch_size=128, optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(FloatingPointError, match="seed 1 in epoch 1") as caught:
        bpfree.fit(make, bpfree.load(), seeds=(0, 1), vectorize=True, **common)
    both = caught.value.run
    alone = bpfree.fit(make, bpfree.load(), seeds=(0,), **common)
    assert both.diverged == [None, 1]
    torch.testing.assert_close(both.train_loss[:1], alone.train_loss)


def test_checkpoints_of_seeds_not_recorded_yet_survive_a_repeated_run(folder, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert run(folder, "--seeds", "5") == 3
    (left,) = folder.glob("small.5.ckpt")
    for _ in range(2):  # the second finds nothing to do
        assert run(folder, "--seeds", "0") == 0
        assert left.exists()


@pytest.mark.parametrize(
    ("net", "rule"), [({"init": "torch"}, {}), ({}, {"feedback_scale": 0.5})], ids=["net", "rule"]
)
def test_checkpoint_drawn_with_other_settings_is_refused(tmp_path, net, rule):
    def train_with(net, rule):
        def make(g):
            mlp = bpfree.mlp(64, 16, 10, generator=g, **net)
            return bpfree.FeedbackAlignment(mlp, generator=g, **rule)

        bpfree.fit(make, bpfree.load(), epochs=1, checkpoint=tmp_path / "c")

    train_with({}, {})
    with pytest.raises(ValueError, match="other settings"):
        train_with(net, rule)


@pytest.mark.parametrize(
    "change", [{"pool": torch.nn.AvgPool2d}, {"activation": torch.cos}, {"stride": 2}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_checkpoint_of_another_network_with_the_same_weights_is_refused(tmp_path, change):
    def train_with(pool=torch.nn.MaxPool2d, activation=torch.sin, stride=1):
        def make(g):
            conv = torch.nn.Conv2d(1, 2, 3, stride=stride, padding=0 if stride == 1 else 3)
            blocks = [bpfree.Block(conv, activation, pool(2))]
            trunk = bpfree.Network(*blocks, input_shape=(1, 8, 8))
            size = math.prod(trunk.shapes[-1])
            net = bpfree.Network(*blocks, *bpfree.mlp(size, 10), input_shape=(1, 8, 8))
            torch.manual_seed(0)
            for weight in net.parameters():
                torch.nn.init.uniform_(weight, -0.1, 0.1)
            return bpfree.Backprop(net)

        bpfree.fit(make, bpfree.load(), epochs=1, checkpoint=tmp_path / "c")

    train_with()
    with pytest.raises(ValueError, match="other settings"):
        train_with(**change)


def test_checkpoint_without_content_is_named(tmp_path):
    torch.save({"digest": ""}, tmp_path / "c")
    with pytest.raises(ValueError, match=r"damaged or no checkpoint.*move it away"):
        checkpoint.load(tmp_path / "c", "f")
