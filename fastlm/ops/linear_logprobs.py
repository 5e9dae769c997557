"""Log-probabilities of targets under a linear layer's logits, which are never held together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastlm.ops._checks import check_integer, is_distributed
from fastlm.ops._linear import check_linear_loss, shifted
from fastlm.ops._linear_loss import BACKENDS, needs_gradient, per_position
from fastlm.ops._shards import sharded_loss
from fastlm.ops.cross_entropy import check_loss_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BACKENDS", "linear_logprobs"]

_OP = "linear_logprobs"


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: int = 0,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """The log-probability of each target under the logits of a linear layer; differentiable.

    As ``reduction="none"`` of :func:`linear_cross_entropy`, whose arguments these are, with the
    other sign: for the policies of reinforcement learning and preference losses.

    Returns:
        ``(...)``, with ``shift`` without the last positions; float32, float64 for float64 inputs;
        zero where the target is ignored.

    Raises:
        The errors of :func:`linear_cross_entropy`.
    """
    check_loss_options(_OP, "none", ignore_index, 0.0, softcap, logit_scale, 0.0)
    check_integer(_OP, "shift", shift)
    group = ""
    if process_group is not None or is_distributed(linear_weight):
        input, linear_weight, linear_bias, target, _, group, vocab_size = sharded_loss(
            _OP, input, linear_weight, linear_bias, target, None, process_group
        )
    dtype = check_linear_loss(_OP, input, linear_weight, target, linear_bias, group)
    if not group:
        vocab_size = linear_weight.shape[0]
    target = shifted(_OP, target.long(), shift, ignore_index)
    params = (input, linear_weight, linear_bias)
    options = (ignore_index, 0.0, softcap, logit_scale, False)
    try:
        losses, *_ = per_position(
            needs_gradient(*params), *params, target, None, *options, group, vocab_size,
            dtype, backend,
        )  # fmt: skip
    except (IndexError, NotImplementedError, ValueError) as error:
        # the operator is the other function's
        raise type(error)(str(error).replace("linear_cross_entropy", _OP)) from error
    if shift:
        losses = losses[..., : losses.shape[-1] - shift]
    return -losses
