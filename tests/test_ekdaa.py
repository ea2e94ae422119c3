"""EKDAA (chapter 4): equations, options, feedback that learns, activations without derivative."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    assert_same,
    autograd_grads,
    conv_problem,
    deep_problems,
    error_and_target,
    generator,
    mlp_problem,
    problem,
    relative_error,
    seeds,
    towards_targets,
    update_of,
)
from torch import nn

import bpfree
from bpfree import EKDAA, Block, Frozen, Network, fit
from bpfree.experiments.released import ReleasedEKDAA
from bpfree.measure import angle

OPTIONS = {
    "target": ("unpooled", "bilinear"),
    "target_activation": (None, "sigmoid", torch.sin),
    "swap_axes": (False, True),
    "normalise_feedback": (False, True),
    "normalise_updates": (False, True),
    "scale_updates": (False, True),
}
BATCHWISE = ("normalise_feedback", "normalise_updates")
options = st.fixed_dictionaries({name: st.sampled_from(v) for name, v in OPTIONS.items()})
named = st.fixed_dictionaries(  # the oracle knows activations by name
    {**{k: st.sampled_from(v) for k, v in OPTIONS.items()},
     "target_activation": st.sampled_from([None, "sigmoid"]),
     "beta": st.sampled_from([0.3, 0.9, 2.0]), "gamma": st.sampled_from([0.0, 0.1, 1.0]),
     "start": st.sampled_from(["weights", "random"])}
)  # fmt: skip
# a name per option, each with a value that is not the default
CHANGES = {name: {name: values[1]} for name, values in OPTIONS.items()}


def ekdaa(net, seed=0, **chosen):
    """The rule of the book, unless an option of the released program is chosen."""
    rule = ReleasedEKDAA if OPTIONS.keys() & chosen.keys() else EKDAA
    return rule(net, **chosen, generator=generator(seed))


def grads_of(net, x, y, masks=None, **chosen):
    return update_of(ekdaa(net, **chosen), x, y, masks=masks).grads


def of_weights(grads):
    return {k: g for k, g in grads.items() if not k.startswith("rule.")}


def trunk(seed=0, scale=3.0):
    """Three convolutions, the first without a pool; weights so large that maxima exceed 1."""
    g = generator(seed)
    net = bpfree.convnet(
        (2, 8, 8), (3, 4, 5), (6,), num_classes=5, pool=(1, 2, 2), activation="tanh", generator=g
    )
    with torch.no_grad():
        for w in net.weights():
            w.mul_(scale)
    return problem(net, seed=seed + 1)


# ---- the equations -------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 3)], ids=str)
def test_gradients_of_an_mlp_are_the_equations(hidden, bias, dropout):
    net, x, y = mlp_problem(7, *hidden, 4, bias=bias, dropout=dropout)
    masks, L = net.masks(len(x), generator(3)), len(hidden) + 1
    rule = ekdaa(net, beta=0.8, gamma=0.3, start="random")
    a, z, h = {}, {}, {0: x}
    for l, block in enumerate(net, 1):
        a[l] = block.linear(h[l - 1]).detach()
        z[l] = torch.tanh(a[l]) if l < L else a[l]
        h[l] = z[l] * masks.get(l, 1)
    delta = {L: error_and_target(h[L], y)[0]}
    for l in range(L - 1, 0, -1):
        u = delta[l + 1] @ getattr(rule, f"E{l + 1}").detach() * masks.get(l, 1)
        delta[l] = z[l] - torch.tanh(a[l] - 0.8 * u)
    grads = update_of(rule, x, y, masks=masks).grads
    for l in range(1, L + 1):
        weight = torch.einsum("bi,bj->ij", delta[l], h[l - 1]) / len(x)
        torch.testing.assert_close(grads[f"{l - 1}.linear.weight"], weight)
        if bias:
            torch.testing.assert_close(grads[f"{l - 1}.linear.bias"], delta[l].mean(0))
        if l > 1:
            torch.testing.assert_close(grads[f"rule.E{l}"], 0.3 * weight)


def test_signals_of_a_pooled_convnet_are_the_equations_on_images():
    net, x, y = conv_problem(bias=False)  # conv, pool, conv, pool, linear, linear
    rule = ekdaa(net, start="random")
    E = {l: getattr(rule, f"E{l}").detach() for l in (2, 3, 4)}
    W = [w.detach() for w in net.weights()]
    a1 = F.conv2d(x, W[0], padding=1)
    h1, i1 = F.max_pool2d(torch.tanh(a1), 2, return_indices=True)
    a2 = F.conv2d(h1, W[1], padding=1)
    h2, i2 = F.max_pool2d(torch.tanh(a2), 2, return_indices=True)
    a3 = h2.flatten(1) @ W[2].T
    d4, _ = error_and_target(torch.tanh(a3) @ W[3].T, y)
    d3 = torch.tanh(a3) - torch.tanh(a3 - 0.9 * d4 @ E[4])
    u2 = F.max_unpool2d((d3 @ E[3]).reshape(h2.shape), i2, 2, output_size=a2.shape[2:])
    d2 = torch.tanh(a2) - torch.tanh(a2 - 0.9 * u2)
    u1 = F.conv_transpose2d(d2, E[2], padding=1)
    u1 = F.max_unpool2d(u1, i1, 2, output_size=a1.shape[2:])
    d1 = torch.tanh(a1) - torch.tanh(a1 - 0.9 * u1)
    signals = update_of(rule, x, y).signals
    torch.testing.assert_close([delta for _, delta in signals], [d1, d2, d3, d4])


@given(problem=deep_problems, chosen=named, seed=seeds, dropout=st.sampled_from([0.0, 0.4]))
def test_any_options_on_any_network_are_their_equations(problem, chosen, seed, dropout):
    net, x, y = problem
    for block in list(net)[:-1]:
        block.dropout = dropout
    masks = net.masks(len(x), generator(seed))
    rule = ekdaa(net, seed, **chosen)
    update = update_of(rule, x, y, masks=masks)
    E = {k: p.detach() for k, p in rule.named_parameters()}
    deltas, grads = towards_targets(net, E, x, y, masks, **chosen)
    torch.testing.assert_close([delta for _, delta in update.signals], deltas)
    assert_same(update.grads, grads)


def test_no_derivative_of_an_activation_is_asked_for(monkeypatch, either):
    expected = grads_of(*either)

    def derivative(*args):
        raise AssertionError("a local derivative was computed")

    monkeypatch.setattr(Block, "local_vjp", derivative)
    with pytest.raises(AssertionError, match="local derivative"):
        bpfree.FeedbackAlignment(either.net).backward(either.x, either.y)
    assert_same(grads_of(*either), expected, rtol=0, atol=0)


# ---- options -------------------------------------------------------------------------------------


def test_every_option_gives_gradients_of_its_own():
    choices = [{}, {"beta": 0.5}, {"start": "random"}, {"start": "random", "feedback_scale": 2.0}]
    gradients = [
        of_weights(grads_of(*trunk(), **chosen)) for chosen in [*choices, *CHANGES.values()]
    ]
    for (i, g), (j, h) in itertools.combinations(enumerate(gradients), 2):
        assert max(relative_error(g[k], h[k]) for k in g) > 0.01, (i, j)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_gamma_scales_the_updates_of_the_feedback_alone(gamma, either):
    changed, plain = (grads_of(*either, gamma=g) for g in (gamma, 0.1))
    assert_same(of_weights(changed), of_weights(plain))
    for l in range(2, len(either.net) + 1):
        torch.testing.assert_close(changed[f"rule.E{l}"], gamma * plain[f"{l - 1}.linear.weight"])


def test_defaults_are_the_documented_ones(convnet):
    documented = {name: values[0] for name, values in OPTIONS.items()}
    spelled = grads_of(*convnet, beta=0.9, gamma=0.1, start="weights", **documented)
    assert_same(grads_of(*convnet), spelled, rtol=0, atol=0)


@given(problem=deep_problems, chosen=options)
def test_options_of_the_released_code_change_convolutions_alone(problem, chosen):
    if not any(block.is_conv for block in problem.net):
        assert_same(grads_of(*problem, **chosen), grads_of(*problem), rtol=0, atol=0)
    top = f"{len(problem.net) - 1}.linear.weight"
    torch.testing.assert_close(
        grads_of(*problem, **chosen)[top], grads_of(*problem)[top], rtol=0, atol=0
    )


def without_error(target):
    """Teaching signals where the output error is zero."""
    net, x, y = conv_problem()
    rule = ekdaa(net, target=target)
    params, state = rule.params(), rule.state()
    with torch.no_grad():
        trace, state = rule.first_pass(params, state, x, {})
        zero = torch.zeros(len(x), 5, dtype=x.dtype)
        return [delta for _, delta in rule.signals(params, state, [*trace], zero, zero)]


def test_a_target_that_is_up_sampled_teaches_without_any_error():
    assert not any(delta.any() for delta in without_error("unpooled"))
    first, second, *above = without_error("bilinear")
    assert first.abs().mean() > 0.05
    assert second.abs().mean() > 0.05
    assert not any(delta.any() for delta in above)


def test_a_trunk_that_sends_pre_activations_up_has_targets_of_its_own_activation():
    net, x, y = trunk(scale=0.5)
    tanh = [Block(b.linear, b.activation, b.pool) for b in net]
    linear = [Block(b.linear, "identity" if b.is_conv else "tanh", b.pool) for b in net]
    linear[-1].activation = "identity"
    net = Network(*linear, input_shape=net.input_shape)
    updates = [update_of(ekdaa(net, target_activation=f), x, y) for f in (None, "tanh")]
    # pre-activations went up: one network, one loss, which is not that of tanh
    assert updates[0].loss == updates[1].loss
    assert updates[0].loss != update_of(ekdaa(Network(*tanh, input_shape=(2, 8, 8))), x, y).loss
    (_, plain), (_, bounded) = (u.signals[1] for u in updates)
    assert bounded.abs().max() <= 2
    assert relative_error(bounded, plain) > 0.01
    # the second kernel learns from tanh(a_1), the third, above a pool, from what came up
    a1 = F.conv2d(x, net.weights()[0].detach(), net[0].linear.bias, padding=1)
    torch.testing.assert_close(updates[1].signals[1][0], torch.tanh(a1).detach())
    assert torch.equal(updates[1].signals[2][0], updates[0].signals[2][0])


def test_exchanging_the_axes_of_feedback_kernels_starts_it_at_an_angle_from_the_weights():
    rule = ekdaa(trunk().net, swap_axes=True)
    assert torch.equal(rule.feedback(2, rule.params(), {}), rule.net.weights()[1].transpose(2, 3))
    wide = ekdaa(bpfree.convnet((8, 4, 4), (64, 64), num_classes=3), swap_axes=True)
    # a random 3x3 kernel keeps its diagonal, a third of it: the angle's cosine is 1/3
    E = wide.feedback(2, wide.params(), {})
    assert angle(E, wide.net.weights()[1]).item() == pytest.approx(70.5, abs=1)


def test_normalised_feedback_and_updates_have_a_largest_entry_of_one():
    net, x, y = trunk()
    plain = update_of(ekdaa(net), x, y)
    bound = update_of(ekdaa(net, normalise_updates=True), x, y)
    for l in range(3):
        key = f"{l}.linear.weight"
        largest = float(plain.grads[key].max()) * len(x)
        assert largest > 1
        torch.testing.assert_close(bound.grads[key], plain.grads[key] / largest)
    assert_same({k: g for k, g in bound.grads.items() if k[0] in "34"},
                {k: g for k, g in plain.grads.items() if k[0] in "34"})  # fmt: skip
    # a linear block 1 shows the feedback that came down to it
    blocks = [Block(net[0].linear, "identity"), *list(net)[1:]]
    net = Network(*blocks, input_shape=net.input_shape)
    largest = []
    for normalise in (False, True):
        rule = ekdaa(net, beta=1.0, normalise_feedback=normalise)
        with torch.no_grad():
            rule.E2.mul_(100)
        largest.append(float(update_of(rule, x, y).signals[0][1].max()))
    assert largest[0] > 2
    assert largest[1] == pytest.approx(1)


def test_what_is_small_is_not_normalised():
    small = trunk(scale=0.05)
    for name in BATCHWISE:
        assert_same(grads_of(*small, **{name: True}), grads_of(*small), rtol=0, atol=0)


def test_scaled_updates_are_divided_by_the_channels_of_their_kernels():
    plain, scaled = (grads_of(*trunk(), scale_updates=on) for on in (False, True))
    for l, channels in enumerate((2 * 3, 3 * 4, 4 * 5, 1, 1)):
        key = f"{l}.linear.weight"
        torch.testing.assert_close(scaled[key], plain[key] / channels)


@pytest.mark.parametrize("option", OPTIONS)
def test_T12_holds_for_every_option_but_the_maxima_of_a_batch(option):
    net, x, y = trunk()
    rule = ekdaa(net, **CHANGES[option])
    whole = update_of(rule, x, y).grads
    singles = [update_of(rule, x[i : i + 1], y[i : i + 1]).grads for i in range(len(x))]
    mean = {k: torch.stack([s[k] for s in singles]).mean(0) for k in whole}
    error = max(relative_error(whole[k], mean[k]) for k in whole)
    assert error > 0.01 if option in BATCHWISE else error < 1e-12


# ---- feedback ------------------------------------------------------------------------------------


def test_feedback_starts_as_a_copy_of_the_weights_and_draws_nothing(either):
    g = generator(4)
    rule = EKDAA(either.net, generator=g)
    assert torch.equal(g.get_state(), generator(4).get_state())
    for l, w in enumerate(either.net.weights()[1:], 2):
        E = getattr(rule, f"E{l}")
        assert torch.equal(E, w)
        with torch.no_grad():
            E.zero_()
        assert w.any()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_random_feedback_is_that_of_feedback_alignment(scale, either):
    ours = EKDAA(either.net, start="random", feedback_scale=scale, generator=generator(2))
    theirs = bpfree.FeedbackAlignment(either.net, scale, generator=generator(2))
    for l in range(2, len(either.net) + 1):
        assert torch.equal(getattr(ours, f"E{l}"), getattr(theirs, f"B{l}"))


def test_feedback_of_another_shape_is_refused_with_both_shapes(mlp):
    rule = ekdaa(mlp.net)
    wrong = {**rule.state_dict(), "E2": torch.zeros(6, 5)}
    with pytest.raises(RuntimeError, match=r"E2.*\[6, 5\].*\[5, 6\]"):
        rule.load_state_dict(wrong)


@pytest.mark.parametrize("chosen", [{}, *CHANGES.values()], ids=lambda c: next(iter(c), "plain"))
@pytest.mark.parametrize("activation", ["tanh", "sign"])
def test_vectorised_seeds_are_trained_as_one_at_a_time(activation, chosen, few_digits):
    def make(g):
        net = bpfree.convnet((1, 8, 8), (3, 4), (9,), num_classes=10, pool=(1, 2), dropout=0.2,
                             activation=activation, generator=g)  # fmt: skip
        return (ReleasedEKDAA if chosen else EKDAA)(net.double(), **chosen, generator=g)

    together, alone = (
        fit(make, few_digits, epochs=2, batch_size=25, seeds=[0, 4], vectorize=v)
        for v in (True, False)
    )
    for one, other in zip(together.rules, alone.rules, strict=True):
        ours, theirs = ({k: p.detach() for k, p in r.params().items()} for r in (one, other))
        assert_same(ours, theirs)


# ---- no derivative -------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["sign", torch.sign], ids=("name", "function"))
@pytest.mark.parametrize("make", [mlp_problem, conv_problem], ids=("mlp", "convnet"))
def test_units_that_only_have_a_sign_get_a_signal_where_backprop_has_none(make, activation):
    net, x, y = make(activation=activation, size=20)
    for key, grad in autograd_grads(net, x, y).items():
        assert bool(grad.any()) == (int(key[0]) == len(net) - 1)
    signals = update_of(ekdaa(net), x, y).signals
    for _, delta in signals[:-1]:
        assert set(delta.unique().tolist()) == {-2.0, 0.0, 2.0}


def test_a_network_of_signs_learns_the_digits_better_than_frozen_signs(digits):
    def accuracy(rule):
        def make(g):
            net = bpfree.mlp(64, 50, 10, activation="sign", init="glorot", generator=g)
            return rule(net, generator=g)

        sgd = partial(torch.optim.SGD, lr=0.03, momentum=0.9)
        return fit(make, digits, epochs=8, batch_size=32, seeds=[0, 1, 2], optimizer=sgd
                   ).test_accuracy[:, -1]  # fmt: skip

    assert (accuracy(EKDAA) > accuracy(Frozen) + 5).all()


# ---- refusals ------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "no beta": ({"beta": 0.0}, r"^beta must be a positive.*got 0\.0"),
    "negative beta": ({"beta": -1}, "^beta must be a positive.*got -1"),
    "beta nan": ({"beta": math.nan}, "^beta must be a positive.*got nan"),
    "beta infinite": ({"beta": math.inf}, "^beta must be a positive.*got inf"),
    "negative gamma": ({"gamma": -0.1}, r"gamma must be .*>= 0, got -0\.1"),
    "gamma nan": ({"gamma": math.nan}, "gamma must be .*got nan"),
    "gamma infinite": ({"gamma": math.inf}, "gamma must be .*got inf"),
    "start": ({"start": "W"}, r"start .*'weights', 'random'.*got 'W'"),
    "scale": ({"feedback_scale": 0}, "feedback_scale must be a positive.*got 0"),
    "target": ({"target": "pooled"}, "target .*'unpooled', 'bilinear'.*got 'pooled'"),
    "activation": ({"target_activation": "tan"}, "target_activation, .*'tanh'.*got 'tan'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_out_of_range_is_refused_by_name_and_value(case, mlp):
    bad, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        ekdaa(mlp.net, **bad)


def test_exchanging_the_axes_of_a_kernel_that_is_not_square_is_refused():
    conv = nn.Conv2d(1, 2, (3, 2))
    net = Network(Block(conv), *bpfree.mlp(2 * 4 * 5, 3), input_shape=(1, 6, 6))
    with pytest.raises(ValueError, match=r"square kernels, got Conv2d.*\(3, 2\)"):
        ekdaa(net, swap_axes=True)


def halved(a):
    return a[:, ::2]


def pooled(a):
    return F.max_pool2d(a, 2) if a.dim() == 4 else a


RESHAPING = {
    "linear": (
        lambda: Network(Block(nn.Linear(3, 8)), Block(nn.Linear(8, 6), halved),
                        Block(nn.Linear(3, 2), "identity")),
        {}, r"activation must give a tensor of its input's shape.*halved",
    ),
    "convolution": (
        lambda: Network(Block(nn.Conv2d(1, 2, 3), pooled), *bpfree.mlp(8, 2),
                        input_shape=(1, 6, 6)),
        {}, r"activation must give a tensor of its input's shape.*pooled",
    ),
    "target": (
        lambda: bpfree.convnet((1, 6, 6), (2,), num_classes=3),
        {"target_activation": pooled}, "target_activation must give .*shape.*pooled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RESHAPING)
def test_an_activation_that_changes_the_shape_is_refused(case):
    make, chosen, message = RESHAPING[case]
    with pytest.raises(ValueError, match=message):
        ekdaa(make(), **chosen)
