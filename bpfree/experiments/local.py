"""What local losses cost and gain, measured beside backprop with the same losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..network import mlp
from ..rules import LeaderFollower
from .timing import SGD, compare


def heads(device: str = "cpu", rounds: int = 15) -> dict:
    """A step of LFNN-l, and of BP with the same heads and losses in its graph (deep supervision).

    784-512x4-10 with 8 workers, 6 of which lead, batch 128.
    """
    sizes, batch = (784, 512, 512, 512, 512, 10), 128
    g = torch.Generator().manual_seed(0)
    rule = LeaderFollower(mlp(*sizes, generator=g), 8, 0.7, generator=g).to(device)
    net = rule.net.to(device)
    learned = [*net.parameters(), *rule.parameters()]
    x = torch.rand(batch, sizes[0], generator=g).to(device)
    y = torch.randint(0, 10, (batch,), generator=g).to(device)
    opt = SGD(learned)

    def supervised() -> None:
        opt.zero_grad()
        h, loss = x, torch.zeros((), device=device)
        for block, V in zip([*net][:-1], rule.parameters(), strict=True):
            h = block(h)
            s = rule.scores(h, V)
            each = F.cross_entropy(s.flatten(0, 1), y.repeat_interleave(8), reduction="none")
            each = each.view(batch, 8)
            leads = rule.leads(each.detach())
            best = s.detach().take_along_dim(each.argmin(1)[:, None, None], 1)
            far = (s - best).square().mean(2)
            loss = loss + torch.where(leads, each / 6, far / 2).sum(1).mean()
        (loss + F.cross_entropy(net[-1](h), y)).backward()
        opt.step()

    def local() -> None:
        opt.zero_grad()
        rule.backward(x, y)
        opt.step()

    return compare(
        {"BP and heads": supervised, "LFNN-l": local}, "BP and heads", rounds, 10, device
    )
