"""What figures/speed.py times: an arm with a cure undone computes what the library computes."""

import sys
from unittest.mock import patch

import pytest
import torch
from oracles import generator

import bpfree

sys.path.insert(0, str(bpfree.results.ROOT / "figures"))
import speed  # noqa: E402


@pytest.mark.parametrize(
    "title, target, name, by",
    [
        (speed.CONV, bpfree.Block, "_is_tiling", lambda block: False),
        (speed.FC, torch, "addmm", speed.separate),
    ],
    ids=("pooling", "products"),
)
def test_a_step_with_a_cure_undone_is_the_same_step(title, target, name, by):
    network, batch = speed.NETWORKS[title]
    net, g = network(generator()).double().eval(), generator(1)
    x = torch.rand(batch, *net.input_shape, generator=g, dtype=torch.float64)
    y = torch.randint(10, (batch,), generator=g)
    rule = bpfree.PEPITA(net, generator=g)
    given = rule.params(), rule.state(), x, y
    ours = rule.update(*given).grads
    calls = []

    def counted(*args, **kwargs):
        calls.append(name)
        return by(*args, **kwargs)

    with patch.object(target, name, counted):
        theirs = rule.update(*given).grads
    assert calls
    torch.testing.assert_close(theirs, ours)


def test_masks_drawn_by_torch_are_masks_of_the_network():
    net = bpfree.mlp(3, 400, 2, dropout=0.25, generator=generator())
    ours, theirs = net.masks(500, generator()), speed.drawn_by_torch(net, 500, generator())
    assert theirs.keys() == ours.keys() == {1}
    assert theirs[1].shape == ours[1].shape
    assert theirs[1].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert theirs[1].mean().item() == pytest.approx(1, abs=0.01)


def test_every_arm_runs_and_the_library_comes_first(monkeypatch):
    timed = []

    def once(arms, base, rounds, repeats):
        timed.append(base)
        assert base == next(iter(arms))
        return {arm: f() for arm, f in arms.items()}

    monkeypatch.setattr(speed, "compare", once)
    assert len({**speed.steps(), **speed.pieces()}) == len(timed) == 12


@pytest.mark.processes
def test_another_process_makes_a_step_when_it_is_asked():
    with speed.process(speed.FC, keep=True) as step:
        step()
