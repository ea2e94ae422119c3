"""Forward gradients: the slope is exact, the estimate unbiased, its variance theorem T16's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    assert_same,
    autograd_grads,
    batch_for,
    conv_problem,
    copies,
    generator,
    global_generator_untouched,
    mlp_problem,
    plain_logits,
    relative_error,
    sibling,
    update_of,
)
from torch import nn

import bpfree
from bpfree import Block, ForwardGradient, Network

both = pytest.mark.parametrize("perturb", ["weights", "activities"])
problem = pytest.mark.parametrize("make", [mlp_problem, conv_problem])


def small_conv(**options):
    """Few units and weights, so that some thousand draws tell a mean from its noise."""
    net = bpfree.convnet(
        (2, 4, 4), (2,), num_classes=3, bias=True, generator=generator(), **options
    )
    return net.double(), *batch_for(net.double(), 3)


def small_mlp(**options):
    net = bpfree.mlp(4, 5, 3, 3, bias=True, generator=generator(), **options).double()
    return net, *batch_for(net, 3)


small = pytest.mark.parametrize("make", [small_mlp, small_conv])


def estimates(net, x, y, perturb, count, masks=None):
    """{name: (count, ...)}: as many independent estimates of each gradient."""
    rule = ForwardGradient(net, perturb, generator=generator(5))
    found = [update_of(rule, x, y, masks=masks).grads for _ in range(count)]
    return {name: torch.stack([g[name] for g in found]) for name in found[0]}


def loss_along(net, x, y, perturb, way, masks):
    """t -> each sample's loss, moved by t along the direction, with autograd's own operators."""

    def loss(t):
        h = x
        for l, block in enumerate(net, 1):
            W, b = block.linear.weight, block.linear.bias
            if perturb == "weights":
                W = W + t * way[f"{l - 1}.linear.weight"]
                b = b + t * way[f"{l - 1}.linear.bias"]
            a = block.pre(h, W, b)[1]
            V = way.get(f"U{l}")
            h = block.post(a, a if V is None else a + t * V, (masks or {}).get(l)).h
        return F.cross_entropy(h, y, reduction="none")

    return loss


# ---- the slope -----------------------------------------------------------------------------------


@both
@problem
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_slope_is_autograds(perturb, make, dropout):
    net, x, y = make(dropout=dropout)
    masks = net.masks(len(x), generator(2))
    rule = ForwardGradient(net, perturb, generator=generator(3))
    params = {n: p.detach() for n, p in net.named_parameters()}
    trace = net.trace(params, x, masks)
    way = {n: rule.draw(p) for n, p in params.items()}
    if perturb == "activities":
        way = {f"U{l}": rule.draw(t.a) for l, t in enumerate(trace[:-1], 1)}
    error = torch.softmax(trace[-1].h, 1) - F.one_hot(y, net.num_classes)
    loss = loss_along(net, x, y, perturb, way, masks)
    zero = torch.zeros((), dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(loss, zero)
    ours = rule.slopes(params, trace, error, way)
    assert ours.abs().min() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


POOLS = {
    "conv": [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)],
    "linear": [None, nn.MaxPool1d(2), nn.AvgPool1d(2)],
}


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "sign", torch.sin])
@pytest.mark.parametrize(
    ("kind", "pool"), [(k, p) for k, pools in POOLS.items() for p in pools], ids=str
)
def test_local_jvp_is_the_transpose_of_local_vjp_and_autograds(kind, pool, activation):
    linear = nn.Conv2d(2, 3, 3) if kind == "conv" else nn.Linear(5, 8)
    block = Block(linear.double(), activation, pool)
    g, f64 = generator(), torch.float64
    x = torch.randn((4, 2, 9, 9) if kind == "conv" else (4, 5), generator=g, dtype=f64)
    t = block.trace(x, linear.weight.detach(), linear.bias.detach())
    mask = torch.randint(3, t.h.shape, generator=g).double()
    t = block.post(t.r, t.a, mask)
    up, down = (torch.randn(s.shape, generator=g, dtype=f64) for s in (t.a, t.h))
    ours = block.local_jvp(up, t)
    assert ours.any() or activation == "sign"
    torch.testing.assert_close((ours * down).sum(), (block.local_vjp(down, t) * up).sum())

    def phi(a):
        z = block.act(a)
        return (z if pool is None else pool(z)) * mask

    torch.testing.assert_close(ours, torch.autograd.functional.jvp(phi, t.a, up)[1])


# ---- the estimate --------------------------------------------------------------------------------


@both
@small
def test_the_mean_of_many_estimates_is_backprops_gradient(perturb, make):
    net, x, y = make(dropout=0.2)
    masks, count = net.masks(len(x), generator(1)), 1000
    true = autograd_grads(net, x, y, masks)
    for name, found in estimates(net, x, y, perturb, count, masks).items():
        error = found.std(0) / count**0.5
        off = (found.mean(0) - true[name]).abs()
        if perturb == "activities" and name.startswith(f"{len(net) - 1}."):
            assert_same({name: found[0]}, {name: true[name]})  # the output's own error
            continue
        assert (off < 5 * error + 1e-12).all()


def expected_error(net, x, y, perturb):
    """T16: E |estimate - gradient|^2 of each weight matrix that is guessed."""
    true = autograd_grads(net, x, y)
    names = [f"{l}.linear.weight" for l in range(len(net))]
    if perturb == "weights":
        whole = sum(g.square().sum() for g in true.values())
        return {n: true[n].numel() * whole + true[n].square().sum() for n in names}
    signals = update_of(bpfree.Backprop(net), x, y).signals[:-1]
    whole = sum(d.square().flatten(1).sum(1) for _, d in signals)  # |delta|^2 of each sample
    law = {}
    for name, (r, d) in zip(names, signals, strict=False):
        n, own = d[0].numel(), d.square().sum(1)
        law[name] = (r.square().sum(1) * (n * whole + own)).sum() / len(x) ** 2
    return law


@both
def test_T16_the_variance_is_the_theorems(perturb):
    net, x, y = small_mlp()
    found, true = estimates(net, x, y, perturb, 1500), autograd_grads(net, x, y)
    for name, law in expected_error(net, x, y, perturb).items():
        off = (found[name] - true[name]).square().flatten(1).sum(1)
        assert abs(off.mean() - law) < 5 * off.std() / len(off) ** 0.5
        assert off.std() / len(off) ** 0.5 < 0.12 * law  # enough draws to tell


def test_T16_of_all_weights_the_relative_error_is_their_number_plus_one():
    for hidden in (2, 12):
        net = bpfree.mlp(4, hidden, 3, generator=generator()).double()
        x, y = batch_for(net, 3)
        found, true = estimates(net, x, y, "weights", 1500), autograd_grads(net, x, y)
        off = sum((found[n] - true[n]).square().flatten(1).sum(1) for n in true)
        law = (4 * hidden + hidden * 3 + 1) * sum(g.square().sum() for g in true.values())
        assert abs(off.mean() / law - 1) < 0.25


def test_activities_are_guessed_better_than_weights():
    net, x, y = mlp_problem()
    weights, activities = (expected_error(net, x, y, p) for p in ("weights", "activities"))
    assert all(activities[n] < weights[n] / 2 for n in activities)


@both
def test_the_variance_falls_with_the_number_of_draws(perturb):
    net, x, y = small_mlp()
    true = autograd_grads(net, x, y)["0.linear.weight"]
    off = {}
    for m in (1, 16):
        rule = ForwardGradient(net, perturb, draws=m, generator=generator(5))
        found = [update_of(rule, x, y).grads["0.linear.weight"] for _ in range(200)]
        off[m] = sum((g - true).square().sum() for g in found)
    assert 10 < off[1] / off[16] < 24


def test_draws_are_the_mean_of_single_ones():
    net, x, y = conv_problem()
    single = ForwardGradient(net, generator=generator(5))
    found = [update_of(single, x, y).grads for _ in range(3)]
    three = ForwardGradient(net, draws=3, generator=generator(5))
    mean = {n: sum(g[n] for g in found) / 3 for n in found[0]}
    assert_same(update_of(three, x, y).grads, mean)


def test_guessed_activities_are_signals_and_guessed_weights_teach_no_unit():
    net, x, y = conv_problem()
    rule = ForwardGradient(net, "activities", generator=generator(5))
    update = update_of(rule, x, y)
    for l, (block, (r, delta)) in enumerate(zip(net, update.signals, strict=True)):
        assert_same(block.outer(delta, r, 1 / len(x))["weight"], update.grads[f"{l}.linear.weight"])
    e = torch.softmax(plain_logits(net, x), 1) - F.one_hot(y, net.num_classes)
    torch.testing.assert_close(update.signals[-1][1], e.detach())
    silent = update_of(ForwardGradient(net, generator=generator(5)), x, y)
    assert not any(delta.any() for _, delta in silent.signals)
    assert all(g.any() for g in silent.grads.values())


# ---- what every rule must do ---------------------------------------------------------------------


@both
@problem
def test_update_writes_nothing_and_reads_only_what_it_is_given(perturb, make):
    net, x, y = make()
    rule = ForwardGradient(net, perturb, generator=generator(1))
    other = ForwardGradient(sibling(net, seed=9), perturb, generator=generator(1))
    before = copies(dict(net.named_parameters()))
    with global_generator_untouched():
        doctored = rule.update(other.params(), other.state(), x, y)
        assert_same(doctored.grads, update_of(other, x, y).grads, rtol=0, atol=0)
    assert_same(copies(dict(net.named_parameters())), before, rtol=0, atol=0)
    assert not any(g.requires_grad for g in doctored.grads.values())
    bpfree.refuse.check_pure(rule, x, y)


@both
def test_backward_adds_a_new_direction_at_each_call(perturb):
    net, x, y = mlp_problem(dropout=0.5)
    rule = ForwardGradient(net, perturb, generator=generator(1))
    loss = rule.backward(x, y)
    first = copies({n: p.grad for n, p in net.named_parameters()})
    g = generator(1)
    again, masks = ForwardGradient(net, perturb, generator=g), net.masks(len(x), g)
    expected = update_of(again, x, y, masks=masks)
    assert_same(first, expected.grads)
    torch.testing.assert_close(loss, expected.loss)
    rule.backward(x, y)
    second = {n: p.grad - first[n] for n, p in net.named_parameters()}
    assert relative_error(second["0.linear.weight"], first["0.linear.weight"]) > 0.1
    assert list(copy.deepcopy(rule).parameters()) == []


@both
def test_fit_trains_and_is_the_same_twice(perturb, few_digits):
    def make(g):
        return ForwardGradient(bpfree.mlp(64, 8, 10, generator=g), perturb, 8, generator=g)

    sgd = torch.optim.Adam
    runs = [
        bpfree.fit(make, few_digits, epochs=20, batch_size=10, optimizer=lambda p: sgd(p, 0.01),
                   seeds=(0,)) for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(runs[0].train_loss, runs[1].train_loss)
    assert runs[0].train_loss[0, -1] < 0.8 * runs[0].train_loss[0, 0]


@both
def test_the_audit_finds_no_transposed_weights_and_a_global_number_to_wait_for(perturb):
    net = bpfree.mlp(16, 12, 11, 10, 3, activation="tanh", generator=generator()).double()
    x, y = batch_for(net, 3)
    rule = ForwardGradient(net, perturb, generator=generator(4))
    found = bpfree.audit(rule, x, y)
    drops = found.drops()
    assert drops["transposed weights"]
    assert not drops["a global error"]
    assert not drops["stored activities, a frozen network"]
    assert not any(found.depends("graph"))
    assert not any(found.depends("others"))  # the mean of what each sample says of the direction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws must be a whole number >= 1, got 0"),
        ({"draws": True}, "draws must be a whole number"),
        ({"draws": 1.5}, "draws must be a whole number"),
        ({"perturb": "units"}, "perturb must be one of .*got 'units'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ForwardGradient(bpfree.mlp(3, 2), **options)


@both
def test_half_precision_and_a_network_of_one_block(perturb):
    net = bpfree.mlp(5, 6, 3, bias=True, generator=generator()).bfloat16()
    x, y = batch_for(net, 4)
    grads = update_of(ForwardGradient(net, perturb, generator=generator()), x, y).grads
    assert all(g.isfinite().all() for g in grads.values())
    one = Network(bpfree.mlp(5, 3, generator=generator())[0]).double()
    x, y = batch_for(one, 4)
    grads = update_of(ForwardGradient(one, perturb, generator=generator()), x, y).grads
    exact = relative_error(grads["0.linear.weight"], autograd_grads(one, x, y)["0.linear.weight"])
    assert (exact < 1e-12) == (perturb == "activities")
