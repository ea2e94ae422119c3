"""PEPITA and weight mirroring (chapter 3): equations, options, and feedback that learns."""

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
    check_uniform,
    conv_problem,
    copies,
    deep_problems,
    error_and_target,
    generator,
    global_generator_untouched,
    hidden_weights,
    mlp_problem,
    relative_error,
    seeds,
    two_passes,
    update_of,
)
from torch import nn

import bpfree
from bpfree import PEPITA, Block, Network, fit
from bpfree.measure import angle

OPTIONS = {
    "output_error": ("second", "first"),
    "sign": (1, -1),
    "conv_scaling": ("mean", "sum", "released"),
    "presynaptic": ("second", "first", "time-local"),
}
options = st.fixed_dictionaries({name: st.sampled_from(v) for name, v in OPTIONS.items()})
both_signs = pytest.mark.parametrize("sign", OPTIONS["sign"])


def pepita(net, seed=0, **chosen):
    return PEPITA(net, **chosen, generator=generator(seed))


def grads_of(net, x, y, masks=None, **chosen):
    return update_of(pepita(net, **chosen), x, y, masks=masks).grads


def with_masks(problem, dropout, seed=0):
    """The problem and dropout masks of its hidden blocks."""
    for block in list(problem.net)[:-1]:
        block.dropout = dropout
    return *problem, problem.net.masks(len(problem.x), generator(seed))


# ---- the equations -------------------------------------------------------------------------------


def written_out(net, feedback, x, y, masks):
    """Gradients of a fully connected tanh network."""
    L, grads = len(net), {}

    def forward(h):
        activities = [h]
        for l, block in enumerate(net, 1):
            a = h @ block.linear.weight.T + (0 if block.linear.bias is None else block.linear.bias)
            h = a if l == L else torch.tanh(a) * masks.get(l, 1)
            activities.append(h)
        return activities

    with torch.no_grad():
        h = forward(x)
        e, _ = error_and_target(h[L], y)
        h_err = forward(x + e @ feedback.T)
        e_err, _ = error_and_target(h_err[L], y)
        for l, block in enumerate(net, 1):
            delta = e_err if l == L else h[l] - h_err[l]
            weight = torch.einsum("bi,bj->ij", delta, h_err[l - 1]) / len(x)
            grads[f"{l - 1}.linear.weight"] = weight
            if block.linear.bias is not None:
                grads[f"{l - 1}.linear.bias"] = delta.mean(0)
    return grads


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 3)], ids=str)
def test_gradients_of_an_mlp_are_the_equations_with_one_mask_for_both_passes(hidden, bias, dropout):
    net, x, y, masks = with_masks(mlp_problem(7, *hidden, 4, bias=bias), dropout)
    rule = pepita(net)
    assert_same(update_of(rule, x, y, masks=masks).grads, written_out(net, rule.F, x, y, masks))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_kernels_learn_from_the_activity_before_the_pool_by_the_mean_over_positions(dropout):
    net, x, y, masks = with_masks(conv_problem(), dropout)
    rule = pepita(net)
    grads = update_of(rule, x, y, masks=masks).grads
    e, _ = error_and_target(net(x, masks).detach(), y)
    h, h_err = x, x + (e @ rule.F.T).reshape(x.shape)
    for l in (1, 2):
        linear, patches = net[l - 1].linear, F.unfold(h_err, 3, padding=1)
        z, z_err = (torch.tanh(linear(activity)).detach() for activity in (h, h_err))
        delta = (z - z_err).flatten(2)
        kernel = torch.einsum("bop,bkp->ok", delta, patches) / len(x) / delta.shape[2]
        torch.testing.assert_close(
            grads[f"{l - 1}.linear.weight"], kernel.reshape(linear.weight.shape)
        )
        torch.testing.assert_close(grads[f"{l - 1}.linear.bias"], delta.mean((0, 2)))
        h, h_err = (F.max_pool2d(a, 2) * masks.get(l, 1) for a in (z, z_err))


