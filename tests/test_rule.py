"""What every rule shares: ``backward`` like autograd's, a pure ``update``, loud refusals."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mutate import MUTANTS
from oracles import (
    LEADER_FOLLOWERS,
    ONE_PASS,
    RULES,
    TWO_PASS,
    WITH_FEEDBACK,
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
from torch.nn.utils import prune

import bpfree
from bpfree import Block, Network

every_rule = pytest.mark.parametrize("name", RULES)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def grads_of(rule):
    return {name: None if p.grad is None else p.grad.clone() for name, p in rule.params().items()}


# ---- what a rule of the library comes with ----


def test_every_rule_of_the_library_has_an_oracle_and_a_mutant():
    """Else it would be among no test that is for every rule, and nobody would notice."""
    rules = {n: getattr(bpfree, n) for n in bpfree.rules.__all__ if n != "shuffled"}
    checked = {getattr(make, "func", make).__name__ for make in RULES.values()}
    apart = {"ForwardGradient"}  # its update is random: test_forward_gradient.py
    assert not set(rules) - checked - apart, "add each to RULES in oracles.py, with its equations"
    files = {f"rules/{rule.__module__.rpartition('.')[2]}.py" for rule in rules.values()}
    assert not files - {m.file for m in MUTANTS}, "add a mutant of each to mutate.py"


# ---- backward ------------------------------------------------------------------------------------


@every_rule
def test_backward_writes_the_updates_gradients_and_returns_the_loss(name, either):
    net, x, y = either
    rule = RULES[name](net, generator=generator())
    loss = rule.backward(x, y)
    assert_same(grads_of(rule), update_of(rule, x, y).grads)
    torch.testing.assert_close(loss, F.cross_entropy(plain_logits(net, x), y).detach())
    assert loss.shape == ()
    assert not loss.requires_grad


@every_rule
def test_two_backward_calls_accumulate_the_sum_of_both(name, either):
    net, x, y = either
    rule = RULES[name](net, generator=generator())
    x2, y2 = batch_for(net, 4, seed=7)
    first, second = update_of(rule, x, y).grads, update_of(rule, x2, y2).grads
    rule.backward(x, y)
    rule.backward(x2, y2)
    assert_same(grads_of(rule), {k: first[k] + second[k] for k in first})


@every_rule
def test_no_two_parameters_share_the_memory_of_a_gradient(name, either):
    net, x, y = either
    rule = RULES[name](net, generator=generator())
    rule.backward(x, y)
    memory = [p.grad.data_ptr() for p in rule.params().values()]
    assert len(set(memory)) == len(memory)


@every_rule
def test_backward_leaves_parameters_that_need_no_gradient_alone(name, either):
    net, x, y = either
    rule = RULES[name](net, generator=generator())
    expected = update_of(rule, x, y).grads
    net[0].linear.weight.requires_grad_(False)
    net[1].linear.bias.requires_grad_(False)
    rule.backward(x, y)
    skipped = {"0.linear.weight": None, "1.linear.bias": None}
    assert {k: g for k, g in grads_of(rule).items() if k in skipped} == skipped
    assert_same(
        {k: g for k, g in grads_of(rule).items() if k not in skipped},
        {k: g for k, g in expected.items() if k not in skipped},
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_backprop_trains_as_autograd_does(optimizer, either):
    net, x, y = either
    twin = sibling(net)
    rule = bpfree.Backprop(net)
    ours = OPTIMIZERS[optimizer](net.parameters())
    theirs = OPTIMIZERS[optimizer](twin.parameters())
    for _ in range(4):
        ours.zero_grad()
        rule.backward(x, y)
        ours.step()
        theirs.zero_grad()
        F.cross_entropy(plain_logits(twin, x), y).backward()
        theirs.step()
    assert_same(dict(net.named_parameters()), dict(twin.named_parameters()))


@every_rule
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_rule_lowers_the_loss_under_torch_optim(name, optimizer, either):
    net, x, y = either
    rule = RULES[name](net, generator=generator())
    opt = OPTIMIZERS[optimizer]([*net.parameters(), *rule.parameters()])
    losses = []
    for _ in range(30):
        opt.zero_grad()
        losses.append(float(rule.backward(x, y)))
        opt.step()
    assert losses[-1] < 0.75 * losses[0]


@every_rule
def test_a_rule_leaves_the_networks_parameters_in_place(name, mlp):
    before = list(mlp.net.parameters())
    values = [p.detach().clone() for p in before]
    RULES[name](mlp.net, generator=generator())
    after = list(mlp.net.parameters())
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, values, strict=True))


@every_rule
def test_a_rule_does_not_own_the_network(name, mlp):
    rule = RULES[name](mlp.net, generator=generator())
    assert rule.net is mlp.net
    assert not {id(p) for p in rule.parameters()} & {id(p) for p in mlp.net.parameters()}
    assert not any("linear" in key for key in rule.state_dict())
    assert set(update_of(rule, mlp.x, mlp.y).grads) == set(rule.params())


@every_rule
def test_state_dicts_reproduce_the_gradients_in_another_rule(name, either):
    net, x, y = either
    rule = RULES[name](net, generator=generator(1))
    other = RULES[name](sibling(net, seed=5), generator=generator(2))
    expected = update_of(rule, x, y).grads
    other.net.load_state_dict(net.state_dict())
    if name in WITH_FEEDBACK:
        assert relative_error(update_of(other, x, y).grads["0.linear.weight"],
                              expected["0.linear.weight"]) > 0.1  # fmt: skip
    other.load_state_dict(rule.state_dict())
    assert_same(update_of(other, x, y).grads, expected, rtol=0, atol=0)


@every_rule
def test_training_resumed_from_state_dicts_is_exact(name, either):
    net, x, y = either

    def start(seed):
        rule = RULES[name](sibling(net, seed=seed), generator=generator(seed))
        return rule, OPTIMIZERS["adam"]([*rule.net.parameters(), *rule.parameters()])

    def train(rule, opt, steps=3):
        for _ in range(steps):
            opt.zero_grad()
            rule.backward(x, y)
            opt.step()

    (rule, opt), (resumed, opt_resumed) = start(1), start(2)
    train(rule, opt)
    resumed.net.load_state_dict(copy.deepcopy(rule.net.state_dict()))
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    opt_resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(rule, opt)
    train(resumed, opt_resumed)
    assert_same(copies(resumed.params()), copies(rule.params()), rtol=0, atol=0)


@every_rule
def test_a_deep_copy_of_a_rule_has_a_network_of_its_own(name, mlp):
    rule = RULES[name](mlp.net, generator=generator())
    twin = copy.deepcopy(rule)
    twin.backward(mlp.x, mlp.y)
    assert all(p.grad is None for p in rule.params().values())
    assert_same(grads_of(twin), update_of(rule, mlp.x, mlp.y).grads)


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_feedback_is_drawn_from_the_given_generator_alone(name, either):
    with global_generator_untouched():
        first, again, other = (RULES[name](either.net, generator=generator(s)) for s in (1, 1, 2))
    assert first.state_dict().keys() == again.state_dict().keys()
    for key, B in first.state_dict().items():
        assert torch.equal(B, again.state_dict()[key])
        assert not torch.equal(B, other.state_dict()[key])


@every_rule
def test_dropout_in_backward_comes_from_the_rules_generator_alone(name):
    net, x, y = conv_problem(dropout=0.5)
    rule = RULES[name](net, generator=generator())
    rule.generator = generator(3)
    with global_generator_untouched():
        loss = rule.backward(x, y)
    masks = net.masks(len(x), generator(3))
    expected = F.cross_entropy(plain_logits(net, x, masks), y).detach()
    torch.testing.assert_close(loss, expected)
    assert_same(grads_of(rule), update_of(rule, x, y, masks=masks).grads)
    assert abs(float(loss - rule.backward(x, y))) > 1e-6, "the second call has the same masks"


def test_evaluation_mode_turns_dropout_off():
    net, x, y = mlp_problem(dropout=0.5)
    rule = bpfree.Backprop(net.eval(), generator=generator())
    rule.backward(x, y)
    assert_same(grads_of(rule), autograd_grads(net, x, y))


@pytest.mark.parametrize("name", ONE_PASS)
def test_a_network_of_one_block_is_softmax_regression(name):
    net, x, y = mlp_problem(6, 4)
    rule = RULES[name](net, generator=generator())
    rule.backward(x, y)
    assert_same({k: g for k, g in grads_of(rule).items() if "rule" not in k},
                autograd_grads(net, x, y))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_are_the_same_labels(dtype, mlp):
    rule = bpfree.Backprop(mlp.net)
    rule.backward(mlp.x, mlp.y.to(dtype))
    assert_same(grads_of(rule), autograd_grads(*mlp))


def test_a_linear_first_block_takes_images(mlp):
    rule, net = bpfree.Backprop(mlp.net), mlp.net
    rule.backward(mlp.x.reshape(len(mlp.x), 7, 1, 1), mlp.y)
    assert_same(grads_of(rule), autograd_grads(net, mlp.x, mlp.y))


# ---- update: pure, and of the weights it is given ------------------------------------------------


@every_rule
def test_update_writes_nothing(name):
    net, x, y = conv_problem(dropout=0.3, activation="relu")
    rule = RULES[name](net, generator=generator())
    params, state, inputs = rule.params(), rule.state(), {"x": x, "y": y}
    masks = net.masks(len(x), generator(4))
    everything = (params, state, inputs, masks)
    before = [copies(tensors) for tensors in everything]
    versions = [[t._version for t in tensors.values()] for tensors in everything]
    rule.update(params, state, x, y, masks=masks)
    for tensors, old in zip(everything, before, strict=True):
        assert_same(copies(tensors), old, rtol=0, atol=0)
    assert versions == [[t._version for t in tensors.values()] for tensors in everything]
    assert all(p.grad is None for p in params.values())


@every_rule
def test_update_records_no_graph(name, either):
    rule = RULES[name](either.net, generator=generator())
    update = update_of(rule, either.x, either.y)
    tensors = [update.loss, update.logits, *update.grads.values(), *sum(update.signals, ())]
    assert not any(t.requires_grad for t in tensors)


@every_rule
def test_update_reads_only_the_weights_and_feedback_it_is_given(name, either):
    net, x, y = either
    rule = RULES[name](net, generator=generator(1))
    other = RULES[name](sibling(net, seed=9), generator=generator(2))
    doctored = rule.update(other.params(), other.state(), x, y)
    expected = update_of(other, x, y)
    torch.testing.assert_close(doctored.loss, expected.loss, rtol=0, atol=0)
    assert_same(doctored.grads, expected.grads, rtol=0, atol=0)
    own = update_of(rule, x, y).grads
    assert all(relative_error(own[k], g) > 0.01 for k, g in doctored.grads.items() if g.any())


@every_rule
def test_signals_have_the_shapes_of_input_and_pre_activation(name, either):
    net, x, y = either
    rule = RULES[name](net, generator=generator())
    update = update_of(rule, x, y)
    trace = net.trace(rule.params(), x)
    for t, (r, delta) in zip(trace, update.signals, strict=True):
        # the time-local signal of a hidden block is two: one of each pass, one after the other
        passes = len(delta) // len(t.a)
        assert passes == 1 + (name == "pepita-local" and t is not trace[-1])
        assert r.shape == (len(delta), *t.r.shape[1:])
        assert delta.shape == (len(delta), *t.a.shape[1:])
        if name in ONE_PASS:
            torch.testing.assert_close(r, t.r)
    torch.testing.assert_close(update.logits, plain_logits(net, x).detach())


def test_update_draws_its_masks_from_the_generator_given():
    net, x, y = mlp_problem(dropout=0.5)
    rule = bpfree.Backprop(net)
    masks = net.masks(len(x), generator(3))
    drawn = update_of(rule, x, y, generator=generator(3)).grads
    assert_same(drawn, update_of(rule, x, y, masks=masks).grads)
    assert_same(drawn, autograd_grads(net, x, y, masks))


def test_two_rules_of_one_class_share_nothing():
    rules = [bpfree.FeedbackAlignment(mlp_problem(seed=s).net) for s in (0, 1)]
    before = copies(rules[1].state())
    for B in rules[0].state().values():
        B.zero_()
    assert_same(rules[1].state(), before)


def test_a_rule_without_signals_is_unfinished(mlp):
    with pytest.raises(NotImplementedError):
        bpfree.Rule(mlp.net).backward(mlp.x, mlp.y)


# ---- autocast ------------------------------------------------------------------------------------


def rule_for_bfloat16(name, net):
    """PEPITA's signal is a small difference of activities, which keeps few of bfloat16's 8 bits;
    with feedback 20 times the usual it keeps enough to be told from a wrong one."""
    options = {"feedback_scale": 1.0} if name in TWO_PASS else {}
    return RULES[name](net, **options, generator=generator())


UNIT = 2**-8  # relative rounding error of bfloat16


def rounding_errors(exact, rough):
    """Relative error of the gradients and of the loss."""
    errors = {k: relative_error(rough.grads[k].float(), g) for k, g in exact.grads.items()}
    return {k: e for k, e in errors.items() if exact.grads[k].any()}, relative_error(
        rough.loss.float(), exact.loss
    )


def allowed_errors(rule, x, y, masks):
    """What bfloat16 may cost each gradient in any order of summation, taken from float32 itself.

    Twice what rounding the weights, the feedback and the input costs, at worst in eight draws (it
    moves some maxima of max-pooling, say); and a unit of the sum's terms without their signs, which
    is much where they cancel.
    """
    given = {"x": x, **rule.params(), **rule.state()}
    exact, worst = update_of(rule, x, y, masks=masks), {}
    for seed in range(8):
        draw = generator(seed)
        near = {k: t * (1 + UNIT * (2 * torch.rand(t.shape, generator=draw) - 1)).to(t)
                for k, t in given.items()}  # fmt: skip
        params, state = ({k: near[k] for k in part} for part in (rule.params(), rule.state()))
        errors, _ = rounding_errors(exact, rule.update(params, state, near["x"], y, masks=masks))
        worst = {k: max(e, worst.get(k, 0.0)) for k, e in errors.items()}
    for l, (block, (r, delta)) in enumerate(zip(rule.net, exact.signals, strict=True)):
        for name, terms in block.outer(delta.abs(), r.abs(), 1 / len(x)).items():
            if (key := f"{l}.linear.{name}") in worst:
                cancels = (terms.norm() / exact.grads[key].norm()).item()
                worst[key] = 2 * worst[key] + UNIT * cancels
    return {k: w for k, w in worst.items() if not k.startswith("rule.")}


def assert_within(errors, allowed):
    assert not {k: (errors[k], w) for k, w in allowed.items() if errors[k] > w}


def autocast_errors(rule, x, y, masks):
    """Relative error, against float32, of gradients and loss under bfloat16 autocast."""
    exact = update_of(rule, x, y, masks=masks)
    with torch.autocast("cpu", torch.bfloat16):
        return rounding_errors(exact, update_of(rule, x, y, masks=masks))


@every_rule
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_gives_gradients_near_the_float32_ones(name, dropout, either):
    net = either.net.float()
    for block in list(net)[:-1]:
        block.dropout = dropout
    x, y = batch_for(net, 32)
    rule = rule_for_bfloat16(name, net)
    given = x, y, net.masks(32, generator(2))
    errors, loss = autocast_errors(rule, *given)
    assert_within(errors, allowed_errors(rule, *given))
    assert loss < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        rule.backward(x, y)
    assert {p.grad.dtype for p in rule.params().values()} == {torch.float32}


@every_rule
def test_a_network_in_bfloat16_gets_gradients_near_the_float32_ones(name, either):
    net = either.net.bfloat16().float()
    x, y = batch_for(net, 32)
    x, rule = x.bfloat16().float(), rule_for_bfloat16(name, net)
    exact, allowed = update_of(rule.bfloat16().float(), x, y), allowed_errors(rule, x, y, {})
    net.bfloat16()
    rule.bfloat16()
    errors, loss = rounding_errors(exact, update_of(rule, x.bfloat16(), y))
    assert_within(errors, allowed)
    assert loss < 0.01
    rule.backward(x.bfloat16(), y)
    assert {p.grad.dtype for p in rule.params().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["backprop", "dfa", "ekdaa"])
def test_autocast_keeps_small_errors_of_a_trained_network(name):
    net, x, y = mlp_problem(12, 30, 4, size=16)
    net.float()
    x = x.float()
    opt = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(60):
        opt.zero_grad()
        F.cross_entropy(plain_logits(net, x), y).backward()
        opt.step()
    rule = RULES[name](net, generator=generator())
    errors, loss = autocast_errors(rule, x, y, {})
    assert_within(errors, allowed_errors(rule, x, y, {}))
    assert loss < 0.1


# ---- what learns beside the weights --------------------------------------------------------------

LEARNING = [name for name in RULES if list(RULES[name](mlp_problem().net).parameters())]


def train_ten(rule, problem, *optimizers):
    for _ in range(10):
        for opt in optimizers:
            opt.zero_grad()
        rule.backward(problem.x, problem.y)
        for opt in optimizers:
            opt.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LEARNING)
def test_feedback_that_nobody_steps_is_warned_of_once(name, fused, mlp):
    rule = RULES[name](mlp.net, generator=generator())
    opt = torch.optim.SGD(mlp.net.parameters(), lr=0.1, fused=fused)
    with pytest.warns(UserWarning, match=r"[BEV]\d, [BEV]\d .*\*rule\.parameters\(\)"):
        train_ten(rule, mlp, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_ten(rule, mlp, opt)


def test_of_several_feedback_matrices_those_that_rest_are_named(mlp):
    rule = bpfree.KolenPollack(mlp.net, generator=generator())
    with pytest.warns(UserWarning, match="learns B3 beside"):
        train_ten(rule, mlp, torch.optim.SGD([*mlp.net.parameters(), rule.B2], lr=0.1))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("way", ["together", "apart", "nobody", "own frozen"])
def test_nothing_is_warned_of_where_all_that_learns_is_stepped_or_nothing(name, way, mlp):
    rule = RULES[name](mlp.net, generator=generator())
    net, own = [*mlp.net.parameters()], [*rule.parameters()]
    if way == "own frozen":
        rule.requires_grad_(False)
    groups = {"together": [net + own], "apart": [net, own], "nobody": [], "own frozen": [net]}[way]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_ten(rule, mlp, *(torch.optim.SGD(g, lr=0.1) for g in groups if g))


def test_no_warning_where_the_feedbacks_gradient_is_zero(mlp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_ten(bpfree.EKDAA(mlp.net, gamma=0.0), mlp,
                  torch.optim.SGD(mlp.net.parameters(), lr=0.1))  # fmt: skip


@pytest.mark.parametrize("name", [n for n in LEARNING if n not in LEADER_FOLLOWERS])
@pytest.mark.parametrize("by", ["backward", "fit"])
def test_feedback_beside_a_frozen_weight_rests_with_it(name, by, few_digits):
    def make(g):
        rule = RULES[name](bpfree.mlp(64, 9, 8, 10, generator=g), generator=g)
        rule.net[1].linear.weight.requires_grad_(False)
        return rule

    rule = make(generator(3))
    before = copies(rule.params())
    if by == "fit":
        rule = bpfree.fit(make, few_digits, epochs=1, seeds=[3]).rules[0]
    else:
        learned = [*rule.net.parameters(), *rule.parameters()]
        rule.backward(few_digits.inputs(few_digits.train_x), few_digits.train_y)
        torch.optim.SGD(learned, lr=0.1).step()
    moved = {k for k, p in rule.params().items() if not torch.equal(p, before[k])}
    letter = name[0].upper() if name.startswith("ekdaa") else "B"
    assert moved == {"0.linear.weight", "2.linear.weight", f"rule.{letter}3"}


# ---- a network that is no longer what the rule was made for --------------------------------------


def pruned(net):
    prune.random_unstructured(net[1].linear, "weight", 0.5)


def renormed(net):
    torch.nn.utils.parametrizations.weight_norm(net[1].linear)


def tied(net):
    net[1].linear.weight = net[0].linear.weight


def grown(net):
    net._modules["3"] = Block(nn.Linear(4, 4), "identity")


def widened(net):
    net[0].linear.weight = nn.Parameter(torch.ones(9, 7).double())


def biased(net):
    net[0].linear.bias = None


CHANGES = {  # what is done to the network 7-6-5-4, and what the refusal says
    "pruned": (pruned, "block 2 must own its weight.*prune.remove"),
    "weight norm": (renormed, "block 2 must own its weight.*remove_parametrizations"),
    "tied": (tied, "must not share parameters"),
    "last activation": (lambda net: setattr(net[-1], "activation", "relu"), "block 3 was.*relu"),
    "last softmax": (
        lambda net: setattr(net[-1], "activation", lambda a: a.softmax(1)), "block 3 was"),
    "pool": (lambda net: setattr(net[1], "pool", nn.AvgPool1d(1)), "block 2 was.*AvgPool1d"),
    "last dropout": (lambda net: setattr(net[-1], "dropout", 0.5), "without dropout, got 0.5"),
    "grown": (grown, "block 4 was None"),
    "widened": (widened, r"block 1 was.*\[9, 7\]"),
    "bias": (biased, "block 1 was"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_changed_after_its_rule_was_made_is_refused_and_not_trained(change):
    net, x, y = mlp_problem()
    rule = bpfree.FeedbackAlignment(net, generator=generator())
    spoil, message = CHANGES[change]
    spoil(net)
    for call in (rule.backward, partial(bpfree.alignment, rule)):
        with pytest.raises(ValueError, match=message):
            call(x, y)
    assert all(p.grad is None for p in net.parameters())


def bias_pruned(net):
    prune.random_unstructured(net[1].linear, "bias", 0.5)


def bias_replaced(net):
    bias = net[1].linear.bias.detach() + 5
    del net[1].linear.bias
    net[1].linear.bias = bias


def test_a_block_exchanged_before_the_rule_is_made_is_refused(mlp):
    mlp.net[-1].linear = nn.Linear(5, 9).double()
    with pytest.raises(ValueError, match="a block was exchanged: make a new Network"):
        bpfree.KolenPollack(mlp.net)


@pytest.mark.parametrize("spoil", [pruned, renormed, bias_pruned, bias_replaced])
def test_a_computed_weight_is_refused_where_a_rule_or_a_network_is_made(spoil):
    net = mlp_problem().net
    spoil(net)
    for make in (bpfree.Backprop, bpfree.PEPITA, lambda net: Network(*net)):
        with pytest.raises(ValueError, match="block 2 must own its weight"):
            make(net)


def test_pruning_made_permanent_trains():
    net, x, y = mlp_problem()
    pruned(net)
    prune.remove(net[1].linear, "weight")
    assert bpfree.Backprop(net).backward(x, y).isfinite()


def test_dropout_may_change_along_the_way_and_copies_keep_their_rule():
    net, x, y = mlp_problem()
    rule = copy.deepcopy(bpfree.PEPITA(net, generator=generator()))
    rule.net[0].dropout = 0.5
    assert rule.backward(x, y).isfinite()


# ---- refusals ------------------------------------------------------------------------------------

NAN = torch.full((5, 7), torch.nan, dtype=torch.float64)
INF = torch.cat([torch.zeros(4, 7), torch.full((1, 7), torch.inf)]).double()

BAD_BATCHES = {  # what is done to (x, y) of shapes (5, 7) and (5,), labels 0..3
    "features": (lambda x, y: (x[:, :6], y), ValueError, r"\(B >= 1, 7\).*\(5, 6\)"),
    "no batch dimension": (lambda x, y: (x[0], y), ValueError, r"\(B >= 1, 7\).*\(7,\)"),
    "scalar": (lambda x, y: (x[0, 0], y), ValueError, r"\(B >= 1, 7\).*\(\)"),
    "empty batch": (lambda x, y: (x[:0], y[:0]), ValueError, r"\(B >= 1, 7\).*\(0, 7\)"),
    "labels too few": (lambda x, y: (x, y[:4]), ValueError, r"\(5,\).*\(4,\)"),
    "labels one-hot": (lambda x, y: (x, F.one_hot(y, 4)), ValueError, r"\(5,\).*\(5, 4\)"),
    "label negative": (lambda x, y: (x, y * 0 - 1), ValueError, r"0\.\.3.*-1\.\.-1"),
    "label too large": (lambda x, y: (x, y * 0 + 4), ValueError, r"0\.\.3.*4\.\.4"),
    "labels float": (lambda x, y: (x, y.double()), TypeError, "integer.*float64"),
    "labels bool": (lambda x, y: (x, y > 1), TypeError, "integer.*bool"),
    "x integer": (lambda x, y: (x.long(), y), TypeError, "floating point.*int64"),
    "x bytes": (lambda x, y: (x.to(torch.uint8), y), TypeError, "floating point.*uint8"),
    "x complex": (lambda x, y: (x.to(torch.complex64), y), TypeError, "floating.*complex64"),
    "x of another dtype": (lambda x, y: (x.float(), y), TypeError, "float64.*float32"),
    "x nan": (lambda x, y: (NAN, y), ValueError, "finite.*35 NaN"),
    "x infinite": (lambda x, y: (INF, y), ValueError, "finite.*7 NaN"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
@pytest.mark.parametrize("name", ["backprop", "drtp"])
def test_a_bad_batch_is_refused_by_name_and_changes_nothing(name, case, mlp):
    spoil, exception, message = BAD_BATCHES[case]
    rule = RULES[name](mlp.net, generator=generator())
    rule.backward(mlp.x, mlp.y)
    before, state = grads_of(rule), copies(rule.state())
    with pytest.raises(exception, match=message):
        rule.backward(*spoil(mlp.x, mlp.y))
    assert_same(grads_of(rule), before, rtol=0, atol=0)
    assert_same(rule.state(), state, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, 9, 8, 2), (5, 2, 9, 8), (5, 144), (2, 8, 9)])
def test_a_convnet_refuses_images_of_another_shape(shape, convnet):
    given = r", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"\(B >= 1, 2, 8, 9\).*\({given}\)"):
        bpfree.Backprop(convnet.net).backward(torch.zeros(shape).double(), convnet.y)


def chain(*last):
    return Network(Block(nn.Linear(3, 4)), Block(nn.Linear(4, 2), *last))


BAD_NETWORKS = {
    "bare linear": (lambda: nn.Linear(3, 2), TypeError, "bpfree.Network.*got Linear"),
    "sequential": (lambda: nn.Sequential(nn.Linear(3, 2)), TypeError, "Network.*got Sequential"),
    "sequential of blocks": (
        lambda: nn.Sequential(*bpfree.mlp(3, 4, 2)), TypeError, "Network.*got Sequential",
    ),
    "a block": (lambda: Block(nn.Linear(3, 2), "identity"), TypeError, "Network.*got Block"),
    "last activation": (lambda: chain("tanh"), ValueError, "'identity'.*'tanh'"),
    "last callable": (lambda: chain(F.elu), ValueError, "'identity'.*elu"),
    "last pool": (
        lambda: chain("identity", nn.MaxPool1d(2)), ValueError, r"pool MaxPool1d\(",
    ),
    "last dropout": (lambda: chain("identity", None, 0.5), ValueError, r"dropout 0\.5"),
    "one class": (lambda: bpfree.mlp(3, 4, 1), ValueError, r"C >= 2.*1"),
    "image of logits": (
        lambda: Network(Block(nn.Conv2d(1, 2, 3), "identity"), input_shape=(1, 3, 3)),
        ValueError, r"C >= 2.*2, 1, 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NETWORKS)
@every_rule
def test_a_network_the_rules_cannot_train_is_refused_by_name(name, case):
    make, exception, message = BAD_NETWORKS[case]
    with pytest.raises(exception, match=message):
        RULES[name](make(), generator=generator())


def test_the_refusal_names_the_rule():
    with pytest.raises(TypeError, match="^DRTP needs"):
        bpfree.DRTP(nn.Linear(3, 2))


def test_a_loss_that_is_huge_is_still_finite(mlp):
    with torch.no_grad():
        mlp.net[-1].linear.weight.mul_(1e6)
    loss = bpfree.Backprop(mlp.net).backward(mlp.x, mlp.y)
    assert math.isfinite(loss)
    torch.testing.assert_close(loss, F.cross_entropy(plain_logits(mlp.net, mlp.x), mlp.y).detach())


class Forgetful(bpfree.Backprop):
    """A rule with a parameter of its own, for which it gives no gradient."""

    def __init__(self, net):
        super().__init__(net)
        self.gain = nn.Parameter(torch.ones(2).double())


class Narrow(bpfree.Backprop):
    """A rule whose first signal has one column, which would broadcast."""

    def signals(self, *args):
        (r, delta), *rest = super().signals(*args)
        return [(r, delta[:, :1]), *rest]


class Taciturn(bpfree.Backprop):
    def signals(self, *args):
        return super().signals(*args)[:1]


class Talkative(bpfree.Backprop):
    def signals(self, *args):
        return super().signals(*args) * 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Forgetful, r" must give rule\.gain a gradient of shape"),
        (Narrow, r"'s signal for block 1 must be r of shape .*delta of shape \(B, 5\).*\(6, 1\)"),
        (Taciturn, " must give 2 signals, gave 1"),
        (Talkative, " must give 2 signals, gave more"),
    ],
)
def test_a_mistaken_rule_is_named_and_writes_no_gradient(rule, message):
    net = bpfree.mlp(4, 5, 3).double()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    x, y = torch.rand(6, 4).double(), torch.arange(6) % 3
    with pytest.raises(ValueError, match=f"{rule.__name__}{message}"):
        rule(net).backward(x, y)
    assert all(not p.grad.any() for p in net.parameters())


def test_a_convolution_is_not_taught_by_other_samples_than_its_input():
    """torch's own would take one image for four activities, and not say so."""

    class OneImage(bpfree.Backprop):
        def signals(self, *args):
            (r, delta), last = super().signals(*args)
            return [(r[:1], delta), last]

    net = bpfree.convnet((2, 8, 8), (4,), num_classes=3)
    with pytest.raises(ValueError, match=r"block 1 must be r .*got \(1, 2, 8, 8\) and \(4, 4"):
        OneImage(net).backward(torch.rand(4, 2, 8, 8), torch.arange(4) % 3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_same_whatever_the_layout_of_the_weights(fused):
    """A fused optimiser walks through gradient and weight as they lie in memory."""
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = bpfree.convnet((3, 12, 12), (4, 6), num_classes=5, generator=generator())
        net = net.to(memory_format=layout)
        before = [w.detach().clone() for w in net.weights()]
        opt = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
        bpfree.Backprop(net).backward(torch.rand(7, 3, 12, 12, generator=generator()),
                                      torch.arange(7) % 5)  # fmt: skip
        opt.step()
        steps.append([w.detach() - b for w, b in zip(net.weights(), before, strict=True)])
    for step, other in zip(*steps, strict=True):
        assert step.norm() > 0
        torch.testing.assert_close(step, other, rtol=1e-3, atol=1e-6)


@every_rule
def test_a_rule_works_without_hooks_which_compilation_would_ignore(name, mlp):
    RULES[name](mlp.net, generator=generator()).backward(mlp.x, mlp.y)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, kind) for module in mlp.net.modules() for kind in kinds)
