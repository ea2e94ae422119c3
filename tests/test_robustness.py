"""What figures/robustness.py measures, and that what it recorded is of the recorded runs."""

import json
import math
import sys

import pytest
import torch
from oracles import error_and_target, generator, mlp_problem

import bpfree
from bpfree import recipes, results
from bpfree.experiments.recipe import Recipe

sys.path.insert(0, str(results.ROOT / "figures"))
import robustness  # noqa: E402
from robustness import fgsm  # noqa: E402

NET = ("mlp", (64, 16, 10), {"activation": "tanh"})
SMALL = Recipe("small", "digits", NET, "EKDAA", {}, epochs=2, lr=0.1, shift=-0.5)


def test_examples_are_near_their_image_and_the_attacked_ones_are_the_worse(monkeypatch):
    monkeypatch.setattr(robustness, "LEVELS", (0, 16, 64))
    data = SMALL.load()
    x, y = data.inputs(data.test_x), data.test_y
    net = SMALL.fit(data, [0]).rules[0].net
    inputs = robustness.shown(net, data)
    for kind in ("attack", "noise"):
        for level, changed in zip(robustness.LEVELS, inputs[kind], strict=True):
            assert (changed - x).abs().max() <= level / 255 + 1e-6
            assert changed.abs().max() <= 0.5
        assert torch.equal(inputs[kind][0], x)
    attacked, noisy = (robustness.accuracy(net, inputs[k][2], y) for k in ("attack", "noise"))
    assert attacked < noisy - 10


def test_a_run_is_recorded_with_the_network_that_is_attacked(tmp_path):
    data = SMALL.load()
    net = robustness.trained(SMALL, 3, data, tmp_path)
    (file,) = tmp_path.iterdir()  # no checkpoint is left
    (run,) = json.loads(file.read_text())["runs"].values()
    accuracy = robustness.accuracy(net, data.inputs(data.test_x), data.test_y)
    assert abs(run["test_accuracy"][-1] - accuracy) < 0.01


def test_what_was_recorded_starts_from_the_recorded_runs():
    found = json.loads(results.path(f"robustness-{robustness.EXPERIMENT}").read_text())
    assert tuple(found["levels"]) == robustness.LEVELS
    names = {n for n in recipes.RECIPES if n.startswith(robustness.EXPERIMENT)}
    assert {row["recipe"] for row in found["rows"]} == names
    for row in found["rows"]:
        run = results.read(row["recipe"])["runs"][str(row["seed"])]
        for kind in ("attack", "noise"):
            assert len(row[kind]) == len(robustness.LEVELS)
            assert abs(row[kind][0] - run["test_accuracy"][-1]) < 0.011


# ---- adversarial examples ------------------------------------------------------------------------


def images(net, seed=0):
    g = generator(seed)
    x = torch.rand(40, *net.input_shape, generator=g, dtype=torch.float64)
    return x, torch.randint(net.num_classes, (40,), generator=g)


@pytest.mark.parametrize("epsilon", [0.0, 0.03, 0.4])
def test_fgsm_of_softmax_regression_is_the_closed_form(epsilon):
    net = bpfree.mlp(6, 4, generator=generator()).double()
    x, y = images(net)
    W = net.weights()[0].detach()
    e, _ = error_and_target(x @ W.T, y)
    expected = torch.clamp(x + epsilon * torch.sign(e @ W), 0, 1)
    torch.testing.assert_close(fgsm(net, x, y, epsilon), expected)


def test_fgsm_raises_the_loss_of_any_module(either):
    x, y = images(either.net)
    net = torch.nn.Sequential(either.net, torch.nn.LogSoftmax(1))
    losses = [
        float(torch.nn.functional.cross_entropy(net(fgsm(net, x, y, epsilon)), y).detach())
        for epsilon in (0.0, 0.1, 0.3)
    ]
    assert losses[0] < losses[1] - 0.01 < losses[2] - 0.02


def test_fgsm_keeps_to_its_bounds_and_its_size(either):
    x, y = images(either.net)
    fooled = fgsm(either.net, x - 0.5, y, 0.1, bounds=(-0.5, 0.5))
    assert fooled.min() == -0.5
    assert fooled.max() == 0.5
    assert (fooled - (x - 0.5)).abs().max() <= 0.1 + 1e-12


def test_fgsm_writes_nothing_records_no_graph_and_works_without_gradients(either):
    x, y = images(either.net)
    before = x.clone()
    fooled = fgsm(either.net, x, y, 0.1)
    with torch.no_grad():
        torch.testing.assert_close(fgsm(either.net, x, y, 0.1), fooled, rtol=0, atol=0)
    assert not fooled.requires_grad
    assert not x.requires_grad
    assert torch.equal(x, before)
    assert all(p.grad is None for p in either.net.parameters())


def test_a_network_without_derivative_cannot_be_attacked_through_itself():
    net = mlp_problem(7, 6, 4, activation="sign").net
    x, y = images(net)
    assert torch.equal(fgsm(net, x, y, 0.3), x)


@pytest.mark.parametrize(
    "epsilon, bounds, message",
    [
        (-0.1, (0, 1), r"epsilon must be .*>= 0, got -0\.1"),
        (math.nan, (0, 1), "epsilon must be .*got nan"),
        (math.inf, (0, 1), "epsilon must be .*got inf"),
        (0.1, (-0.5, 0.5), r"x must be in \(-0\.5, 0\.5\), got 0\.\d+\.\.0\.99"),
        (0.1, (0.5, 1), r"x must be in \(0\.5, 1\), got 0\.0"),
    ],
)
def test_fgsm_refuses_what_is_out_of_range(epsilon, bounds, message, mlp):
    with pytest.raises(ValueError, match=message):
        fgsm(mlp.net, *images(mlp.net), epsilon, bounds)
