"""The bench: ratios round by round, the recorded file, the table, the command."""

import json
from functools import partial

import pytest
import torch

import bpfree
from bpfree.experiments import bench, cli, timing

pytestmark = [pytest.mark.processes, pytest.mark.compiles]  # times; the engine's, compiled too
ARMS = ("autograd", "Backprop", "PEPITA")


def table_1(g):
    return bpfree.convnet((3, 32, 32), (32,), kernel_size=5, padding=0, num_classes=10, generator=g)


@pytest.fixture
def small(monkeypatch):
    """The bench on tiny networks, two rules and few rounds."""
    networks = {
        "784-1024-10": (lambda g: bpfree.mlp(784, 5, 10, dropout=0.1, generator=g), 64),
        "3x32x32-conv32-10": (
            lambda g: bpfree.convnet(
                (3, 32, 32), (32,), kernel_size=5, padding=0, num_classes=3, generator=g
            ),
            4,
        ),
    }
    changes = {
        "NETWORKS": networks,
        "STEPS": 2,
        **{
            f: partial(getattr(bench, f), rounds=1)
            for f in ("seeds", "engine", "heads", "released")
        },
        "RULES": {name: getattr(bpfree, name) for name in ARMS[1:]},
        "DEPTHS": (4, 8),
        "WIDTH": 64,
        "DEPTH_BATCH": 16,
        "steps": partial(bench.steps, rounds=3, repeats=1),
    }
    for name, value in changes.items():
        monkeypatch.setattr(bench, name, value)


# ---- comparison ----------------------------------------------------------------------------------


def test_compare_gives_the_median_of_the_ratios_within_rounds_after_a_warm_up(monkeypatch):
    # the first is the warm-up, the second says how often an arm can be called
    seconds = {"base": [9999, 99, 1, 2, 10], "other": [0, 0, 3, 2, 10]}
    clocks, calls = {name: iter(s) for name, s in seconds.items()}, []

    def timed(arm, repeats, device):
        calls.append((arm, repeats, device))
        return next(clocks[arm]) / 1e3

    monkeypatch.setattr(timing, "_seconds", timed)
    rows = timing.compare({n: n for n in seconds}, "base", rounds=3, repeats=7, device="meta")
    # ratios 3, 1, 1; the ratio of the medians would be 1.5
    assert rows == {
        "base": {"median_ms": 2, "min_ms": 1, "ratio": 1},
        "other": {"median_ms": 3, "min_ms": 2, "ratio": 1},
    }
    turns = [("base", repeats, "meta") for repeats in (2, 1, 7, 7, 7)]
    assert calls[::2] == turns
    assert calls[1::2] == [("other", *turn[1:]) for turn in turns]


def test_compare_calls_slow_arms_less_often_but_all_alike(monkeypatch):
    calls = []

    def timed(arm, repeats, device):
        calls.append((arm, repeats))
        return 0.3 if arm == "slow" else 0.01

    monkeypatch.setattr(timing, "_seconds", timed)
    timing.compare({n: n for n in ("base", "slow")}, "base", rounds=1, repeats=7)
    assert calls == [(arm, n) for n in (2, 1, 3) for arm in ("base", "slow")]


