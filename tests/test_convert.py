"""``convert``: the rules' own gradients under torch's autograd, whatever the model."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    PROBLEMS,
    assert_same,
    autograd_grads,
    generator,
    global_generator_untouched,
    relative_error,
    update_of,
)
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision import models

import bpfree
from bpfree.convert import RULES, left_alone
from bpfree.experiments import zoo

every_rule = pytest.mark.parametrize("rule", RULES)


def plain(net):
    """A network's layers, of the same weights, as modules that know nothing of rules."""
    layers = []
    for block in copy.deepcopy(net):
        if isinstance(block.linear, nn.Linear) and layers:
            layers.append(nn.Flatten())
        layers += [block.linear, {"tanh": nn.Tanh, "identity": nn.Identity}[block.activation]()]
        layers += [block.pool] * (block.pool is not None)
    return nn.Sequential(*layers)


def maps(model):
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def loss_grads(model, x, y):
    """Cross-entropy's gradients by name; those of the model are left as they are."""
    names, params = zip(*model.named_parameters(), strict=True)
    loss = F.cross_entropy(model(x), y)
    return dict(zip(names, torch.autograd.grad(loss, params, allow_unused=True), strict=True))


def keyed(model, part):
    """Gradients of the l-th map under the names that rules give them."""
    return {f"{l}.linear.{part}": getattr(m, part).grad for l, m in enumerate(maps(model))}


def vit(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12)
    net = models.VisionTransformer(**sizes, num_classes=5, **options)
    nn.init.normal_(net.heads.head.weight)
    for block in net.encoder.layers:
        nn.init.normal_(block.self_attention.in_proj_bias)
    return net


def resnet18():
    torch.manual_seed(0)
    return models.resnet18(num_classes=5)


MODELS = {
    "resnet18": (resnet18, 16),
    "vit": (vit, 8),
    "resnet8": (lambda: zoo.resnet8(5, width=8, generator=generator()), 8),
}
every_model = pytest.mark.parametrize("kind", ["resnet18", "vit"])


def model_and_batch(kind, dtype=torch.float64, size=3):
    make, side = MODELS[kind]
    x = torch.randn(size, 3, side, side, generator=generator(), dtype=dtype)
    return make().to(dtype), x, torch.arange(size) % 5


# ---- the rules on Blocks -------------------------------------------------------------------------


class Cubes(bpfree.Backprop):
    def feedback(self, l, params, state):
        return params[f"{l - 1}.linear.weight"] ** 3


