"""Blocks and networks: shapes, local derivatives, initial weights, dropout, refusals."""

import math
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    ACTIVATIONS,
    PROBLEMS,
    batch_for,
    generator,
    global_generator_untouched,
    plain_logits,
    plain_phi,
    problems,
)
from torch import nn

import bpfree
from bpfree import Block, Network

CALLABLES = {"elu": F.elu, "sin": torch.sin, "torch.sign": torch.sign, "module": nn.Softplus()}
POOLS = {"none": None, "max": nn.MaxPool2d(2), "average": nn.AvgPool2d(3, 2)}
CONVOLUTIONS = {
    "plain": dict(),
    "stride": dict(stride=2),
    "padding": dict(padding=(2, 1)),
    "dilation": dict(dilation=2, padding=1),
    "groups": dict(groups=2),
    "all": dict(stride=(2, 3), padding=2, dilation=(1, 2), groups=2),
}


def draws(shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# ---- shapes and the forward pass -------------------------------------------------------------


def test_mlp_has_the_given_sizes_and_a_linear_last_block():
    net = bpfree.mlp(7, 6, 5, 4, activation="tanh", bias=True, dropout=0.3, generator=generator())
    assert [tuple(w.shape) for w in net.weights()] == [(6, 7), (5, 6), (4, 5)]
    assert net.shapes == [(6,), (5,), (4,)]
    assert net.input_shape == (7,)
    assert net.num_classes == 4
    assert [b.activation for b in net] == ["tanh", "tanh", "identity"]
    assert [b.dropout for b in net] == [0.3, 0.3, 0.0]
    assert all(b.linear.bias is not None for b in net)
    assert not any(b.is_conv for b in net)


def test_mlp_has_no_bias_by_default():
    assert all(b.linear.bias is None for b in bpfree.mlp(3, 4, 2, generator=generator()))


def test_convnet_has_the_shapes_its_arguments_say():
    net = bpfree.convnet((2, 8, 9), (3, 4), (6,), num_classes=5, pool=(2, 1), generator=generator())
    assert net.shapes == [(3, 4, 4), (4, 4, 4), (6,), (5,)]
    assert [tuple(w.shape) for w in net.weights()] == [(3, 2, 3, 3), (4, 3, 3, 3), (6, 64), (5, 6)]
    assert [b.is_conv for b in net] == [True, True, False, False]
    assert net[0].pool.kernel_size == 2
    assert net[1].pool is None
    assert net.num_classes == 5


def test_convnet_gives_its_trunk_the_activation_asked_for():
    options = dict(num_classes=5, activation="tanh", generator=generator())
    net = bpfree.convnet((2, 8, 8), (3, 4), (6,), trunk="identity", **options)
    assert [b.activation for b in net] == ["identity", "identity", "tanh", "identity"]


def test_convnet_without_convolutions_is_an_mlp_that_flattens():
    net = bpfree.convnet((2, 3, 3), (), (7,), num_classes=4, generator=generator())
    x, _ = batch_for(net, 3)
    assert net.shapes == [(7,), (4,)]
    torch.testing.assert_close(net(x), plain_logits(net, x))


def test_convnet_padding_changes_the_size_as_convolution_arithmetic_says():
    net = bpfree.convnet(
        (1, 8, 8), (2,), num_classes=3, kernel_size=5, padding=1, pool=1, generator=generator()
    )
    assert net.shapes[0] == (2, 6, 6)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_convnet_without_padding_given_keeps_the_size(kernel_size):
    net = bpfree.convnet(
        (1, 8, 8), (2,), num_classes=3, kernel_size=kernel_size, pool=1, generator=generator()
    )
    assert net.shapes[0] == (2, 8, 8)


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_convnet_refuses_to_keep_the_size_under_an_even_kernel(kernel_size):
    with pytest.raises(ValueError, match=str(kernel_size)):
        bpfree.convnet((1, 8, 8), (2,), num_classes=3, kernel_size=kernel_size)


@given(problems)
def test_forward_and_trace_are_the_plain_forward_pass(problem):
    net, x, _ = problem
    logits = plain_logits(net, x)
    trace = net.trace(dict(net.named_parameters()), x)
    torch.testing.assert_close(net(x), logits)
    torch.testing.assert_close(trace[-1].h, logits)
    assert [tuple(t.h.shape[1:]) for t in trace] == net.shapes
    h = x
    for block, t in zip(net, trace, strict=True):
        assert torch.equal(t.r, h if block.is_conv else h.flatten(1))
        torch.testing.assert_close(t.a, block.linear(t.r))
        assert t.z.shape == t.a.shape
        torch.testing.assert_close(t.h, plain_phi(block, t.a, None))
        h = t.h


def test_trace_reads_the_weights_it_is_given(either):
    net, x, _ = either
    params = dict(net.named_parameters())
    doubled = {name: 2 * p for name, p in params.items()}
    torch.testing.assert_close(net.trace(doubled, x)[0].a, 2 * net.trace(params, x)[0].a)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_state_dict_carries_a_network_to_another(kind):
    net, x, _ = PROBLEMS[kind](seed=1)
    other = PROBLEMS[kind](seed=2).net
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert set(net.state_dict()) == set(dict(net.named_parameters()))


def test_linear_block_flattens_images():
    block = Block(nn.utils.skip_init(nn.Linear, 12, 3, bias=False), "identity").double()
    block.linear.weight.data.copy_(draws((3, 12)))
    x = draws((4, 3, 2, 2), 1)
    expected = torch.einsum("bchw,ochw->bo", x, block.linear.weight.reshape(3, 3, 2, 2))
    torch.testing.assert_close(block(x), expected)


# ---- local derivatives, transposed maps, outer products ----------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=("no-mask", "mask"))
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *CALLABLES])
def test_local_vjp_is_autograd_through_phi(activation, pool, masked):
    function = CALLABLES.get(activation, activation)
    block = Block(nn.Conv2d(2, 3, 3).double(), function, POOLS[pool])
    x = 5 * draws((4, 2, 8, 7))  # large enough for sin to turn round: pooling sees z, not a
    a = block.linear(x).detach().requires_grad_()
    mask = torch.rand_like(plain_phi(block, a, None)).round() / 0.5 if masked else None
    h = plain_phi(block, a, mask)
    v = draws(h.shape, 1)
    expected = torch.autograd.grad(h, a, v)[0]
    t = block.trace(x, block.linear.weight, block.linear.bias, mask)
    with torch.no_grad():
        got = block.local_vjp(v, t)
    assert got.shape == a.shape
    torch.testing.assert_close(got, expected)
    assert (expected == 0).all() == ("sign" in activation)


