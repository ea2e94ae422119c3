"""Forward gradient (chapter 7): guess a direction, measure its slope on the way up, go along it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..block import Tensors, Trace
from ..network import Network
from ..refuse import one_of
from ..rule import Rule, Signal


class ForwardGradient(Rule):
    """Forward gradients of the weights or of the activities (Baydin et al. 2022, Ren et al. 2023).

    A tangent pass, forward mode of automatic differentiation, carries a random direction up beside
    the activity and meets the error at the output. There it is a number, the slope:

        a'_l = h'_{l-1} W_l^T + (what is perturbed in block l),    h'_l = phi_l'(a_l) * a'_l
        d_b = <e_b, a'_L,b>

    FG-W, ``perturb="weights"``: one direction V ~ N(0, 1) for all weights and biases, the same on
    the whole batch. It perturbs a_l by h_{l-1} V_l^T, and

        grad W_l = d V_l,    d = mean_b d_b

    No unit is taught: its signals are zeros, and its gradients are given by name.

    FG-A, ``perturb="activities"``: a direction U ~ N(0, 1) for each sample and each hidden
    pre-activation, in all blocks at once. It perturbs a_l by U_l, and

        delta_l,b = d_b U_l,b  (l < L),    delta_L = e,    r_l = h_{l-1}

    The output block gets its error as it is, our reading: nothing is above it to be guessed. Both
    are unbiased; variances are in theorem T16 of chapter 7. Directions come from
    ``self.generator``, anew at each update. Sources: arXiv 2202.08587, arXiv 2210.03310.

    Args:
        perturb: ``"weights"`` or ``"activities"``.
        draws: m >= 1 directions at each step, each with a tangent pass; the mean is taken, and the
            variance falls m times.

    Raises:
        ValueError: for a perturbation or a number of draws out of these.
    """

    def __init__(
        self,
        net: Network,
        perturb: str = "weights",
        draws: int = 1,
        generator: torch.Generator | None = None,
    ):
        super().__init__(net, generator)
        one_of("perturb", perturb, ("weights", "activities"))
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws must be a whole number >= 1, got {draws!r}")
        self.perturb, self.draws = perturb, draws

    def draw(self, like: Tensor) -> Tensor:
        """Independent draws from N(0, 1), shaped like the argument."""
        g = self.generator
        device = like.device if g is None else g.device
        return torch.randn(like.shape, generator=g, device=device, dtype=like.dtype).to(like)

    def slopes(self, params: Tensors, trace: list[Trace], error: Tensor, way: Tensors) -> Tensor:
        """d_b, (B,): derivative of each sample's loss along a direction.

        Args:
            way: the direction, by parameter, or by ``"U1"`` .. ``"UL"`` for pre-activations; what
                is not in it stays.
        """
        rising: Tensor | None = None  # h'_{l-1}
        for l, (block, t) in enumerate(zip(self.net, trace, strict=True), 1):
            name = f"{l - 1}.linear"
            lean = way[f"U{l}"] if f"U{l}" in way else torch.zeros_like(t.a)  # a'_l
            if f"{name}.weight" in way:
                lean = lean + block.pre(t.r, way[f"{name}.weight"], way.get(f"{name}.bias"))[1]
            if rising is not None:
                lean = lean + block.pre(rising, params[f"{name}.weight"])[1]
            rising = block.local_jvp(lean.to(t.a.dtype), t)
        return (error * lean).sum(1)  # the last block's phi is the identity

    def signals(self, params, state, trace: list[Trace], error, target) -> list[Signal]:
        weights = self.perturb == "weights"
        found: Tensors = {}
        for _ in range(self.draws):
            if weights:
                way = {n: self.draw(params[n]) for n, _ in self.net.named_parameters()}
            else:
                way = {f"U{l}": self.draw(t.a) for l, t in enumerate(trace[:-1], 1)}
            d = self.slopes(params, trace, error, way) / self.draws
            for name, v in way.items():
                each = (d.mean() if weights else d.reshape(-1, *[1] * (v.dim() - 1))) * v
                found[name] = found[name] + each if name in found else each
        if not weights:
            return [(t.r, d) for t, d in zip(trace, [*found.values(), error], strict=True)]
        mine = [{n: found[n] for n in found if n.startswith(f"{l}.")} for l in range(len(trace))]
        return [(t.r, torch.zeros_like(t.a), own) for t, own in zip(trace, mine, strict=True)]
