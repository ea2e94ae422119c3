"""Models that the recorded experiments cut into stages, drawn from a generator as everything is."""

from __future__ import annotations

import torch
from torch import nn

from ..training.device import global_draws_from

CPU = torch.device("cpu")


def resnet8(classes: int, *, width: int = 16, channels: int = 3, generator: torch.Generator):
    """A 3x3 convolution, then three of torchvision's residual blocks, twice as wide and half as
    high each, the mean over positions, a linear map. Initial weights as those of its ResNets."""
    from torchvision.models.resnet import BasicBlock

    with global_draws_from(generator, CPU):
        layers = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                  nn.ReLU(), BasicBlock(width, width)]  # fmt: skip
        for n in (width, 2 * width):
            shortcut = nn.Sequential(nn.Conv2d(n, 2 * n, 1, 2, bias=False), nn.BatchNorm2d(2 * n))
            layers.append(BasicBlock(n, 2 * n, 2, shortcut))
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)]
        net = nn.Sequential(*layers, *head)
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


def torchvision_model(name: str, classes: int, side: int, *, generator: torch.Generator, **options):
    """A model of torchvision's for images of ``side`` pixels. A ResNet starts with a 3x3
    convolution where they have 64 or less, and pools after it only where they have more than 32."""
    from torchvision import models

    with global_draws_from(generator, CPU):
        if name.startswith("vit"):
            options["image_size"] = side
        net = getattr(models, name)(num_classes=classes, **options)
        if isinstance(net, models.ResNet) and side <= 64:
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = net.maxpool if side > 32 else nn.Identity()
    return net
