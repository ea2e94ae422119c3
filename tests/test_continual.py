"""Tasks one after the other: what they are, what is forgotten, and records after a kill."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

import bpfree
from bpfree import results
from bpfree.experiments.continual import ContinualRecipe, TaskSequence
from bpfree.experiments.record import record
from bpfree.experiments.tasks import EWC, Shrunk, measures, tasks
from bpfree.training.fit import OutOfTime

f64 = torch.float64
SMALL = ContinualRecipe(
    "continual-small", "digits", ("mlp", (64, 12, 10, 10), {"bias": True}), "Backprop", {},
    epochs=6, lr=0.1, momentum=0.0, batch_size=50, rates=(0.03,), count=3, seeds=(0,),
)  # fmt: skip
SPLIT = dataclasses.replace(
    SMALL, network=("mlp", (64, 12, 10, 2), {"bias": True}), scenario="task", count=5, epochs=10
)


def test_what_a_matrix_says():
    R = torch.tensor([[10.0, 20, 30], [90, 25, 35], [70, 80, 45], [60, 85, 95]])
    said = {k: v.item() for k, v in measures(R).items()}
    assert said == pytest.approx({
        "final": (60 + 85 + 95) / 3, "learning": (90 + 80 + 95) / 3,
        "backward": ((60 - 90) + (85 - 80)) / 2, "forward": ((25 - 20) + (45 - 30)) / 2,
        "forgetting": ((90 - 60) + (80 - 85)) / 2,
    })  # fmt: skip
    R[0, 0] = 99.0  # luck before training is nothing that was learnt
    assert measures(R)["forgetting"] == said["forgetting"]
    both = measures(torch.stack([R, R + 1]))
    assert_close(both["final"], torch.tensor([80.0, 81.0]))
    assert_close(both["forgetting"], torch.tensor([12.5, 12.5]))


def test_permuted_tasks_are_the_same_images_in_orders_of_their_own(digits):
    first, second, third = tasks(digits, 3, "permuted", seed=4)
    assert torch.equal(first.train_x, digits.train_x)
    for task in (second, third):
        for part in ("train", "test"):
            x, old = (getattr(d, f"{part}_x").flatten(1) for d in (task, digits))
            assert torch.equal(x.sort(1).values, old.sort(1).values)
            assert torch.equal(getattr(task, f"{part}_y"), getattr(digits, f"{part}_y"))
    orders = torch.cat([second.train_x, second.test_x]), torch.cat([digits.train_x, digits.test_x])
    columns = [x.flatten(1).float().T for x in orders]  # one order for all images of both parts
    assert {tuple(c.tolist()) for c in columns[0]} == {tuple(c.tolist()) for c in columns[1]}
    assert not torch.equal(second.train_x, third.train_x)
    assert torch.equal(tasks(digits, 2, "permuted", 4)[1].train_x, second.train_x)
    assert not torch.equal(tasks(digits, 2, "permuted", 5)[1].train_x, second.train_x)


@pytest.mark.parametrize("scenario", ["domain", "class", "task"])
def test_split_tasks_share_out_the_classes(digits, scenario):
    found = tasks(digits, 5, scenario)
    assert sum(len(task.train_x) for task in found) == len(digits.train_x)
    for t, task in enumerate(found):
        mine = digits.train_y // 2 == t
        assert torch.equal(task.train_x, digits.train_x[mine])
        labels = digits.train_y[mine]
        assert torch.equal(task.train_y, labels if scenario == "class" else labels - 2 * t)


@pytest.mark.parametrize(
    ("n", "scenario", "words"),
    [
        (1, "permuted", ["at least 2", "1 tasks"]),
        (3, "class", ["divide the 10", "3 tasks"]),
        (10, "domain", ["two classes", "10 tasks of 10 classes"]),
        (2, "shuffled", ["scenario", "'shuffled'"]),
    ],
)
def test_sequences_that_cannot_be_are_refused(digits, n, scenario, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        tasks(digits, n, scenario)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(scenario="class", count=5), "the network has 2 classes, .* has"),
        (dict(batch_size=400), "batch_size must be in 1..*, got 400"),
        (dict(epochs=5), "5 tasks times 2 rates, got 5"),
    ],
)
def test_recipes_that_do_not_fit_their_tasks_are_refused(digits, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SPLIT, **changes).fit(digits, [0])


def test_several_seeds_or_ranks_are_refused(digits):
    with pytest.raises(ValueError, match="got 2 seeds"):
        SMALL.fit(digits, [0, 1])


def problem(rule, **options):
    g = torch.Generator().manual_seed(3)
    net = bpfree.mlp(6, 5, 4, 3, bias=True, activation="tanh", generator=g).double()
    x, y = torch.randn(9, 6, generator=g, dtype=f64), torch.randint(3, (9,), generator=g)
    return rule(net, **options), x, y, g


def test_ewc_adds_the_gradient_of_its_penalty():
    rule, x, y, g = problem(EWC, strength=3.0, cap=1e9)
    params, state = rule.params(), rule.state()
    for value in state.values():
        value.copy_(torch.rand(value.shape, generator=g, dtype=f64))
    plain = bpfree.Backprop(rule.net).update(params, {}, x, y).grads
    found = rule.update(params, state, x, y).grads
    for i, name in enumerate(rule.held):
        w = params[name].detach().clone().requires_grad_()
        penalty = 3.0 / 2 * (state[f"importance{i}"] * (w - state[f"anchor{i}"]) ** 2).sum()
        assert_close(found[name] - plain[name], torch.autograd.grad(penalty, w)[0])
    rule.cap = 0.5
    capped = rule.update(params, state, x, y).grads["0.linear.weight"] - plain["0.linear.weight"]
    far = params["0.linear.weight"] - state["anchor0"]
    assert_close(capped, (3.0 * state["importance0"]).clamp(max=0.5) * far)


def test_importance_is_the_mean_square_of_the_samples_gradients():
    rule, x, _, g = problem(EWC)
    params, state = rule.params(), {k: v.clone() for k, v in rule.state().items()}
    for i, name in enumerate(rule.held):  # as tasks before left them
        state[f"importance{i}"].fill_(0.5)
        state[f"anchor{i}"].copy_(params[name] + 1)
    drawn = torch.Generator().manual_seed(7)
    rule.consolidate(params, state, x, drawn)
    p = rule.net(x).softmax(1)
    y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7))[:, 0]
    squares = {name: torch.zeros_like(v) for name, v in params.items()}
    for i in range(len(x)):
        loss = torch.nn.functional.cross_entropy(rule.net(x[i : i + 1]), y[i : i + 1])
        for name, grad in zip(params, torch.autograd.grad(loss, params.values()), strict=True):
            squares[name] += grad**2 / len(x)
    for i, name in enumerate(rule.held):
        assert_close(state[f"importance{i}"], 0.5 + squares[name])
        assert_close(state[f"anchor{i}"], params[name].detach())
    assert len(EWC(rule.net, head=False).held) == len(rule.held) - 2


def test_ewc_without_strength_is_backprop(digits):
    bp = SMALL.fit(digits, [0])
    none = dataclasses.replace(SMALL, rule="EWC", options={"strength": 0.0}).fit(digits, [0])
    assert torch.equal(bp.matrix[:, :, 0], none.matrix[:, :, 0])
    assert torch.equal(bp.matrix[:, :, 1], none.matrix[:, :, 1])  # the draw of classes comes after


def test_ewc_with_much_strength_hardly_moves_after_its_first_task(digits):
    sequence, moved = tasks(digits, 3, "permuted"), []
    for strength in (0.0, 1e9):
        g = torch.Generator().manual_seed(0)
        options = {"strength": strength, "cap": 1 / SMALL.lr}  # as stiff as a step can bear
        rule = dataclasses.replace(SMALL, rule="EWC", options=options).make(g)
        run = TaskSequence(rule, g, sequence, False, 50, SMALL.optimizer)
        with torch.no_grad():
            run.train(1.0)
            run.test()
            before = [w.clone() for w in run.net.weights()]
            run.train(1.0)
        pairs = zip(run.net.weights(), before, strict=True)
        moved.append(torch.stack([(w - old).norm() for w, old in pairs]))
    # pixels that are always dark in the first task leave block 1 some freedom
    assert (moved[1] < moved[0] / 3)[1:].all()


def test_ewc_refuses_convolutions():
    net = bpfree.convnet((1, 8, 8), (2,), num_classes=3)
    with pytest.raises(ValueError, match="dense"):
        EWC(net)


def test_the_control_is_backprop_at_first_and_shrinks_by_one_number():
    rule, x, y, _ = problem(Shrunk)
    bp = bpfree.Backprop(rule.net)
    params = rule.params()
    for a, b in zip(*(r.update(params, r.state(), x, y).signals for r in (rule, bp)), strict=True):
        assert_close(a[1], b[1])
    grown = {**params, "2.linear.weight": 2 * params["2.linear.weight"]}
    assert_close(rule.feedback(3, grown, rule.state()), params["2.linear.weight"] / 2)
    slow = Shrunk(rule.net, power=0.0, factor=0.25)
    assert_close(slow.feedback(3, grown, slow.state()), params["2.linear.weight"] / 2)


def test_frozen_hidden_blocks_stay(digits):
    frozen = dataclasses.replace(SMALL, rule="Frozen").fit(digits, [0]).rules[0]
    start = SMALL.make(torch.Generator().manual_seed(0)).net
    assert torch.equal(frozen.net.weights()[0], start.weights()[0])
    assert not torch.equal(frozen.net.weights()[2], start.weights()[2])


def test_a_task_leaves_the_heads_of_the_others_alone(digits):
    sequence = tasks(digits, 5, "task")
    g = torch.Generator().manual_seed(0)
    rule = SPLIT.make(g)
    run = TaskSequence(rule, g, sequence, True, 50, SPLIT.optimizer)
    with torch.no_grad():
        run.train(1.0)
        run.test()
        before = [{k: v.clone() for k, v in head.items()} for head in run.heads]
        run.train(1.0)
        run.test()
    for t in range(5):
        same = all(torch.equal(run.heads[t][k], v) for k, v in before[t].items())
        assert same == (t != 1), t
    assert not torch.equal(run.heads[0]["2.linear.weight"], run.heads[2]["2.linear.weight"])
    R = SPLIT.fit(digits, [0]).matrix[0, -1]
    assert R[-1].mean() > R[0].mean() + 15


def test_a_record_interrupted_at_any_task_ends_with_the_same_bits(tmp_path, digits, monkeypatch):
    recipe = dataclasses.replace(SPLIT, rule="EWC", options={"head": False})
    whole = record(recipe, [0], folder=tmp_path / "whole")["runs"]["0"]
    calls, task = [], TaskSequence.train

    def train(self, *args):
        calls.append(len(self.rows))
        if len(calls) in (2, 5, 10):
            raise OutOfTime
        return task(self, *args)

    monkeypatch.setattr(TaskSequence, "train", train)
    for _ in range(3):
        with pytest.raises(OutOfTime):
            record(recipe, [0], folder=tmp_path / "parts")
    parts = record(recipe, [0], folder=tmp_path / "parts")["runs"]["0"]
    assert len(calls) == 10 + 3
    assert parts["matrix"] == whole["matrix"]
    assert parts["train_loss"] == whole["train_loss"]
    assert [f.name for f in (tmp_path / "parts").iterdir()] == ["continual-small.json"]
    assert len(whole["matrix"]) == 2
    assert len(whole["matrix"][0]) == 6
    assert whole["test_accuracy"][-1] == pytest.approx(sum(whole["matrix"][-1][-1]) / 5, abs=1e-3)
    assert (
        "continual-small" in results.read("continual-small", tmp_path / "parts")["recipe"]["name"]
    )


@pytest.mark.parametrize("rule", ["Shrunk", "EWC"])
def test_a_kill_within_a_task_costs_no_bit(tmp_path, digits, monkeypatch, rule):
    recipe = dataclasses.replace(SPLIT, rule=rule)
    whole, calls, step = recipe.fit(digits, [0]), [], TaskSequence._advance

    def advance(self, *args):
        calls.append(len(self.rows))
        if len(calls) in (3, 9, 20, 27):
            raise KeyboardInterrupt
        step(self, *args)

    monkeypatch.setattr(TaskSequence, "_advance", advance)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            recipe.fit(digits, [0], checkpoint=tmp_path / "x.ckpt", save_every=0)
    parts = recipe.fit(digits, [0], checkpoint=tmp_path / "x.ckpt", save_every=0)
    assert len(calls) - 4 == 2 * sum(len(t.train_x) // 50 for t in tasks(digits, 5, "task"))
    assert torch.equal(parts.matrix, whole.matrix)
    assert torch.equal(parts.train_loss, whole.train_loss)


def test_a_checkpoint_of_another_scenario_is_refused(tmp_path, digits):
    file = tmp_path / "x.ckpt"
    dataclasses.replace(SPLIT, scenario="domain").fit(digits, [0], checkpoint=file)
    with pytest.raises(ValueError, match="other settings"):
        dataclasses.replace(SPLIT, scenario="task", rates=(), epochs=5).fit(
            digits, [0], checkpoint=file
        )


@pytest.mark.parametrize("rule", ["Backprop", "EWC"])
def test_a_rate_that_diverges_is_recorded_and_does_not_stop_the_others(digits, rule):
    run = dataclasses.replace(SMALL, rates=(1e20,), rule=rule).fit(digits, [0])
    lost, kept = run.matrix[0]
    assert lost[0].isfinite().all()
    assert lost[1:].isnan().all()
    assert kept.isfinite().all()
    assert run.diverged == [None]
    assert math.isfinite(run.test_accuracy[0, -1])
    with pytest.raises(FloatingPointError):
        dataclasses.replace(SMALL, lr=1e9).fit(digits, [0])


def test_a_rate_has_its_result_whatever_the_others_are(digits):
    both = SMALL.fit(digits, [0])
    alone = dataclasses.replace(SMALL, rates=(), epochs=3).fit(digits, [0])
    assert torch.equal(both.matrix[0, -1], alone.matrix[0, -1])


def test_a_table_says_at_which_rate_a_sequence_ended(tmp_path):
    name = "continual-split-mnist-bp"
    (row,) = [r for r in results.table([name]).splitlines() if r.startswith("| BP")]
    assert "| 5 tasks, at the rate 0.1 |" in row
    R = results.frontier(name)[1]["final"][:, 1]
    assert results.spread(R.tolist()) in row


def test_gain_is_over_the_best_of_the_rates_that_learn_as_much(tmp_path, digits):
    """Two tasks; final and learning accuracy of each rate are set by hand."""
    two = dataclasses.replace(SMALL, count=2, epochs=6, rates=(0.3, 0.5))

    def write(name, points):
        def matrix(final, learning):
            return [[0, 0], [2 * learning - final, 0], [final, final]]

        recipe = dataclasses.replace(two, name=name)
        run = dict.fromkeys(results.KEYS, 0) | {"test_accuracy": [0.0] * 6, "diverged": None}
        content = {"format": results.FORMAT, "recipe": dataclasses.asdict(recipe), "runs": {}}
        content["runs"]["0"] = {**run, "matrix": [matrix(*p) for p in points]}
        results.write_json(results.path(name, tmp_path), content)

    # in the order of the record: rates 0.3, 0.5, 0.1
    write("one", [(70, 90), (60, 96), (75, 80)])
    write("other", [(65, 91), (50, 95), (80, 79)])
    rates, found = results.gain("one", "other", tmp_path)
    assert rates == [0.1, 0.3, 0.5]
    # at 0.1 it learns 80: the other, of those that learn as much, ends at 65; nobody learns 96
    assert found[0, :2].tolist() == [75 - 65, 70 - 65]
    assert found[0, 2].isnan()
