"""Models in stages: the model's own bits, gradients that stay at home, memory of one stage."""

import copy
import dataclasses
import itertools
import time
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, copies, generator, global_generator_untouched, mlp_problem
from torch import nn
from torchvision import models

import bpfree
from bpfree import Stage, Stages, recipes, results
from bpfree.experiments import zoo
from bpfree.experiments.record import record
from bpfree.experiments.staged import StagesRecipe
from bpfree.training.augment import augment, draw_moves
from bpfree.training.device import global_draws_from
from bpfree.training.fit import Diverged, OutOfTime
from bpfree.training.stages import backward, fit_stages


def vit():
    net = models.VisionTransformer(8, 4, 3, 2, 8, 12, num_classes=5)
    nn.init.normal_(net.heads.head.weight)
    return net


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 2 * 2, 7), nn.Tanh(), nn.Linear(7, 5),
    )  # fmt: skip


# model, side of its images, units below its classifier
MODELS = {
    "resnet18": (lambda: models.resnet18(num_classes=5), 32, 9),
    "resnet50": (lambda: models.resnet50(num_classes=5), 32, 17),
    "vgg11-bn": (lambda: models.vgg11_bn(num_classes=5, init_weights=False), 32, 8),
    "vit": (vit, 8, 4),
    "resnet8": (lambda: zoo.resnet8(5, generator=generator()), 8, 4),
    "sequential": (sequential, 8, 3),
}


def small(seed=0, stages=3, dropout=0.0):
    """A convolutional model in stages with batch norm, in float64, and a batch."""
    g = generator(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    cut = bpfree.split(net, stages, generator=g).double()
    x = torch.randn(4, 2, 6, 6, generator=generator(1), dtype=torch.float64)
    return cut, x, torch.tensor([0, 4, 2, 1])


def grads(module):
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


# ---- split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_stages_are_the_model_to_the_bit_in_parts_that_are_as_even_as_can_be(kind):
    make, side, units = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 3, side, side)
    own = {id(p) for p in model.parameters()}
    for n in (1, 2, units):
        with global_generator_untouched():
            stages = bpfree.split(model, n, generator=generator())
        assert len(stages) == n
        assert torch.equal(stages(x), model(x))
        assert own <= {id(p) for p in stages.parameters()}
        bodies = [{id(p) for p in stage.body.parameters()} for stage in stages]
        assert all(bodies)
        assert not any(a & b for a, b in itertools.combinations(bodies, 2))
        h = x
        for stage in stages[:-1]:
            h = stage(h)
            assert stage.scores(h).shape == (2, 5)
            assert not own & {id(p) for p in stage.head.parameters()}
    with pytest.raises(
        ValueError, match=rf"n must be a whole number in 1..{units}.*got {units + 1}"
    ):
        bpfree.split(model, units + 1)


def test_the_units_of_a_stage_differ_by_one_at_most():
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(7)]
    stages = bpfree.split(nn.Sequential(*blocks, nn.Linear(3, 2)), 3)
    assert [len(stage.body) for stage in stages] == [3, 2, 2]
    assert [m for stage in stages for m in stage.body] == blocks


def test_what_has_no_map_of_its_own_stays_with_what_it_follows_but_flattening():
    net = sequential()
    stages = bpfree.split(net, 3)
    assert [[*stage.body] for stage in stages] == [[*net[:3]], [*net[3:5]], [*net[5:8]]]
    assert [*stages[-1].head] == [net[8]]


def test_inner_heads_read_the_mean_over_positions_or_the_class_token():
    maps = torch.randn(2, 4, 3, 5)
    head = bpfree.split(sequential(), 2, num_classes=9)[0].head
    torch.testing.assert_close(
        head(torch.randn(2, 6, 3, 5) * 0 + maps[:, :1]),
        maps[:, :1].mean((2, 3)).expand(2, 6) @ head.linear.weight.T,
    )
    head = bpfree.split(vit(), 2)[0].head
    tokens = torch.randn(2, 5, 8)
    assert torch.equal(head(tokens), head.linear(tokens[:, 0]))


