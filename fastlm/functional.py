"""The public functions, all of them also at the top of ``fastlm``."""

from __future__ import annotations

from typing import Any

from fastlm.compat import sdpa
from fastlm.compat.sdpa import scaled_dot_product_attention
from fastlm.ops import _explain
from fastlm.ops._checked import KernelMismatch, checked
from fastlm.ops._checks import check_choice
from fastlm.ops._explain import Explanation
from fastlm.ops.attention import causal_attention
from fastlm.ops.attention_with_kv_cache import attention_with_kv_cache
from fastlm.ops.cross_entropy import LossStats, cross_entropy
from fastlm.ops.glu import glu, swiglu
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.linear_logprobs import linear_logprobs
from fastlm.ops.linear_top_k import TopK, linear_top_k
from fastlm.ops.packing import cu_seqlens_from_document_ids, cu_seqlens_from_position_ids
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import apply_rotary

OPS = {
    op.__name__: op
    for op in (
        apply_rotary,
        attention_with_kv_cache,
        causal_attention,
        cross_entropy,
        glu,
        linear_cross_entropy,
        linear_logprobs,
        linear_top_k,
        rms_norm,
        swiglu,
    )
}

# Functions that have no backends and hand each call on, to one of those above or to torch's own,
# and what says where to.
ROUTERS = {op.__name__: op for op in (scaled_dot_product_attention,)}
_ROUTES = {"scaled_dot_product_attention": sdpa.route}

__all__ = [
    "Explanation",
    "KernelMismatch",
    "LossStats",
    "TopK",
    "checked",
    "cu_seqlens_from_document_ids",
    "cu_seqlens_from_position_ids",
    "explain",
    *OPS,
    *ROUTERS,
]


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run ``fastlm.<op>(*args, **kwargs)`` and why the others would not.

    Of a function that hands its calls on, say where to and why.

    Nothing is computed and no memory is allocated.  Print the result, or read ``steps``
    and ``route``.

    Args:
        op: Name of a public op, ``"causal_attention"`` for example.
        args: What the op would be called with; inputs that require a gradient explain the backward.
        kwargs: Likewise.

    Raises:
        ValueError: ``op`` is not one of ours, or the op itself would raise it for these arguments.
    """
    known = OPS | ROUTERS
    check_choice("explain", "op", op, tuple(known))
    route = _ROUTES[op](*args, **kwargs) if op in _ROUTES else None
    return _explain.explain(known[op], args, kwargs, route)
