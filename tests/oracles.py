"""What the library is tested against: the book's equations on plain tensors, and small problems.

Nothing here calls the code under test except to build networks and rules. Signals follow the
table of rules; derivatives come from closed forms, or from autograd on one block cut out of its
chain, never from ``Block.local_vjp`` or ``Block.outer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import bpfree
from bpfree.experiments.released import ReleasedEKDAA

# PEPITA teaches with a second pass on another input; each option is in one of these at least, but
# mirroring, which takes no bias and no convolution
TWO_PASS: dict[str, Callable[..., bpfree.Rule]] = {
    "pepita": bpfree.PEPITA,
    "pepita-minus": partial(bpfree.PEPITA, sign=-1, output_error="first"),
    "pepita-local": partial(bpfree.PEPITA, presynaptic="time-local", cheap=False),
    "pepita-saving": partial(bpfree.PEPITA, saving=True, presynaptic="first", conv_scaling="sum"),
}
# EKDAA's feedback learns; what the released code does to convolutions is in the last
EKDAAS: dict[str, Callable[..., bpfree.Rule]] = {
    "ekdaa": bpfree.EKDAA,
    "ekdaa-random": partial(bpfree.EKDAA, start="random", beta=0.7, gamma=0.5),
    "ekdaa-released": partial(
        ReleasedEKDAA, target="bilinear", target_activation="sigmoid", swap_axes=True,
        normalise_feedback=True, normalise_updates=True, scale_updates=True,
    ),
}  # fmt: skip
# heads of their own teach the blocks; what workers see of their own needs widths that they divide
LEADER_FOLLOWERS: dict[str, Callable[..., bpfree.Rule]] = {
    "lfnn-l": partial(bpfree.LeaderFollower, workers=4, leaders=0.6, lambda_follower=0.5),
    "lfnn": partial(
        bpfree.LeaderFollower, workers=3, leaders=0.3, local=False, maps="flat", lambda_leader=0.8
    ),
}
# the weights, seen through another function each; the last looks ahead of the audience's step
ATTENTIONS: dict[str, Callable[..., bpfree.Rule]] = {
    "attention": partial(bpfree.NextLayerAttention, p=1.5, scale="weights"),
    "attention-relative": partial(bpfree.NextLayerAttention, p=1.5, relative=True),
    "attention-ahead": partial(bpfree.NextLayerAttention, p=3, foresight=0.4, observed=True),
}
# every rule with every option that changes its signal; the keys are the tests' ids
RULES: dict[str, Callable[..., bpfree.Rule]] = {
    "backprop": bpfree.Backprop,
    "fa": bpfree.FeedbackAlignment,
    "sign-unit": partial(bpfree.SignSymmetry, scale=0.7),
    "sign-fixed": partial(bpfree.SignSymmetry, magnitude="fixed"),
    "kp": bpfree.KolenPollack,
    "dfa": bpfree.DirectFeedbackAlignment,
    "drtp": bpfree.DRTP,
    "frozen": bpfree.Frozen,
    **TWO_PASS,
    **EKDAAS,
    **LEADER_FOLLOWERS,
    **ATTENTIONS,
}
# those with r_l = h_{l-1} and delta_L = e, which need no hidden block
ONE_PASS = [name for name in RULES if name not in TWO_PASS]
# those with feedback of their own: random draws that differ from one generator to another
WITH_FEEDBACK = (
    "fa",
    "sign-fixed",
    "kp",
    "dfa",
    "drtp",
    *TWO_PASS,
    "ekdaa-random",
    *LEADER_FOLLOWERS,
)
# those whose feedback is a parameter
LEARNING_FEEDBACK = ("kp", *EKDAAS, *LEADER_FOLLOWERS)
# those in which a sample's signal depends on the others of its batch: no T12
BATCHWISE = ("ekdaa-released", "attention-ahead")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a * 1,
    "relu": lambda a: a * (a > 0),
    "tanh": lambda a: a.sinh() / a.cosh(),
    "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
    "sign": lambda a: a.sign(),
}


class Problem(NamedTuple):
    """A network in float64 with one batch that fits it."""

    net: bpfree.Network
    x: Tensor
    y: Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_for(net: bpfree.Network, size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gaussian inputs of the weights' dtype and random labels."""
    g = generator(seed)
    x = torch.randn(size, *net.input_shape, generator=g, dtype=torch.float64)
    y = torch.randint(net.num_classes, (size,), generator=g)
    return x.to(net.weights()[0].dtype), y


