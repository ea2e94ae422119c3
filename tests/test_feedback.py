"""Every rule against the equations of the book; what the rules of chapter 2 have of their own."""

import math

import pytest
import torch
from oracles import (
    ATTENTIONS,
    EKDAAS,
    LEADER_FOLLOWERS,
    LEARNING_FEEDBACK,
    ONE_PASS,
    RULES,
    TWO_PASS,
    WITH_FEEDBACK,
    assert_same,
    autograd_grads,
    block_by_block,
    check_uniform,
    conv_problem,
    copies,
    generator,
    hidden_weights,
    mlp_problem,
    relative_error,
    update_of,
    written_out,
)

import bpfree
from bpfree import (
    DRTP,
    Backprop,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    Frozen,
    KolenPollack,
    SignSymmetry,
    shuffled,
)

every_rule = pytest.mark.parametrize("name", RULES)
one_pass = pytest.mark.parametrize("name", ONE_PASS)
every_shuffled = pytest.mark.parametrize("name", [n for n in RULES if n != "frozen"])


def fixed_of(rule):
    """The rule's feedback by the names its docstring gives: B2, D1, S2, ..."""
    return copies(rule.state_dict())


def check_closed_form(rule, expected, x, y, **options):
    deltas, grads = expected
    update = update_of(rule, x, y, **options)
    torch.testing.assert_close([delta for _, delta in update.signals], deltas)
    assert_same(update.grads, grads)


# ---- closed forms --------------------------------------------------------------------------------


@one_pass
def test_signals_and_gradients_of_an_mlp_are_the_equations(name, mlp):
    rule = RULES[name](mlp.net, generator=generator())
    check_closed_form(rule, written_out(name, mlp.net, fixed_of(rule), mlp.x, mlp.y), *mlp[1:])


@every_rule
@pytest.mark.parametrize(
    "activation", ["relu", "sigmoid", torch.sin], ids=("relu", "sigmoid", "sin")
)
def test_signals_and_gradients_of_a_pooled_convnet_are_the_equations(name, activation):
    net, x, y = conv_problem(activation=activation)
    rule = RULES[name](net, generator=generator())
    check_closed_form(rule, block_by_block(name, net, fixed_of(rule), x, y), x, y)


@every_rule
@pytest.mark.parametrize("make", [mlp_problem, conv_problem], ids=("mlp", "convnet"))
def test_signals_and_gradients_under_dropout_are_the_equations(name, make):
    net, x, y = make(dropout=0.4, activation="relu", size=7)
    rule = RULES[name](net, generator=generator())
    masks = net.masks(len(x), generator(6))
    expected = block_by_block(name, net, fixed_of(rule), x, y, masks)
    check_closed_form(rule, expected, x, y, masks=masks)


@every_rule
def test_gradients_without_biases_are_the_equations(name):
    net, x, y = conv_problem(bias=False, activation="sigmoid")
    rule = RULES[name](net, generator=generator())
    check_closed_form(rule, block_by_block(name, net, fixed_of(rule), x, y), x, y)
    assert not any("bias" in key for key in update_of(rule, x, y).grads)


@one_pass
def test_the_last_block_learns_as_under_backprop(name, either):
    net, x, y = either
    grads = update_of(RULES[name](net, generator=generator()), x, y).grads
    last, theirs = f"{len(net) - 1}.linear.weight", autograd_grads(net, x, y)
    torch.testing.assert_close(grads[last], theirs[last])


@pytest.mark.parametrize("name", [n for n in RULES if n != "backprop"])
def test_hidden_blocks_learn_otherwise_than_under_backprop(name, either):
    net, x, y = either
    grads = update_of(RULES[name](net, generator=generator()), x, y).grads
    theirs = autograd_grads(net, x, y)
    for key in hidden_weights(net):
        assert relative_error(grads[key], theirs[key]) > 0.1


def test_drtp_hidden_signals_do_not_know_the_error(mlp):
    net, x, y = mlp
    rule = DRTP(net, generator=generator())
    before = update_of(rule, x, y)
    with torch.no_grad():
        net[-1].linear.weight.mul_(-3)
    after = update_of(rule, x, y)
    assert not torch.allclose(before.signals[-1][1], after.signals[-1][1])
    for (_, old), (_, new) in zip(before.signals[:-1], after.signals[:-1], strict=True):
        assert torch.equal(old, new)


def test_kolen_pollack_feedback_gets_the_gradient_of_its_weight(either):
    net, x, y = either
    grads = update_of(KolenPollack(net, generator=generator()), x, y).grads
    for l in range(2, len(net) + 1):
        assert grads[f"rule.B{l}"].any()
        assert torch.equal(grads[f"rule.B{l}"], grads[f"{l - 1}.linear.weight"])


# ---- options -------------------------------------------------------------------------------------

