"""Images changed at random, so that no epoch sees the same ones twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(x: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image moved by up to ``shift`` pixels both ways, zeros at the border, and mirrored left
    to right with probability 1/2.

    Args:
        x: images (B, channels, height, width) of any dtype.
        shift: pixels, >= 0. flip: whether to mirror at all.
        generator: source of the draws, on the device of x.

    Returns:
        New images of the same shape; x itself if there is nothing to do.
    """
    if not shift and not flip:
        return x
    n, place = len(x), dict(device=x.device)
    moves = torch.randint(2 * shift + 1, (2, n, 1), generator=generator, **place)
    rows, columns = (
        torch.arange(size, **place) + m for size, m in zip(x.shape[2:], moves, strict=True)
    )
    if flip:
        mirrored = torch.rand((n, 1), generator=generator, **place) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, [shift] * 4)
    places = rows[:, :, None] * padded.shape[3] + columns[:, None]
    places = places.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return padded.flatten(2).gather(2, places).view(x.shape)