def problem(net: bpfree.Network, size: int = 5, seed: int = 1) -> Problem:
    """The network in float64, its biases no longer zero, with a batch."""
    net, g = net.double(), generator(seed + 100)
    with torch.no_grad():
        for block in net:
            if block.linear.bias is not None:
                block.linear.bias.copy_(torch.randn(block.linear.bias.shape, generator=g) / 3)
    return Problem(net, *batch_for(net, size, seed))


def mlp_problem(*sizes: int, size: int = 5, seed: int = 0, **options) -> Problem:
    sizes, options = sizes or (7, 6, 5, 4), {"activation": "tanh", "bias": True} | options
    return problem(bpfree.mlp(*sizes, generator=generator(seed), **options), size, seed + 1)


def conv_problem(size: int = 5, seed: int = 0, **options) -> Problem:
    """Two convolutions with max-pooling, then two fully connected blocks; no two widths equal."""
    options = {"activation": "tanh", "bias": True} | options
    net = bpfree.convnet(
        (2, 8, 9), (3, 4), (6,), num_classes=5, generator=generator(seed), **options
    )
    return problem(net, size, seed + 1)


PROBLEMS = {"mlp": mlp_problem, "convnet": conv_problem}


def sibling(net: bpfree.Network, seed: int = 0) -> bpfree.Network:
    """A default problem's network of the same shapes, with the weights of another seed."""
    return PROBLEMS["convnet" if net[0].is_conv else "mlp"](seed=seed).net


@contextmanager
def global_generator_untouched():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before), "drew from the global generator"


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def update_of(rule: bpfree.Rule, x: Tensor, y: Tensor, **options) -> bpfree.Update:
    """The rule's update with its own weights and feedback."""
    return rule.update(rule.params(), rule.state(), x, y, **options)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance) -> None:
    torch.testing.assert_close(ours, theirs, **tolerance)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check_uniform(B: Tensor, bound: float, nonnegative: bool = False) -> None:
    """B looks like independent draws from U(-bound, bound), or from U(0, bound)."""
    assert 0.98 * bound < B.abs().max() <= bound
    assert (B.min() >= 0) == nonnegative
    expected = bound / 2 if nonnegative else 0
    assert abs(float(B.mean()) - expected) < 5 * bound / math.sqrt(B.numel())


def hidden_weights(net: bpfree.Network) -> list[str]:
    """Names of W_1 .. W_{L-1}, as in ``Update.grads``."""
    return [f"{l}.linear.weight" for l in range(len(net) - 1)]


# ---- the forward pass and backprop, by plain PyTorch ------------------------------------------


def plain_activation(block: bpfree.Block, a: Tensor) -> Tensor:
    return ACTIVATIONS[block.activation](a) if block.activation in ACTIVATIONS else (
        block.activation(a))  # fmt: skip


def plain_phi(block: bpfree.Block, a: Tensor, mask: Tensor | None) -> Tensor:
    """dropout(pool(activation(a)))."""
    z = plain_activation(block, a)
    h = z if block.pool is None else block.pool(z)
    return h if mask is None else h * mask


def plain_logits(net: bpfree.Network, x: Tensor, masks: dict[int, Tensor] | None = None) -> Tensor:
    for l, block in enumerate(net, 1):
        x = x if isinstance(block.linear, nn.Conv2d) else x.reshape(len(x), -1)
        x = plain_phi(block, block.linear(x), (masks or {}).get(l))
    return x