def test_heads_come_from_the_generator_and_have_the_models_type(mlp):
    twins = [bpfree.split(mlp.net, 2, generator=generator(s))[0].head.linear for s in (1, 1, 2)]
    assert twins[0].weight.dtype == torch.float64
    assert torch.equal(twins[0].weight, twins[1].weight)
    assert not torch.equal(twins[0].weight, twins[2].weight)
    assert twins[0].weight.std() > 0
    assert bpfree.split(mlp.net, 2, num_classes=9)[0].scores(torch.ones(1, 6).double()).shape == (
        1,
        9,
    )


@pytest.mark.parametrize("n", [0, -1, 3, True, 1.5, "2"])
def test_a_number_of_stages_that_the_model_has_not_is_refused(n):
    with pytest.raises(ValueError, match=rf"n must be .* 1\.\.2, .* got {n!r}"):
        bpfree.split(mlp_problem().net, n)


def test_an_unknown_model_is_refused_with_how_to_cut_it_by_hand():
    with pytest.raises(TypeError, match=r"got MobileNetV2; cut it by hand: Stages\(\[Stage\(body"):
        bpfree.split(models.mobilenet_v2(), 2)
    with pytest.raises(TypeError, match="stage 2 must be a Stage, got Linear"):
        Stages([Stage(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)])


# ---- backward ------------------------------------------------------------------------------------


def oracle(stages, x, y, local, weights):
    """Losses and gradients by autograd over all that a loss may reach."""
    expected = {n: None for n, _ in stages.named_parameters()}
    h, losses = x, []
    for stage in stages:
        h = stage(h.detach() if local else h)
        losses.append(F.cross_entropy(stage.scores(h), y))
    for loss, weight in zip(losses, weights, strict=True):
        if weight:
            found = torch.autograd.grad(loss, list(stages.parameters()), retain_graph=True,
                                        allow_unused=True)  # fmt: skip
            for n, g in zip(expected, found, strict=True):
                if g is not None:
                    expected[n] = weight * g + (0 if expected[n] is None else expected[n])
    return torch.stack(losses).detach(), expected


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("weights", [None, (0.5, 0.5, 1), (0, 0, 1), (0, 2, 0)])
def test_gradients_are_those_of_the_weighted_losses_and_accumulate(local, weights):
    stages, x, y = small()
    twin = copy.deepcopy(stages)
    losses, expected = oracle(twin, x, y, local, weights or (1, 1, 1))
    found = backward(stages, x, y, local, weights)
    torch.testing.assert_close(found, losses)
    assert not found.requires_grad
    mine = grads(stages)
    assert {n for n, g in mine.items() if g is None} == {
        n for n, g in expected.items() if g is None
    }
    known = {n: g for n, g in expected.items() if g is not None}
    assert_same({n: mine[n] for n in known}, known)
    buffers = zip(stages.buffers(), twin.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)  # batch norm saw the batch once
    backward(stages.eval(), x, y, local, weights)
    stages, twin = (s.eval() for s in (stages, twin))
    _, more = oracle(twin, x, y, local, weights or (1, 1, 1))
    assert_same({n: grads(stages)[n] for n in known}, {n: known[n] + more[n] for n in known})


@pytest.mark.parametrize("local", [True, False])
def test_a_frozen_stage_learns_nothing_and_those_around_it_do(local):
    stages, x, y = small()
    stages[1].requires_grad_(False)
    backward(stages, x, y, local)
    assert not any(p.grad is not None for p in stages[1].parameters())
    assert all(p.grad is not None for k in (0, 2) for p in stages[k].parameters())


