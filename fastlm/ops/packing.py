"""Where packed documents begin and end: ``cu_seqlens`` from what a batch says of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops._checks import (
    INDEX_DTYPES,
    PLAIN,
    check_dtype,
    check_integer,
    check_tensor,
    check_that,
)

_INT32_MAX = 2**31 - 1


def cu_seqlens_from_position_ids(position_ids: Tensor, max_documents: int | None = None) -> Tensor:
    """The boundaries of packed documents, from the position of each token in its document.

    A document begins with each row and wherever a position is not one more than that before it, as
    in the batches of Hugging Face's ``DataCollatorWithFlattening``.  Nothing is read on the host,
    and the shape of the result does not depend on the values, so that calls can be compiled and
    captured in CUDA graphs.

    Args:
        position_ids: ``(T,)`` or ``(B, T)``, integers; rows follow one another, like the tokens of
            ``query.reshape(1, B * T, H, D)``.
        max_documents: How many documents there may be; None for one per token, always enough.  Each
            costs the kernels of :func:`fastlm.causal_attention` a program per head, empty or not:
            with thousands of tokens tell it.

    Returns:
        ``(max_documents + 1,)`` int32, for ``cu_seqlens_q``: document d has the tokens from
        ``[d]`` to ``[d + 1]``; those that there are not are empty, at the end.

    Raises:
        ValueError: A shape or ``max_documents`` is none of those above, or on a CPU there are more
            documents.  On a GPU, and in compiled code, the boundaries are then those of the first
            ``max_documents``: the tokens of the others belong to none, and attention gives them 0.
        TypeError: ``position_ids`` are no integers.
    """
    op = "cu_seqlens_from_position_ids"
    _check(op, "position_ids", position_ids, max_documents)
    ids = position_ids.long()  # no narrower: 255 + 1 is not 0
    return _boundaries(op, ids, ids[..., :-1] + 1, max_documents)


def cu_seqlens_from_document_ids(document_ids: Tensor, max_documents: int | None = None) -> Tensor:
    """The boundaries of packed documents, from the document that each token belongs to.

    A document begins with each row and wherever the id changes; ids need no order.  The rest is as
    in :func:`fastlm.cu_seqlens_from_position_ids`.

    Args:
        document_ids: ``(T,)`` or ``(B, T)``, integers.
        max_documents: How many documents there may be; None for one per token.

    Returns:
        ``(max_documents + 1,)`` int32, for ``cu_seqlens_q``.

    Raises:
        ValueError: As there.
        TypeError: ``document_ids`` are no integers.
    """
    op = "cu_seqlens_from_document_ids"
    _check(op, "document_ids", document_ids, max_documents)
    return _boundaries(op, document_ids, document_ids[..., :-1], max_documents)


def _check(op: str, name: str, ids: Tensor, max_documents: int | None) -> None:
    check_tensor(op, name, ids)
    check_dtype(op, name, ids, INDEX_DTYPES)
    check_that(op, name, ids.dim() in (1, 2), "have shape (T,) or (B, T)", tuple(ids.shape))
    few = ids.numel() <= _INT32_MAX
    check_that(op, name, few, f"have at most {_INT32_MAX} tokens", ids.numel())
    if max_documents is not None:
        check_integer(op, "max_documents", max_documents)
        check_that(op, "max_documents", max_documents >= 0, "be at least 0", max_documents)


def _boundaries(op: str, ids: Tensor, expected: Tensor, max_documents: int | None) -> Tensor:
    """Documents begin where ``ids``, from the second of each row on, are not as ``expected``."""
    begins = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    begins[..., 1:] = ids[..., 1:] != expected
    document = begins.flatten().cumsum(0)  # of each token, from 1
    if max_documents is None:
        max_documents = ids.numel()
    elif _can_look(document) and document.numel() > 0:
        found = int(document[-1])
        enough = found <= max_documents
        check_that(op, "max_documents", enough, f"be at least the {found} documents", max_documents)
    numbers = torch.arange(1, max_documents + 2, device=ids.device)
    return torch.searchsorted(document, numbers, out_int32=True)


def _can_look(tensor: Tensor) -> bool:
    """Whether its values are at hand on the host."""
    return type(tensor) in PLAIN and tensor.is_cpu and not torch.compiler.is_compiling()
