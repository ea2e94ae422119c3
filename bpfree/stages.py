"""Any model cut into stages, each of which learns from a loss of its own (arXiv 2310.07885)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .init import initialise


class Stage(nn.Module):
    """A part of a model, and a head that says which class its activity speaks for.

    Args:
        body: (B, ...) -> activity h, a module.
        head: h -> scores (B, C), a module.
    """

    def __init__(self, body: nn.Module, head: nn.Module):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        """The activity h."""
        return self.body(x)

    def scores(self, h: Tensor) -> Tensor:
        """The head's class scores (B, C) of an activity."""
        return self.head(h)


class Stages(nn.ModuleList):
    """Stages, input first. The last one's head is the model's classifier: ``forward`` gives its
    logits. ``bpfree.training.stages.backward`` trains each by its own loss.

    Args:
        stages: each a ``Stage``; made by hand, ``Stages([Stage(body, head), ...])`` cuts what
            ``split`` does not know.
    """

    def __init__(self, stages: Iterable[nn.Module]):
        super().__init__(stages)
        for i, stage in enumerate(self, 1):
            if not isinstance(stage, Stage):
                raise TypeError(f"stage {i} must be a Stage, got {type(stage).__name__}")

    def __iter__(self) -> Iterator[Stage]:  # type: ignore[override]  # ModuleList's are modules
        return super().__iter__()  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self:
            x = stage(x)
        return stage.scores(x)


class LinearHead(nn.Module):
    """Scores of a linear map of the mean over positions, or of the class token, the first of
    tokens (B, T, n)."""

    def __init__(self, n: int, num_classes: int, generator: torch.Generator | None = None):
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, n, num_classes)
        initialise(self.linear, "torch", generator)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h[:, 0] if h.dim() == 3 else h.flatten(2).mean(2) if h.dim() > 3 else h)


class _Tokens(nn.Module):
    """A ViT's patches, its class token before them, each with its position."""

    def __init__(self, vit: Any):
        super().__init__()
        self.conv_proj, self.dropout = vit.conv_proj, vit.encoder.dropout
        self.class_token, self.pos_embedding = vit.class_token, vit.encoder.pos_embedding

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        return self.dropout(x + self.pos_embedding)


class _First(nn.Module):
    """The class token."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, 0]


def _units(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Runs of modules that stay together: each begins with a map of channels to others, and what
    follows without one (normalisation, activation, pooling) goes with it; flattening, with what
    comes after it."""
    units: list[list[nn.Module]] = [[]]
    late: list[nn.Module] = []
    for m in modules:
        if isinstance(m, nn.Flatten):
            late.append(m)
            continue
        if _width(m) and any(map(_width, units[-1])):
            units.append([])
        units[-1] += [*late, m]
        late = []
    units[-1] += late
    return units


def _width(module: nn.Module) -> int:
    """Channels of a module's output: those of its last map; 0 without any."""
    widths = (getattr(m, "out_channels", getattr(m, "out_features", 0)) for m in module.modules())
    return [0, *filter(None, widths)][-1]


def _take_apart(model: Any) -> tuple[list[list[nn.Module]], nn.Module]:
    """A model's units below its classifier, and the classifier."""
    if isinstance(model, nn.Sequential):
        *units, last = _units(model)
        return units, nn.Sequential(*last)
    from torchvision.models import VGG, ResNet, VisionTransformer

    if isinstance(model, ResNet):
        stem = (model.conv1, model.bn1, model.relu, model.maxpool)
        blocks = (*model.layer1, *model.layer2, *model.layer3, *model.layer4)
        return _units((*stem, *blocks)), nn.Sequential(model.avgpool, nn.Flatten(), model.fc)
    if isinstance(model, VGG):
        return _units(model.features), nn.Sequential(model.avgpool, nn.Flatten(), model.classifier)
    if isinstance(model, VisionTransformer):
        head = nn.Sequential(model.encoder.ln, _First(), model.heads)
        return _units([_Tokens(model), *model.encoder.layers]), head
    raise TypeError(
        "model must be torchvision's ResNet, VGG or VisionTransformer, or an nn.Sequential, got "
        f"{type(model).__name__}; cut it by hand: Stages([Stage(body, head), ...]), the last head "
        "its classifier"
    )


def split(
    model: nn.Module,
    n: int,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> Stages:
    """Cut a model into n stages, each with a linear head of its own; the last has the model's.

    The modules are the model's own, so that training the stages trains it. Cuts lie between units
    (a residual or encoder block; a convolution or linear map with what follows it), as many in each
    stage as can be, the first ones one more. Source: Yin et al., arXiv 2310.07885.

    Args:
        model: torchvision's ResNet, VGG or VisionTransformer, or an ``nn.Sequential``.
        n: number of stages, from 1 to that of units below the classifier.
        num_classes: of the inner heads; None: as many as the classifier has.
        generator: source of their weights; None is torch's default.

    Raises:
        TypeError: for a model it does not know, with what to write by hand.
        ValueError: if n is not so.
    """
    units, classifier = _take_apart(model)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(units):
        raise ValueError(f"n must be a whole number in 1..{len(units)}, the units that "
                         f"{type(model).__name__} has below its classifier, got {n!r}")  # fmt: skip
    like = next(classifier.parameters())
    stages = []
    for i, part in enumerate(torch.arange(len(units), device="cpu").tensor_split(n), 1):
        body = nn.Sequential(*(m for unit in part for m in units[unit]))
        head: nn.Module = classifier
        if i < n:
            head = LinearHead(_width(body), num_classes or _width(classifier), generator).to(like)
        stages.append(Stage(body, head))
    return Stages(stages)