@given(problem=deep_problems, chosen=options, seed=seeds, dropout=st.sampled_from([0.0, 0.4]))
def test_any_options_on_any_network_are_their_equations(problem, chosen, seed, dropout):
    net, x, y, masks = with_masks(problem, dropout, seed)
    rule = pepita(net, seed, **chosen)
    update = update_of(rule, x, y, masks=masks)
    deltas, grads = two_passes(net, rule.F, x, y, masks, **chosen)
    torch.testing.assert_close([delta for _, delta in update.signals], deltas)
    assert_same(update.grads, grads)


@pytest.mark.parametrize("form", [("cheap",), ("saving",), ("cheap", "saving")], ids=" and ".join)
@given(problem=deep_problems, chosen=options, seed=seeds, dropout=st.sampled_from([0.0, 0.4]))
def test_forms_that_save_work_or_memory_are_the_plain_one_to_rounding(
    form, problem, chosen, seed, dropout
):
    net, x, y, masks = with_masks(problem, dropout, seed)
    plain, ours = (
        grads_of(net, x, y, masks, **chosen, cheap="cheap" in names, saving="saving" in names)
        for names in ((), form)
    )
    assert_same(ours, plain, rtol=1e-9, atol=1e-13)


# ---- options -------------------------------------------------------------------------------------


def test_every_value_of_every_option_gives_gradients_of_its_own(convnet):
    choices = [{}, {"feedback_scale": 0.5}]
    choices += [{name: value} for name, values in OPTIONS.items() for value in values[1:]]
    gradients = [grads_of(*convnet, **{"feedback_scale": 1.0} | chosen) for chosen in choices]
    for (one, g), (other, h) in itertools.combinations(zip(choices, gradients, strict=True), 2):
        assert max(relative_error(g[k], h[k]) for k in g) > 0.01, (one, other)


def test_defaults_are_the_documented_ones(convnet):
    documented = {name: values[0] for name, values in OPTIONS.items()}
    spelled = grads_of(*convnet, feedback_scale=0.05, mirroring=0, **documented)
    assert_same(grads_of(*convnet), spelled, rtol=0, atol=0)


def test_sum_is_positions_times_the_mean_and_released_is_minus_the_mean_over_the_batch(convnet):
    mean, total, released = (
        grads_of(*convnet, conv_scaling=scaling) for scaling in OPTIONS["conv_scaling"]
    )
    positions = {0: 8 * 9, 1: 4 * 4, 2: None, 3: None}
    for name, grad in mean.items():
        P = positions[int(name[0])]
        torch.testing.assert_close(total[name], grad * (P or 1))
        torch.testing.assert_close(released[name], -grad / len(convnet.x) if P else grad)


def test_subtracting_the_projected_error_is_adding_it_through_minus_F(either):
    net, x, y = either
    minus, plus = pepita(net, sign=-1), pepita(net)
    plus.load_state_dict({"F": -minus.F})
    assert_same(update_of(minus, x, y).grads, update_of(plus, x, y).grads)


def test_the_sign_turns_small_hidden_gradients_round(either):
    plus, minus = (grads_of(*either, sign=s, feedback_scale=0.005) for s in OPTIONS["sign"])
    for key in hidden_weights(either.net):
        assert angle(plus[key], minus[key]) > 179


# ---- F -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_feedback_goes_from_classes_to_the_input_and_is_uniform_with_hes_bound_times_the_scale(
    scale,
):
    net = bpfree.convnet((2, 8, 8), (3,), num_classes=7, generator=generator()).double()
    feedback = pepita(net, feedback_scale=scale).F
    assert feedback.shape == (2 * 8 * 8, 7)
    assert feedback.dtype == torch.float64
    check_uniform(feedback, scale * math.sqrt(6 / 128))


def test_feedback_of_another_shape_is_refused_with_both_shapes(mlp):
    with pytest.raises(RuntimeError, match=r"\[4, 7\].*\[7, 4\]"):
        pepita(mlp.net).load_state_dict({"F": torch.zeros(4, 7)})