def test_max_pooling_sends_the_signal_to_the_largest_unit_only():
    block = Block(nn.Conv2d(1, 1, 1, bias=False).double(), "identity", nn.MaxPool2d(2))
    block.linear.weight.data.fill_(1.0)
    t = block.trace(torch.tensor([[[[1.0, 5.0], [3.0, 2.0]]]]).double(), block.linear.weight)
    got = block.local_vjp(torch.full((1, 1, 1, 1), 7.0).double(), t)
    assert got.tolist() == [[[[0.0, 7.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("side", [(2, 2), (3, 2)])
def test_of_equal_units_the_pool_chooses_the_first_as_torch_does(side):
    block = Block(nn.Conv2d(1, 1, 1, bias=False).double(), "identity", nn.MaxPool2d(side))
    block.linear.weight.data.fill_(1.0)
    x = torch.randint(0, 2, (4, 1, 7, 9), generator=generator(0)).double().requires_grad_()
    v = draws(block(x).shape, 1)
    expected = torch.autograd.grad(block(x), x, v)[0]
    t = block.trace(x.detach(), block.linear.weight.detach())
    torch.testing.assert_close(block.unpool(v, t), expected, rtol=0, atol=0)


def test_relu_has_no_slope_at_zero():
    block = Block(nn.Linear(1, 1, bias=False).double(), "relu")
    t = block.trace(torch.tensor([[-1.0], [0.0], [1.0]]).double(), torch.ones(1, 1).double())
    assert block.local_vjp(torch.ones(3, 1).double(), t).flatten().tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("bias", [False, True], ids=("no-bias", "bias"))
@pytest.mark.parametrize("geometry", CONVOLUTIONS)
def test_transpose_and_outer_of_a_convolution_are_autograd(geometry, bias):
    linear = nn.Conv2d(4, 6, 3, bias=bias, **CONVOLUTIONS[geometry]).double()
    check_transpose_and_outer(linear, draws((3, 4, 8, 9)))


@pytest.mark.parametrize("bias", [False, True], ids=("no-bias", "bias"))
@pytest.mark.parametrize("shape", [(12,), (3, 2, 2)], ids=("vector", "image"))
def test_transpose_and_outer_of_a_linear_map_are_autograd(shape, bias):
    check_transpose_and_outer(nn.Linear(12, 5, bias=bias).double(), draws((3, *shape)))


def check_transpose_and_outer(linear, h):
    h.requires_grad_()
    a = linear(h if isinstance(linear, nn.Conv2d) else h.flatten(1))
    delta = draws(a.shape, 1)
    parameters = dict(linear.named_parameters())
    for_h, *for_parameters = torch.autograd.grad(a, (h, *parameters.values()), delta)
    block = Block(linear)
    t = block.trace(h.detach(), linear.weight, linear.bias)
    torch.testing.assert_close(block.transpose(delta, linear.weight, h), for_h)
    expected = dict(zip(parameters, for_parameters, strict=True))
    torch.testing.assert_close(block.outer(delta, t.r), expected)


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_masks_are_zero_or_the_inverse_keep_probability(p):
    net = bpfree.mlp(3, 40, 50, 2, dropout=p, generator=generator())
    masks = net.masks(200, generator(1))
    assert {l: tuple(m.shape) for l, m in masks.items()} == {1: (200, 40), 2: (200, 50)}
    for mask in masks.values():
        kept = mask != 0
        torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
        sd = math.sqrt(p * (1 - p) / mask.numel())
        assert abs(float(kept.double().mean()) - (1 - p)) < 5 * sd
    assert not torch.equal(masks[1][:, :40], masks[2][:, :40])


def test_a_probability_just_below_one_drops_nearly_all():
    net = bpfree.mlp(4, 2000, 3, dropout=1 - 1e-6, generator=generator())
    assert (net.masks(4, generator(1))[1] != 0).double().mean() < 1e-3


def test_masks_have_the_shape_of_the_pooled_activity_and_the_dtype_of_the_weights():
    net = bpfree.convnet(
        (1, 6, 6), (2,), (5,), num_classes=3, dropout=0.5, generator=generator()
    ).double()
    masks = net.masks(4, generator())
    assert {l: tuple(m.shape) for l, m in masks.items()} == {1: (4, 2, 3, 3), 2: (4, 5)}
    assert {m.dtype for m in masks.values()} == {torch.float64}


def test_masks_come_from_the_given_generator_alone():
    net = bpfree.mlp(3, 40, 2, dropout=0.5, generator=generator())
    with global_generator_untouched():
        first, again, other = (net.masks(5, generator(s))[1] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_there_are_no_masks_in_evaluation_mode_or_without_dropout():
    assert bpfree.mlp(3, 4, 2, dropout=0.5, generator=generator()).eval().masks(5) == {}
    assert bpfree.mlp(3, 4, 2, generator=generator()).train().masks(5) == {}


def test_forward_applies_masks_after_pooling_and_none_by_itself():
    net = bpfree.convnet(
        (1, 6, 6), (2,), (5,), num_classes=3, dropout=0.5, generator=generator()
    ).double()
    x, _ = batch_for(net, 4)
    masks = net.masks(4, generator(1))
    torch.testing.assert_close(net(x, masks), plain_logits(net, x, masks))
    trace = net.trace(dict(net.named_parameters()), x, masks)
    torch.testing.assert_close(trace[-1].h, plain_logits(net, x, masks))
    torch.testing.assert_close(net(x), plain_logits(net, x))


# ---- initial weights -----------------------------------------------------------------------------


BOUNDS = {  # init -> bound for fan_in 40, fan_out 90 (mlp) and 4*9, 20*9 (convolution)
    "he": (math.sqrt(6 / 40), math.sqrt(6 / 36)),
    "glorot": (math.sqrt(6 / 130), math.sqrt(6 / 216)),
    "torch": (1 / math.sqrt(40), 1 / math.sqrt(36)),
}


@pytest.mark.parametrize("init", BOUNDS)
def test_initial_weights_are_uniform_within_the_bound_of_their_kind(init):
    options = dict(init=init, bias=True, generator=generator())
    nets = (
        bpfree.mlp(40, 90, 10, **options),
        bpfree.convnet((4, 4, 4), (20,), num_classes=10, **options),
    )
    for net, bound in zip(nets, BOUNDS[init], strict=True):
        w = net.weights()[0].detach()
        assert 0.99 * bound < float(w.abs().max()) <= bound
        assert float(w.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(float(w.mean())) < 0.1 * bound
        assert all(not b.linear.bias.any() for b in net)


def test_torch_initialisation_has_the_bound_of_pytorchs_own_layers():
    own = nn.Linear(40, 900, bias=False).weight.detach().abs().max()
    ours = bpfree.mlp(40, 900, 2, init="torch", generator=generator()).weights()[0].detach()
    assert float(ours.abs().max()) == pytest.approx(float(own), rel=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: bpfree.mlp(4, 5, 3, bias=True, generator=g),
        lambda g: bpfree.convnet((1, 4, 4), (2,), (5,), num_classes=3, bias=True, generator=g),
    ],
    ids=("mlp", "convnet"),
)
def test_initial_weights_come_from_the_given_generator_alone(make):
    with global_generator_untouched():
        first, again, other = (make(generator(s)).weights() for s in (1, 1, 2))
    for w, same, different in zip(first, again, other, strict=True):
        assert torch.equal(w, same)
        assert not torch.equal(w, different)


def test_without_a_generator_the_default_generator_of_torch_is_the_source():
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(3)
        first = bpfree.mlp(4, 5, 3).weights()
        torch.manual_seed(3)
        again = bpfree.mlp(4, 5, 3).weights()
    finally:
        torch.random.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].std() > 0


# ---- slices --------------------------------------------------------------------------------------


@given(problems, st.data())
def test_a_slice_is_the_sub_network_with_the_same_weights(problem, data):
    net, x, _ = problem
    start = data.draw(st.integers(0, len(net) - 1))
    stop = data.draw(st.integers(start + 1, len(net)))
    part = net[start:stop]
    trace = net.trace(dict(net.named_parameters()), x)
    assert isinstance(part, Network)
    assert all(a is b for a, b in zip(part.weights(), net.weights()[start:stop], strict=True))
    assert part.shapes == net.shapes[start:stop]
    torch.testing.assert_close(part(trace[start - 1].h if start else x), trace[stop - 1].h)


def test_an_index_is_a_block(either):
    net = either.net
    assert isinstance(net[0], Block)
    assert net[-1] is net[len(net) - 1]


def test_a_network_grown_in_place_keeps_its_shapes_in_step_or_refuses():
    net = bpfree.mlp(3, 4, 2, generator=generator())
    last = Block(nn.Linear(2, 7), "identity")

    def add():
        nonlocal net
        net += nn.Sequential(last)

    for grow in (lambda: net.append(last), lambda: net.add_module("2", last), add):
        with suppress(TypeError, NotImplementedError, AttributeError):
            grow()
        assert net.shapes[-1] == tuple(net(torch.ones(1, 3)).shape[1:])


# ---- refusals ------------------------------------------------------------------------------------

SHARED = nn.Linear(4, 4)
MISFIT = "block 2 .*in_features=5.*cannot take an input of shape .4,."

REFUSED = {
    "padding mode": (
        lambda: Block(nn.Conv2d(1, 2, 3, padding_mode="reflect")),
        ValueError, "'zeros'.*'reflect'",
    ),
    "padding by name": (lambda: Block(nn.Conv2d(1, 2, 3, padding="same")), ValueError, "'same'"),
    "transposed convolution": (
        lambda: Block(nn.ConvTranspose2d(1, 2, 3)), TypeError, "Conv2d.*ConvTranspose2d",
    ),
    "no linear map": (lambda: Block(nn.BatchNorm1d(3)), TypeError, "nn.Linear.*BatchNorm1d"),
    "unknown activation": (
        lambda: Block(nn.Linear(2, 3), "swish"), ValueError, "identity.*relu.*'swish'",
    ),
    "activation in place": (
        lambda: Block(nn.Linear(2, 3), nn.ReLU(inplace=True)), ValueError, "in place.*ReLU",
    ),
    "activation function in place": (
        lambda: Block(nn.Linear(2, 3), torch.relu_), ValueError, "in place.*relu_",
    ),
    "random activation": (
        lambda: Block(nn.Linear(2, 3), nn.Dropout(0.5)), ValueError, "input alone.*Dropout",
    ),
    "halving activation": (
        lambda: Block(nn.Linear(2, 4), nn.GLU()), ValueError, "input's shape.*GLU",
    ),
    "pool with indices": (
        lambda: Block(nn.Conv2d(1, 2, 3), pool=nn.MaxPool2d(2, return_indices=True)), ValueError,
        "pooled tensor alone",
    ),
    "no activation": (lambda: Block(nn.Linear(2, 3), None), ValueError, "None"),
    "pool with parameters": (
        lambda: Block(nn.Conv2d(1, 2, 3), pool=nn.Conv2d(2, 2, 1)), TypeError,
        "pool must be.*got Conv2d.2, 2",
    ),
    "dropout one": (lambda: Block(nn.Linear(2, 3), dropout=1.0), ValueError, r"\[0, 1\).*1\.0"),
    "dropout negative": (lambda: Block(nn.Linear(2, 3), dropout=-0.1), ValueError, r"-0\.1"),
    "dropout nan": (lambda: Block(nn.Linear(2, 3), dropout=math.nan), ValueError, "nan"),
    "empty network": (lambda: Network(), ValueError, "at least one Block"),
    "not a block": (
        lambda: Network(Block(nn.Linear(2, 3)), nn.Linear(3, 3)), TypeError, "block 2.*Linear",
    ),
    "shared parameter": (
        lambda: Network(Block(SHARED), Block(SHARED, "identity")), ValueError, "share parameters",
    ),
    "misfitting linear": (
        lambda: Network(Block(nn.Linear(3, 4)), Block(nn.Linear(5, 2))), ValueError, MISFIT,
    ),
    "misfitting convolution": (
        lambda: Network(
            Block(nn.Conv2d(1, 2, 3)), Block(nn.Conv2d(3, 2, 3)), input_shape=(1, 8, 8)
        ),
        ValueError, r"block 2 .*Conv2d\(3, 2.*shape \(2, 6, 6\)",
    ),
    "no input shape": (lambda: Network(Block(nn.Conv2d(1, 2, 3))), ValueError, "input_shape"),
    "one size": (lambda: bpfree.mlp(3), ValueError, r"two sizes.*\(3,\)"),
    "empty layer": (lambda: bpfree.mlp(3, 0, 2), ValueError, r"\(3, 0, 2\)"),
    "unknown init": (
        lambda: bpfree.mlp(3, 2, init="xavier"), ValueError, "glorot.*he.*torch.*'xavier'",
    ),
    "unknown init of a convnet": (
        lambda: bpfree.convnet((1, 4, 4), (2,), num_classes=2, init="xavier"), ValueError, "xavier",
    ),
    "flat convnet": (
        lambda: bpfree.convnet((16,), (2,), num_classes=2), ValueError,
        r"\(channels, height, width\).*\(16,\)",
    ),
    "pools too many": (
        lambda: bpfree.convnet((1, 8, 8), (2,), num_classes=2, pool=(2, 2)), ValueError,
        r"\(1\).*\(2, 2\)",
    ),
    "growing in place": (
        lambda: bpfree.mlp(4, 3).append(Block(nn.Linear(3, 2))), TypeError, "Network",
    ),
    "pooled away": (
        lambda: bpfree.convnet((1, 4, 4), (2, 2), num_classes=2, pool=4), ValueError,
        r"block 2 .*\(2, 1, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("block", [
    lambda: Block(nn.Linear(3, 48), lambda a: a * (a >= a.topk(10, 1).values[:, -1:])),
    lambda: Block(nn.Linear(3, 9), lambda a: a.unflatten(1, (3, 3)).softmax(-1).flatten(1)),
    lambda: Block(nn.Conv2d(1, 3, 3), nn.Softmax2d()),
])  # fmt: skip
def test_an_activation_may_look_at_its_whole_block(block):
    assert callable(block().activation)


@pytest.mark.parametrize("case", REFUSED)
def test_a_misuse_is_refused_and_the_given_value_named(case):
    make, exception, message = REFUSED[case]
    with pytest.raises(exception, match=message):
        make()


# what would be accepted and then learn wrongly, or fail far from its cause
SILENT = {
    "activation with a parameter, which no rule teaches": (
        lambda: Block(nn.Linear(2, 3), nn.PReLU()), "PReLU",
    ),
    "pool that is random: its derivative would draw again": (
        lambda: Block(nn.Linear(2, 3), pool=nn.Dropout(0.5)), "Dropout",
    ),
    "pool that keeps batch statistics: update would write them": (
        lambda: Block(nn.Conv2d(1, 2, 3), pool=nn.BatchNorm2d(2, affine=False)), "BatchNorm2d",
    ),
    "pool that is no module": (lambda: Block(nn.Linear(2, 3), pool=2), "2"),
    "convolution on a shape without channels": (
        lambda: Network(Block(nn.Conv2d(1, 2, 3)), input_shape=(8, 8)), r"\(8, 8\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_what_would_fail_silently_or_later_is_refused_at_once(case):
    make, message = SILENT[case]
    with pytest.raises((TypeError, ValueError), match=message):
        make()
