"""``fit``: plain PyTorch training, the same for seeds one at a time or all at once."""

import dataclasses
import functools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import RULES, copies, generator, global_generator_untouched, plain_logits

import bpfree
from bpfree import alignment, fit
from bpfree.training.check import check_update

every_rule = pytest.mark.parametrize("name", RULES)
plain_sgd = partial(torch.optim.SGD, lr=0.1)
momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
adam = partial(torch.optim.Adam, lr=0.01)


def maker(name="backprop", kind="mlp", dropout=0.3, dtype=torch.float64, **options):
    """A ``make`` for fit: a small network for digits and the rule on it."""

    def make(g):
        options_of_net = dict(activation="tanh", bias=True, dropout=dropout, generator=g)
        if kind == "mlp":
            net = bpfree.mlp(64, 12, 8, 10, **options_of_net)
        else:
            net = bpfree.convnet((1, 8, 8), (3,), (9,), num_classes=10, **options_of_net)
        return RULES[name](net.to(dtype), generator=g, **options)

    return make


def learned(run):
    return [copies(rule.params()) for rule in run.rules]


def curves(run):
    return {k: v for k, v in vars(run).items() if isinstance(v, torch.Tensor)}


def assert_same_runs(ours, theirs, order=slice(None)):
    torch.testing.assert_close(learned(ours), [learned(theirs)[i] for i in order])
    for key, curve in curves(ours).items():
        expected = curves(theirs)[key][order]
        torch.testing.assert_close(curve, expected, atol=1e-5, rtol=1e-7, equal_nan=True)


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [momentum, adam], ids=("sgd", "adam"))
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_fit_of_backprop_is_a_plain_pytorch_loop(kind, optimizer, few_digits):
    make = maker(kind=kind)
    run = fit(make, few_digits, epochs=2, batch_size=32, optimizer=optimizer, seeds=[5])
    g = generator(5)  # weights, then the order of each epoch, then the masks of each step
    net = make(g).net
    opt = optimizer(net.parameters())
    x, y = few_digits.train_x.double() / 16, few_digits.train_y
    losses, hits = torch.zeros(2, 3), torch.zeros(2, 3)
    for epoch in range(2):
        order = torch.randperm(100, generator=g)
        for step in range(3):
            index = order[32 * step : 32 * step + 32]
            logits = plain_logits(net, x[index], net.masks(32, g))
            loss = F.cross_entropy(logits, y[index])
            losses[epoch, step] = loss.item()
            hits[epoch, step] = (logits.argmax(1) == y[index]).double().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
    torch.testing.assert_close(learned(run), [copies(dict(net.named_parameters()))])
    expected = {"train_loss": losses, "train_accuracy": 100 * hits}
    for key, curve in expected.items():
        torch.testing.assert_close(getattr(run, key)[0], curve.double().mean(1), rtol=1e-5, atol=0)
    correct = plain_logits(net, few_digits.test_x.double() / 16).argmax(1) == few_digits.test_y
    assert run.test_accuracy[0, -1].item() == pytest.approx(100 * correct.double().mean().item())


@every_rule
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
@pytest.mark.parametrize("optimizer", [momentum, adam], ids=("sgd", "adam"))
def test_seeds_at_once_are_the_seeds_one_at_a_time(name, kind, optimizer, few_digits):
    train = partial(
        fit, maker(name, kind), few_digits, epochs=2, batch_size=32, optimizer=optimizer,
        seeds=[3, 0, 8], probe=20,
    )  # fmt: skip
    together, alone = train(vectorize=True), train(vectorize=False)
    assert_same_runs(together, alone, order=range(3))
    weights = [run["0.linear.weight"] for run in learned(alone)]
    assert not any(torch.allclose(weights[0], w) for w in weights[1:])


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_order_of_seeds_does_not_matter(vectorize, few_digits):
    train = partial(
        fit, maker("kp"), few_digits, epochs=1, batch_size=20, vectorize=vectorize, probe=10
    )
    assert_same_runs(train(seeds=[2, 0, 1]), train(seeds=[0, 1, 2]), order=[2, 0, 1])


