"""Networks whose every intermediate has a name: chains of blocks (chapter 0).

Blocks are numbered l = 1..L as in the book; block l is ``net[l - 1]``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import NoReturn, overload

import torch
from torch import Tensor, nn

from .block import Activation, Block, Masks, Tensors, Trace
from .init import initialise


class Network(nn.Sequential):
    """A chain of blocks; an ordinary ``nn.Sequential``, so autograd and ``state_dict`` work.

    Args:
        blocks: the blocks, input first.
        input_shape: shape of one sample. Needed when the first block is a convolution.

    Raises:
        TypeError: if something in the chain is not a ``Block``.
        ValueError: if blocks do not fit together, share a parameter, or have a weight that is
            computed (pruned, say).
    """

    def __init__(self, *blocks: Block, input_shape: Sequence[int] | None = None):
        super().__init__(*blocks)
        if not blocks:
            raise ValueError("a network needs at least one Block, got none")
        self.plan()
        first = blocks[0].linear
        if input_shape is None:
            if isinstance(first, nn.Conv2d):
                raise ValueError("input_shape=(channels, height, width) is needed for a Conv2d")
            input_shape = (first.in_features,)
        if blocks[0].is_conv and len(input_shape) != 3:
            raise ValueError(
                f"input_shape must be (channels, height, width), got {tuple(input_shape)}"
            )
        self.input_shape = tuple(input_shape)
        self.shapes, self.made_of = self._activity_shapes(), self.geometry()

    def _activity_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each h_l for one sample, found by a pass that computes nothing."""
        h, shapes = torch.empty(1, *self.input_shape, device="meta"), []
        for i, block in enumerate(self, 1):
            try:
                h = copy.deepcopy(block).to(device="meta", dtype=h.dtype)(h)
            except RuntimeError as error:
                raise ValueError(
                    f"block {i} ({block.linear}) cannot take an input of shape {tuple(h.shape[1:])}"
                ) from error
            shapes.append(tuple(h.shape[1:]))
        return shapes

    def __iter__(self) -> Iterator[Block]:  # type: ignore[override]  # Sequential's are modules
        return super().__iter__()  # type: ignore[return-value]

    @overload  # type: ignore[override]
    def __getitem__(self, index: int) -> Block: ...

    @overload
    def __getitem__(self, index: slice) -> Network: ...

    def __getitem__(self, index: int | slice) -> Block | Network:
        """A block, or the sub-network of a slice; its weights are this network's."""
        if not isinstance(index, slice):
            return [*self._modules.values()][index]  # type: ignore[return-value]
        first = range(len(self))[index].start
        shape = self.shapes[first - 1] if first else self.input_shape
        return Network(*list(self)[index], input_shape=shape)

    def _fixed(self, *args: object) -> NoReturn:
        raise TypeError("a Network's shapes are fixed: build a new one with Network(*blocks)")

    append = extend = insert = pop = _fixed  # type: ignore[assignment]
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _fixed  # type: ignore[assignment]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._fixed() if "shapes" in vars(self) else super().add_module(name, module)

    def geometry(self) -> list[tuple]:
        """What decides the shapes of activities, block by block."""
        return [(block.linear.extra_repr(), block.pool) for block in self]

    def plan(self) -> list[tuple]:
        """What rules rely on, block by block: maps with weights of their own, then phi."""
        plan: list[tuple] = []
        seen: set[int] = set()
        for i, block in enumerate(self, 1):
            if not isinstance(block, Block):
                raise TypeError(f"block {i} must be a Block, got {type(block).__name__}")
            owned = block.linear._parameters
            weight, bias = owned.get("weight"), owned.get("bias")
            if weight is None or owned.keys() != {"weight", "bias"}:
                raise ValueError(
                    f"block {i} must own its weight and bias, but pruning or a parametrisation "
                    "computes one: make that permanent (prune.remove, "
                    "parametrize.remove_parametrizations)"
                )
            if id(weight) in seen or id(bias) in seen:
                raise ValueError("blocks must not share parameters: a weight occurs in two blocks")
            seen |= {id(weight)} if bias is None else {id(weight), id(bias)}
            plan.append((weight.shape, bias is not None, block.activation, block.pool))
        return plan

    @property
    def num_classes(self) -> int:
        return math.prod(self.shapes[-1])

    def weights(self) -> list[Tensor]:
        """[W_1, ..., W_L]."""
        return [block.linear.weight for block in self]

    def forward(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        """Logits (B, C). Dropout acts only through ``masks``, so a plain call is deterministic."""
        for l, block in enumerate(self, 1):
            x = block(x, (masks or {}).get(l))
        return x

    def masks(self, batch: int, generator: torch.Generator | None = None) -> Masks:
        """Fresh dropout masks {l: (B, *shape of h_l)} in training mode; {} in evaluation mode.

        A unit's probability is rounded to a multiple of 2^-16.
        """
        masks = {}
        for l, block in enumerate(self, 1):
            if self.training and block.dropout:
                weight, shape = block.linear.weight, (batch, *self.shapes[l - 1])
                device = generator.device if generator is not None else weight.device
                # 16 random bits decide a unit, so one draw decides four: less than half of the time
                count = math.prod(shape)
                bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
                bits = bits.random_(-(2**63), None, generator=generator).view(torch.int16)
                dropped = min(round(block.dropout * 2**16), 2**16 - 1)
                keep = bits[:count].view(shape) >= dropped - 2**15
                masks[l] = keep.to(weight.device, weight.dtype) / (1 - block.dropout)
        return masks

    def block_trace(self, l: int, params: Tensors, h: Tensor, mask: Tensor | None = None) -> Trace:
        """Block l's forward pass on its input h_{l-1}, with the weights in ``params``."""
        weight, bias = params[f"{l - 1}.linear.weight"], params.get(f"{l - 1}.linear.bias")
        return self[l - 1].trace(h, weight, bias, mask)

    def blockwise(
        self, params: Tensors, x: Tensor, masks: Masks, first: Trace | None = None
    ) -> Iterator[Trace]:
        """A forward pass block by block; ``first`` is block 1's, where it is known already."""
        for l in range(1, len(self) + 1):
            if l > 1 or first is None:
                first = self.block_trace(l, params, x, masks.get(l))
            yield first
            x = first.h

    def trace(self, params: Tensors, x: Tensor, masks: Masks | None = None) -> list[Trace]:
        """Every intermediate of a forward pass with the weights in ``params``."""
        return list(self.blockwise(params, x, masks or {}))


def mlp(
    *sizes: int,
    activation: Activation = "relu",
    bias: bool = False,
    dropout: float = 0.0,
    init: str = "he",
    generator: torch.Generator | None = None,
) -> Network:
    """A fully connected network of the given layer sizes, input first and classes last.

    Args:
        sizes: n_0, n_1, ..., n_L; the last block is linear, its outputs are the logits.
        activation, dropout: of every hidden block; see ``Block``.
        bias: whether blocks have one (they start at zero).
        init: ``"he"``, ``"glorot"`` or ``"torch"``: the uniform distribution of the weights.
        generator: source of the initial weights; None is torch's default generator.

    Raises:
        ValueError: with fewer than two sizes, or a size below 1.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"mlp needs at least two sizes, each >= 1, got {sizes}")
    blocks = []
    for l, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        # skip_init: PyTorch's own initialisation would draw from the global generator
        linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias)
        initialise(linear, init, generator)
        f, drop = (activation, dropout) if l < len(sizes) - 1 else ("identity", 0.0)
        blocks.append(Block(linear, f, None, drop))
    return Network(*blocks)


def convnet(
    input_shape: Sequence[int],
    channels: Sequence[int],
    hidden: Sequence[int] = (),
    *,
    num_classes: int,
    kernel_size: int = 3,
    padding: int | None = None,
    pool: int | Sequence = 2,
    activation: Activation = "relu",
    trunk: Activation | None = None,
    bias: bool = False,
    dropout: float = 0.0,
    init: str = "he",
    generator: torch.Generator | None = None,
) -> Network:
    """Convolutional blocks, then fully connected ones, the last of which is linear.

    Args:
        input_shape: (channels, height, width) of one image.
        channels: output channels of each convolution.
        hidden: sizes of the fully connected blocks before the last.
        num_classes: number of logits.
        kernel_size, padding: of every convolution, stride 1; padding None keeps the size.
        pool: side of each max-pooling (1: none, "mean": of all positions), one for all or one each.
        trunk: activation of the convolutional blocks; None: as the others.
        activation, bias, dropout, init, generator: as for ``mlp``.

    Raises:
        ValueError: if the shapes do not fit, or ``pool`` has another length than ``channels``.
    """
    pools = [pool] * len(channels) if isinstance(pool, int) else list(pool)
    if len(pools) != len(channels):
        raise ValueError(f"pool must have one entry per convolution ({len(channels)}), got {pool}")
    if padding is None and kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size} is even, so it needs a padding")
    padding = kernel_size // 2 if padding is None else padding
    blocks, c_in = [], input_shape[0]
    for c_out, side in zip(channels, pools, strict=True):
        conv = nn.utils.skip_init(nn.Conv2d, c_in, c_out, kernel_size, padding=padding, bias=bias)
        layer = nn.AdaptiveAvgPool2d(1) if side == "mean" else nn.MaxPool2d(side)
        initialise(conv, init, generator)
        blocks.append(Block(conv, trunk or activation, layer if side != 1 else None, dropout))
        c_in = c_out
    shape = Network(*blocks, input_shape=input_shape).shapes[-1] if blocks else input_shape
    head = mlp(
        math.prod(shape), *hidden, num_classes,
        activation=activation, bias=bias, dropout=dropout, init=init, generator=generator,
    )  # fmt: skip
    return Network(*blocks, *head, input_shape=input_shape)