AS_RULES = {
    "fa": ("feedback-alignment", {}, bpfree.FeedbackAlignment),
    "sign": ("sign-symmetry", {"scale": 0.7}, partial(bpfree.SignSymmetry, scale=0.7)),
    "kp": ("kolen-pollack", {}, bpfree.KolenPollack),
    "p=2": ("attention", {}, bpfree.Backprop),
    "p=1": ("attention", {"p": 1.0}, bpfree.SignSymmetry),
    "p=4": ("attention", {"p": 4.0}, lambda net, generator: Cubes(net)),
    "function": (lambda W: W**3, {}, lambda net, generator: Cubes(net)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", AS_RULES)
def test_gradients_are_those_of_the_rule_on_blocks(name, problem):
    net, x, y = PROBLEMS[problem]()
    which, options, kind = AS_RULES[name]
    rule = kind(net, generator=generator())
    expected = update_of(rule, x, y).grads
    model = bpfree.convert(plain(net), which, **options)
    for l, layer in enumerate(maps(model)[1:], 2):
        if hasattr(layer, "feedback"):
            layer.feedback.data.copy_(getattr(rule, f"B{l}"))
    F.cross_entropy(model(x), y).backward()
    for part in ("weight", "bias"):
        mine = keyed(model, part)
        assert_same(mine, {k: expected[k] for k in mine})
    if name == "kp":
        for l, layer in enumerate(maps(model), 1):
            assert torch.equal(layer.feedback.grad, layer.weight.grad)
            if l > 1:
                torch.testing.assert_close(layer.feedback.grad, expected[f"rule.B{l}"])
    if name != "p=2":  # it is not backprop by mistake
        mine = maps(model)[0].weight.grad
        assert relative_error(mine, autograd_grads(net, x, y)["0.linear.weight"]) > 0.1


def test_feedback_is_drawn_as_the_rules_draw_it_and_from_the_generator_alone(mlp):
    with global_generator_untouched():
        twins = [bpfree.convert(plain(mlp.net), "feedback-alignment", scale=0.5,
                                generator=generator(s)) for s in (1, 1, 2)]  # fmt: skip
    first, again, other = ([m.feedback for m in maps(twin)] for twin in twins)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    rest = generator(1)
    torch.rand(first[0].shape, generator=rest)  # what the rules have no use for
    rule = bpfree.FeedbackAlignment(mlp.net, 0.5, generator=rest)
    assert all(torch.equal(B, getattr(rule, f"B{l}")) for l, B in enumerate(first[1:], 2))


def test_T2_learning_feedback_approaches_the_weights_at_the_rate_of_the_decay(convnet):
    net, x, y = convnet
    model = bpfree.convert(plain(net), "kolen-pollack", generator=generator())
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    apart = [(m.feedback - m.weight).detach() for m in maps(model)]
    for step in range(1, 4):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        for m, start in zip(maps(model), apart, strict=True):
            torch.testing.assert_close(m.feedback - m.weight, (1 - 0.1 * 0.5) ** step * start)


def test_learning_feedback_rests_beside_a_frozen_weight(mlp):
    model = bpfree.convert(plain(mlp.net), "kolen-pollack")
    maps(model)[1].weight.requires_grad_(False)
    F.cross_entropy(model(mlp.x), mlp.y).backward()
    assert [m.feedback.grad is None for m in maps(model)] == [False, True, False]


# ---- any model -----------------------------------------------------------------------------------


@every_rule
@every_model
def test_the_forward_pass_is_the_same_to_the_bit_in_every_mode(kind, rule):
    model, x, _ = model_and_batch(kind, torch.float32)
    twin = bpfree.convert(copy.deepcopy(model), rule, generator=generator())
    for training in (True, False):
        model.train(training), twin.train(training)
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            assert torch.equal(twin(x), model(x))
        with torch.inference_mode():
            assert torch.equal(twin(x), model(x))
    buffers = dict(twin.named_buffers())
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())


@every_model
def test_attention_of_p_2_is_backprop_and_any_other_feedback_changes_what_is_below(kind):
    model, x, y = model_and_batch(kind)
    expected = loss_grads(model, x, y)
    assert_same(loss_grads(bpfree.convert(copy.deepcopy(model), "attention"), x, y), expected)
    last = list(expected)[-2:]
    for rule in RULES[:3]:
        twin = bpfree.convert(copy.deepcopy(model), rule, generator=generator())
        mine = loss_grads(twin, x, y)
        for name, grad in expected.items():
            same = name in last or grad.abs().max() < 1e-12  # a bias below a batch norm
            assert same or relative_error(mine[name], grad) > 0.1, name
        for name in last:
            assert torch.equal(mine[name], expected[name])


@every_model
def test_every_linear_and_convolution_has_feedback_and_nothing_else(kind):
    model, _, _ = model_and_batch(kind)
    before = dict(model.named_parameters())
    bpfree.convert(model, "feedback-alignment")
    feedback = {n: b for n, b in model.named_buffers() if "feedback" in n}
    weights = {n: p for n, p in before.items() if p.dim() > 1 and "weight" in n}
    assert {n.replace("feedback", "weight") for n in feedback} == set(weights)
    for name, B in feedback.items():
        W = weights[name.replace("feedback", "weight")]
        assert (B.shape, B.dtype) == (W.shape, W.dtype)
    assert all(p is before[n] for n, p in model.named_parameters())
    told = left_alone(model)
    exchanged = {n.rpartition(".")[0] for n in feedback}
    owners = {n.rpartition(".")[0] for n in before}
    assert set(told) == owners - exchanged
    assert ("bn1" if kind == "resnet18" else "encoder.ln") in told


def surrogate(x, W, b, B):
    """x W + b whose derivative is B's: two products of which one adds zero."""
    other = F.linear(x, B)
    return F.linear(x.detach(), W, b) + other - other.detach()


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_layers_descend_by_feedback_in_both_projections_alone(batch_first):
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(6, 2, batch_first=batch_first).double()
    nn.init.normal_(layer.in_proj_bias)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    bpfree.convert(layer, "kolen-pollack", generator=generator())
    out, none = layer(x, x, x, need_weights=False)
    assert none is None
    error = torch.randn(out.shape, dtype=torch.float64)
    mine = torch.autograd.grad(out, [x, layer.in_proj_weight, layer.in_proj_feedback], error)
    seq = x if batch_first else x.transpose(0, 1)
    q, k, v = (
        t.unflatten(2, (2, 3)).transpose(1, 2)
        for t in surrogate(
            seq, layer.in_proj_weight, layer.in_proj_bias, layer.in_proj_feedback
        ).chunk(3, 2)
    )
    h = ((q @ k.mT / 3**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    o = layer.out_proj
    expected = surrogate(h, o.weight, o.bias, o.feedback)
    expected = expected if batch_first else expected.transpose(0, 1)
    torch.testing.assert_close(out, expected)
    theirs = torch.autograd.grad(expected, [x, layer.in_proj_weight], error)
    torch.testing.assert_close(mine[:2], theirs)
    assert torch.equal(mine[2], mine[1])


GEOMETRIES = [
    dict(stride=2, padding=1), dict(dilation=2), dict(groups=2), dict(padding="same"),
    dict(padding="same", kernel_size=(2, 3)), dict(padding="valid"), dict(kernel_size=(1, 3)),
    dict(padding=1, padding_mode="reflect"), dict(padding="same", padding_mode="circular"),
]  # fmt: skip


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_convolutions_of_any_geometry_are_torchs(options):
    conv = nn.Conv2d(4, 6, **{"kernel_size": 3, **options}).double()
    twin = bpfree.convert(copy.deepcopy(conv), "attention")
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    assert torch.equal(twin(x), conv(x))
    error = torch.randn_like(conv(x))
    mine, theirs = (
        torch.autograd.grad(m(x), [x, *m.parameters()], error) for m in (twin, conv)
    )  # fmt: skip
    torch.testing.assert_close(mine, theirs)


# ---- under torch's own ---------------------------------------------------------------------------


@every_rule
def test_deep_copies_and_pickles_are_independent_and_the_same(rule):
    model, x, y = model_and_batch("vit")
    bpfree.convert(model, rule, generator=generator())
    expected = loss_grads(model, x, y)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(a is not b for t in twins for a, b in zip(t.buffers(), model.buffers(), strict=True))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    for twin in twins:
        assert_same(loss_grads(twin, x, y), expected, rtol=0, atol=0)


@every_rule
def test_state_dicts_carry_the_feedback(rule):
    model, x, y = model_and_batch("vit")
    other = bpfree.convert(vit(seed=3).double(), rule, generator=generator(5))
    other.load_state_dict(bpfree.convert(model, rule, generator=generator()).state_dict())
    assert_same(loss_grads(other, x, y), loss_grads(model, x, y), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["resnet8", "vit"])
def test_autocast_rounds_as_torchs_own_layers_do(kind):
    model, x, y = model_and_batch(kind, torch.float32)
    twin = bpfree.convert(copy.deepcopy(model), "attention")
    other = bpfree.convert(copy.deepcopy(model), "kolen-pollack", generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(x).dtype == torch.bfloat16
        assert torch.equal(twin(x), model(x))
        mine, theirs = loss_grads(twin, x, y), loss_grads(model, x, y)
        learning = loss_grads(other, x, y)
    exact = loss_grads(model, x, y)
    for name, grad in theirs.items():
        assert mine[name].dtype == torch.float32
        # as near to what is exact as torch's own come
        own = relative_error(grad, exact[name])
        assert relative_error(mine[name], exact[name]) < 2 * own + 2**-7, name
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in learning.values())


@pytest.mark.compiles
@pytest.mark.parametrize(
    "rule, backend", [*((r, "aot_eager") for r in RULES[1:3]), (RULES[2], None)]
)
def test_the_compiler_makes_the_same_of_it(rule, backend):
    torch._dynamo.reset()
    layers = [nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(4, 8), nn.Flatten(), nn.Linear(64, 5)]
    if backend:  # the default one takes a minute for it
        layers.insert(3, models.vision_transformer.EncoderBlock(2, 8, 12, 0.0, 0.0))
    model = bpfree.convert(nn.Sequential(*layers), rule, generator=generator())
    x, y = torch.randn(3, 3, 8, 8), torch.arange(3)
    compiled = torch.compile(model, fullgraph=True, backend=backend or "inductor")
    mine = {n.removeprefix("_orig_mod."): g for n, g in loss_grads(compiled, x, y).items()}
    assert_same(mine, loss_grads(model, x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.processes
@every_rule
def test_data_parallel_training_reduces_what_learns(rule, tmp_path):
    model, x, y = model_and_batch("vit")
    bpfree.convert(model, rule, generator=generator())
    expected = loss_grads(model, x, y)
    place = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        F.cross_entropy(parallel(x), y).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected)
    assert any("feedback" in n for n in expected) == (rule == "kolen-pollack")


# ---- what is refused -----------------------------------------------------------------------------


class Own(nn.Linear):
    pass


def pruned():
    return prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5)


REFUSED = {
    "no module": (lambda: 3, "sign-symmetry", {}, TypeError, "nn.Module, got int"),
    "no such layer": (lambda: nn.Sequential(nn.ReLU()), RULES[0], {}, ValueError, "Conv2d.*none"),
    "unknown rule": (lambda: nn.Linear(3, 3), "hebb", {}, ValueError, "kolen-pollack.*'hebb'"),
    "scale": (lambda: nn.Linear(3, 3), RULES[0], {"scale": 0}, ValueError, "scale.*got 0"),
    "p": (lambda: nn.Linear(3, 3), "attention", {"p": 0.5}, ValueError, "p must.*got 0.5"),
    "shape": (lambda: nn.Linear(3, 2), lambda W: W.T, {}, ValueError, r"shape \(2, 3\)"),
    "no tensor": (lambda: nn.Linear(3, 2), lambda W: 1, {}, ValueError, r"shape \(2, 3\), got 1"),
    "derived": (lambda: nn.Sequential(Own(3, 3)), RULES[0], {}, TypeError, r"0 \(Own\).*own class"),
    "pruned": (pruned, RULES[0], {}, ValueError, r"model \(Linear\) must own its weight"),
    "parametrised": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), RULES[0], {}, TypeError,
                     "ParametrizedLinear"),
    "twice": (lambda: bpfree.convert(nn.Linear(3, 3), "attention"), RULES[0], {}, ValueError,
              "converted already"),
    "network": (lambda: bpfree.mlp(3, 3), RULES[0], {}, TypeError, r"0 \(Block\).*takes a rule"),
    "kdim": (lambda: nn.MultiheadAttention(4, 2, kdim=3), RULES[0], {}, ValueError, "no kdim"),
    "bias_kv": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), RULES[0], {}, ValueError,
                "add_bias_kv"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name_and_left_as_it_was(name):
    make, rule, options, kind, words = REFUSED[name]
    model = make()
    behind = nn.Sequential(nn.Linear(2, 2), model) if isinstance(model, nn.Module) else model
    classes = [type(m) for m in behind.modules()] if behind is not model else None
    with pytest.raises(kind, match=words):
        bpfree.convert(model, rule, **options)
    if classes and name != "no such layer":
        with pytest.raises(kind):
            bpfree.convert(behind, rule, **options)
        assert [type(m) for m in behind.modules()] == classes
        assert not any("feedback" in key for key in behind[0].state_dict())


def test_swins_attention_reads_weights_itself_and_is_refused():
    with pytest.raises(TypeError, match=r"features.1.0.attn \(ShiftedWindowAttention\)"):
        bpfree.convert(models.swin_t(), "attention")


@pytest.mark.parametrize("how", ["other key", "mask", "causal", "weights", "unbatched"])
def test_attention_in_a_way_that_is_not_exchanged_is_refused(how):
    layer = bpfree.convert(nn.MultiheadAttention(4, 2), "attention")
    x = torch.randn(3, 2, 4)
    args = {"query": x, "key": x, "value": x, "need_weights": False}
    args |= {"other key": {"key": x + 1}, "weights": {"need_weights": True},
             "mask": {"attn_mask": torch.zeros(3, 3)}, "causal": {"is_causal": True},
             "unbatched": dict.fromkeys(("query", "key", "value"), x[0])}[how]  # fmt: skip
    with pytest.raises(ValueError, match="query = key = value"):
        layer(**args)


def test_other_maps_are_left_alone_and_told_of():
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 2, 3))
    with pytest.warns(UserWarning, match="feedback of 2 is left alone"):
        bpfree.convert(model, "attention")
    assert left_alone(model) == ["2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bpfree.convert(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "attention")