@pytest.mark.parametrize("vectorize", [True, False])
def test_what_is_fixed_stays_and_what_learns_moves(vectorize, few_digits):
    for name in ("fa", "dfa", "sign-fixed", "kp", "pepita"):
        make, seeds = maker(name), [0, 1]
        run = fit(make, few_digits, epochs=1, seeds=seeds, vectorize=vectorize)
        for seed, rule in zip(seeds, run.rules, strict=True):
            start = make(generator(seed))
            torch.testing.assert_close(copies(rule.state()), copies(start.state()))
            before = start.params()
            assert all(not torch.equal(p, before[k]) for k, p in rule.params().items())


@pytest.mark.parametrize("vectorize", [True, False])
def test_parameters_that_need_no_gradient_are_not_trained(vectorize, few_digits):
    def make(g):
        rule = maker()(g)
        rule.net[0].linear.weight.requires_grad_(False)
        return rule

    run = fit(make, few_digits, epochs=1, seeds=[0, 1], vectorize=vectorize)
    for seed, rule in zip([0, 1], run.rules, strict=True):
        assert torch.equal(rule.net[0].linear.weight, make(generator(seed)).net[0].linear.weight)


@pytest.mark.parametrize("vectorize", [True, False])
def test_fit_leaves_the_global_generator_alone(vectorize, few_digits):
    for kind in ("mlp", "convnet"):
        with global_generator_untouched():
            fit(maker("dfa", kind), few_digits, epochs=1, seeds=[0, 1], vectorize=vectorize,
                probe=10)  # fmt: skip


def test_dropout_is_on_in_training_whatever_mode_the_network_was_made_in(few_digits):
    def make(g):
        rule = maker(dropout=0.5)(g)
        rule.net.eval()
        return rule

    train = partial(fit, data=few_digits, epochs=1, seeds=[3])
    torch.testing.assert_close(learned(train(make)), learned(train(maker(dropout=0.5))))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(learned(train(make)), learned(train(maker(dropout=0.0))))


def test_the_same_seed_gives_the_same_run_to_the_bit(few_digits):
    runs = [fit(maker("fa"), few_digits, epochs=2, seeds=[4]) for _ in range(2)]
    torch.testing.assert_close(learned(runs[0]), learned(runs[1]), rtol=0, atol=0)


# ---- schedule ------------------------------------------------------------------------------------


def test_the_schedule_multiplies_the_learning_rate(few_digits):
    train = partial(fit, maker(), few_digits, epochs=2, seeds=[0])
    half = train(optimizer=plain_sgd, schedule=lambda epoch: 0.5)
    torch.testing.assert_close(
        learned(half), learned(train(optimizer=partial(torch.optim.SGD, lr=0.05)))
    )


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_schedule_is_asked_once_per_epoch(vectorize, few_digits):
    train = partial(
        fit, maker(), few_digits, optimizer=plain_sgd, seeds=[0, 1], vectorize=vectorize
    )
    stopped = train(epochs=3, schedule=lambda epoch: float(epoch < 2))
    torch.testing.assert_close(learned(stopped), learned(train(epochs=2)))
    assert (stopped.test_accuracy[:, 1] == stopped.test_accuracy[:, 2]).all()


# ---- curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]], ids=("one", "three"))
def test_curves_have_one_row_per_seed_and_one_column_per_epoch(seeds, vectorize, few_digits):
    S, train = len(seeds), partial(
        fit, maker("fa", dtype=torch.float32), few_digits, epochs=2, seeds=seeds,
        vectorize=vectorize,
    )  # fmt: skip
    run = train(probe=10)
    assert len(run.rules) == S
    for key, curve in curves(run).items():
        assert curve.shape == ((S, 3, 3) if key in ("angle", "norm") else (S, 2))
        assert curve.dtype == torch.float64
        assert curve.device.type == "cpu"
        assert not curve.requires_grad
    assert run.seconds > 0
    without = train()
    assert without.angle.numel() == without.norm.numel() == 0
    torch.testing.assert_close(learned(without), learned(run))


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_last_test_accuracy_is_that_of_the_trained_network(vectorize, few_digits):
    run = fit(maker(), few_digits, epochs=2, seeds=[0, 1], vectorize=vectorize)
    for s, rule in enumerate(run.rules):
        logits = plain_logits(rule.net, few_digits.test_x.double() / 16)
        correct = (logits.argmax(1) == few_digits.test_y).double().mean()
        assert run.test_accuracy[s, -1].item() == pytest.approx(100 * correct.item())


