"""Images changed at random, so that no epoch sees the same ones twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_moves(n: int, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """What befalls n images: (n, 3), rows and columns to move by, 0..2 shift, and 1 to mirror it,
    with probability 1/2 where ``flip``; on the generator's device."""
    ends = torch.tensor([2 * shift + 1, 2 * shift + 1, 1 + flip], device=generator.device)
    draws = torch.randint(2**31, (n, 3), generator=generator, device=generator.device)
    return draws % ends


def augment(x: Tensor, moves: Tensor, shift: int) -> Tensor:
    """Each image moved by up to ``shift`` pixels both ways, zeros at the border, and mirrored left
    to right.

    Args:
        x: images (..., channels, height, width) of any dtype. moves: (..., 3), see ``draw_moves``.
        shift: pixels, >= 0, as drawn with.
    """
    images, moves = x.flatten(0, -4), moves.flatten(0, -2)[:, :, None]
    rows, columns = (
        torch.arange(size, device=x.device) + moves[:, i] for i, size in enumerate(x.shape[-2:])
    )
    columns = torch.where(moves[:, 2] > 0, columns.flip(1), columns)
    padded = F.pad(images, [shift] * 4)
    places = rows[:, :, None] * padded.shape[3] + columns[:, None]
    places = places.flatten(1)[:, None].expand(-1, x.shape[-3], -1)
    return padded.flatten(2).gather(2, places).view(x.shape)
