"""One block: a linear map with the only weights, then a parameter-free map phi (chapter 0).

    a_l = h_{l-1} W_l^T + b_l        h_l = phi_l(a_l) = dropout(pool(activation(a_l)))

Learning rules need a_l, h_l and the local derivative of phi_l, one block at a time. So a block
computes them as plain functions of given weights, which is what lets ``torch.func.vmap`` train
many seeds at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from .refuse import check_function, example, one_of

Tensors = dict[str, Tensor]  # by name
Masks = dict[int, Tensor]  # dropout masks of the blocks l that have one
Activation = str | Callable[[Tensor], Tensor]  # a name in ACTIVATIONS, or the function itself
aten: Any = torch.ops.aten

# name -> (f, (v, f(a)) -> v * f'(a)); the derivatives that need no autograd
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "identity": (lambda a: a, lambda v, z: v),
    "relu": (torch.relu, lambda v, z: aten.threshold_backward(v, z, 0)),
    "tanh": (torch.tanh, lambda v, z: aten.tanh_backward(v, z)),
    "sign": (torch.sign, lambda v, z: torch.zeros_like(v)),
    "sigmoid": (torch.sigmoid, lambda v, z: aten.sigmoid_backward(v, z)),
}

# deterministic, parameter-free, each sample by itself: so the local derivative is well defined
POOLS = (nn.MaxPool1d, nn.AvgPool1d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class Trace(NamedTuple):
    """What block l computed on one batch."""

    r: Tensor  # h_{l-1}, the input of the linear map: (B, n_{l-1}) or (B, C, H, W)
    a: Tensor  # pre-activation: (B, n_l) or (B, C', H', W')
    z: Tensor  # activation(a), the shape of a
    pooled: Tensor  # z after pooling; z itself without
    h: Tensor  # activity: pooled, after dropout
    mask: Tensor | None  # dropout mask with values 0 and 1/(1-p), the shape of h


class Block(nn.Module):
    """One linear map and one parameter-free map: h = dropout(pool(activation(linear(x)))).

    Args:
        linear: an ``nn.Linear`` (its input is flattened first) or a zero-padded ``nn.Conv2d``.
        activation: a name in ``ACTIVATIONS`` or any elementwise function of a tensor.
        pool: one of ``POOLS``, applied after the activation, such as ``nn.MaxPool2d(2)``.
        dropout: probability in [0, 1) of silencing a unit. Active only where a mask is passed.

    Raises:
        TypeError, ValueError: for a linear map, activation, pool or dropout out of these ranges.
    """

    pool: Any  # one of POOLS, or None

    def __init__(
        self,
        linear: nn.Linear | nn.Conv2d,
        activation: Activation = "relu",
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
        if not callable(activation):
            one_of("activation, if not a function,", activation, sorted(ACTIVATIONS))
        elif isinstance(activation, nn.Module) and activation.state_dict():
            raise ValueError(f"activation must have no parameters or buffers, got {activation}")
        else:
            check_function("activation", activation, example(linear))
        if pool is not None and type(pool) not in POOLS:
            names = ", ".join(p.__name__ for p in POOLS)
            raise TypeError(f"pool must be one of torch.nn's {names}, or None, got {pool!r}")
        if getattr(pool, "return_indices", False):
            raise ValueError(f"pool must return the pooled tensor alone, got {pool}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.linear, self.activation, self.pool, self.dropout = linear, activation, pool, dropout
        self.is_conv = isinstance(linear, nn.Conv2d)

    def _geometry(self) -> dict:
        c = self.linear
        return dict(stride=c.stride, padding=c.padding, dilation=c.dilation, groups=c.groups)

    def _is_tiling(self) -> bool:
        """Whether each unit is in one window of a max-pool, at most."""
        p = self.pool
        return type(p) is nn.MaxPool2d and (
            p.kernel_size == p.stride and p.padding == 0 and p.dilation == 1 and not p.ceil_mode
        )

    def _lines(self, z: Tensor, axis: int) -> list[Tensor]:
        """The first, second, ... row (axis -2) or column (axis -1) of all windows, as views."""
        side = self.pool.kernel_size
        k = side[axis] if isinstance(side, tuple) else side
        end = z.shape[axis] // k * k
        return [z[..., i:end:k, :] if axis == -2 else z[..., i:end:k] for i in range(k)]

    def _largest(self, z: Tensor, axis: int) -> Tensor:
        """The largest unit of each window along one axis; along both, the max-pool, much faster
        than torch's own on a CPU (appendix)."""
        return reduce(torch.maximum, self._lines(z, axis))

    def act(self, a: Tensor) -> Tensor:
        """activation(a), elementwise."""
        f = self.activation
        return f(a) if callable(f) else ACTIVATIONS[f][0](a)

    def pre(self, h: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(r, a): the linear map's input, flattened for an ``nn.Linear``, and its output."""
        if self.is_conv:
            return h, F.conv2d(h, weight, bias, **self._geometry())
        h = h if h.dim() == 2 else h.flatten(1)
        return h, F.linear(h, weight, bias)

    def post(self, r: Tensor, a: Tensor, mask: Tensor | None = None) -> Trace:
        """The rest of the block from its pre-activation; ``mask=None`` drops no unit."""
        z = self.act(a)
        if self._is_tiling():
            pooled = self._largest(self._largest(z, -2), -1)  # rows first: whole lines of memory
        else:
            pooled = z if self.pool is None else self.pool(z)
        return Trace(r, a, z, pooled, pooled if mask is None else pooled * mask, mask)

    def trace(
        self, h: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Trace:
        """The block's forward pass with the given weights."""
        return self.post(*self.pre(h, weight, bias), mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """h alone, for autograd: with torch's own pooling, whose derivative is the faster one."""
        z = self.act(self.pre(x, self.linear.weight, self.linear.bias)[1])
        h = z if self.pool is None else self.pool(z)
        return h if mask is None else h * mask

    def unpool(self, v: Tensor, t: Trace) -> Tensor:
        """v from the shape of h to that of z: through dropout and pool to the units they chose.

        Of equal units in a window max-pooling chose the first. Average pooling chose all of them,
        each for an equal share.
        """
        if t.mask is not None:
            v = v * t.mask
        if not self._is_tiling():
            return v if self.pool is None else torch.func.vjp(self.pool, t.z)[1](v)[0]
        # to the first row that has its window's largest unit, then to the first such column of it
        in_row = self._largest(t.z, -1)
        for z, largest, axis in ((in_row, t.pooled, -2), (t.z, in_row, -1)):
            out = torch.zeros_like(z, dtype=v.dtype)
            *places, last = self._lines(out, axis)
            for line, place in zip(self._lines(z, axis), places, strict=False):
                chosen = v * (line == largest)
                place.copy_(chosen)
                v = v - chosen
            last.copy_(v)
            v = out
        return v

    def local_vjp(self, v: Tensor, t: Trace) -> Tensor:
        """phi'(a) * v: from the shape of h to the shape of a, through this block's phi only."""
        return self.slope(self.unpool(v, t), t)

    def local_jvp(self, v: Tensor, t: Trace) -> Tensor:
        """The transpose of ``local_vjp``, from the shape of a to that of h: what a small change v
        of a does to h."""
        v, p = self.slope(v, t), self.pool
        if isinstance(p, (nn.MaxPool1d, nn.MaxPool2d)):  # what the chosen units do
            pool, sides = (F.max_pool2d, 2) if isinstance(p, nn.MaxPool2d) else (F.max_pool1d, 1)
            window = p.kernel_size, p.stride, p.padding, p.dilation, p.ceil_mode
            chosen: Any = pool(t.z, *window, return_indices=True)[1]
            v = v.flatten(-sides).gather(-1, chosen.flatten(-sides)).view_as(chosen)
        elif p is not None:
            v = p(v)
        return v if t.mask is None else v * t.mask

    def slope(self, v: Tensor, t: Trace) -> Tensor:
        """activation'(a) * v, elementwise."""
        if callable(self.activation):
            return torch.func.vjp(self.activation, t.a)[1](v)[0]
        return ACTIVATIONS[self.activation][1](v, t.z)

    def transpose(self, delta: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """delta W: from the shape of a to the shape of the block's input, that of ``like``.

        For a convolution this is the transposed convolution with ``weight``.
        """
        if self.is_conv:
            weight = weight.to(delta.dtype)
            return grad.conv2d_input(like.shape, weight, delta, **self._geometry())
        out = delta @ (weight if weight.dtype == delta.dtype else weight.to(delta.dtype))
        return out if out.shape == like.shape else out.reshape(like.shape)

    def outer(self, delta: Tensor, r: Tensor, scale: float = 1.0) -> Tensors:
        """scale * delta^T r, summed over batch and positions; keyed like the linear map's
        parameters."""
        r = r if r.dtype == delta.dtype else r.to(delta.dtype)
        if self.is_conv:
            shape = self.linear.weight.shape
            grads = {"weight": scale * grad.conv2d_weight(r, shape, delta, **self._geometry())}
        else:  # the product itself scales, at no cost; with beta=0 it ignores its first argument
            grads = {"weight": torch.addmm(delta.new_zeros(1), delta.mT, r, beta=0, alpha=scale)}
        if self.linear.bias is not None:
            grads["bias"] = scale * delta.sum((0, 2, 3) if self.is_conv else 0)
        return grads
