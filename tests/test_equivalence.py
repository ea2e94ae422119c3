"""The theorems of the book as properties, in float64: when a rule is backprop, and T12."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import (
    ONE_PASS,
    RULES,
    assert_same,
    autograd_grads,
    block_by_block,
    convnets,
    copies,
    generator,
    hidden_weights,
    mlps,
    plain_logits,
    problems,
    relative_error,
    seeds,
    update_of,
)

import bpfree

every_rule = pytest.mark.parametrize("name", RULES)


def weights_as_feedback(net, letter="B"):
    return {f"{letter}{l}": w.detach() for l, w in enumerate(net.weights()[1:], 2)}


def jacobians(net, x):
    """D_l for every hidden block: derivative of the logits by h_l, (C, size of h_l)."""
    trace = net.trace(dict(net.named_parameters()), x[:1])
    fixed = {}
    for l in range(1, len(net)):
        h = trace[l - 1].h.detach()
        J = torch.autograd.functional.jacobian(lambda h, l=l: plain_logits(net[l:], h), h)
        fixed[f"D{l}"] = J.reshape(net.num_classes, -1)
    return fixed


@given(problems)
def test_backprop_is_autograd(problem):
    grads = update_of(bpfree.Backprop(problem.net), problem.x, problem.y).grads
    assert_same(grads, autograd_grads(*problem))


@every_rule
@given(problem=problems, seed=seeds)
def test_every_rule_is_its_equation_on_any_network(name, problem, seed):
    net, x, y = problem
    assume(len(net) > 1 or name in ONE_PASS)
    rule = RULES[name](net, generator=generator(seed))
    update = update_of(rule, x, y)
    deltas, grads = block_by_block(name, net, copies(rule.state_dict()), x, y)
    torch.testing.assert_close([delta for _, delta in update.signals], deltas)
    assert_same(update.grads, grads)


@given(problems)
def test_T1_feedback_alignment_with_the_weights_as_feedback_is_backprop(problem):
    net, x, y = problem
    rule = bpfree.FeedbackAlignment(net, generator=generator())
    rule.load_state_dict(weights_as_feedback(net))
    assert_same(update_of(rule, x, y).grads, autograd_grads(net, x, y))


@given(problems)
def test_kolen_pollack_with_the_weights_as_feedback_is_backprop(problem):
    net, x, y = problem
    rule = bpfree.KolenPollack(net, generator=generator())
    rule.load_state_dict(weights_as_feedback(net))
    grads = update_of(rule, x, y).grads
    assert_same({k: g for k, g in grads.items() if "rule" not in k}, autograd_grads(net, x, y))


@given(problems)
def test_sign_symmetry_with_the_weights_magnitudes_is_backprop(problem):
    net, x, y = problem
    rule = bpfree.SignSymmetry(net, magnitude="fixed", generator=generator())
    rule.load_state_dict({k: w.abs() for k, w in weights_as_feedback(net, "S").items()})
    assert_same(update_of(rule, x, y).grads, autograd_grads(net, x, y))


@given(
    problem=problems,
    lr=st.floats(0.01, 0.3),
    weight_decay=st.floats(0.0, 0.9),
    seed=seeds,
)
def test_T2_kolen_pollack_feedback_approaches_the_weights_at_the_rate_of_the_decay(
    problem, lr, weight_decay, seed
):
    net, x, y = problem
    rule = bpfree.KolenPollack(net, generator=generator(seed))
    opt = torch.optim.SGD([*net.parameters(), *rule.parameters()], lr=lr, weight_decay=weight_decay)
    B, W = copies(dict(rule.named_parameters())), copies(weights_as_feedback(net))
    start = {k: B[k] - W[k] for k in B}
    for t in range(1, 9):
        opt.zero_grad()
        rule.backward(x, y)
        opt.step()
        now, weights = dict(rule.named_parameters()), weights_as_feedback(net)
        left = (1 - lr * weight_decay) ** t
        assert_same({k: now[k].detach() - weights[k] for k in B},
                    {k: left * d for k, d in start.items()})  # fmt: skip
    if len(net) > 1:
        assert not torch.allclose(now[f"B{len(net)}"], B[f"B{len(net)}"]), "nothing has moved"


@given(st.one_of(mlps(activation=st.just("identity")),
                 convnets(activation=st.just("identity"), linear_only=True)))  # fmt: skip
def test_T3_direct_feedback_alignment_is_backprop_in_a_linear_network(problem):
    net, x, y = problem
    rule = bpfree.DirectFeedbackAlignment(net, generator=generator())
    rule.load_state_dict(jacobians(net, x))
    assert_same(update_of(rule, x, y).grads, autograd_grads(net, x, y))


@given(mlps(depth=(2, 4), activation=st.just("identity")))
def test_T3_the_feedback_of_an_mlp_is_the_product_of_the_weights_above(problem):
    net, x, _ = problem
    product, W = torch.eye(net.num_classes, dtype=torch.float64), net.weights()
    for l in range(len(net) - 1, 0, -1):
        product = product @ W[l].detach()
        torch.testing.assert_close(jacobians(net, x)[f"D{l}"], product)


@given(mlps(depth=(3, 4), activation=st.just("tanh")))
def test_T3_fails_below_a_nonlinear_block_and_holds_just_below_the_output(problem):
    net, x, y = problem
    W = net.weights()
    rule = bpfree.DirectFeedbackAlignment(net, generator=generator())
    product, D = torch.eye(net.num_classes, dtype=torch.float64), {}
    for l in range(len(net) - 1, 0, -1):
        product = product @ W[l].detach()
        D[f"D{l}"] = product
    rule.load_state_dict(D)
    grads, theirs = update_of(rule, x, y).grads, autograd_grads(net, x, y)
    *below, top = hidden_weights(net)
    torch.testing.assert_close(grads[top], theirs[top])
    for key in below:
        assume(theirs[key].norm() > 1e-6)
        assert relative_error(grads[key], theirs[key]) > 1e-5


@given(problem=mlps(depth=(2, 2)), seed=seeds)
def test_with_one_hidden_block_feedback_alignment_is_direct(problem, seed):
    net, x, y = problem
    fa = bpfree.FeedbackAlignment(net, generator=generator(seed))
    dfa = bpfree.DirectFeedbackAlignment(net, generator=generator(seed + 1))
    dfa.load_state_dict({"D1": fa.B2})
    assert_same(update_of(dfa, x, y).grads, update_of(fa, x, y).grads)


@every_rule
@given(problem=problems, seed=seeds)
def test_T12_a_batchs_gradient_is_the_mean_of_its_samples_gradients(name, problem, seed):
    net, x, y = problem
    assume(len(net) > 1 or name in ONE_PASS)
    rule = RULES[name](net, generator=generator(seed))
    whole = update_of(rule, x, y)
    singles = [update_of(rule, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    mean = {k: torch.stack([s.grads[k] for s in singles]).mean(0) for k in whole.grads}
    assert_same(whole.grads, mean)
    torch.testing.assert_close(whole.loss, torch.stack([s.loss for s in singles]).mean())
