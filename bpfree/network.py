"""Networks whose every intermediate has a name (chapter 0).

A network is a chain of blocks, numbered l = 1..L as in the book; block l is ``net[l - 1]``.
Each block is one linear map with the only weights, then one parameter-free map phi:

    a_l = h_{l-1} W_l^T + b_l        h_l = phi_l(a_l) = dropout(pool(activation(a_l)))

Learning rules need a_l, h_l and the local derivative of phi_l one block at a time. So a block
computes them as plain functions of given weights, which is what lets ``torch.func.vmap`` train
many seeds at once and an audit call the same code with doctored weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten

# name -> (f, (v, a, f(a)) -> v * f'(a)); the derivatives that need no autograd
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "identity": (lambda a: a, lambda v, a, z: v),
    "relu": (torch.relu, lambda v, a, z: aten.threshold_backward(v, z, 0)),
    "tanh": (torch.tanh, lambda v, a, z: aten.tanh_backward(v, z)),
    "sigmoid": (torch.sigmoid, lambda v, a, z: aten.sigmoid_backward(v, z)),
}

# name -> bound of the uniform distribution, from fan-in and fan-out
INITS: dict[str, Callable[[int, int], float]] = {
    "he": lambda fan_in, fan_out: math.sqrt(6 / fan_in),  # He et al. 2015
    "glorot": lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out)),  # Glorot & Bengio 2010
    "torch": lambda fan_in, fan_out: math.sqrt(1 / fan_in),  # the default of nn.Linear, nn.Conv2d
}


def uniform(shape: Sequence[int], bound: float, generator: torch.Generator | None) -> Tensor:
    """A tensor of independent draws from U(-bound, bound)."""
    device = generator.device if generator is not None else None
    return (torch.rand(shape, generator=generator, device=device) * 2 - 1) * bound


class Trace(NamedTuple):
    """What block l computed on one batch."""

    r: Tensor  # h_{l-1}, the input of the linear map: (B, n_{l-1}) or (B, C, H, W)
    a: Tensor  # pre-activation: (B, n_l) or (B, C', H', W')
    z: Tensor  # activation(a), the shape of a
    h: Tensor  # activity, after pooling and dropout
    mask: Tensor | None  # dropout mask with values 0 and 1/(1-p), the shape of h


class Block(nn.Module):
    """One linear map and one parameter-free map: h = dropout(pool(activation(linear(x)))).

    Args:
        linear: an ``nn.Linear`` (its input is flattened first) or a zero-padded ``nn.Conv2d``.
        activation: a name in ``ACTIVATIONS`` or any elementwise function of a tensor.
        pool: a parameter-free module applied after the activation, such as ``nn.MaxPool2d(2)``.
        dropout: probability in [0, 1) of silencing a unit. Active only where a mask is passed.

    Raises:
        TypeError, ValueError: for a linear map, activation, pool or dropout out of these ranges.
    """

    def __init__(
        self,
        linear: nn.Linear | nn.Conv2d,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        pool: nn.Module | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if type(linear) not in (nn.Linear, nn.Conv2d):
            raise TypeError(f"linear must be nn.Linear or nn.Conv2d, got {type(linear).__name__}")
        if isinstance(linear, nn.Conv2d):
            if linear.padding_mode != "zeros":
                raise ValueError(f"padding_mode must be 'zeros', got {linear.padding_mode!r}")
            if isinstance(linear.padding, str):
                raise ValueError(f"padding must be given in pixels, got {linear.padding!r}")
        if not callable(activation) and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be a function or one of {sorted(ACTIVATIONS)}, got {activation!r}"
            )
        if pool is not None and list(pool.parameters()):
            raise ValueError(f"pool must have no parameters, got {pool}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.linear, self.activation, self.pool, self.dropout = linear, activation, pool, dropout

    @property
    def is_conv(self) -> bool:
        return isinstance(self.linear, nn.Conv2d)

    def _geometry(self) -> dict:
        c = self.linear
        return dict(stride=c.stride, padding=c.padding, dilation=c.dilation, groups=c.groups)

    def act(self, a: Tensor) -> Tensor:
        """activation(a), elementwise."""
        return (
            self.activation(a) if callable(self.activation) else ACTIVATIONS[self.activation][0](a)
        )

    def trace(
        self, h: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Trace:
        """The block's forward pass with the given weights; ``mask=None`` drops no unit."""
        if self.is_conv:
            r = h
            a = F.conv2d(r, weight, bias, **self._geometry())
        else:
            r = h.flatten(1)
            a = F.linear(r, weight, bias)
        z = self.act(a)
        h = z if self.pool is None else self.pool(z)
        return Trace(r, a, z, h if mask is None else h * mask, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.trace(x, self.linear.weight, self.linear.bias, mask).h

    def local_vjp(self, v: Tensor, t: Trace) -> Tensor:
        """phi'(a) * v: from the shape of h to the shape of a, through this block's phi only."""
        if t.mask is not None:
            v = v * t.mask
        if self.pool is not None:
            v = torch.func.vjp(self.pool, t.z)[1](v)[0]
        if callable(self.activation):
            return torch.func.vjp(self.activation, t.a)[1](v)[0]
        return ACTIVATIONS[self.activation][1](v, t.a, t.z)

    def transpose(self, delta: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """delta W: a signal of the shape of a, sent back to the shape of the block's input ``like``.

        For a convolution this is the transposed convolution with ``weight``.
        """
        if self.is_conv:
            weight = weight.to(delta.dtype)
            return torch.nn.grad.conv2d_input(like.shape, weight, delta, **self._geometry())
        return (delta @ weight.to(delta.dtype)).reshape(like.shape)

    def outer(self, delta: Tensor, r: Tensor) -> dict[str, Tensor]:
        """delta^T r summed over the batch (and positions), keyed like the linear map's parameters."""
        r = r.to(delta.dtype)
        if self.is_conv:
            shape = self.linear.weight.shape
            grads = {
                "weight": torch.nn.grad.conv2d_weight(r, shape, delta, **self._geometry())
            }
        else:
            grads = {"weight": delta.T @ r}
        if self.linear.bias is not None:
            grads["bias"] = delta.sum((0, 2, 3) if self.is_conv else 0)
        return grads


class Network(nn.Sequential):
    """A chain of blocks; an ordinary ``nn.Sequential``, so autograd and ``state_dict`` work.

    Args:
        blocks: the blocks, input first.
        input_shape: shape of one sample. Needed when the first block is a convolution.

    Raises:
        TypeError: if something in the chain is not a ``Block``.
        ValueError: if blocks do not fit together, or share a parameter.
    """

    def __init__(self, *blocks: Block, input_shape: Sequence[int] | None = None):
        super().__init__(*blocks)
        if not blocks:
            raise ValueError("a network needs at least one Block, got none")
        for i, block in enumerate(blocks, 1):
            if not isinstance(block, Block):
                raise TypeError(f"block {i} must be a Block, got {type(block).__name__}")
        parameters = [p for block in blocks for p in block.parameters()]
        if len({id(p) for p in parameters}) != len(parameters):
            raise ValueError("blocks must not share parameters: a weight occurs in two blocks")
        if input_shape is None:
            if blocks[0].is_conv:
                raise ValueError("input_shape=(channels, height, width) is needed: block 1 is a Conv2d")
            input_shape = (blocks[0].linear.in_features,)
        self.input_shape = tuple(input_shape)
        self.shapes = self._activity_shapes()

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

    def __getitem__(self, index: int | slice) -> Block | Network:
        """A block, or the sub-network of a slice; its weights are this network's."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        first = range(len(self))[index].start
        shape = self.shapes[first - 1] if first else self.input_shape
        return Network(*list(self)[index], input_shape=shape)

    @property
    def num_classes(self) -> int:
        return math.prod(self.shapes[-1])

    def weights(self) -> list[Tensor]:
        """[W_1, ..., W_L]."""
        return [block.linear.weight for block in self]

    def forward(self, x: Tensor, masks: dict[int, Tensor] | None = None) -> Tensor:
        """Logits (B, C). Dropout acts only through ``masks``, so a plain call is deterministic."""
        for l, block in enumerate(self, 1):
            x = block(x, (masks or {}).get(l))
        return x

    def masks(self, batch: int, generator: torch.Generator | None = None) -> dict[int, Tensor]:
        """Fresh dropout masks {l: (B, *shape of h_l)} in training mode; {} in evaluation mode."""
        masks = {}
        for l, block in enumerate(self, 1):
            if self.training and block.dropout:
                weight = block.linear.weight
                device = generator.device if generator is not None else weight.device
                shape = (batch, *self.shapes[l - 1])
                draw = torch.rand(shape, generator=generator, device=device)
                keep = (draw >= block.dropout).to(weight.device, weight.dtype)
                masks[l] = keep / (1 - block.dropout)
        return masks

    def trace(
        self, params: dict[str, Tensor], x: Tensor, masks: dict[int, Tensor] | None = None
    ) -> list[Trace]:
        """Every intermediate of a forward pass with the weights in ``params``, block by block."""
        traces, h = [], x
        for l, block in enumerate(self, 1):
            name = f"{l - 1}.linear"
            mask = (masks or {}).get(l)
            traces.append(
                block.trace(h, params[f"{name}.weight"], params.get(f"{name}.bias"), mask)
            )
            h = traces[-1].h
        return traces


def _initialise(block: Block, init: str, generator: torch.Generator | None) -> Block:
    if init not in INITS:
        raise ValueError(f"init must be one of {sorted(INITS)}, got {init!r}")
    weight, bias = block.linear.weight, block.linear.bias
    receptive = math.prod(weight.shape[2:])
    bound = INITS[init](weight.shape[1] * receptive, weight.shape[0] * receptive)
    with torch.no_grad():
        weight.copy_(uniform(weight.shape, bound, generator))
        if bias is not None:
            bias.zero_()
    return block


def mlp(
    *sizes: int,
    activation: str | Callable[[Tensor], Tensor] = "relu",
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
        last = l == len(sizes) - 1
        # skip_init: PyTorch's own initialisation would draw from the global generator
        linear = torch.nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias)
        block = Block(linear, "identity" if last else activation, None, 0.0 if last else dropout)
        blocks.append(_initialise(block, init, generator))
    return Network(*blocks)


def convnet(
    input_shape: Sequence[int],
    channels: Sequence[int],
    hidden: Sequence[int] = (),
    *,
    num_classes: int,
    kernel_size: int = 3,
    padding: int | None = None,
    pool: int | Sequence[int] = 2,
    activation: str | Callable[[Tensor], Tensor] = "relu",
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
        pool: side of the max-pooling after each convolution (1: none), one for all or one each.
        activation, bias, dropout, init, generator: as for ``mlp``.

    Raises:
        ValueError: if the shapes do not fit, or ``pool`` has another length than ``channels``.
    """
    if len(input_shape) != 3:
        raise ValueError(f"input_shape must be (channels, height, width), got {tuple(input_shape)}")
    pools = [pool] * len(channels) if isinstance(pool, int) else list(pool)
    if len(pools) != len(channels):
        raise ValueError(f"pool must have one entry per channel entry ({len(channels)}), got {pool}")
    padding = kernel_size // 2 if padding is None else padding
    blocks, c_in = [], input_shape[0]
    for c_out, side in zip(channels, pools, strict=True):
        conv = torch.nn.utils.skip_init(
            nn.Conv2d, c_in, c_out, kernel_size, padding=padding, bias=bias
        )
        layer = nn.MaxPool2d(side) if side > 1 else None
        blocks.append(_initialise(Block(conv, activation, layer, dropout), init, generator))
        c_in = c_out
    trunk = Network(*blocks, input_shape=input_shape) if blocks else None
    n_in = math.prod(trunk.shapes[-1]) if trunk else math.prod(input_shape)
    head = mlp(
        n_in, *hidden, num_classes,
        activation=activation, bias=bias, dropout=dropout, init=init, generator=generator,
    )  # fmt: skip
    return Network(*blocks, *head, input_shape=input_shape)
