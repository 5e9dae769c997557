"""Modules of the functional ops, with the names and state of torch's own where torch has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fastlm.ops._checks import check_choice
from fastlm.ops.attention import causal_attention
from fastlm.ops.cross_entropy import REDUCTIONS, cross_entropy
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import apply_rotary

__all__ = ["CausalSelfAttention", "CrossEntropyLoss", "LinearCrossEntropyLoss", "RMSNorm"]

if TYPE_CHECKING or not hasattr(nn, "LinearCrossEntropyLoss"):
    _LinearCrossEntropyLoss = nn.Module
else:
    _LinearCrossEntropyLoss = nn.LinearCrossEntropyLoss


class RMSNorm(nn.Module):
    """:func:`fastlm.rms_norm` with a learned weight.

    Args:
        hidden_size: C, the last dimension of the input.
        eps: Added to the mean square.
        weight_offset: Added to the weight; the weight starts at ``1 - weight_offset``.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - weight_offset))
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(
            input, self.weight, self.eps, weight_offset=self.weight_offset, residual=residual
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with shared key/value heads and rotary positions.

    The projections are called ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, as in Hugging
    Face's Llama and Qwen3, and no tensor is transposed on the way to
    :func:`fastlm.causal_attention`.

    Args:
        hidden_size: C, width of input and output.
        num_heads: H, query heads.
        num_kv_heads: G, key and value heads; None for H.
        head_dim: D; None for C / H.
        qk_norm: Normalise each query and key head before rotation (Qwen3; Henry et al., 2020,
            https://arxiv.org/abs/2010.04245).
        bias: The projections to queries, keys and values have biases.
        out_bias: That of the output has one; None for ``bias``.
        window_size: How many of the latest keys each query sees, that of its own position included;
            None for all.
        eps: Of that normalisation.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qk_norm: bool = False,
        bias: bool = False,
        out_bias: bool | None = None,
        window_size: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        out_bias = bias if out_bias is None else out_bias
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window_size = window_size
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=out_bias)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """``(B, T, C)`` to the same shape.

        Args:
            hidden: Input.
            rotary: cos and sin of the T positions, each ``(T, D/2)`` or ``(B, T, D/2)``.
            extend: Given the keys and values of these tokens, ``(B, T, G, D)``, stores them and
                returns those of all tokens so far, ``(B, S, G, D)``: a cache.
        """
        batch, length, _ = hidden.shape
        query = self.q_proj(hidden).view(batch, length, self.num_heads, self.head_dim)
        key = self.k_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim)
        value = self.v_proj(hidden).view(batch, length, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = apply_rotary(query, key, *rotary)
        if extend is not None:
            key, value = extend(key, value)
        out = cast(Tensor, causal_attention(query, key, value, window_size=self.window_size))
        return self.o_proj(out.flatten(2))


def _refuse(module: str, **given: bool) -> None:
    """Raise for the first of torch's options that is given and that the op does not have."""
    for name, is_given in given.items():
        if is_given:
            raise NotImplementedError(f"{module}: {name} is not supported")


def _options_of(loss: CrossEntropyLoss | LinearCrossEntropyLoss) -> str:
    """What a loss is told that is not the default; of class weights, that there are some."""
    defaults = {
        "reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0, "softcap": None,
        "logit_scale": 1.0, "z_loss": 0.0, "backend": "auto",
    }  # fmt: skip
    values = {name: getattr(loss, name) for name in defaults}
    shown = [f"{name}={values[name]!r}" for name in defaults if values[name] != defaults[name]]
    if loss.weight is not None:
        shown.insert(0, f"weight=({len(loss.weight)},)")
    return ", ".join(shown)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:func:`fastlm.cross_entropy` in place of :class:`torch.nn.CrossEntropyLoss`.

    As there, classes are in dimension 1 of an input with more than one: ``(V,)``, ``(N, V)`` or
    ``(N, V, ...)``, of which the triton backend makes no copy, and the loss is at least float32.
    Targets are class indices; where they are probabilities, of the input's shape, the call is
    torch's own, without the options that torch does not have.

    Args:
        weight: ``(V,)``: the factor of the loss of each class.
        size_average: Must be None.
        ignore_index: Positions with this target have loss 0 and gradient 0.
        reduce: Must be None.
        reduction: ``"mean"`` over positions that are not ignored, each counting as much as the
            weight of its target; ``"sum"`` or ``"none"``.
        label_smoothing: From 0 to 1.
        softcap: As in :func:`fastlm.cross_entropy`, as the next three.
        logit_scale: Factor of the logits.
        z_loss: Factor of the squared log-sum-exp.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        NotImplementedError: One of torch's options that this class does not have is set, or one of
            ours together with probabilities.
        ValueError: ``reduction`` is not one of those above.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        backend: str = "auto",
    ) -> None:
        name = type(self).__name__
        _refuse(name, size_average=size_average is not None, reduce=reduce is not None)
        check_choice(name, "reduction", reduction, REDUCTIONS)
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        self.softcap, self.logit_scale, self.z_loss = softcap, logit_scale, z_loss
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if isinstance(target, Tensor) and target.is_floating_point():
            _refuse(
                f"{type(self).__name__} with probabilities as targets",
                softcap=self.softcap is not None,
                logit_scale=self.logit_scale != 1.0,
                z_loss=self.z_loss != 0.0,
                backend=self.backend not in ("auto", "torch"),
            )
            return super().forward(input, target)
        logits = input.movedim(1, -1) if input.dim() > 1 else input
        return cross_entropy(
            logits, target, self.weight,
            ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, softcap=self.softcap,
            logit_scale=self.logit_scale, z_loss=self.z_loss, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return _options_of(self)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):
    """:func:`fastlm.linear_cross_entropy` with a learned layer.

    Takes the place of torch's class of that name, where torch has one (2.13), and has its
    parameters, ``linear.weight`` and ``linear.bias``; leading dimensions may be any number.  Where
    these are DTensors split over processes, so is the loss.

    Args:
        in_features: C, the last dimension of the input.
        num_classes: V.
        out_features: Must be empty.
        bias: Whether the layer has a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        reduction: ``"mean"`` over positions that are not ignored, each counting as much as the
            weight of its target; ``"sum"`` or ``"none"``.
        weight: ``(V,)``: the factor of the loss of each class.
        ignore_index: Positions with this target have loss 0 and gradient 0; None is -100.
        label_smoothing: From 0 to 1.
        options: Must be None: the loss is always computed in chunks.
        softcap: As in :func:`fastlm.linear_cross_entropy`, as the next three.
        logit_scale: Factor of the logits.
        z_loss: Factor of the squared log-sum-exp.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        NotImplementedError: One of torch's options that this class does not have is set.
        ValueError: ``reduction`` is not one of those above.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        backend: str = "auto",
    ) -> None:
        name = type(self).__name__
        _refuse(name, out_features=len(out_features) > 0, options=options is not None)
        check_choice(name, "reduction", reduction, REDUCTIONS)
        # not torch's own, whose arguments differ between releases
        nn.Module.__init__(self)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.reduction = reduction
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.label_smoothing = label_smoothing
        self.softcap, self.logit_scale, self.z_loss = softcap, logit_scale, z_loss
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            input, self.linear.weight, target,
            linear_bias=self.linear.bias, weight=self.weight, reduction=self.reduction,
            ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            softcap=self.softcap, logit_scale=self.logit_scale, z_loss=self.z_loss,
            backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return _options_of(self)