def test_test_accuracy_counts_every_image_of_a_large_test_set(digits, few_digits):
    data = dataclasses.replace(few_digits, test_x=digits.train_x, test_y=digits.train_y)
    assert len(data.test_y) > 1000
    run = fit(maker(), data, epochs=1, seeds=[0])
    logits = plain_logits(run.rules[0].net, data.test_x.double() / 16)
    correct = (logits.argmax(1) == data.test_y).double().mean()
    assert run.test_accuracy.item() == pytest.approx(100 * correct.item())


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_probe_measures_alignment_before_and_after_training(vectorize, few_digits):
    make, seeds = maker("dfa"), [0, 1]
    run = fit(make, few_digits, epochs=1, seeds=seeds, vectorize=vectorize, probe=15)
    x, y = few_digits.train_x[:15].double() / 16, few_digits.train_y[:15]
    for s, seed in enumerate(seeds):
        for moment, rule in ((0, make(generator(seed))), (-1, run.rules[s])):
            measured = alignment(rule, x, y)
            torch.testing.assert_close(run.angle[s, moment], measured.angle, atol=1e-5, rtol=0)
            torch.testing.assert_close(run.norm[s, moment], measured.norm)


def test_nothing_is_printed_unless_asked(few_digits, capsys):
    fit(maker(), few_digits, epochs=1)
    assert capsys.readouterr() == ("", "")
    fit(maker(), few_digits, epochs=1, progress=True)
    assert "epoch" in capsys.readouterr().err


# ---- refusals ------------------------------------------------------------------------------------

