"""Leader-follower networks (chapter 5): workers with losses of their own, and those who follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..block import Tensors, Trace
from ..init import uniform
from ..network import Network
from ..refuse import check_scale, one_of
from ..rule import Rule, Signal, output_error


class LeaderFollower(Rule):
    """LFNN and LFNN-l (Yin et al. 2023): each hidden block is taught by heads of its own.

    Worker w of block l has scores s_w = V_w h_l[w] and p_w = softmax(s_w). On each sample the
    m = ceil(leaders N) workers of lowest cross-entropy lead, the others follow the best of them:

        q_w = lambda_leader (p_w - y) / m                          if w leads
        q_w = lambda_follower (2 / C) (s_w - s_best) / (N - m)     if it follows
        u_l = sum_w V_w^T q_w,    delta_l = phi_l'(a_l) * u_l,    delta_L = e,    r_l = h_{l-1}

    which is the gradient of the block's mean cross-entropy over leaders and mean squared distance
    of followers (mean over scores, s_best held). That is LFNN-l, ``local=True``: no signal crosses
    a block, and a block learns before the next one computes. LFNN, ``local=False``, adds the global
    loss and lets every loss descend through all blocks below its own, as the released scripts do:

        delta_l = phi_l'(a_l) * (u_l + delta_{l+1} W_{l+1}),    l < L

    Parameters ``V1`` .. ``V{L-1}``, (N, C, what a worker sees), with grad V_w = q_w^T h_l[w] / B;
    pass ``rule.parameters()`` to the optimiser. Source: arXiv 2310.07885.

    Args:
        workers: N >= 1 per hidden block. One worker is greedy local learning.
        leaders: share of the workers that lead on a sample, in (0, 1].
        sees: a worker's head reads ``"all"`` of h_l (the released code), or its ``"own"`` n_l / N
            units or channels (the paper).
        local: LFNN-l, or LFNN.
        lambda_leader, lambda_follower: >= 0, weights of the two losses. With both 0 LFNN is
            backprop (theorem T9).
        maps: what heads read of a convolutional block: the ``"mean"`` over positions, or all maps
            ``"flat"``.
        head_scale: V is drawn from U(+-head_scale * sqrt(6 / what a worker sees)); > 0.

    Raises:
        ValueError: for an option out of these, or if workers do not divide a block's units and each
            sees its own.
    """

    def __init__(
        self,
        net: Network,
        workers: int = 32,
        leaders: float = 0.7,
        sees: str = "all",
        local: bool = True,
        lambda_leader: float = 1.0,
        lambda_follower: float = 1.0,
        maps: str = "mean",
        head_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(net, generator)
        one_of("sees", sees, ("all", "own"))
        one_of("maps", maps, ("mean", "flat"))
        check_scale("head_scale", head_scale)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ValueError(f"workers must be a whole number >= 1, got {workers!r}")
        if not 0 < leaders <= 1:
            raise ValueError(f"leaders must be a share in (0, 1], got {leaders!r}")
        for name, value in (("lambda_leader", lambda_leader), ("lambda_follower", lambda_follower)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        self.workers, self.sees, self.local, self.maps = workers, sees, local, maps
        self.leading = max(1, math.ceil(leaders * workers - 1e-9))  # 0.07 * 100 is a little over 7
        self.lambda_leader, self.lambda_follower = lambda_leader, lambda_follower
        self.forward_only = local
        for l, (channels, *sides) in enumerate(net.shapes[:-1], 1):
            if sees == "own" and channels % workers:
                raise ValueError(
                    f"workers must divide the units or channels of each hidden block, as each sees "
                    f"its own; got {workers} workers, {channels} in block {l}"
                )
            size = channels * (math.prod(sides) if maps == "flat" else 1)
            size //= workers if sees == "own" else 1
            bound = head_scale * math.sqrt(6 / size)
            V = uniform((workers, net.num_classes, size), bound, generator)
            setattr(self, f"V{l}", nn.Parameter(V.to(net.weights()[0])))

    # ---- heads ----------------------------------------------------------------------------------

    def _seen(self, h: Tensor) -> tuple[Tensor, str]:
        """What heads read, (B, n) or (B, N, n / N), and its axes' letters."""
        if h.dim() == 4:
            h = h.mean((2, 3)) if self.maps == "mean" else h.flatten(1)
        return (h, "bn") if self.sees == "all" else (h.unflatten(1, (self.workers, -1)), "bwn")

    def scores(self, h: Tensor, V: Tensor) -> Tensor:
        """s_w of all workers, (B, N, C), from the activity h_l and the heads V_l."""
        seen, axes = self._seen(h)
        return torch.einsum(f"{axes},wcn->bwc", seen, V.to(seen.dtype))

    def leads(self, losses: Tensor) -> Tensor:
        """Which workers lead, from their cross-entropies (B, N)."""
        chosen = losses.topk(self.leading, 1, largest=False).indices
        return torch.zeros_like(losses, dtype=torch.bool).scatter(1, chosen, True)

    def score_errors(self, s: Tensor, target: Tensor) -> Tensor:
        """q_w, (B, N, C), from the scores and the one-hot target (B, C)."""
        y = target[:, None]
        log_p = F.log_softmax(s, 2, dtype=target.dtype)
        losses = -(log_p * y).sum(2)
        leads = self.leads(losses)
        first = losses.masked_fill(~leads, math.inf).argmin(1)  # a leader, at ties too
        best = s.take_along_dim(first[:, None, None], 1)
        following = self.lambda_follower * 2 / s.shape[2] / max(self.workers - self.leading, 1)
        return torch.where(
            leads[..., None],
            self.lambda_leader / self.leading * (log_p.exp() - y),
            following * (s - best),
        )

    def teach(self, h: Tensor, V: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """u_l, shaped like h_l, and the gradient of V_l."""
        seen, axes = self._seen(h)
        q = self.score_errors(self.scores(h, V), target).to(V.dtype)
        u = torch.einsum(f"bwc,wcn->{axes}", q, V).flatten(1)
        if h.dim() == 4 and self.maps == "mean":
            u = (u / h[0, 0].numel())[..., None, None].expand(h.shape)
        grad = torch.einsum(f"bwc,{axes}->wcn", q, seen.to(q.dtype)) / len(h)
        return u.reshape(h.shape), grad

    # ---- the rule -------------------------------------------------------------------------------

    def signals(self, params, state, trace: Iterable[Trace], error, target) -> Iterable[Signal]:
        return (self._each_block if self.local else self._end_to_end)(params, trace, target)

    def _each_block(self, params: Tensors, trace: Iterable[Trace], target) -> Iterator[Signal]:
        for l, t in enumerate(trace, 1):  # zip would keep the block before
            if l == len(self.net):
                yield t.r, output_error(t.h, target)
            else:
                u, grad = self.teach(t.h, params[f"rule.V{l}"], target)
                yield t.r, self.net[l - 1].local_vjp(u, t), {f"rule.V{l}": grad}

    def _end_to_end(self, params: Tensors, trace: Iterable[Trace], target) -> list[Signal]:
        *hidden, last = trace
        delta = output_error(last.h, target)
        signals: list[Signal] = [(last.r, delta)]
        for l in range(len(hidden), 0, -1):
            t, W = hidden[l - 1], params[f"{l}.linear.weight"]
            u, grad = self.teach(t.h, params[f"rule.V{l}"], target)
            delta = self.net[l - 1].local_vjp(u + self.net[l].transpose(delta, W, t.h), t)
            signals.insert(0, (t.r, delta, {f"rule.V{l}": grad}))
        return signals

    @torch.no_grad()
    def vote(self, x: Tensor, among: str = "all") -> Tensor:
        """Mean of the scores of the last hidden block's workers, (B, C), for inputs x.

        Args:
            among: ``"all"`` workers, or on each sample the ``"surest"`` m, of lowest cross-entropy
                with the class that they would say: who leads is not known without labels.
        """
        one_of("among", among, ("all", "surest"))
        l = len(self.net) - 1
        if not l:
            raise ValueError("a vote needs workers in a hidden block, got a network of 1 block")
        params = self.params()
        s = self.scores(self.net.trace(params, x)[l - 1].h, params[f"rule.V{l}"])
        if among == "all":
            return s.mean(1)
        chosen = self.leads(-F.log_softmax(s, 2).amax(2))
        return (s * chosen[..., None]).sum(1) / self.leading
