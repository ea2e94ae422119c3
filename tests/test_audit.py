"""The locality audit: what it finds of every rule, and the cheats that it must catch."""

from functools import partial

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

import bpfree
from bpfree import DRTP, PEPITA, FeedbackAlignment, LeaderFollower, NextLayerAttention, audit
from bpfree.audit import QUESTIONS, Audit
from bpfree.training import stages

mpl.use("agg")
f64 = torch.float64


def dense():
    g = torch.Generator().manual_seed(0)
    net = bpfree.mlp(12, 14, 13, 12, 4, activation="tanh", bias=True, generator=g).double()
    return net, torch.randn(4, 12, generator=g, dtype=f64), torch.tensor([0, 1, 2, 3]), g


def conv():
    g = torch.Generator().manual_seed(0)
    options = dict(num_classes=3, pool=2, activation="tanh", generator=g)
    net = bpfree.convnet((2, 6, 6), (6, 6), (14,), **options).double()
    return net, torch.randn(2, 2, 6, 6, generator=g, dtype=f64), torch.tensor([0, 2]), g


# rule -> the demands of backprop that it drops: transposed weights, a backward phase, stored
# activities and a frozen network, a global error
EXPECTED = {
    "bp": (bpfree.Backprop, (0, 0, 0, 0)),
    "fa": (FeedbackAlignment, (1, 0, 0, 0)),
    "sign": (bpfree.SignSymmetry, (0, 0, 0, 0)),
    "kp": (bpfree.KolenPollack, (1, 0, 0, 0)),
    "dfa": (bpfree.DirectFeedbackAlignment, (1, 1, 0, 0)),
    "drtp": (DRTP, (1, 1, 1, 1)),
    "pepita": (PEPITA, (1, 1, 0, 0)),
    "ekdaa": (bpfree.EKDAA, (1, 0, 0, 0)),
    "lfnn-l": (partial(LeaderFollower, workers=4), (1, 1, 1, 1)),
    "lfnn": (partial(LeaderFollower, workers=4, local=False), (0, 0, 0, 0)),
    "attention": (partial(NextLayerAttention, p=1.5), (0, 0, 0, 0)),
    "relative": (partial(NextLayerAttention, relative=True), (0, 0, 0, 0)),
    "frozen": (bpfree.Frozen, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("problem", [dense, conv])
@pytest.mark.parametrize("name", EXPECTED)
def test_every_rule_drops_the_demands_that_its_equations_drop(name, problem):
    net, x, y, g = problem()
    make, drops = EXPECTED[name]
    found = audit(make(net, generator=g).double(), x, y)
    assert tuple(found.drops().values()) == tuple(map(bool, drops))
    assert list(found) == list(QUESTIONS)
    hidden = {q: found.depends(q)[:-1] for q in QUESTIONS}
    assert hidden["label"] == [name != "frozen"] * (len(net) - 1)
    assert not any(hidden["others"])
    assert not any(hidden["graph"])
    if name in ("bp", "sign", "attention"):  # every block reads, whatever is above it
        assert all(hidden["transport"])
        assert all(hidden["locking"])
        assert all(hidden["sweep"][:-1])
    assert found.depends("label")[-1]
    assert not found.depends("transport")[-1]
    by = {"drtp": "target", "lfnn-l": "local error", "frozen": ""}.get(name, "global error")
    assert found.taught() == [by] * (len(net) - 1) + ["global error"]


def test_cost_counts_passes_and_arithmetic():
    net, x, y, g = dense()
    cost = {n: audit(EXPECTED[n][0](net, generator=g).double(), x, y).cost for n in EXPECTED}
    assert cost["bp"]["passes"] == 1
    assert cost["pepita"]["passes"] == 2
    macs = [12 * 14, 14 * 13, 13 * 12, 12 * 4]  # up, and all but the first down, and the updates
    assert cost["bp"]["macs"] == pytest.approx((3 * sum(macs) - macs[0]) / sum(macs))
    assert cost["frozen"]["macs"] < cost["dfa"]["macs"] < cost["bp"]["macs"]
    assert cost["lfnn-l"]["memory"] > 0


# ---- cheats --------------------------------------------------------------------------------------


class ReadsAbove(PEPITA):
    """PEPITA that secretly uses W_2."""

    def signals(self, params, state, *rest):
        pairs = [*super().signals(params, state, *rest)]
        r, delta = pairs[0]
        secret = pairs[1][1][: len(delta)] @ params["1.linear.weight"]
        return [(r, delta + 1e-3 * F.pad(secret, (0, 0, 0, len(delta) - len(secret)))), *pairs[1:]]


class Attached(LeaderFollower):
    """LFNN-l whose losses were not detached: one graph through all blocks."""

    def signals(self, params, state, trace, error, target):
        trace, y = [*trace], target.argmax(1)
        with torch.enable_grad():
            h, loss, at = trace[0].r, 0.0, []
            for l, block in enumerate(self.net, 1):
                names = (f"{l - 1}.linear.{kind}" for kind in ("weight", "bias"))
                r, a = block.pre(h, *(params[n] for n in names))
                at.append(a if a.requires_grad else a.requires_grad_())
                h = block.post(r, a).h
                s = self.scores(h, params[f"rule.V{l}"]) if l < len(self.net) else h[:, None]
                loss = loss + F.cross_entropy(s.flatten(0, 1), y.repeat_interleave(s.shape[1]))
            deltas = torch.autograd.grad(loss, at)
        heads = {n: torch.zeros_like(p) for n, p in params.items() if n.startswith("rule.")}
        pairs = [(t.r, d) for t, d in zip(trace, deltas, strict=True)]
        return [*pairs[:-1], (*pairs[-1], heads)]


class ReadsHead(LeaderFollower):
    """LFNN-l that looks at the heads of the block above."""

    def signals(self, params, *rest):
        for l, (r, delta, *own) in enumerate(super().signals(params, *rest), 1):
            yield r, delta * params.get(f"rule.V{l + 1}", torch.ones(1)).sum(), *own


class Refreshed(FeedbackAlignment):
    """FA whose B is copied from W before each epoch."""

    def refresh(self, params, state, generator):
        return {
            f"B{l}": params[f"{l - 1}.linear.weight"].clone() for l in range(2, len(self.net) + 1)
        }


class Peeking(DRTP):
    """DRTP that looks at the output."""

    def signals(self, params, state, trace, error, target):
        pairs = [*super().signals(params, state, trace, error, target)]
        return [(r, d * trace[-1].h.sum()) for r, d in pairs[:-1]] + pairs[-1:]


class OthersLabel(DRTP):
    """A rule that reads the labels of another sample."""

    def signals(self, params, state, trace, error, target):
        return super().signals(params, state, trace, error, target.roll(1, 0))


class Stashed(DRTP):
    """DRTP that hides the output in the state, and sends the error after all."""

    def first_pass(self, params, state, x, masks):
        trace = self.net.trace(params, x, masks)
        return trace, {**state, "secret": trace[-1].h}

    def signals(self, params, state, trace, error, target):
        return super().signals(params, state, trace, error, target - state["secret"].softmax(1))


class HeadsAbove(LeaderFollower):
    """LFNN-l whose heads alone look at the weights above."""

    def signals(self, params, *rest):
        for l, (r, delta, *own) in enumerate(super().signals(params, *rest), 1):
            W = params.get(f"{l}.linear.weight", torch.zeros(1))
            yield r, delta, *({n: v + 1e-3 * W.sum() for n, v in heads.items()} for heads in own)


class OwnWeights(FeedbackAlignment):
    """FA that reads the module's own weights, past ``params``."""

    def feedback(self, l, params, state):
        return self.net[l - 1].linear.weight.detach()


class Differentiated(bpfree.Rule):
    """A "local" rule that calls autograd for the whole network."""

    def signals(self, params, state, trace, error, target):
        with torch.enable_grad():
            h, at = trace[0].r, []
            for l, block in enumerate(self.net):
                at.append(block.pre(h, params[f"{l}.linear.weight"])[1])
                at[-1] = at[-1] if at[-1].requires_grad else at[-1].requires_grad_()
                h = block.post(h, at[-1]).h
            deltas = torch.autograd.grad(F.cross_entropy(h, target), at)
        return [(t.r, len(h) * d) for t, d in zip(trace, deltas, strict=True)]


CHEATS = {
    ReadsAbove: "transport",
    Attached: "graph",
    ReadsHead: "locking",
    Refreshed: "refresh",
    Peeking: "output",
    OthersLabel: "others",
    Stashed: "output",
    HeadsAbove: "transport",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_caught_by_its_question(cheat):
    net, x, y, g = dense()
    options = {"workers": 3} if issubclass(cheat, LeaderFollower) else {}
    honest, found = (audit(kind(net, generator=g, **options).double(), x, y)
                     for kind in (cheat.__mro__[1], cheat))  # fmt: skip
    question = CHEATS[cheat]
    assert not any(honest.depends(question)[:-1])
    assert any(found.depends(question)[:-1])
    if cheat is Attached:
        assert found.depends("locking") == [True, True, True, False]


def test_weights_out_of_silent_units_do_not_hide_what_is_read():
    net, x, y, _ = dense()
    with torch.no_grad():  # block 3 meets as many live units as samples, and silent ones
        net[1].linear.weight[4:], net[1].linear.bias[4:] = 0, -1
        net[1].linear.bias[:4] = 3
    net[1].activation, few = "relu", x[:3]
    assert audit(bpfree.Backprop(net), few, y[:3]).depends("transport") == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="block 3 meets 4 rows of 4 live"):
        audit(bpfree.Backprop(net), x, y)


def test_a_rule_that_does_not_repeat_itself_is_refused():
    net, x, y, g = dense()

    class Draws(bpfree.Backprop):
        def descend(self, l, v, t):
            return super().descend(l, v, t) * (1 + 1e-6 * torch.rand((), generator=g))

    with pytest.raises(ValueError, match="Draws does not repeat itself"):
        audit(Draws(net), x, y)


def test_weights_that_are_read_past_params_are_told():
    net, x, y, g = dense()
    with pytest.raises(ValueError, match="OwnWeights must read weights from params"):
        audit(OwnWeights(net, generator=g).double(), x, y)


# ---- a reader's own rule, and mistakes -----------------------------------------------------------


def test_a_users_own_rule_is_audited_and_printed():
    class Hebbian(bpfree.Rule):
        def signals(self, params, state, trace, error, target):
            return [(t.r, -t.h) for t in trace[:-1]] + [(trace[-1].r, error)]

    net, x, y, _ = dense()
    found = audit(Hebbian(net), x, y)
    assert not any(found.depends("label")[:-1])
    assert all(found.drops().values())
    table = found.table().splitlines()
    assert table[0].startswith("| Hebbian")
    assert len(table) == 2 + len(QUESTIONS)
    fig, ax = plt.subplots()
    found.plot(ax)
    fig.canvas.draw()
    plt.close(fig)
    assert str(found) == found.table()
    assert isinstance(found, dict)
    assert len(found["label"]) == len(net)


def test_the_audit_leaves_everything_as_it_was_and_repeats():
    net, x, y, g = dense()
    rule = PEPITA(net, generator=g).double()
    before = [t.clone() for t in (*rule.params().values(), *rule.state().values())]
    drawn = g.get_state()
    first, second = audit(rule, x, y), audit(rule, x, y)
    assert first == second
    assert torch.equal(drawn, g.get_state())
    assert rule.generator is g
    after = (*rule.params().values(), *rule.state().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_mirroring_reads_weights_between_epochs_and_not_in_a_step():
    g = torch.Generator().manual_seed(0)
    net = bpfree.mlp(12, 14, 13, 4, generator=g).double()
    _, x, y, _ = dense()
    found = audit(PEPITA(net, mirroring=20, generator=g).double(), x, y)
    assert not any(found.depends("transport"))
    assert all(found.depends("refresh")[:-1])


def test_a_graph_through_the_network_is_a_backward_phase():
    g = torch.Generator().manual_seed(0)
    net = bpfree.mlp(12, 14, 13, 4, activation="tanh", generator=g).double()
    _, x, y, _ = dense()
    found = audit(Differentiated(net), x, y)
    assert not any(found.depends("sweep"))  # it keeps a trace of its own
    assert found["graph"] == [1, 1, 0]
    assert not any(found.drops().values())


def test_a_graph_within_a_block_is_none_between_blocks():
    class Greedy(bpfree.Rule):
        """Each block's activity is to be the class, by autograd in the block alone."""

        def signals(self, params, state, trace, error, target):
            for l, (block, t) in enumerate(zip(self.net, trace, strict=True)):
                with torch.enable_grad():
                    r = t.r.detach().clone().requires_grad_()  # as a module's input often is
                    a = block.pre(r.view(t.r.shape), params[f"{l}.linear.weight"])[1]
                    loss = F.cross_entropy(block.post(r, a).h, target.argmax(1), reduction="sum")
                    delta = torch.autograd.grad(loss, a)[0]
                yield t.r, delta

    g = torch.Generator().manual_seed(0)
    net = bpfree.mlp(12, 14, 13, 4, activation="tanh", generator=g).double()
    _, x, y, _ = dense()
    found = audit(Greedy(net), x, y)
    assert not any(found["graph"])
    assert all(found.drops().values())


@pytest.mark.parametrize("product", [F.linear, lambda h, W: h @ W.T, lambda h, W: h @ W.clone().T])
def test_a_second_pass_of_a_users_own_is_no_weight_transport(product):
    class Twice(bpfree.Rule):
        """PEPITA of zero feedback, by hand: the second pass is on twice the input."""

        def signals(self, params, state, trace, error, target):
            h, pairs = 2 * trace[0].r, []
            for l, t in enumerate(trace):
                r, a = h, product(h, params[f"{l}.linear.weight"])
                h = a.tanh()
                pairs.append((r, t.h - h))
            return [*pairs[:-1], (trace[-1].r, error)]

    g = torch.Generator().manual_seed(0)
    net = bpfree.mlp(12, 14, 13, 4, activation="tanh", generator=g).double()
    _, x, y, _ = dense()
    found = audit(Twice(net), x, y)
    assert not any(found.depends("transport"))
    assert found.cost["passes"] == 2


@pytest.mark.parametrize(
    "sizes, activation", [((12, 14, 4), "relu"), ((12, 14, 13, 4), "identity")]
)
def test_a_sweep_is_asked_only_where_something_is_kept_for_it(sizes, activation):
    g = torch.Generator().manual_seed(0)
    net = bpfree.mlp(*sizes, activation=activation, generator=g).double()
    _, x, y, _ = dense()
    found = audit(bpfree.Backprop(net), x, y)
    assert "sweep" not in found
    assert found.drops() == dict.fromkeys(
        ["transposed weights", "stored activities, a frozen network", "a global error"], False
    )


def test_weights_that_start_at_zero_are_moved_all_the_same():
    net, x, y, g = dense()
    torch.nn.init.zeros_(net[-1].linear.weight)
    assert audit(bpfree.Backprop(net), x, y).depends("transport")[2]
    assert not any(audit(FeedbackAlignment(net, generator=g), x, y).depends("transport"))


# ---- any model -----------------------------------------------------------------------------------


def sequential():
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3, padding=1, stride=2), torch.nn.Tanh(),
        torch.nn.Conv2d(6, 12, 3, padding=1, stride=2, groups=2), torch.nn.Tanh(),
        torch.nn.Flatten(), torch.nn.Linear(48, 14), torch.nn.Tanh(), torch.nn.Dropout(0.5),
        torch.nn.Linear(14, 3),
    ).double()  # fmt: skip
    return model, torch.randn(3, 2, 8, 8, generator=g, dtype=f64), torch.tensor([0, 2, 1]), g


def vit():
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    from torchvision.models import VisionTransformer

    model = VisionTransformer(8, 4, 2, 2, 16, 24, num_classes=3).double()
    torch.nn.init.normal_(model.heads[-1].weight)  # which starts at zero
    return model, torch.randn(2, 3, 8, 8, generator=g, dtype=f64), torch.tensor([0, 2]), g


@pytest.mark.parametrize("problem", [sequential, vit])
@pytest.mark.parametrize("name, reads", [
    ("none", True), ("feedback-alignment", False), ("kolen-pollack", False),
    ("sign-symmetry", True), ("attention", True),
])  # fmt: skip
def test_a_model_reads_the_weights_above_unless_its_feedback_is_exchanged(name, reads, problem):
    model, x, y, g = problem()
    if name != "none":
        bpfree.convert(model, name, generator=g)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = audit(model, x, y)
    hidden = {q: found.depends(q)[:-1] for q in found}
    assert hidden["transport"] == [reads] * len(hidden["label"])
    assert all(hidden["locking"])
    assert all(hidden["output"])
    assert not any(hidden["others"])
    assert found.taught() == ["global error"] * len(found.blocks)
    assert found.drops() == {
        "transposed weights": not reads, "stored activities, a frozen network": False,
        "a global error": False,
    }  # fmt: skip
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("local", [True, False])
def test_stages_read_nothing_above_only_if_local(local):
    model, x, y, g = sequential()
    cut = bpfree.split(model, 3, generator=g).double()
    found = audit(cut, x, y, backward=partial(stages.backward, local=local))
    assert found.blocks == ["stage 1", "stage 2", "stage 3"]
    for question in ("transport", "locking", "output"):
        assert found.depends(question)[:-1] == [not local] * 2
    assert found.drops() == dict.fromkeys(found.drops(), local)


def test_an_effect_too_small_to_say_is_not_called_one():
    found = Audit("rule", ["1", "2"], {"label": [1e-10, 1.0]}, {})
    with pytest.raises(ValueError, match="1.0e-10 is neither"):
        found.depends("label")


def test_what_cannot_be_audited_is_refused():
    net, x, y, g = dense()

    class Silent(bpfree.Rule):
        pass

    with pytest.raises(TypeError, match="Silent has no signals"):
        audit(Silent(net), x, y)
    with pytest.raises(TypeError, match="net.double"):
        audit(FeedbackAlignment(bpfree.mlp(12, 8, 8, 4)), x.float(), y)
    many = torch.randn(20, 12, generator=g, dtype=f64)
    with pytest.raises(ValueError, match="block 2 meets 20 rows of 14 live.*fewer samples"):
        audit(bpfree.Backprop(net), many, torch.arange(20) % 4)
    flat = bpfree.mlp(12, 4).double()
    with pytest.raises(ValueError, match="2 blocks and 2 samples, got 1 and 4"):
        audit(bpfree.Backprop(flat), x, y)
    with pytest.raises(TypeError, match="takes a Rule or a model, got function"):
        audit(lambda x: x, x, y)
    model, images, labels, _ = sequential()
    with pytest.raises(TypeError, match="net.double"):
        audit(model.float(), images.float(), labels)
    with pytest.raises(ValueError, match="2.weight meets 32 rows of 27 live.*smaller images"):
        audit(model.double(), torch.randn(4, 2, 8, 8, dtype=f64), torch.arange(4) % 3)


def hidden(signal):
    """A rule whose hidden blocks get ``signal(rule, trace of the block)``."""

    class Mine(bpfree.Rule):
        def signals(self, params, state, trace, error, target):
            return [signal(self, t) for t in trace[:-1]] + [(trace[-1].r, error)]

    return Mine


MISTAKES = {
    "r transposed": (hidden(lambda _, t: (t.r.T, t.a)), r"block 1 must be r of shape \(B, 12\)"),
    "delta transposed": (hidden(lambda _, t: (t.r, t.a.T)), r"delta of shape \(B, 14\).*\(14, 4\)"),
    "r is the block's output": (hidden(lambda _, t: (t.h, t.a)), r"got \(4, 14\) and \(4, 14\)"),
    "no batch": (hidden(lambda _, t: (t.r, t.a.mean(0))), r"got \(4, 12\) and \(14,\)"),
    "fewer samples": (hidden(lambda _, t: (t.r, t.a[:1])), r"got \(4, 12\) and \(1, 14\)"),
    "delta alone": (hidden(lambda _, t: t.a), r"must be a tuple \(r, delta\), got Tensor"),
    "a number": (hidden(lambda _, t: (t.r, 1.0)), "two tensors.*got Tensor and float"),
    "not finite": (hidden(lambda _, t: (t.r, t.a / 0)), "0.linear.weight, .* is not finite"),
    "draws past the generator": (
        hidden(lambda _, t: (t.r, torch.randn_like(t.a))), "draw from self.generator alone"
    ),
    "reads itself": (
        hidden(lambda rule, t: (t.r, t.a * rule.net[2].linear.weight.sum().detach())),
        "must read weights from params",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_beginner_gets_wrong_is_told(mistake):
    rule, message = MISTAKES[mistake]
    net, x, y, _ = dense()
    with pytest.raises((TypeError, ValueError), match=message):
        audit(rule(net), x, y)


def test_a_missing_return_a_class_and_what_is_not_in_float64_are_told():
    class Mute(bpfree.Rule):
        def signals(self, params, state, trace, error, target):
            [(t.r, t.a) for t in trace]

    net, x, y, g = dense()
    with pytest.raises(TypeError, match="Mute.signals must give.*is a return missing"):
        audit(Mute(net), x, y)
    with pytest.raises(NotImplementedError, match="Rule has no method signals"):
        bpfree.Rule(net).backward(x, y)
    with pytest.raises(TypeError, match=r"the class itself: Backprop\(net\)"):
        audit(bpfree.Backprop, x, y)
    with pytest.raises(TypeError, match="got rule.B2 in torch.float32"):
        audit(FeedbackAlignment(net, generator=g).float(), x, y)


def test_images_that_do_not_fit_are_told():
    net, x, y, _ = conv()
    with pytest.raises(ValueError, match=r"delta of shape \(B, 6, \.\.\.\).*\(2, 54\)"):
        audit(hidden(lambda _, t: (t.r, t.h.flatten(1)))(net), x, y)