def test_seconds_are_those_of_one_call(monkeypatch):
    calls, clock = [], iter([10.0, 13.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing._seconds(lambda: calls.append(1), 6, "cpu") == 0.5
    assert len(calls) == 6


# ---- the record and the table --------------------------------------------------------------------


def test_run_writes_what_it_returns_with_every_network_arm_and_depth(small, tmp_path):
    content = bench.run("cpu", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["bench-cpu.json"]
    read = json.loads((tmp_path / "bench-cpu.json").read_text())
    assert read == json.loads(json.dumps(content))
    assert set(read) == {
        "steps", "memory_MB", "memory_setting", "seeds", "engine", "heads", "released",
        "device", "machine", "python", "torch", "commit",
    }  # fmt: skip
    assert list(read["steps"]) == ["784-1024-10, batch 64", "3x32x32-conv32-10, batch 4"]
    times = {"median_ms", "min_ms", "ratio"}
    for rows in read["steps"].values():
        assert tuple(rows) == ARMS
        assert rows["autograd"]["ratio"] == 1
        for row in rows.values():
            assert set(row) == {*times, "images_per_s"}
            assert 0 < row["min_ms"] <= row["median_ms"]
            assert row["images_per_s"] > 0
    assert tuple(read["memory_MB"]) == ARMS
    for depths in read["memory_MB"].values():
        assert list(depths) == ["4", "8"]
        assert 0 < depths["4"] < depths["8"]
    assert read["memory_setting"] == {"width": 64, "batch": 16}
    assert {count: set(row) for count, row in read["seeds"].items()} == {"1": times, "10": times}
    assert read["seeds"]["1"]["ratio"] == 1
    assert list(read["engine"]) == ["autograd", "launched", "compiled"]
    for rows, theirs in zip(
        read["released"].values(), ("loop over positions", "DataLoader"), strict=True
    ):
        assert rows[theirs]["ratio"] > 0


def test_the_released_loop_over_positions_is_the_convolutions_weight_gradient(small, monkeypatch):
    arms = {}
    monkeypatch.setattr(bench, "compare", lambda given, *rest: arms.update(given) or {})
    monkeypatch.setattr(bench, "NETWORKS", {"3x32x32-conv32-10": (table_1, 4)})
    bench.released()
    ours, theirs = arms["one convolution"]()["weight"], arms["loop over positions"]()
    torch.testing.assert_close(theirs.reshape(ours.shape), ours, rtol=1e-5, atol=1e-2)


def test_plain_modules_are_the_network():
    g = torch.Generator().manual_seed(0)
    net = table_1(g)
    x = torch.rand(4, 3, 32, 32, generator=g)
    torch.testing.assert_close(timing.plain(net)(x), net(x))
    dropped = timing.plain(bpfree.mlp(6, 50, 4, dropout=0.5, generator=g))
    names = ["Flatten", "Linear", "ReLU", "Dropout", "Flatten", "Linear", "Identity"]
    assert [type(m).__name__ for m in dropped] == names


def test_table_has_one_row_per_arm_and_one_column_per_network():
    rows = {name: {"ratio": 1 + i / 8, "median_ms": 2.5} for i, name in enumerate(bench.RULES)}
    steps = {title: {"autograd": {"ratio": 1.0, "median_ms": 4.0}, **rows} for title in ("a", "b")}
    memory = {name: {"4": i / 2, "64": i + 0.25} for i, name in enumerate(("autograd", *rows))}
    content = {"steps": steps, "memory_MB": memory}
    head, rule, *body = bench.table(content).splitlines()
    assert head == "| rule | a | b | peak memory of 64 layers, MB |"
    assert rule == "| --- | --- | --- | --- |"
    assert body[0] == "| autograd | 1.00 (4.00 ms) | 1.00 (4.00 ms) | 0.2 |"
    assert body[1:] == [
        f"| {n} | {1 + i / 8:.2f} | {1 + i / 8:.2f} | {i + 1.25:.1f} |" for i, n in enumerate(rows)
    ]


def test_the_command_records_and_prints_the_table(small, tmp_path, capsys):
    assert cli.main(["bench", "--results", str(tmp_path)]) == 0
    recorded = json.loads((tmp_path / "bench-cpu.json").read_text())
    assert capsys.readouterr().out == bench.table(recorded) + "\n"


@pytest.mark.parametrize("device", ["gpu", "meta", "mps"])
def test_a_device_that_is_none_is_one_clear_error(device, small, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--device", device, "--results", str(tmp_path)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert device in captured.err
    assert list(tmp_path.iterdir()) == []
