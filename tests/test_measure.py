"""Angles and norms against backprop; memory."""

import math
from functools import partial

import pytest
import torch
from oracles import (
    autograd_grads,
    copies,
    generator,
    mlp_problem,
    sibling,
    update_of,
)

import bpfree
from bpfree import (
    PEPITA,
    Backprop,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    Frozen,
    alignment,
)
from bpfree.measure import angle, peak_memory

ONE, OTHER = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


@pytest.mark.parametrize(
    "u, v, degrees",
    [
        (ONE, ONE, 0.0),
        (ONE, 7 * ONE, 0.0),
        (ONE, OTHER, 90.0),
        (ONE, ONE + OTHER, 45.0),
        (ONE, -ONE + math.sqrt(3) * OTHER, 120.0),
        (ONE, -3 * ONE, 180.0),
    ],
    ids=("itself", "longer", "right", "half", "obtuse", "opposite"),
)
def test_angle_of_known_vectors(u, v, degrees):
    assert float(angle(u, v)) == pytest.approx(degrees, abs=1e-5)
    assert float(angle(v, u)) == pytest.approx(degrees, abs=1e-5)


@pytest.mark.parametrize("radians", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("near", [0.0, 180.0])
def test_tiny_angles_keep_their_digits(radians, near):
    u = torch.tensor([1.0, 0.0], dtype=torch.float64)
    v = torch.tensor([math.cos(radians), math.sin(radians)], dtype=torch.float64)
    got = float(angle(u, v if near == 0 else -v))
    if near == 0:
        assert got == pytest.approx(math.degrees(radians), rel=1e-6)
    else:
        assert 180 - got == pytest.approx(math.degrees(radians), rel=1e-3, abs=1e-13)


@pytest.mark.parametrize("pair", [(0 * ONE, ONE), (ONE, 0 * ONE), (0 * ONE, 0 * ONE)])
def test_a_zero_vector_has_no_angle(pair):
    assert torch.isnan(angle(*pair))


def test_angle_is_of_tensors_as_vectors_in_float64():
    u, v = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    cosine = (u.double() * v.double()).sum() / u.double().norm() / v.double().norm()
    got = angle(u, v)
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(math.degrees(math.acos(float(cosine))), rel=1e-9)
    assert angle(u, 3 * u.double()) < 1e-9


def test_backprop_is_aligned_with_itself(either):
    measured = alignment(Backprop(either.net), either.x, either.y)
    L = len(either.net)
    torch.testing.assert_close(measured.angle, torch.zeros(L).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.norm, torch.ones(L).double())


def test_alignment_is_the_angle_and_the_ratio_of_the_weight_gradients(either):
    net, x, y = either
    rule = DirectFeedbackAlignment(net, generator=generator())
    ours, theirs = update_of(rule, x, y).grads, autograd_grads(net, x, y)
    measured = alignment(rule, x, y)
    assert measured.angle.shape == measured.norm.shape == (len(net),)
    for l in range(len(net)):
        u, v = ours[f"{l}.linear.weight"].flatten(), theirs[f"{l}.linear.weight"].flatten()
        degrees = math.degrees(math.acos(min(1.0, float(u @ v / u.norm() / v.norm()))))
        assert float(measured.angle[l]) == pytest.approx(degrees, abs=1e-5)
        assert float(measured.norm[l]) == pytest.approx(float(u.norm() / v.norm()))


def test_alignment_tells_length_apart_from_direction():
    net, x, y = mlp_problem(7, 6, 4)
    rule = FeedbackAlignment(net)
    rule.load_state_dict({"B2": 3 * net[1].linear.weight})
    measured = alignment(rule, x, y)
    torch.testing.assert_close(measured.angle, torch.zeros(2).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.norm, torch.tensor([3.0, 1.0]).double())


def test_frozen_blocks_have_no_angle_and_no_length(mlp):
    measured = alignment(Frozen(mlp.net), mlp.x, mlp.y)
    assert measured.angle.isnan().tolist() == [True, True, False]
    torch.testing.assert_close(measured.norm, torch.tensor([0.0, 0.0, 1.0]).double())


def test_alignment_is_measured_without_dropout_and_changes_nothing():
    net, x, y = mlp_problem(dropout=0.5)
    rule = FeedbackAlignment(net.train(), generator=generator())
    before, drawn = copies(rule.params()), rule.generator.get_state()
    measured = alignment(rule, x, y)
    torch.testing.assert_close(measured, alignment(rule, x, y), rtol=0, atol=0)
    net.eval()
    torch.testing.assert_close(measured, alignment(rule, x, y), rtol=0, atol=0)
    assert torch.equal(rule.generator.get_state(), drawn)
    torch.testing.assert_close(copies(rule.params()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in rule.params().values())


def test_alignment_of_stacked_seeds_is_that_of_each(either):
    net, x, y = either
    nets = [net, sibling(net, seed=3), sibling(net, seed=4)]
    rules = [FeedbackAlignment(n, generator=generator(s)) for s, n in enumerate(nets)]
    stack = {k: torch.stack([r.params()[k].detach() for r in rules]) for k in rules[0].params()}
    state = {k: torch.stack([r.state()[k] for r in rules]) for k in rules[0].state()}
    measured = torch.vmap(lambda p, s: tuple(alignment(rules[0], x, y, p, s)))(stack, state)
    for s, rule in enumerate(rules):
        expected = alignment(rule, x, y)
        torch.testing.assert_close(measured[0][s], expected.angle, atol=1e-5, rtol=1e-7)
        torch.testing.assert_close(measured[1][s], expected.norm)


# ---- memory --------------------------------------------------------------------------------------

UNIT = 4000  # bytes of a thousand float32
GIVEN = torch.ones(1000)


def thousand():
    return torch.ones(1000)


def all_kept():
    a = thousand()
    b = a + 1
    return a, b, b + 1


def freed_on_the_way():
    a = thousand()
    b = a + 1
    del a
    return b + 1


def viewed():
    a = thousand()
    return a[:10], a.reshape(10, 100).T, a.detach()


def kept_by_a_view():
    end = thousand()[-1:]
    return end, thousand()


def changed_in_place():
    return thousand().add_(1).clamp_(0, 1)


def saved_for_backward():
    a = thousand().requires_grad_()
    b = (2 * a).sin()  # its derivative needs 2 * a
    return a, b


SEQUENCES = {
    all_kept: 3,
    freed_on_the_way: 2,
    viewed: 1,
    kept_by_a_view: 2,
    changed_in_place: 1,
    saved_for_backward: 3,
    lambda: GIVEN[:500]: 0,
    lambda: GIVEN + 1: 1,
    lambda: GIVEN.sort(): 3,  # values, and indices of twice the size
    lambda: [thousand() for _ in range(5)]: 5,
    lambda: [None for _ in range(5) if thousand() is None]: 1,
}


@pytest.mark.parametrize("f, units", SEQUENCES.items())
def test_peak_memory_of_known_sequences(f, units):
    assert [peak_memory(f), peak_memory(f)] == [units * UNIT] * 2


def test_peak_memory_leaves_out_what_it_is_told():
    left = []

    def f():
        left.extend([thousand(), GIVEN])
        a = thousand()
        left.append(a[:500])  # a view is left out with all its memory
        return a + 1, a + 2

    assert peak_memory(f) == 4 * UNIT
    left.clear()
    assert peak_memory(f, lambda: left) == 2 * UNIT


SAVING = partial(PEPITA, saving=True)


@pytest.mark.parametrize(
    "make, least, most",
    [(SAVING, 0.9, 1.1), (PEPITA, 3, 4), (Backprop, 3, 4)],
    ids=("saving", "pepita", "backprop"),
)
def test_memory_at_64_hidden_layers_beside_16_is_the_same_only_if_saving(make, least, most):
    def peak(depth):
        net = bpfree.mlp(*[32] * (depth + 1), 10, generator=generator())
        rule = make(net, generator=generator())
        x, y = torch.rand(16, 32), torch.arange(16) % 10
        return peak_memory(lambda: rule.backward(x, y), lambda: [p.grad for p in net.parameters()])

    assert least <= peak(64) / peak(16) <= most
