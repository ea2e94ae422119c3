"""Weight mirroring: feedback learns the forward weights from noise (chapter 3).

A layer that is fed noise correlates its output with its input. The mean of that correlation is
proportional to its weights, so feedback can copy them without ever reading them (Akrout et al.
2019, arXiv 1904.05391; for PEPITA arXiv 2302.05440).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..network import Network

NOISE = 0.1  # standard deviation of the noise, as in the released code
BATCH, RATE = 64, 0.1  # RATE: step of a factor per batch of noise, relative to its norm


def factors(net: Network, scale: float, generator: torch.Generator | None) -> list[Tensor]:
    """[Q_1, ..., Q_L], normal, Q_l (n_{l-1}, n_l), whose product has entries of sd ``scale``.

    Raises:
        ValueError: for a network with a convolution or a bias, which is no product of matrices.
    """
    for l, block in enumerate(net, 1):
        if block.is_conv or block.linear.bias is not None:
            raise ValueError(
                "mirroring factors F along fully connected blocks without bias, "
                f"got {block.linear} in block {l}"
            )
    shapes = [tuple(reversed(w.shape)) for w in net.weights()]
    hidden = math.prod(n for _, n in shapes[:-1])
    sd = (scale / math.sqrt(hidden)) ** (1 / len(shapes))
    device = generator.device if generator is not None else None
    draws = [torch.randn(s, generator=generator, device=device) for s in shapes]
    return [sd * draw.to(w) for draw, w in zip(draws, net.weights(), strict=True)]


def mirror(
    Q: Tensor, W: Tensor, f: Callable, steps: int, sign: int, generator: torch.Generator
) -> Tensor:
    """Q after ``steps`` batches of noise through one block alone; it keeps its norm.

    It moves along sign * E[xi^T f(xi W^T)], which is proportional to sign * W^T.
    """
    norm = Q.norm()
    for _ in range(steps):
        noise = torch.randn(BATCH, W.shape[1], generator=generator, device=generator.device).to(W)
        xi = NOISE * (noise - noise.mean())
        correlation = xi.T @ f(xi @ W.T) / BATCH
        direction = sign * correlation / correlation.norm()
        Q = Q + RATE * norm * direction
        Q = Q * (norm / Q.norm())
    return Q