# ---- mirroring -----------------------------------------------------------------------------------


def mirrored(*sizes, mirroring=3, activation="relu", **chosen):
    """A rule whose F learns the weights of a network without bias."""
    sizes = sizes or (12, 10, 8, 4)
    problem = mlp_problem(*sizes, bias=False, activation=activation)
    return pepita(problem.net, mirroring=mirroring, **chosen)


def factors(state):
    return [state[f"Q{l}"] for l in range(1, len(state))]


def product(matrices):
    whole = torch.eye(len(matrices[0]), dtype=matrices[0].dtype)
    for matrix in matrices:
        whole = whole @ matrix
    return whole


def refreshed(rule, seed=0):
    return rule.refresh(rule.params(), rule.state(), generator(seed))


def test_factors_follow_the_layers_and_F_is_their_product():
    rule = mirrored()
    assert [tuple(B.shape) for B in factors(rule.state_dict())] == [(12, 10), (10, 8), (8, 4)]
    assert set(rule.state_dict()) == set(rule.state()) == {"Q1", "Q2", "Q3", "F"}
    assert {B.dtype for B in rule.state().values()} == {torch.float64}
    torch.testing.assert_close(rule.F, product(factors(rule.state())))


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_the_product_of_the_factors_has_the_size_of_the_uniform_draw(scale):
    F = mirrored(100, 90, 80, 20, feedback_scale=scale).F
    assert float(F.std()) == pytest.approx(scale * math.sqrt(6 / 100 / 3), rel=0.1)


def test_factors_and_their_refreshing_come_from_the_given_generators_alone():
    with global_generator_untouched():
        rules = [mirrored(seed=seed) for seed in (1, 1, 2)]
        fresh = [refreshed(rules[0], seed) for seed in (1, 1, 2)]
    for first, again, other in ([rule.state() for rule in rules], fresh):
        for key, B in first.items():
            assert torch.equal(B, again[key])
            assert not torch.equal(B, other[key])


def test_a_refresh_keeps_the_factors_norms_and_F_their_product():
    rule = mirrored()
    fresh = refreshed(rule)
    assert set(fresh) == set(rule.state())
    for old, new in zip(factors(rule.state()), factors(fresh), strict=True):
        assert relative_error(new, old) > 0.01
        torch.testing.assert_close(new.norm(), old.norm())
    torch.testing.assert_close(fresh["F"], product(factors(fresh)))


def test_a_refresh_writes_nothing_and_records_no_graph():
    rule = mirrored()
    tensors = {**rule.params(), **rule.state()}
    before, versions = copies(tensors), [t._version for t in tensors.values()]
    fresh = refreshed(rule)
    assert_same(copies(tensors), before, rtol=0, atol=0)
    assert [t._version for t in tensors.values()] == versions
    assert not any(t.requires_grad for t in fresh.values())


def test_a_refresh_reads_the_weights_and_feedback_it_is_given():
    rule, other = mirrored(), mirrored(seed=1)
    with torch.no_grad():
        for w in other.net.weights():
            w.neg_()
    doctored = rule.refresh(other.params(), other.state(), generator())
    assert_same(doctored, refreshed(other), rtol=0, atol=0)
    assert relative_error(doctored["Q1"], refreshed(rule)["Q1"]) > 0.1


def test_without_mirroring_a_refresh_gives_nothing_and_draws_nothing(either):
    rule, g = pepita(either.net), generator(3)
    assert rule.refresh(rule.params(), rule.state(), g) == {}
    assert torch.equal(g.get_state(), generator(3).get_state())


@both_signs
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("sizes", [(40, 30, 10), (40, 30, 20, 10)], ids=str)
def test_mirroring_turns_F_from_no_direction_to_minus_sign_times_the_transposed_weights(
    sizes, activation, sign
):
    rule = mirrored(*sizes, mirroring=100, activation=activation, sign=sign)
    weights = product([w.detach().T for w in rule.net.weights()])
    assert 75 < angle(rule.F, -sign * weights) < 105
    assert angle(refreshed(rule)["F"], -sign * weights) < 60