BAD = {
    "no epochs": (dict(epochs=0), "epochs.*0"),
    "half an epoch": (dict(epochs=1.5), "whole number.*1.5"),
    "a number of seeds": (dict(seeds=3), "list.*3"),
    "probe too large": (dict(probe=101), r"probe.*0\.\.100.*101"),
    "unknown precision": (dict(precision="half"), "precision.*float32.*half"),
    "no seeds": (dict(seeds=[]), r"seeds.*\[\]"),
    "repeated seeds": (dict(seeds=[1, 2, 1]), r"distinct.*\[1, 2, 1\]"),
    "batch too large": (dict(batch_size=101), r"1\.\.100.*101"),
    "batch empty": (dict(batch_size=0), r"1\.\.100.*0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case, few_digits):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fit(maker(), few_digits, **{"epochs": 1, "batch_size": 10} | options)


@pytest.mark.parametrize("vectorize", [True, False])
def test_one_network_for_several_seeds_is_refused(vectorize, few_digits):
    net = bpfree.mlp(64, 10)
    with pytest.raises(ValueError, match="same one twice"):
        fit(lambda g: bpfree.Backprop(net), few_digits, epochs=1, seeds=[0, 1], vectorize=vectorize)


def test_a_network_with_fewer_classes_than_the_data_is_refused(few_digits):
    def make(g):
        return bpfree.Backprop(bpfree.mlp(64, 5, generator=g))

    with pytest.raises(ValueError, match=r"5\D.*10|10\D.*5"):
        fit(make, few_digits, epochs=1)


@pytest.mark.parametrize("vectorize", [True, False])
def test_divergence_names_the_epoch_and_the_seed(vectorize, few_digits):
    def make(g):
        return bpfree.Backprop(bpfree.mlp(64, 12, 10, activation="identity", generator=g))

    with pytest.raises(FloatingPointError, match=r"seed 11 in epoch \d+"):
        fit(
            make, few_digits, epochs=20, batch_size=10, seeds=[11], vectorize=vectorize,
            optimizer=partial(torch.optim.SGD, lr=1e6),
        )  # fmt: skip


def test_a_loss_out_of_every_sensible_range_has_diverged(few_digits):
    """Finite in float32, and far from training: one rate for logits of 10^3, one of 10^12."""

    def train(lr):
        def make(g):
            return bpfree.Backprop(bpfree.mlp(64, 10, generator=g))

        return fit(make, few_digits, epochs=3, optimizer=partial(torch.optim.SGD, lr=lr))

    assert 100 < train(1e3).train_loss.max() < 2**24
    with pytest.raises(FloatingPointError, match="seed 0 in epoch 2") as caught:
        train(1e12)
    assert caught.value.run.train_loss.isfinite().any()


@pytest.mark.parametrize("vectorize", [True, False])
def test_weights_lost_in_an_epochs_last_step_have_diverged(vectorize, few_digits):
    class Last(torch.optim.SGD):
        def step(self):
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="seed 0 in epoch 1, seed 1 in epoch 1"):
        fit(maker(), few_digits, epochs=1, seeds=[0, 1], vectorize=vectorize,
            optimizer=partial(Last, lr=0.1))  # fmt: skip


def test_seeds_that_share_any_parameter_are_refused(few_digits):
    head = bpfree.mlp(12, 10, generator=generator())[0]

    def make(g):
        return bpfree.Backprop(bpfree.Network(bpfree.mlp(64, 12, generator=g)[0], head))

    with pytest.raises(ValueError, match="a new network for each seed"):
        fit(make, few_digits, epochs=1, seeds=[0, 1])


def test_where_nothing_learns_fit_says_so(few_digits):
    def make(g):
        return bpfree.Backprop(bpfree.mlp(64, 10, generator=g).requires_grad_(False))

    with pytest.raises(ValueError, match="nothing learns"):
        fit(make, few_digits, epochs=1)


@pytest.mark.parametrize("vectorize", [True, False])
def test_divergence_names_only_the_seeds_that_diverged(vectorize, few_digits):
    def make(g):
        rule = maker()(g)
        if g.initial_seed() == 7:
            torch.nn.init.constant_(rule.net[-1].linear.weight, torch.inf)
        return rule

    with pytest.raises(FloatingPointError, match="diverged: seed 7 in epoch 1$"):
        fit(make, few_digits, epochs=2, seeds=[6, 7, 8], vectorize=vectorize)


def test_a_seed_that_diverged_has_no_numbers_from_there_though_its_stack_goes_on(few_digits):
    def make(g):
        rule = maker()(g)
        if g.initial_seed() == 7:
            torch.nn.init.constant_(rule.net[-1].linear.weight, torch.inf)
        return rule

    for vectorize in (True, False):
        with pytest.raises(FloatingPointError) as caught:
            fit(make, few_digits, epochs=3, seeds=[6, 7], vectorize=vectorize, probe=10)
        run = caught.value.run
        for curve in (run.train_loss, run.train_accuracy, run.test_accuracy, run.angle[:, 1:]):
            assert not curve[0].isnan().any()
            assert curve[1, 1:].isnan().all()


class ReadsItself(bpfree.Backprop):
    def feedback(self, l, params, state):
        return self.net[l - 1].linear.weight


class ReadsItsSigns(bpfree.Backprop):
    def feedback(self, l, params, state):
        return self.net[l - 1].linear.weight.sign()


class ReadsItselfALittle(bpfree.Backprop):
    def feedback(self, l, params, state):
        return super().feedback(l, params, state) + 1e-5 * self.net[l - 1].linear.weight


class Decomposes(bpfree.Backprop):
    def feedback(self, l, params, state):
        return torch.linalg.svd(self.net[l - 1].linear.weight, full_matrices=False)[0]


class WritesItsInput(bpfree.Backprop):
    def signals(self, params, state, trace, error, target):
        trace[0].r.mul_(0.5)
        return super().signals(params, state, trace, error, target)


class WritesItsState(bpfree.FeedbackAlignment):
    def feedback(self, l, params, state):
        return state[f"B{l}"].mul_(0.9)


@pytest.mark.parametrize("rule, message", [
    (ReadsItself, "must read weights from params"),
    (ReadsItsSigns, "must read weights from params"),
    (ReadsItselfALittle, "must read weights from params"),
    (Decomposes, "must read weights from params"),
    (WritesItsInput, r"wrote to \['x'\]"),
    (WritesItsState, r"wrote to \['B2'\]"),
])  # fmt: skip
def test_a_rule_whose_update_is_not_pure_is_told_so_and_left_as_it_was(rule, message, few_digits):
    net = bpfree.mlp(64, 8, 10, generator=generator(0))
    made = rule(net, generator=generator(1))
    before = {k: v.clone() for k, v in {**made.params(), **made.state()}.items()}
    with pytest.raises(ValueError, match=message):
        fit(lambda g: made, few_digits, epochs=1)
    for key, tensor in {**made.params(), **made.state()}.items():
        assert torch.equal(tensor, before[key])


class Draws(bpfree.FeedbackAlignment):
    """Feedback that is drawn at each step, by the ten hardest samples, with a buffer that is one
    number seen eight times: unusual, and nothing is wrong with it."""

    def __init__(self, net, generator):
        super().__init__(net, generator=generator)
        self.register_buffer("ones", torch.ones(1).expand(8))

    def signals(self, params, state, trace, error, target):
        hard = error.norm(dim=1).topk(10).indices
        mask = torch.zeros(len(error)).index_fill(0, hard, 1.0)[:, None]
        for r, delta in super().signals(params, state, trace, error, target):
            noise = torch.rand(1, generator=self.generator)
            yield r, delta * mask * noise * state["ones"][0]


def test_the_check_of_a_rule_leaves_its_generator_and_refuses_nothing_right(few_digits):
    net = bpfree.mlp(64, 8, 10, generator=generator(0))
    rule = Draws(net, generator(1))
    before = rule.generator.get_state()
    check_update(rule, few_digits, 64)
    assert torch.equal(rule.generator.get_state(), before)
    assert all(t.isfinite().all() for t in {**rule.params(), **rule.state()}.values())


def test_numbers_of_numpy_are_numbers(few_digits):
    make = lambda g: bpfree.Backprop(bpfree.mlp(64, 8, 10, generator=g))  # noqa: E731
    run = fit(make, few_digits, epochs=np.int64(1), seeds=np.arange(2))
    assert run.test_accuracy.shape == (2, 1)


# ---- learning ------------------------------------------------------------------------------------


@functools.cache  # so that a worker trains the rules that its tests look at, and no other
def trained(name):
    """A rule on all digits: one seed, 12 epochs."""

    def make(g):
        net = bpfree.mlp(64, 100, 50, 10, activation="tanh", init="glorot", generator=g)
        return RULES[name](net, generator=g)

    return fit(make, bpfree.load("digits"), epochs=12, batch_size=32, probe=200,
               optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))  # fmt: skip


