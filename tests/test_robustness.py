"""What figures/robustness.py measures, and that what it recorded is of the recorded runs."""

import json
import sys

import torch

from bpfree import recipes, results
from bpfree.recipe import Recipe

sys.path.insert(0, str(results.ROOT / "figures"))
import robustness  # noqa: E402

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