def test_end_to_end_is_the_models_own_gradient():
    stages, x, y = small()
    twin = copy.deepcopy(stages)
    backward(stages, x, y, local=False, weights=[0, 0, 1])
    F.cross_entropy(twin(x), y).backward()
    assert_same(*({n: g for n, g in grads(s).items() if g is not None} for s in (stages, twin)),
                rtol=0, atol=0)  # fmt: skip


@pytest.mark.parametrize("local", [True, False])
def test_a_stage_is_deaf_to_all_above_it_only_if_local(local):
    """The falsifier: without the cut, its gradient is another one under another end."""
    (stages, x, y), (other, _, _) = small(), small(seed=5)
    mixed = Stages([stages[0], other[1], other[2]])
    found = []
    for s in (stages, mixed):
        s.zero_grad()
        backward(s, x, y, local)
        found.append(grads(stages[0]))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0] if "head" in n)
    same = [torch.equal(found[0][n], found[1][n]) for n in found[0] if "body" in n]
    assert all(same) if local else not any(same)


def peak(stages, x, y, **how):
    """The most bytes of activity that autograd ever kept at once: (largest, of each stage)."""
    own = {p.untyped_storage().data_ptr() for p in (*stages.parameters(), x)}
    now, most = {}, [0]

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # an output knows its node, which knows this
            place = tensor.untyped_storage().data_ptr()
            if place in own:
                return
            count, size = now.get(place, (0, tensor.untyped_storage().nbytes()))
            now[place] = count + 1, size
            most[0] = max(most[0], sum(size for _, size in now.values()))
            weakref.finalize(self, self.freed, place)

        @staticmethod
        def freed(place):
            count, size = now.pop(place)
            if count > 1:
                now[place] = count - 1, size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        backward(stages, x, y, **how)
    assert not now
    return most[0]


def test_memory_is_that_of_the_largest_stage_and_not_of_all():
    def deep(n):
        torch.manual_seed(0)
        blocks = [m for _ in range(n) for m in (nn.Linear(40, 40), nn.Tanh())]
        return bpfree.split(nn.Sequential(*blocks, nn.Linear(40, 3)), n)

    x, y = torch.randn(50, 40), torch.zeros(50, dtype=torch.long)
    one, many = (peak(deep(n), x, y) for n in (1, 12))
    assert many < 1.2 * one + x.nbytes  # a stage's input is kept too
    ends = [0] * 11 + [1]
    assert peak(deep(12), x, y, weights=ends) <= many  # what does not learn keeps nothing
    for how in ({}, {"weights": ends}):
        assert peak(deep(12), x, y, local=False, **how) > 5 * many


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, -1], [0, 0, 0], [1, 1, float("nan")]])
def test_weights_that_are_none_are_refused(weights):
    stages, x, y = small()
    with pytest.raises(ValueError, match="weights must be 3 finite numbers"):
        backward(stages, x, y, weights=weights)


def test_stages_are_trained_under_autocast_with_losses_in_float32():
    stages, x, y = small()
    with torch.autocast("cpu", torch.bfloat16):
        assert backward(stages.float(), x.float(), y).dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in grads(stages).values())


def test_converted_models_are_cut_too():
    stages, x, y = small()
    fed = Stages(copy.deepcopy(list(stages)))
    bpfree.convert(fed, "attention")
    backward(stages, x, y)
    backward(fed, x, y)
    assert_same(grads(fed), grads(stages))


# ---- images that are moved -----------------------------------------------------------------------


def moved_by(x, shift, flip, seed):
    return augment(x, draw_moves(len(x), shift, flip, generator(seed)), shift)