def make_mirrored(g, dropout=0.2, mirroring=2):
    net = bpfree.mlp(64, 12, 10, dropout=dropout, generator=g).double()
    return PEPITA(net, mirroring=mirroring, generator=g)


@pytest.mark.parametrize("vectorize", [True, False])
def test_fit_refreshes_before_each_epoch_from_the_seeds_generator(vectorize, few_digits):
    make = partial(make_mirrored, dropout=0.0)
    run = fit(make, few_digits, epochs=2, seeds=[3, 5], vectorize=vectorize,
              schedule=lambda epoch: 0.0)  # fmt: skip
    for seed, trained in zip([3, 5], run.rules, strict=True):
        g = generator(seed)
        rule = make(g)
        params, state = rule.params(), rule.state()
        for _ in range(2):
            state |= rule.refresh(params, state, g)
            torch.randperm(100, generator=g)  # the order of the epoch's batches
        assert_same(copies(trained.state()), copies(state))
        assert relative_error(trained.F, rule.F) > 0.01


def test_vectorised_seeds_get_back_the_feedback_of_seeds_one_at_a_time(few_digits):
    together, alone = (
        fit(make_mirrored, few_digits, epochs=2, batch_size=25, seeds=[0, 4], vectorize=v)
        for v in (True, False)
    )
    for one, other in zip(together.rules, alone.rules, strict=True):
        assert_same(copies(one.state()), copies(other.state()))
        assert_same(copies(one.params()), copies(other.params()))
        torch.testing.assert_close(one.F, product(factors(one.state())))


# ---- refusals ------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "output error": ({"output_error": "third"}, r"output_error .*'second', 'first'.*got 'third'"),
    "sign": ({"sign": 0}, r"sign .*\(1, -1\), got 0"),
    "conv scaling": ({"conv_scaling": "max"}, "conv_scaling .*'sum', 'released'.*got 'max'"),
    "presynaptic": ({"presynaptic": None}, "presynaptic .*'time-local'.*got None"),
    "no scale": ({"feedback_scale": 0.0}, r"feedback_scale must be .*got 0\.0"),
    "negative scale": ({"feedback_scale": -1}, "feedback_scale must be .*got -1"),
    "scale nan": ({"feedback_scale": math.nan}, "feedback_scale must be .*got nan"),
    "scale infinite": ({"feedback_scale": math.inf}, "feedback_scale must be .*got inf"),
    "negative mirroring": ({"mirroring": -1}, "mirroring must be a number of batches.*got -1"),
    "mirroring true": ({"mirroring": True}, "mirroring must be a number of batches.*got True"),
    "half a batch": ({"mirroring": 2.5}, r"mirroring must be a number of batches.*got 2\.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_out_of_range_is_refused_by_name_and_value(case):
    bad, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        pepita(mlp_problem(bias=False).net, **bad)


def test_a_network_without_hidden_block_is_refused():
    with pytest.raises(ValueError, match="hidden block.*1 block"):
        pepita(mlp_problem(6, 4).net)


def linear(bias):
    return nn.Linear(3, 3, bias=bias)


NO_PRODUCTS = {
    "convolution": (lambda: bpfree.convnet((1, 4, 4), (2,), num_classes=3), r"Conv2d\(.*block 1"),
    "bias": (lambda: bpfree.mlp(5, 4, 3, bias=True), r"Linear\(.*bias=True\) in block 1"),
    "one bias above": (
        lambda: Network(Block(linear(False)), Block(linear(True), "identity")),
        r"Linear\(.*bias=True\) in block 2",
    ),
}


@pytest.mark.parametrize("case", NO_PRODUCTS)
def test_mirroring_a_network_that_is_no_product_of_matrices_is_refused(case):
    make, message = NO_PRODUCTS[case]
    with pytest.raises(ValueError, match=f"without bias.*{message}"):
        pepita(make(), mirroring=1)
