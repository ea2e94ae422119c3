"""Any model of torch's layers with other feedback, its forward pass the same to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .refuse import check_scale, one_of
from .rules.attention import power
from .rules.feedback import like_weight

RULES = ("feedback-alignment", "sign-symmetry", "kolen-pollack", "attention")


class _Descend(torch.autograd.Function):
    """y, through which the error reaches x by B, whatever made y."""

    @staticmethod
    def forward(ctx, y, x, B, geometry):
        ctx.save_for_backward(B)
        ctx.like, ctx.geometry = (x.shape, x.dtype), geometry
        return y.view_as(y)

    @staticmethod
    def backward(ctx, delta):
        (shape, dtype), B = ctx.like, ctx.saved_tensors[0].to(delta.dtype)  # as autocast has it
        conv = ctx.geometry is not None
        v = nn.grad.conv2d_input(shape, B, delta, *ctx.geometry) if conv else delta @ B
        return delta, v.to(dtype), None, None


def _exchange(layer, op, x, name="weight", geometry=None):
    """op(x, W), forward pass and weight gradient torch's own; the error goes down through B."""
    W, B = getattr(layer, name), getattr(layer, name.replace("weight", "feedback"), None)
    if not torch.is_grad_enabled():
        return op(x, W)
    M = (layer.attention(W) if B is None else B).detach()
    if isinstance(B, nn.Parameter) and W.requires_grad:
        W = W + (B - M)  # B - M is zero: B gets W's gradient
    return _Descend.apply(op(x.detach(), W), x, M, geometry) if x.requires_grad else op(x, W)


class FeedbackLinear(nn.Linear):
    """``nn.Linear`` whose error descends by ``feedback``, or by ``attention(weight)``."""

    def forward(self, x):
        return _exchange(self, lambda x, W: F.linear(x, W, self.bias), x)


class FeedbackConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose error descends by ``feedback``, or by ``attention(weight)``."""

    def forward(self, x):
        padding, mode = self.padding, self.padding_mode
        if isinstance(padding, str) or mode != "zeros":
            mode = "constant" if mode == "zeros" else mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)
        where = self.stride, padding, self.dilation, self.groups
        conv = lambda x, W: F.conv2d(x, W, self.bias, *where)  # noqa: E731
        return _exchange(self, conv, x, geometry=where)


class FeedbackAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of a sequence to itself: the error descends by other matrices in
    its two projections; between them, in the softmax and the products, it is torch's own."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                **options):  # fmt: skip
        if not torch.is_grad_enabled():
            masks = dict(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
            return super().forward(query, key, value, need_weights=need_weights, **masks, **options)
        masked = attn_mask is not None or key_padding_mask is not None or options.get("is_causal")
        if query is not key or key is not value or query.dim() != 3 or masked or need_weights:
            raise ValueError("a converted MultiheadAttention takes query = key = value of shape "
                             "(B, T, n), no masks, and need_weights=False")  # fmt: skip
        x, out = query.transpose(0, 1) if self.batch_first else query, self.out_proj
        (T, N, n), heads = x.shape, self.num_heads
        a = _exchange(self, lambda x, W: F.linear(x, W, self.in_proj_bias), x, "in_proj_weight")
        a = a.unflatten(-1, (3, n)).permute(2, 0, 1, 3).contiguous()
        q, k, v = (t.view(T, N, heads, n // heads).permute(1, 2, 0, 3) for t in a)
        h = F.scaled_dot_product_attention(q, k, v, None, self.dropout * self.training)
        h = h.permute(2, 0, 1, 3).reshape(T * N, n)
        h = _exchange(out, lambda x, W: F.linear(x, W, out.bias), h).view(T, N, n)
        return (h.transpose(0, 1) if self.batch_first else h), None


_OTHER: dict[type, type] = {
    nn.Linear: FeedbackLinear, nn.Conv2d: FeedbackConv2d, nn.MultiheadAttention: FeedbackAttention,
}  # fmt: skip
_READS = ("Block", "ShiftedWindowAttention", "ShiftedWindowAttentionV2")  # read their layers' W


def _signs(W: Tensor, scale: float) -> Tensor:
    return W.sign() * scale


def convert(
    model: nn.Module,
    rule: str | Callable[[Tensor], Tensor],
    *,
    scale: float = 1.0,
    p: float = 2.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Exchange, in place, the backward weight of every Linear, Conv2d and MultiheadAttention.

        delta_l = phi_l'(a_l) * (delta_{l+1} B_{l+1}),    B_l instead of W_l

    What has parameters besides (normalisation, embeddings) is left alone: ``left_alone(model)``.
    Autograd, autocast, ``torch.compile``, deep copies and DDP go on as they did; fixed B_l are
    buffers, learning ones parameters, each next to its weight: ``weight`` has ``feedback``.

    Args:
        model: any module that calls its layers, and does not read their weights itself.
        rule: ``"feedback-alignment"`` (B fixed), ``"kolen-pollack"`` (B learns with W's gradient:
            give the optimiser a weight decay), ``"sign-symmetry"`` (B = scale sign(W)),
            ``"attention"`` (B = sign(W) |W|^(p-1); p = 2 is backprop, theorem T11), or a function
            W -> B.
        scale: > 0; of the random B as of ``FeedbackAlignment``, or of the signs.
        generator: source of B; None is torch's default.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError: for a model without such layers, one that is converted already, or
            a layer that would not obey, by name; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not callable(rule):
        one_of("rule, if not a function,", rule, RULES)
    check_scale("scale", scale)
    if not 1 <= p < float("inf"):
        raise ValueError(f"p must be a finite number, at least 1, got {p!r}")
    own = {"sign-symmetry": partial(_signs, scale=scale), "attention": partial(power, p=p)}
    attention = rule if callable(rule) else own.get(rule)
    kind = nn.Parameter if rule == "kolen-pollack" else nn.Buffer
    places: list[tuple[Any, str, type]] = list(_places(model))
    if not places:
        raise ValueError("model must have a Linear, a Conv2d or a MultiheadAttention, got none: "
                         f"{type(model).__name__}")  # fmt: skip
    if attention:
        for layer, name, _ in places:
            W = layer.get_parameter(name).detach()
            M = attention(W)
            if not isinstance(M, Tensor) or M.shape != W.shape:
                raise ValueError(
                    f"rule must map W to a tensor of its shape {tuple(W.shape)}, got {M}"
                )
    for layer, name, other in places:
        layer.__class__ = other
        if attention:
            layer.attention = attention
        else:
            B = kind(like_weight(getattr(layer, name).detach(), scale, generator))
            setattr(layer, name.replace("weight", "feedback"), B)
    weights = {n: model.get_submodule(n)._parameters.get("weight") for n in left_alone(model)}
    if maps := [n for n, W in weights.items() if W is not None and W.dim() > 1]:
        warnings.warn(f"the feedback of {', '.join(maps)} is left alone", stacklevel=2)
    return model


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, type]]:
    """(layer, name of its weight, class to be) of all that is exchanged; raises at what cannot."""
    outs = {id(m.out_proj) for m in model.modules() if type(m) is nn.MultiheadAttention}
    for path, m in model.named_modules():
        what = f"{path or 'model'} ({type(m).__name__})"
        if hasattr(m, "feedback") or hasattr(m, "attention") and type(m) in _OTHER.values():
            raise ValueError(f"model must not be converted already, but {what} is")
        if type(m).__name__ in _READS:
            raise TypeError(f"{what} reads its layers' weights itself: a bpfree.Network takes a "
                            "rule; other modules must call their layers")  # fmt: skip
        other = FeedbackLinear if id(m) in outs else _OTHER.get(type(m))
        if other is None:
            if isinstance(m, tuple(_OTHER)):
                raise TypeError(f"{what} must be torch's own class, not derived from it")
            continue
        name, odd = "weight", False
        if isinstance(m, nn.MultiheadAttention):
            name, odd = "in_proj_weight", m.bias_k is not None or m.add_zero_attn
        if odd or m._parameters.get(name) is None:
            raise ValueError(f"{what} must own its {name} (no pruning, no kdim, vdim, add_bias_kv "
                             "or add_zero_attn)")  # fmt: skip
        yield m, name, other


def left_alone(model: nn.Module) -> list[str]:
    """Names of the modules with parameters of their own that ``convert`` does not exchange."""
    kept = tuple(_OTHER.values())
    return [n for n, m in model.named_modules() if m._parameters and not isinstance(m, kept)]