def test_images_are_moved_and_mirrored_each_by_its_own_draw():
    x = torch.randint(1, 255, (800, 2, 5, 6), generator=generator(), dtype=torch.uint8)
    moved = moved_by(x, 2, True, 1)
    assert (moved.shape, moved.dtype) == (x.shape, x.dtype)
    padded, seen = F.pad(x, [2] * 4), set()
    for before, after in zip(padded, moved, strict=True):
        fits = set()
        for dy, dx, flip in itertools.product(range(5), range(5), (False, True)):
            part = before[:, dy : dy + 5, dx : dx + 6]
            fits |= (
                {(dy, dx, flip)} if torch.equal(after, part.flip(2) if flip else part) else set()
            )
        assert len(fits) == 1
        seen |= fits
    assert len(seen) == 50
    assert torch.equal(moved_by(x, 2, True, 1), moved)
    assert not torch.equal(moved_by(x, 2, True, 2), moved)
    assert torch.equal(moved_by(x, 0, False, 1), x)
    assert not any((row == 0).any() for row in moved_by(x, 0, True, 1))
    stacks = torch.stack([x, x.flip(0)])  # of two seeds
    moves = torch.stack([draw_moves(len(x), 2, True, generator(s)) for s in (1, 2)])
    expected = torch.stack([moved_by(x, 2, True, 1), moved_by(x.flip(0), 2, True, 2)])
    assert torch.equal(augment(stacks, moves, 2), expected)


def test_modules_without_a_generator_draw_from_the_one_given():
    with global_generator_untouched():
        drawn = []
        for seed in (1, 1, 2):
            with global_draws_from(generator(seed), torch.device("cpu")):
                drawn.append(torch.rand(9))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- fit_stages ----------------------------------------------------------------------------------


def make(g, dropout=0.2, n=3):
    with global_draws_from(g, torch.device("cpu")):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout),
            nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip
    return bpfree.split(net, n, generator=g)


def fitted(data, **changes):
    settings = dict(epochs=3, batch_size=10, seeds=(0, 1), shifts=1, flips=True,
                    schedule=lambda epoch: 0.5**epoch)  # fmt: skip
    return fit_stages(make, data, **{**settings, **changes})


CURVES = ("train_loss", "train_accuracy", "test_accuracy", "stage_loss", "stage_accuracy")


def assert_runs_equal(one, other, seeds=slice(None)):
    for name in CURVES:
        assert torch.equal(getattr(one, name), getattr(other, name)[seeds]), name
    for a, b in zip(one.rules, other.rules[seeds], strict=True):
        assert_same(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def test_curves_are_of_all_stages_and_the_last_ones_are_the_runs(few_digits):
    with global_generator_untouched():
        run = fitted(few_digits)
    assert run.stage_loss.shape == run.stage_accuracy.shape == (2, 3, 3)
    assert torch.equal(run.stage_loss[..., -1], run.train_loss)
    assert torch.equal(run.stage_accuracy[..., -1], run.test_accuracy)
    assert run.angle.shape == run.norm.shape == (2, 0)
    x = few_digits.inputs(few_digits.test_x)
    for i, stages in enumerate(run.rules):
        assert stages[0].body[1].num_batches_tracked == 3 * 10
        h = x
        for k, stage in enumerate(stages.eval()):
            h = stage(h)
            right = (stage.scores(h).argmax(1) == few_digits.test_y).double().mean()
            torch.testing.assert_close(run.stage_accuracy[i, -1, k], 100 * right)


def test_a_seed_is_the_same_alone_and_with_others(few_digits):
    assert_runs_equal(fitted(few_digits, seeds=(1,)), fitted(few_digits), slice(1, 2))


@pytest.mark.parametrize("change", [
    dict(local=False), dict(weights=[0.5, 0.5, 1]), dict(shifts=0), dict(flips=False),
    dict(schedule=None), dict(batch_size=20), dict(precision="bf16"),
], ids=str)  # fmt: skip
def test_every_setting_has_its_effect_and_a_checkpoint_knows_it(change, few_digits, tmp_path):
    one, other = fitted(few_digits, seeds=(0,), checkpoint=tmp_path / "c"), None
    other = fitted(few_digits, seeds=(0,), **change)
    assert not torch.equal(one.stage_loss, other.stage_loss)
    with pytest.raises(ValueError, match="other settings or data"):
        fitted(few_digits, seeds=(0,), checkpoint=tmp_path / "c", **change)


@pytest.mark.parametrize("optimizer", [
    partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True),
    partial(torch.optim.Adam, lr=1e-3),
], ids=["sgd", "adam"])  # fmt: skip
def test_interrupted_after_each_epoch_it_goes_on_to_the_same_bits(
    optimizer, few_digits, tmp_path, monkeypatch
):
    whole, stops = fitted(few_digits, optimizer=optimizer), 0
    original = bpfree.training.course.Course.train
    for _ in range(7):
        begun = itertools.count()

        def once(self, *args, begun=begun):
            if next(begun) == 1:
                raise OutOfTime("test")
            return original(self, *args)

        monkeypatch.setattr(bpfree.training.course.Course, "train", once)
        try:
            resumed = fitted(few_digits, optimizer=optimizer, checkpoint=tmp_path / "c")
            break
        except OutOfTime:
            stops += 1
    assert stops == 5
    assert_runs_equal(resumed, whole)
    with pytest.raises(OutOfTime):  # it is not begun
        fitted(few_digits, deadline=time.monotonic() - 1)


