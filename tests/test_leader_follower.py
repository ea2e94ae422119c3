"""Leader-follower networks: heads that see their own, who leads, votes, memory, refusals."""

import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    assert_same,
    batch_for,
    conv_problem,
    copies,
    crowds,
    error_and_target,
    generator,
    mlp_problem,
    relative_error,
    update_of,
)

import bpfree
from bpfree import LeaderFollower
from bpfree.measure import peak_memory


def wide_problem():
    """An image network whose channels and units four workers divide."""
    net = bpfree.convnet(
        (2, 6, 6), (4, 8), (12,), num_classes=5, activation="tanh", generator=generator()
    ).double()
    return net, *batch_for(net, 6)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("maps", ["mean", "flat"])
def test_workers_that_see_their_own_channels_and_units(local, maps):
    net, x, y = wide_problem()
    options = dict(workers=4, leaders=0.5, sees="own", maps=maps, local=local, lambda_follower=0.3)
    rule = LeaderFollower(net, **options, generator=generator())
    spots = [1, 1, 1] if maps == "mean" else [9, 1, 1]
    sizes = [n // 4 * spot for n, spot in zip((4, 8, 12), spots, strict=True)]
    assert [tuple(V.shape) for V in rule.parameters()] == [(4, 5, n) for n in sizes]
    deltas, grads = crowds(net, copies(rule.state_dict()), x, y, **options)
    update = update_of(rule, x, y)
    torch.testing.assert_close([delta for _, delta in update.signals], deltas)
    assert_same(update.grads, grads)


def test_heads_see_all_units_by_default_and_their_own_where_asked():
    net = bpfree.mlp(7, 12, 8, 5, generator=generator())
    shapes = {sees: [tuple(V.shape) for V in LeaderFollower(net, 4, sees=sees).parameters()]
              for sees in ("all", "own")}  # fmt: skip
    assert shapes == {"all": [(4, 5, 12), (4, 5, 8)], "own": [(4, 5, 3), (4, 5, 2)]}


def test_heads_are_drawn_from_he_of_what_a_worker_sees():
    rule = LeaderFollower(bpfree.mlp(9, 96, 10), 32, head_scale=0.5, generator=generator())
    bound = 0.5 * math.sqrt(6 / 96)
    assert 0.98 * bound < rule.V1.abs().max() <= bound
    own = LeaderFollower(bpfree.mlp(9, 96, 10), 32, sees="own", generator=generator())
    assert 0.98 * math.sqrt(2) < own.V1.abs().max() <= math.sqrt(2)


# ---- who leads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "leaders", "expected"),
    [
        (4, 1e-12, 1),
        (32, 0.7, 23),
        (32, 0.71875, 23),
        (100, 0.07, 7),
        (10, 0.3, 3),
        (8, 1.0, 8),
        (8, 0.01, 1),
    ],
)
def test_the_number_of_leaders_is_the_share_rounded_up(workers, leaders, expected):
    rule = LeaderFollower(bpfree.mlp(3, 4, 2), workers, leaders)
    losses = torch.rand(5, workers, generator=generator())
    leads = rule.leads(losses)
    assert leads.sum(1).tolist() == [expected] * 5
    assert (losses.masked_fill(~leads, -1).amax(1) <= losses.masked_fill(leads, 9).amin(1)).all()


def test_the_best_worker_gets_no_follower_error_and_is_not_moved_by_followers():
    net, x, y = mlp_problem()
    rule = LeaderFollower(net, 6, 0.3, lambda_leader=0.0, generator=generator())
    s = rule.scores(net.trace(rule.params(), x)[0].h, rule.V1).detach()
    q = rule.score_errors(s, error_and_target(s[:, 0], y)[1])
    losses = torch.stack([F.cross_entropy(s[:, w], y, reduction="none") for w in range(6)], 1)
    leads = rule.leads(losses)
    assert not q[leads].any()
    assert q[~leads].abs().min() > 0
    best = s[torch.arange(len(s)), losses.argmin(1)]
    assert_same(
        {"q": q[~leads]}, {"q": (2 / 4 / 4 * (s - best[:, None]))[~leads]}
    )  # C = 4, 4 follow


@pytest.mark.parametrize(("workers", "leading"), [(8, 1), (4, 2), (24, 16)])
def test_the_best_worker_leads_where_all_tie(workers, leading):
    rule = LeaderFollower(bpfree.mlp(3, 4, 5), workers, leading / workers, lambda_follower=5.0)
    orders = list(itertools.permutations((1.0, 2.0, 3.0, 5.0)))[:workers]
    s = torch.tensor([[(0.5, *wrong) for wrong in orders]])  # one loss, other scores
    leads = rule.leads(-s.log_softmax(2)[..., 0])[0]
    q = rule.score_errors(s, torch.eye(5)[:1])[0]
    held = s[0] - (workers - leading) / 2 * q  # of a follower: whom it follows
    assert (held[~leads] - held[~leads][0]).abs().max() < 1e-5
    assert (held[~leads][0] - s[0][leads]).abs().amax(1).min() < 1e-5