@pytest.mark.parametrize("name", [n for n in RULES if n != "frozen"])
def test_every_rule_learns_the_digits(name):
    assert trained(name).test_accuracy[0, -1] > 90


def test_backprop_and_feedback_alignment_beat_frozen_hidden_layers():
    frozen = trained("frozen").train_loss[0, -1]
    assert trained("backprop").train_loss[0, -1] < frozen / 2
    assert trained("fa").train_loss[0, -1] < frozen


def test_feedback_alignment_aligns_as_it_learns():
    angle = trained("fa").angle[0]
    assert angle[0, 1] > 80
    assert angle[-1, 1] < 70
    assert angle[:, 2].max() < 1e-3


def test_kolen_pollack_aligns_with_a_weight_decay(digits):
    def make(g):
        return bpfree.KolenPollack(bpfree.mlp(64, 40, 10, generator=g), generator=g)

    run = fit(make, digits, epochs=5, batch_size=32, probe=100,
              optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.1))  # fmt: skip
    assert run.angle[0, 0, 0] > 60
    assert run.angle[0, -1, 0] < 10


# ---- images that are moved -----------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"shifts": 1}, {"flips": True}])
def test_moved_images_are_the_seeds_own_draw_and_seeds_together_are_seeds_alone(
    changes, few_digits
):
    def weights(**options):
        run = bpfree.fit(
            lambda g: bpfree.Backprop(bpfree.mlp(64, 9, 10, generator=g), generator=g),
            few_digits, epochs=2, seeds=[3, 4], **options,
        )  # fmt: skip
        return [torch.cat([w.flatten() for w in rule.net.weights()]) for rule in run.rules]

    alone, together = (weights(vectorize=v, **changes) for v in (False, True))
    torch.testing.assert_close(together, alone)
    again = weights(vectorize=False, **changes)
    torch.testing.assert_close(again, alone, rtol=0, atol=0)
    assert not torch.allclose(weights(vectorize=False)[0], alone[0], atol=1e-3)


def test_what_is_no_image_is_not_moved():
    x, y = torch.rand(40, 7), torch.arange(40) % 3
    data = bpfree.data.Data("flat", x, y, x, y, 1.0)
    make = lambda g: bpfree.Backprop(bpfree.mlp(7, 3, generator=g))  # noqa: E731
    with pytest.raises(ValueError, match=r"need images .* got samples of shape \(7,\)"):
        bpfree.fit(make, data, epochs=1, batch_size=8, flips=True)
    with pytest.raises(ValueError, match="shifts must be a whole number of pixels"):
        bpfree.fit(make, data, epochs=1, batch_size=8, shifts=-1)