def test_a_seed_that_diverged_has_no_numbers_and_the_others_go_on(few_digits):
    def wild(g):
        stages = make(g)
        if g.initial_seed() == 0:
            nn.init.constant_(stages[-1].body[0].weight, 1e20)
        return stages

    with pytest.raises(Diverged, match="seed 0 in epoch 1$") as caught:
        fit_stages(wild, few_digits, epochs=2, batch_size=10, seeds=(0, 1))
    run = caught.value.run
    assert run.diverged == [1, None]
    assert run.stage_accuracy[0, 1].isnan().all()
    assert run.stage_accuracy[1].isfinite().all()


@pytest.mark.parametrize("local", [True, False])
def test_stages_learn_digits(local, digits):
    run = fit_stages(partial(make, dropout=0.0), digits, epochs=6, batch_size=32, local=local)
    assert run.stage_accuracy[0, -1, -1] > 60
    assert run.stage_loss[0, -1, -1] < 0.6 * run.stage_loss[0, 0, -1]


REFUSED = {
    "epochs": ({"epochs": 0}, ValueError, "epochs must.*got 0"),
    "batch": ({"batch_size": 101}, ValueError, "batch_size must be in 1..100"),
    "seeds": ({"seeds": (0, 0)}, ValueError, "seeds must be"),
    "precision": ({"precision": "fp8"}, ValueError, "precision must be one of"),
    "shifts": ({"shifts": -1}, ValueError, "shifts must.*got -1"),
    "weights": ({"weights": [1]}, ValueError, "weights must be 3"),
    "no stages": ({"make": lambda g: nn.Linear(2, 2)}, TypeError, "Stages, got Linear"),
    "classes": ({"make": lambda g: bpfree.split(bpfree.mlp(64, 8, 5, generator=g), 1)}, ValueError,
                r"\(B, C >= 10\).*got \(1, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused_by_name(name, few_digits):
    change, kind, words = REFUSED[name]
    settings = dict(make=make, data=few_digits, epochs=1, batch_size=10)
    with pytest.raises(kind, match=words):
        fit_stages(**{**settings, **change})


def test_one_model_for_two_seeds_is_refused(few_digits):
    stages = make(generator())
    with pytest.raises(ValueError, match="the same one twice"):
        fit_stages(lambda g: stages, few_digits, epochs=1, seeds=(0, 1), batch_size=10)


# ---- recipes -------------------------------------------------------------------------------------

TINY = StagesRecipe(
    "tiny", "digits", ("resnet8", (10,), {"width": 2, "channels": 1}), "Stages",
    {"n": 2, "local": True, "weights": (0.5, 1.0)}, epochs=2, lr=0.05, seeds=(0, 1), shifts=1,
    flips=True,
)  # fmt: skip
STAGED = {n: r for n, r in recipes.RECIPES.items() if isinstance(r, StagesRecipe)}


def test_a_recipe_is_recorded_like_any_other_with_the_curves_of_its_stages(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", TINY)
    result = record(TINY, TINY.seeds, folder=tmp_path)
    assert record(TINY, TINY.seeds, folder=tmp_path) == result
    one = results.read("tiny", tmp_path)["runs"]["1"]
    assert [len(epoch) for epoch in one["stage_accuracy"]] == [2, 2]
    assert [epoch[-1] for epoch in one["stage_accuracy"]] == one["test_accuracy"]
    assert "| stages, n 2, local True" in results.table(["tiny"], tmp_path)
    with pytest.raises(ValueError, match="flips=True"):
        record(dataclasses.replace(TINY, flips=False), [2], folder=tmp_path)
    with pytest.raises(ValueError, match="not compiled"):
        record(TINY, [2], folder=tmp_path, compile=True)


def test_schedules_fall_by_milestones_or_along_half_a_cosine():
    recipe = dataclasses.replace(TINY, epochs=4, milestones=(3,))
    assert [recipe.schedule(e) for e in range(4)] == pytest.approx([1, 1, 1, 0.1])
    curve = [dataclasses.replace(recipe, cosine=True).schedule(e) for e in range(4)]
    assert curve == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_initial_weights_come_from_the_seeds_generator_alone():
    with global_generator_untouched():
        twins = [TINY.make(generator(s)) for s in (1, 1, 2)]
    first, again, other = (copies(dict(t.named_parameters())) for t in twins)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["0.body.0.weight"], other["0.body.0.weight"])
    assert not torch.equal(first["1.head.1.weight"], other["1.head.1.weight"])


def test_resnet8_has_three_blocks_each_twice_as_wide_and_half_as_high():
    net = zoo.resnet8(10, generator=generator())
    h, shapes = torch.randn(2, 3, 32, 32), []
    for m in net:
        h = m(h)
        shapes.append(tuple(h.shape[1:]))
    assert shapes[2:6] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert shapes[-1] == (10,)


DEEPEST = {r.network[1]: n for n, r in STAGED.items() if r.options["local"]}.values()


@pytest.mark.parametrize("name", DEEPEST)
def test_every_model_fits_its_images_and_all_its_weights_learn(name):
    """On tensors without memory: a step of the whole model, of its images' size."""
    recipe = STAGED[name]
    model, options = recipe.network[1], recipe.options
    side = model[2] if recipe.network[0] == "torchvision_model" else 32
    with torch.device("meta"):
        stages = recipe.make(generator())
        x, y = torch.empty(2, 3, side, side), torch.empty(2, dtype=torch.long)
    losses = backward(stages, x, y, options["local"], options["weights"])
    assert losses.shape == (options["n"],)
    assert all(p.grad is not None for p in stages.parameters())
    assert recipe.optimizer(stages.parameters()).defaults["lr"] == recipe.lr
    assert recipe.paper is None or recipe.source == "arXiv 2310.07885, released logs"


def test_a_recipe_of_the_papers_size_trains_for_some_steps():
    recipe = STAGED["lfnn-resnet50-cifar10-local-4"]
    stages = recipe.make(generator())
    opt = recipe.optimizer(stages.parameters())
    x, y = torch.rand(4, 3, 32, 32, generator=generator()), torch.arange(4)
    losses = []
    for _ in range(2):
        opt.zero_grad()
        losses.append(backward(stages, x, y, True, recipe.options["weights"]))
        opt.step()
    assert torch.stack(losses).isfinite().all()


def test_data_that_cannot_be_read_yet_is_told_of_as_missing():
    with pytest.raises(FileNotFoundError, match="imagenet"):
        STAGED["lfnn-resnet50-imagenet-local-4"].load()