def autograd_grads(
    net: bpfree.Network, x: Tensor, y: Tensor, masks: dict[int, Tensor] | None = None
) -> dict[str, Tensor]:
    loss = F.cross_entropy(plain_logits(net, x, masks), y)
    return dict(
        zip(dict(net.named_parameters()), torch.autograd.grad(loss, net.parameters()), strict=True)
    )


def error_and_target(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """e = softmax - y and the one-hot y."""
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    target = torch.eye(logits.shape[1], dtype=logits.dtype)[y]
    return p - target, target


# ---- the rules on a tanh network of three blocks, every equation written out -------------------


def written_out(
    name: str, net: bpfree.Network, fixed: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Teaching signals [delta_1, delta_2, delta_3] and gradients of a fully connected network."""
    (W1, b1), (W2, b2), (W3, b3) = ((k.linear.weight, k.linear.bias) for k in net)
    options = getattr(RULES[name], "keywords", {})
    with torch.no_grad():
        h1 = torch.tanh(x @ W1.T + b1)
        h2 = torch.tanh(h1 @ W2.T + b2)
        e, t = error_and_target(h2 @ W3.T + b3, y)
        slope1, slope2 = 1 - h1**2, 1 - h2**2

        def descend(M3: Tensor, M2: Tensor) -> list[Tensor]:
            delta2 = (e @ M3) * slope2
            return [(delta2 @ M2) * slope1, delta2, e]

        def towards_targets(beta: float = 0.9, **_) -> list[Tensor]:
            a1, a2 = x @ W1.T + b1, h1 @ W2.T + b2
            delta2 = h2 - torch.tanh(a2 - beta * e @ fixed["E3"])
            return [h1 - torch.tanh(a1 - beta * delta2 @ fixed["E2"]), delta2, e]

        def broadcast(sent: Tensor) -> list[Tensor]:
            return [(sent @ fixed["D1"]) * slope1, (sent @ fixed["D2"]) * slope2, e]

        def crowd(local: bool = True, **given) -> tuple[list[Tensor], dict[str, Tensor]]:
            taught = {l: heads(fixed[f"V{l}"], h, y, **given) for l, h in ((1, h1), (2, h2))}
            delta2 = (taught[2][0] + (0 if local else e @ W3)) * slope2
            delta1 = (taught[1][0] + (0 if local else delta2 @ W2)) * slope1
            return [delta1, delta2, e], {f"rule.V{l}": grad for l, (_, grad) in taught.items()}

        def attended() -> list[Tensor]:
            delta2 = (e @ attention_to(name, W3, e.T @ h2 / len(x))) * slope2
            return [(delta2 @ attention_to(name, W2, delta2.T @ h1 / len(x))) * slope1, delta2, e]

        own: dict[str, Tensor] = {}
        if name == "backprop":
            deltas = descend(W3, W2)
        elif name in ATTENTIONS:
            deltas = attended()
        elif name in LEADER_FOLLOWERS:
            deltas, own = crowd(**options)
        elif name in ("fa", "kp"):
            deltas = descend(fixed["B3"], fixed["B2"])
        elif name.startswith("sign"):
            deltas = descend(W3.sign() * fixed["S3"], W2.sign() * fixed["S2"])
        elif name == "dfa":
            deltas = broadcast(e)
        elif name == "drtp":
            deltas = broadcast(t)
        elif name in EKDAAS:
            deltas = towards_targets(**options)
        elif name == "frozen":
            deltas = [0 * h1, 0 * h2, e]
        else:
            raise KeyError(f"no equations for {name!r}: add them to written_out in oracles.py")
        grads = {}
        for l, (delta, r) in enumerate(zip(deltas, (x, h1, h2), strict=True)):
            grads[f"{l}.linear.weight"] = torch.einsum("bi,bj->ij", delta, r) / len(x)
            grads[f"{l}.linear.bias"] = delta.mean(0)
        if name == "kp":
            grads |= {"rule.B2": grads["1.linear.weight"], "rule.B3": grads["2.linear.weight"]}
        if name in EKDAAS:
            gamma = options.get("gamma", 0.1)
            grads |= {f"rule.E{l}": gamma * grads[f"{l - 1}.linear.weight"] for l in (2, 3)}
    return deltas, grads | own


def attention_to(name: str, W: Tensor, grad: Tensor) -> Tensor:
    """alpha'(W), synapse by synapse."""
    options = RULES[name].keywords
    W = W.detach() - options.get("foresight", 0) * grad
    if options.get("relative"):
        return own_share(W, options["p"])
    M = W.sign() * W.abs() ** (options["p"] - 1)
    return M * W.norm() / M.norm() if options.get("scale") == "weights" else M


@torch.enable_grad()
def own_share(W: Tensor, p: float) -> Tensor:
    """d share_ji / d w_ji of each synapse; the other shares, which fall, are not i's."""
    M = torch.zeros_like(W)
    for j in range(len(W)):
        row = W[j].detach().flatten().requires_grad_()
        paid = row.abs() ** p / p
        for k, share in enumerate(paid / paid.sum()):
            M[j].view(-1)[k] = torch.autograd.grad(share, row, retain_graph=True)[0][k]
    return M


def heads(
    V: Tensor,
    h: Tensor,
    y: Tensor,
    *,
    workers: int,
    leaders: float,
    lambda_leader: float = 1.0,
    lambda_follower: float = 1.0,
    **_,
) -> tuple[Tensor, Tensor]:
    """u and the gradient of V, sample by sample and worker by worker, from the closed form."""
    u, grad = torch.zeros_like(h), torch.zeros_like(V)
    m, C = math.ceil(leaders * workers), V.shape[1]
    for b in range(len(h)):
        s = [V[w] @ h[b] for w in range(workers)]
        p = [torch.softmax(scores, 0) for scores in s]
        ranked = sorted(range(workers), key=lambda w: -float(p[w][y[b]]))
        for rank, w in enumerate(ranked):
            if rank < m:
                q = lambda_leader * (p[w] - torch.eye(C, dtype=h.dtype)[y[b]]) / m
            else:
                q = lambda_follower * 2 / C * (s[w] - s[ranked[0]]) / (workers - m)
            u[b] += V[w].T @ q
            grad[w] += torch.outer(q, h[b]) / len(h)
    return u, grad


# ---- the rules on any chain, each block cut out and differentiated alone -----------------------


class Cut:
    """One block whose input and pre-activation are leaves: autograd sees phi or W alone."""

    def __init__(self, block: bpfree.Block, h: Tensor, mask: Tensor | None):
        conv = isinstance(block.linear, nn.Conv2d)
        self.block, self.like, self.mask = block, h, mask
        self.r = h if conv else h.reshape(len(h), -1)
        self.a = block.linear(self.r).detach().requires_grad_()
        self.h = plain_phi(block, self.a, mask)

    def unpooled(self) -> Tensor:
        """The activity, in a block with pooling the one before the pool: PEPITA's h."""
        h = self.h if self.block.pool is None else plain_activation(self.block, self.a)
        return h.detach()

    def routed(self, v: Tensor) -> Tensor:
        """v through dropout and pool to the activity before them."""
        z = plain_activation(self.block, self.a).detach().requires_grad_()
        h = z if self.block.pool is None else self.block.pool(z)
        h = h if self.mask is None else h * self.mask
        return torch.autograd.grad(h, z, v.reshape(h.shape))[0]

    def slope_times(self, v: Tensor) -> Tensor:
        """phi' * v."""
        return torch.autograd.grad(self.h, self.a, v.reshape(self.h.shape), retain_graph=True)[0]

    def carry(self, delta: Tensor, matrix: Tensor) -> Tensor:
        """delta M: the linear map with M in the place of W, transposed by autograd."""
        r = torch.zeros_like(self.r).requires_grad_()
        a = torch.func.functional_call(self.block.linear, {"weight": matrix}, (r,))
        return torch.autograd.grad(a, r, delta)[0].reshape(self.like.shape)

    def gradients(self, delta: Tensor) -> dict[str, Tensor]:
        """delta^T r / B for the weight, the mean of delta for the bias."""
        parameters = dict(self.block.linear.named_parameters())
        a = self.block.linear(self.r)
        grads = torch.autograd.grad(a, parameters.values(), delta / len(delta))
        return dict(zip(parameters, grads, strict=True))


def cut_up(net: bpfree.Network, x: Tensor, masks: dict[int, Tensor] | None) -> list[Cut]:
    """Every block of a forward pass on x, cut out."""
    cuts = []
    for l, block in enumerate(net, 1):
        cuts.append(Cut(block, x, (masks or {}).get(l)))
        x = cuts[-1].h.detach()
    return cuts


def two_passes(
    net: bpfree.Network,
    feedback: Tensor,
    x: Tensor,
    y: Tensor,
    masks: dict[int, Tensor] | None = None,
    *,
    sign: int = 1,
    output_error: str = "second",
    conv_scaling: str = "mean",
    presynaptic: str = "second",
    **_,  # cheap, saving: the same numbers
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Teaching signals and gradients of PEPITA; the time-local signal is both its terms."""
    first = cut_up(net, x, masks)
    e, _ = error_and_target(first[-1].h.detach(), y)
    second = cut_up(net, x + sign * (e @ feedback.T).reshape(x.shape), masks)
    if output_error == "second":
        e, _ = error_and_target(second[-1].h.detach(), y)
    deltas, grads = [], {}
    for l, (one, two) in enumerate(zip(first, second, strict=True)):
        teacher = one if presynaptic == "first" else two
        h, h_err = one.unpooled(), two.unpooled()
        if l == len(net) - 1:
            terms = [(teacher, e)]
        elif presynaptic == "time-local":
            terms = [(one, h), (two, -h_err)]
        else:
            terms = [(teacher, h - h_err)]
        positions, scale = h[0, 0].numel(), 1
        if h.dim() == 4:
            scale = {"sum": 1, "mean": 1 / positions, "released": -1 / positions / len(x)}[
                conv_scaling
            ]
        terms = [(cut, scale * delta) for cut, delta in terms]
        deltas.append(torch.cat([delta for _, delta in terms]))
        for cut, delta in terms:
            for key, grad in cut.gradients(delta).items():
                name = f"{l}.linear.{key}"
                grads[name] = grads.get(name, 0) + grad
    return deltas, grads


def towards_targets(
    net: bpfree.Network,
    E: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    masks: dict[int, Tensor] | None = None,
    *,
    beta: float = 0.9,
    gamma: float = 0.1,
    target: str = "unpooled",
    target_activation: str | None = None,
    swap_axes: bool = False,
    normalise_feedback: bool = False,
    normalise_updates: bool = False,
    scale_updates: bool = False,
    **_,  # start, feedback_scale: they made E
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Teaching signals and gradients of EKDAA."""
    cuts, L = dict(enumerate(cut_up(net, x, masks), 1)), len(net)
    conv = {l: isinstance(block.linear, nn.Conv2d) for l, block in enumerate(net, 1)}
    deltas, grads, scales = (
        {L: error_and_target(cuts[L].h.detach(), y)[0]},
        {},
        dict.fromkeys(cuts, 1),
    )

    def f(l: int, a: Tensor) -> Tensor:
        if target_activation and conv[l]:
            return ACTIVATIONS[target_activation](a)
        return plain_activation(net[l - 1], a)

    for l in range(L - 1, 0, -1):
        cut, M = cuts[l], E[f"E{l + 1}"]
        v = cuts[l + 1].carry(
            deltas[l + 1], M.permute(0, 1, 3, 2) if swap_axes and conv[l + 1] else M
        )
        if normalise_feedback and conv[l + 1] and v.max() > 1:
            v = v / v.max()
        a, pool = cut.a.detach(), cut.block.pool
        if target == "bilinear" and conv[l] and pool is not None:
            v = v if cut.mask is None else v * cut.mask
            moved = nn.Upsample(a.shape[2:], mode="bilinear")(pool(a) - beta * v)
        else:
            moved = a - beta * cut.routed(v)
        deltas[l] = f(l, a) - f(l, moved)
    for l, cut in cuts.items():
        if target_activation and conv[l] and l > 1 and net[l - 2].pool is None:
            below = cuts[l - 1]
            cut.r = f(l - 1, below.a.detach()) * (1 if below.mask is None else below.mask)
        mine = cut.gradients(deltas[l])
        if normalise_updates and conv[l]:
            scales[l] /= max(1, len(x) * float(mine["weight"].max()))
        if scale_updates and conv[l]:
            scales[l] /= mine["weight"].shape[0] * mine["weight"].shape[1]
        grads |= {f"{l - 1}.linear.{key}": scales[l] * grad for key, grad in mine.items()}
    grads |= {f"rule.E{l}": gamma * grads[f"{l - 1}.linear.weight"] for l in range(2, L + 1)}
    return [scales[l] * deltas[l] for l in cuts], grads


def crowd_loss(
    V: Tensor,
    h: Tensor,
    y: Tensor,
    *,
    workers: int,
    leaders: float,
    maps: str = "mean",
    sees: str = "all",
    lambda_leader: float = 1.0,
    lambda_follower: float = 1.0,
    **_,
) -> Tensor:
    """A block's own loss, for autograd to differentiate: the paper's words, no closed form."""
    seen = h if h.dim() == 2 else h.mean((2, 3)) if maps == "mean" else h.flatten(1)
    each = [seen] * workers if sees == "all" else seen.chunk(workers, 1)
    scores = [own @ head.T for own, head in zip(each, V, strict=True)]
    total, m = h.new_zeros(()), math.ceil(leaders * workers)
    for b in range(len(h)):
        losses = [F.cross_entropy(s[b], y[b]) for s in scores]
        ranked = sorted(range(workers), key=lambda w, losses=losses: losses[w].item())
        leading, following = ranked[:m], ranked[m:]
        best = scores[ranked[0]][b].detach()
        total = total + lambda_leader * torch.stack([losses[w] for w in leading]).mean()
        if following:
            far = torch.stack([F.mse_loss(scores[w][b], best) for w in following])
            total = total + lambda_follower * far.mean()
    return total / len(h)


def crowds(
    net: bpfree.Network,
    V: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    masks: dict[int, Tensor] | None = None,
    *,
    local: bool = True,
    **options,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Teaching signals and gradients of leader-follower networks."""
    cuts, L = dict(enumerate(cut_up(net, x, masks), 1)), len(net)
    deltas, grads = {L: error_and_target(cuts[L].h.detach(), y)[0]}, {}
    for l in range(L - 1, 0, -1):
        cut, head = cuts[l], V[f"V{l}"].clone().requires_grad_()
        loss = crowd_loss(head, cut.h, y, **options)
        own, grads[f"rule.V{l}"] = torch.autograd.grad(loss, (cut.a, head), retain_graph=True)
        deltas[l] = own * len(x)
        if not local:
            W = net[l].linear.weight.detach()
            deltas[l] = deltas[l] + cut.slope_times(cuts[l + 1].carry(deltas[l + 1], W))
    for l, cut in cuts.items():
        grads |= {f"{l - 1}.linear.{k}": g for k, g in cut.gradients(deltas[l]).items()}
    return [deltas[l] for l in cuts], grads


def block_by_block(
    name: str,
    net: bpfree.Network,
    fixed: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    masks: dict[int, Tensor] | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Teaching signals [delta_1 .. delta_L] and gradients of any chain of blocks."""
    if name in TWO_PASS:
        options = getattr(RULES[name], "keywords", {})
        return two_passes(net, fixed["F"], x, y, masks, **options)
    if name in EKDAAS:
        return towards_targets(net, fixed, x, y, masks, **getattr(RULES[name], "keywords", {}))
    if name in LEADER_FOLLOWERS:
        return crowds(net, fixed, x, y, masks, **getattr(RULES[name], "keywords", {}))
    cuts, L = dict(enumerate(cut_up(net, x, masks), 1)), len(net)
    e, t = error_and_target(cuts[L].h.detach(), y)
    W = {l: block.linear.weight.detach() for l, block in enumerate(net, 1)}
    deltas = {L: e}
    for l in range(L - 1, 0, -1):
        above = cuts[l + 1]
        if name in ("dfa", "drtp"):
            v = (e if name == "dfa" else t) @ fixed[f"D{l}"]
        elif name in ("fa", "kp"):
            v = above.carry(deltas[l + 1], fixed[f"B{l + 1}"])
        elif name.startswith("sign"):
            v = above.carry(deltas[l + 1], W[l + 1].sign() * fixed[f"S{l + 1}"])
        elif name in ATTENTIONS:
            grad = above.gradients(deltas[l + 1])["weight"]
            v = above.carry(deltas[l + 1], attention_to(name, W[l + 1], grad))
        elif name in ("backprop", "frozen"):
            v = above.carry(deltas[l + 1], W[l + 1]) * (0 if name == "frozen" else 1)
        else:
            raise KeyError(f"no equations for {name!r}: add them to block_by_block in oracles.py")
        deltas[l] = cuts[l].slope_times(v)
    grads = {
        f"{l - 1}.linear.{key}": grad
        for l in cuts
        for key, grad in cuts[l].gradients(deltas[l]).items()
    }
    if name == "kp":
        grads |= {f"rule.B{l}": grads[f"{l - 1}.linear.weight"] for l in range(2, L + 1)}
    return [deltas[l] for l in cuts], grads


# ---- random problems for property tests --------------------------------------------------------

seeds = st.integers(0, 2**16)
smooth = st.sampled_from(["identity", "tanh", "sigmoid", torch.sin, F.elu])
activations = st.one_of(st.just("relu"), smooth)


@st.composite
def mlps(draw, depth=(1, 4), activation=activations) -> Problem:
    depth = draw(st.integers(*depth))
    sizes = draw(st.lists(st.integers(1, 6), min_size=depth, max_size=depth))
    classes = draw(st.integers(2, 5))
    return mlp_problem(
        *sizes, classes, size=draw(st.integers(1, 5)), seed=draw(seeds),
        activation=draw(activation), bias=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def convnets(draw, activation=activations, linear_only: bool = False) -> Problem:
    """One or two convolutions of any geometry, perhaps pooled, then one or two linear blocks."""
    act, bias, seed = draw(activation), draw(st.booleans()), draw(seeds)
    groups = draw(st.sampled_from([1, 2]))
    shape = (2, draw(st.integers(5, 7)), draw(st.integers(5, 7)))
    pools = [None, nn.AvgPool2d(2)] + ([] if linear_only else [nn.MaxPool2d(2)])
    first = nn.utils.skip_init(
        nn.Conv2d, 2, 4, draw(st.integers(1, 3)), stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(1, 2)), dilation=draw(st.integers(1, 2)), groups=groups, bias=bias,
    )  # fmt: skip
    blocks = [bpfree.Block(first, act, draw(st.sampled_from(pools)))]
    if draw(st.booleans()):
        second = nn.utils.skip_init(nn.Conv2d, 4, 3, 2, padding=1, groups=1, bias=bias)
        blocks.append(bpfree.Block(second, act))
    trunk = bpfree.Network(*blocks, input_shape=shape)
    features = int(torch.Size(trunk.shapes[-1]).numel())
    widths = draw(st.sampled_from([(features, 3), (features, 5, 4)]))
    head = bpfree.mlp(*widths, activation=act, bias=bias, generator=generator(seed))
    g = generator(seed)
    with torch.no_grad():
        for weight in trunk.weights():
            weight.copy_(torch.randn(weight.shape, generator=g) / 2)
    return problem(bpfree.Network(*blocks, *head, input_shape=shape), draw(st.integers(1, 3)), seed)


problems = st.one_of(mlps(), convnets())
deep_problems = problems.filter(lambda problem: len(problem.net) > 1)  # with a hidden block
