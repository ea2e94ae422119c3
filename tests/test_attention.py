"""Next-layer attention: shares, sizes, what is observed, refusals."""

import math

import pytest
import torch
from oracles import assert_same, conv_problem, generator, mlp_problem, relative_error, update_of

import bpfree
from bpfree import NextLayerAttention


@pytest.mark.parametrize("make", [mlp_problem, conv_problem])
def test_scaled_feedback_has_the_norm_of_the_weights(make):
    net, *_ = make()
    for p in (1.0, 1.5, 3.0):
        rule = NextLayerAttention(net, p, scale="weights")
        for W in map(torch.Tensor.detach, net.weights()):
            torch.testing.assert_close(rule.attend(W).norm(), W.norm())
            assert relative_error(rule.attend(W), W) > 0.1
        nobody = torch.zeros(2, 3)
        torch.testing.assert_close(rule.attend(nobody), nobody)


def test_a_share_does_not_grow_with_the_weights_of_its_listener():
    net, *_ = mlp_problem()
    W = net.weights()[1].detach()
    rule = NextLayerAttention(net, relative=True)
    torch.testing.assert_close(rule.attend(3 * W), rule.attend(W) / 3)
    torch.testing.assert_close(rule.attend(torch.zeros(2, 3)), torch.zeros(2, 3))
    alone = rule.attend(torch.tensor([[2.0], [0.5]]))  # who is the only one has all there is
    torch.testing.assert_close(alone, torch.zeros(2, 1))


def test_a_user_s_attention_is_differentiated_by_torch():
    net, x, y = conv_problem()
    ours = update_of(NextLayerAttention(net, attention=lambda w: w**2 / 2), x, y).grads
    assert_same(ours, update_of(bpfree.Backprop(net), x, y).grads)


def test_a_user_s_attention_has_shares_too():
    net, *_ = conv_problem()
    ours, theirs = (
        NextLayerAttention(net, relative=True, **options)
        for options in ({"p": 1.5}, {"attention": lambda w: w.abs() ** 1.5 / 1.5})
    )
    for W in map(torch.Tensor.detach, net.weights()):
        torch.testing.assert_close(theirs.attend(W), ours.attend(W))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("make", [mlp_problem, conv_problem])
def test_what_is_read_off_ones_own_synapses_is_the_error(make, activation):
    net, x, y = make(activation=activation)
    hears, reads = (
        update_of(NextLayerAttention(net, observed=o), x, y).grads for o in (False, True)
    )
    assert_same(reads, hears)


def test_a_silent_neuron_whose_derivative_is_not_zero_hears_nothing():
    net, x, y = mlp_problem(3, 4, 3, activation="identity", bias=False)
    with torch.no_grad():
        net[0].linear.weight[1] = 0  # h_1 = 0 on every sample
    grads = {o: update_of(NextLayerAttention(net, observed=o), x, y).grads["0.linear.weight"]
             for o in (False, True)}  # fmt: skip
    assert grads[False][1].norm() > 0.01
    assert not grads[True][1].any()
    torch.testing.assert_close(grads[True][[0, 2, 3]], grads[False][[0, 2, 3]])


def test_foresight_makes_a_neuron_louder():
    """The second-order part of the signal, eta h_i sum_j delta_j^2, has the sign of h_i."""
    net, x, y = mlp_problem(6, 5, 4, bias=False, size=1)
    (r, _), _ = (update := update_of(NextLayerAttention(net), x, y)).signals
    ahead = update_of(NextLayerAttention(net, foresight=0.5), x, y)
    (_, e), h = update.signals[1], update.signals[1][0]
    more = update.signals[0][1] - ahead.signals[0][1]
    torch.testing.assert_close(more, (1 - h**2) * 0.5 * h * e.square().sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.5}, "p must be a finite number >= 1, got 0.5"),
        ({"p": math.inf}, "p must be a finite number >= 1, got inf"),
        ({"attention": lambda w: w.cumsum(-1)}, "attention must be elementwise"),
        ({"attention": lambda w: w / w.abs().max()}, "attention must be elementwise"),
        ({"attention": lambda w: w.sum()}, "attention must give a tensor of its input's shape"),
        ({"scale": "norm"}, "scale must be one of .* got 'norm'"),
        ({"foresight": -0.1}, "foresight must be a finite number >= 0, got -0.1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NextLayerAttention(bpfree.mlp(7, 6, 5, generator=generator()), **options)
