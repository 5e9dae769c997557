"""The most likely classes of a linear layer's logits, which are never held together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastlm.ops._checks import (
    check_dtype,
    check_integer,
    check_tensor,
    check_that,
    is_distributed,
)
from fastlm.ops._define import define_op
from fastlm.ops._linear import cast_to, check_linear
from fastlm.ops._shards import sharded_layer
from fastlm.ops.cross_entropy import check_transform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OP = "linear_top_k"
BACKENDS = {
    "triton": "fastlm.kernels.linear_top_k",
    "torch": "fastlm.ops.eager.linear_top_k",
    "reference": "fastlm.ops.reference.linear_top_k",
}


class TopK(NamedTuple):
    """The most likely classes of each position, most likely first.

    Attributes:
        logprobs: ``(..., k)``, float32, float64 for float64 inputs.
        indices: ``(..., k)`` int64; of equally likely classes any.
    """

    logprobs: Tensor
    indices: Tensor


def linear_top_k(
    input: Tensor,
    linear_weight: Tensor,
    k: int,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> TopK:
    """The k most likely classes, with their log-probabilities among all V.

    Exact, and without gradient.  Chunks of rows of logits are held, in float32, and never all of
    ``(N, V)``: for the teacher of a distillation, or to see what a model would say.

    The classes may be split over processes as in :func:`linear_cross_entropy`.  Each rank sends its
    own k best and the sums of its classes, and every rank gets what one process would return.

    Args:
        input: ``(..., C)``; float32, bfloat16, float16 or float64.
        linear_weight: ``(V, C)`` in the dtype of ``input``.  With ``process_group``,
            ``(V / ranks, C)``: rank r's from class r V / ranks.
        k: From 1 to V.
        linear_bias: ``(V,)`` in the dtype of ``input``; split as ``linear_weight`` is.
        softcap: Positive, as in :func:`cross_entropy`.
        logit_scale: Factor of the logits, bias included.
        process_group: The processes that ``linear_weight`` is split over.  None takes a DTensor's
            from its mesh; V need not divide by the number of ranks there.
        backend: ``"auto"``, ``"triton"`` (k up to 128), ``"torch"`` or ``"reference"``.

    Returns:
        Log-probabilities and classes, ``(..., k)`` each, most likely first.  A position with NaN or
        infinity among its logits, or nothing but -infinity, has NaN beside k different classes.

    Raises:
        ValueError: Shapes or devices do not match, a number is out of range, or a DTensor is placed
            otherwise.  On CPU, outside ``torch.compile``, also on every rank where ranks differ in
            the size or width of ``input``, in ``k``, ``linear_bias`` or the number of their
            classes.  Elsewhere other classes make the result NaN; other sizes are an error, or a
            wait, of the collectives.
        NotImplementedError: ``backend`` is named and does not take the call.
        TypeError: A dtype is not one of those above, dtypes differ outside autocast, or
            ``process_group`` is not one of this process.
    """
    check_integer(_OP, "k", k)
    check_transform(_OP, softcap, logit_scale)
    group = ""
    if process_group is not None or is_distributed(linear_weight):
        input, linear_weight, linear_bias, group, vocab_size = sharded_layer(
            _OP, input, linear_weight, linear_bias, process_group, k=k
        )
    check_tensor(_OP, "input", input)
    check_dtype(_OP, "input", input)
    check_that(_OP, "input", input.dim() > 0, "have at least one dimension", "a scalar")
    dtype = check_linear(_OP, input, linear_weight, linear_bias, may_be_empty=group != "")
    if not group:
        vocab_size = linear_weight.shape[0]
    check_that(_OP, "k", 1 <= k <= vocab_size, f"be in [1, {vocab_size}]", k)
    params = (None if x is None else x.detach() for x in (input, linear_weight, linear_bias))
    return TopK(
        *_forward(*cast_to(dtype, *params), k, softcap, logit_scale, group, vocab_size, backend)
    )


def _forward_fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    k: int,
    softcap: float | None,
    logit_scale: float,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    logprobs = input.new_empty(
        (*input.shape[:-1], k), dtype=torch.promote_types(input.dtype, torch.float32)
    )
    return logprobs, torch.empty_like(logprobs, dtype=torch.int64)


_forward = define_op(_OP, "forward", BACKENDS, fake=_forward_fake)
