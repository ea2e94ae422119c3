"""Initial weights: uniform, within a bound that the numbers of inputs and outputs give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .refuse import one_of

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


def initialise(linear: nn.Module, init: str, generator: torch.Generator | None) -> None:
    """Draw the weights of an ``nn.Linear`` or ``nn.Conv2d``; biases are zero."""
    one_of("init", init, sorted(INITS))
    weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
    receptive = math.prod(weight.shape[2:])
    bound = INITS[init](weight.shape[1] * receptive, weight.shape[0] * receptive)
    with torch.no_grad():
        weight.copy_(uniform(weight.shape, bound, generator))
        if bias is not None:
            bias.zero_()