OPTIONS = {
    "fa scale": (FeedbackAlignment, {}, {"feedback_scale": 0.5}),
    "kp scale": (KolenPollack, {}, {"feedback_scale": 0.5}),
    "dfa scale": (DirectFeedbackAlignment, {}, {"feedback_scale": 0.5}),
    "drtp scale": (DRTP, {}, {"feedback_scale": 0.5}),
    "sign unit scale": (SignSymmetry, {}, {"scale": 0.5}),
    "sign fixed scale": (SignSymmetry, {"magnitude": "fixed"}, {"scale": 0.5}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_halving_the_scale_halves_the_signal_below_the_output(case, either):
    rule, options, changed = OPTIONS[case]
    net, x, y = either
    before = update_of(rule(net, **options, generator=generator()), x, y)
    after = update_of(rule(net, **options, **changed, generator=generator()), x, y)
    torch.testing.assert_close(after.signals[-2][1], before.signals[-2][1] / 2)
    torch.testing.assert_close(after.signals[-1][1], before.signals[-1][1])
    assert before.signals[-2][1].any()


def test_magnitude_changes_the_hidden_gradients_in_size_and_direction(either):
    net, x, y = either
    unit = update_of(SignSymmetry(net, generator=generator()), x, y).grads
    fixed = update_of(SignSymmetry(net, magnitude="fixed", generator=generator()), x, y).grads
    for key in hidden_weights(net):
        assert bpfree.measure.angle(unit[key], fixed[key]) > 1


def test_defaults_are_the_documented_ones(mlp):
    net, x, y = mlp
    for rule, documented in (
        (FeedbackAlignment, {"feedback_scale": 1.0}),
        (KolenPollack, {"feedback_scale": 1.0}),
        (DirectFeedbackAlignment, {"feedback_scale": 1.0}),
        (DRTP, {"feedback_scale": 1.0}),
        (SignSymmetry, {"magnitude": "unit", "scale": 1.0}),
    ):
        default, spelled = rule(net, generator=generator()), rule(
            net, **documented, generator=generator())  # fmt: skip
        assert_same(fixed_of(default), fixed_of(spelled), rtol=0, atol=0)


# ---- shapes, ranges and homes of feedback --------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(
    "rule, letter",
    [(FeedbackAlignment, "B"), (KolenPollack, "B"), (SignSymmetry, "S")],
    ids=("fa", "kp", "sign"),
)
def test_feedback_shaped_like_weights_is_uniform_with_hes_bound_times_the_scale(
    rule, letter, scale
):
    net = bpfree.convnet((2, 8, 8), (9, 11), (30,), num_classes=7, generator=generator()).double()
    signs = rule is SignSymmetry
    options = {"magnitude": "fixed", "scale": scale} if signs else {"feedback_scale": scale}
    fixed = fixed_of(rule(net, **options, generator=generator()))
    fan_in = {2: 9 * 9, 3: 11 * 2 * 2, 4: 30}
    assert set(fixed) == {f"{letter}{l}" for l in fan_in}
    for l, fan in fan_in.items():
        B = fixed[f"{letter}{l}"]
        assert B.shape == net[l - 1].linear.weight.shape
        assert B.dtype == torch.float64
        check_uniform(B, scale * math.sqrt(6 / fan), nonnegative=signs)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("rule", [DirectFeedbackAlignment, DRTP])
def test_direct_feedback_goes_from_classes_to_every_hidden_activity(rule, scale):
    net = bpfree.convnet((2, 8, 8), (9, 11), (30,), num_classes=7, generator=generator()).double()
    fixed = fixed_of(rule(net, feedback_scale=scale, generator=generator()))
    sizes = {1: 9 * 4 * 4, 2: 11 * 2 * 2, 3: 30}
    assert set(fixed) == {f"D{l}" for l in sizes}
    for l, size in sizes.items():
        assert fixed[f"D{l}"].shape == (7, size)
        assert fixed[f"D{l}"].dtype == torch.float64
        check_uniform(fixed[f"D{l}"], scale * math.sqrt(6 / size))


def test_unit_magnitudes_are_the_scale_itself(mlp):
    fixed = fixed_of(SignSymmetry(mlp.net, scale=0.3))
    assert set(fixed) == {"S2", "S3"}
    assert all(float(S) == 0.3 for S in fixed.values())


@every_rule
def test_what_is_fixed_is_a_buffer_and_what_learns_is_a_parameter(name, mlp):
    rule = RULES[name](mlp.net, generator=generator())
    fixed, learned = set(rule.state()), {k for k in rule.params() if k.startswith("rule.")}
    numbered = {
        "fa": "B",
        "kp": "B",
        "sign-unit": "S",
        "sign-fixed": "S",
        **dict.fromkeys(EKDAAS, "E"),
    }
    keys = {
        "dfa": {"D1", "D2"},
        "drtp": {"D1", "D2"},
        "backprop": set(),
        "frozen": set(),
        **{one: {f"{letter}{l}" for l in (2, 3)} for one, letter in numbered.items()},
        **dict.fromkeys(ATTENTIONS, set()),
        **dict.fromkeys(TWO_PASS, {"F"}),
        **dict.fromkeys(LEADER_FOLLOWERS, {"V1", "V2"}),
    }.get(name, set(rule.state_dict()))  # of a new rule any name will do
    assert set(rule.state_dict()) == keys
    learns = name in LEARNING_FEEDBACK
    assert fixed == (set() if learns else keys)
    assert learned == ({f"rule.{k}" for k in keys} if learns else set())
    assert all(not B.requires_grad for B in rule.state().values())
    assert all(B.requires_grad for B in rule.parameters())


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_feedback_is_independent_of_the_weights(name, mlp):
    rule = RULES[name](mlp.net, generator=generator(3))
    before = fixed_of(rule)
    with torch.no_grad():
        for w in mlp.net.weights():
            w.neg_()
    assert_same(fixed_of(rule), before, rtol=0, atol=0)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("rule", [FeedbackAlignment, KolenPollack, DirectFeedbackAlignment, DRTP])
def test_a_feedback_scale_that_is_not_positive_and_finite_is_refused(rule, scale, mlp):
    with pytest.raises(ValueError, match=f"feedback_scale must be a positive.*{scale}"):
        rule(mlp.net, feedback_scale=scale, generator=generator())


@pytest.mark.parametrize("magnitude", ["unit", "fixed"])
@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_of_sign_symmetry_that_is_not_positive_and_finite_is_refused(magnitude, scale, mlp):
    with pytest.raises(ValueError, match=f"^scale must be a positive.*{scale}"):
        SignSymmetry(mlp.net, magnitude, scale, generator=generator())


def test_an_unknown_magnitude_is_refused(mlp):
    with pytest.raises(ValueError, match="'unit', 'fixed'.*got 'random'"):
        SignSymmetry(mlp.net, magnitude="random", generator=generator())


# ---- falsifiers ----------------------------------------------------------------------------------


def test_frozen_hidden_blocks_have_gradients_of_exactly_zero(either):
    net, x, y = either
    rule = Frozen(net)
    rule.backward(x, y)
    for l, block in enumerate(net, 1):
        for p in block.parameters():
            assert bool(p.grad.any()) == (l == len(net))


@every_shuffled
def test_shuffling_gives_each_sample_the_hidden_signal_of_another(name, either):
    net, x, y = either
    plain = RULES[name](net, generator=generator())
    cls = getattr(RULES[name], "func", RULES[name])
    options = getattr(RULES[name], "keywords", {})
    mixed = shuffled(cls)(net, **options, generator=generator())
    own, other = update_of(plain, x, y), update_of(mixed, x, y)
    for (r, delta), (r_mixed, delta_mixed) in list(zip(own.signals, other.signals, strict=True))[
        :-1
    ]:
        assert torch.equal(r, r_mixed)
        # a time-local signal has one row per sample and pass, which must stay together
        delta, delta_mixed = (
            d.unflatten(0, (-1, len(x))).transpose(0, 1).flatten(1) for d in (delta, delta_mixed)
        )
        giver = torch.cdist(delta_mixed, delta).argmin(1)
        torch.testing.assert_close(delta_mixed, delta[giver])
        assert sorted(giver.tolist()) == list(range(len(x)))
        assert (giver != torch.arange(len(x))).all()
    for key in hidden_weights(net):
        assert relative_error(other.grads[key], own.grads[key]) > 0.1
    torch.testing.assert_close(other.signals[-1], own.signals[-1], rtol=0, atol=0)
    last = f"{len(net) - 1}.linear.weight"
    assert torch.equal(other.grads[last], own.grads[last])


def test_shuffling_makes_a_new_class_and_leaves_the_rule_as_it_was(mlp):
    mixed = shuffled(DRTP)
    assert issubclass(mixed, DRTP)
    assert mixed.__name__ == "ShuffledDRTP"
    rule = DRTP(mlp.net, generator=generator())
    check_closed_form(rule, written_out("drtp", mlp.net, fixed_of(rule), *mlp[1:]), *mlp[1:])


# ---- a wrong sign is seen ------------------------------------------------------------------------


class WrongFeedback(FeedbackAlignment):
    def feedback(self, l, params, state):
        return -super().feedback(l, params, state)


class WrongError(Backprop):
    def signals(self, params, state, trace, error, target):
        return super().signals(params, state, trace, -error, target)


def test_feedback_of_the_wrong_sign_is_seen_by_angle_and_closed_form():
    net, x, y = mlp_problem(7, 6, 4)
    right, wrong = FeedbackAlignment(net, generator=generator()), WrongFeedback(net)
    for rule in (right, wrong):  # B = W, where the right sign is backprop
        rule.load_state_dict({"B2": net[1].linear.weight})
    assert bpfree.alignment(right, x, y).angle[0] < 1e-6
    assert bpfree.alignment(wrong, x, y).angle[0] > 179
    check_closed_form(right, block_by_block("fa", net, fixed_of(right), x, y), x, y)
    with pytest.raises(AssertionError):
        check_closed_form(wrong, block_by_block("fa", net, fixed_of(wrong), x, y), x, y)


def test_an_error_of_the_wrong_sign_is_seen_in_every_block(either):
    net, x, y = either
    assert (bpfree.alignment(WrongError(net), x, y).angle > 179).all()
    assert (bpfree.alignment(Backprop(net), x, y).angle < 1e-5).all()