def test_without_any_loss_of_their_own_blocks_rest():
    net, x, y = mlp_problem()
    none = dict(workers=3, lambda_leader=0.0, lambda_follower=0.0)
    resting = update_of(LeaderFollower(net, **none, generator=generator()), x, y).grads
    assert all(not g.any() for n, g in resting.items() if not n.startswith("2."))


def test_all_leaders_leave_nobody_to_follow():
    net, x, y = mlp_problem()
    grads = [
        update_of(LeaderFollower(net, 3, 1.0, lambda_follower=v, generator=generator()), x, y).grads
        for v in (0.0, 5.0)
    ]
    assert_same(*grads, rtol=0, atol=0)


def test_heads_do_not_rest_with_the_weights_of_their_block():
    net, x, y = mlp_problem()
    rule = LeaderFollower(net, 3, generator=generator())
    net[0].linear.weight.requires_grad_(False)
    rule.backward(x, y)
    assert net[0].linear.weight.grad is None
    assert rule.V1.grad.any()
    rule.V2.requires_grad_(False)
    rule.zero_grad()
    rule.backward(x, y)
    assert rule.V2.grad is None


# ---- locality ------------------------------------------------------------------------------------


def test_nothing_of_a_block_outlives_the_next_one(monkeypatch):
    """LFNN-l: when block l + 2 computes, the pre-activation of block l is gone."""
    net, x, y = mlp_problem(7, 6, 6, 6, 6, 4)
    seen, alive = [], []
    trace = bpfree.Block.trace

    def watched(self, *args):
        alive.append(sum(ref() is not None for ref in seen))
        t = trace(self, *args)
        seen.append(weakref.ref(t.a))
        return t

    monkeypatch.setattr(bpfree.Block, "trace", watched)
    for local, most in ((True, 1), (False, 4)):
        seen.clear(), alive.clear()
        rule = LeaderFollower(net, 3, local=local, generator=generator())
        rule.update(rule.params(), rule.state(), x, y, keep_signals=False)
        assert max(alive) == most


def test_peak_memory_of_fifty_blocks_is_a_fifth_of_backprops():
    net = bpfree.mlp(*[128] * 51, 10, generator=generator())
    x, y = batch_for(net, 128)
    peaks = {}
    for rule in (bpfree.Backprop(net), LeaderFollower(net, 4, generator=generator())):
        learned = [*rule.params().values()]
        peaks[type(rule).__name__] = peak_memory(
            lambda rule=rule: rule.backward(x, y), lambda ps=learned: [p.grad for p in ps]
        )
        for p in learned:
            p.grad = None
    assert peaks["LeaderFollower"] <= 0.2 * peaks["Backprop"]


# ---- votes ---------------------------------------------------------------------------------------


def test_the_vote_is_the_mean_score_of_the_last_hidden_blocks_workers():
    net, x, _ = conv_problem()
    rule = LeaderFollower(net, 5, 0.4, generator=generator())
    h = net.trace(rule.params(), x)[-2].h
    s = torch.stack([h @ V.T for V in rule.V3], 1).detach()
    torch.testing.assert_close(rule.vote(x), s.mean(1))
    sure = s.softmax(2).amax(2)
    chosen = [s[b, sure[b].topk(2).indices].mean(0) for b in range(len(x))]
    torch.testing.assert_close(rule.vote(x, among="surest"), torch.stack(chosen))
    assert not torch.allclose(rule.vote(x), rule.vote(x, "surest"))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leaders": 0}, r"leaders must be a share in \(0, 1\], got 0"),
        ({"leaders": 1.5}, "leaders must be .* got 1.5"),
        ({"leaders": math.nan}, "leaders must be .* got nan"),
        ({"workers": 0}, "workers must be a whole number >= 1, got 0"),
        ({"workers": 2.5}, "workers must be a whole number >= 1, got 2.5"),
        ({"workers": 5, "sees": "own"}, "workers must divide .* got 5 workers, 12 in block 1"),
        ({"sees": "some"}, "sees must be one of .* got 'some'"),
        ({"maps": "max"}, "maps must be one of .* got 'max'"),
        ({"lambda_leader": -1.0}, "lambda_leader must be a finite number >= 0, got -1.0"),
        ({"lambda_follower": math.inf}, "lambda_follower must be a finite number >= 0, got inf"),
        ({"head_scale": 0}, "head_scale must be a positive finite number, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LeaderFollower(bpfree.mlp(7, 12, 8, 5), **options)


def test_a_vote_needs_a_hidden_block():
    rule = LeaderFollower(bpfree.mlp(7, 5))
    with pytest.raises(ValueError, match="network of 1 block"):
        rule.vote(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="among must be one of"):
        rule.vote(torch.zeros(2, 7), among="leaders")


def test_shuffling_moves_the_blocks_signals_and_leaves_the_heads_theirs():
    net, x, y = mlp_problem()
    grads = {cls: update_of(cls(net, 3, generator=generator()), x, y).grads
             for cls in (LeaderFollower, bpfree.shuffled(LeaderFollower))}  # fmt: skip
    ours, shuffled = grads.values()
    for name, grad in ours.items():
        moved = relative_error(shuffled[name], grad) > 0.01
        assert moved == (name in ("0.linear.weight", "1.linear.weight"))
