"""Where a token of a row stands in a cache, whether a row fits; its rotation; its 8 bits."""

import triton
import triton.language as tl

from ..attention.tiles import document_bounds


@triton.jit
def row_length(seqlens_ptr, row, cache_length, new, capacity, HAS_LENGTHS: tl.constexpr):
    """``(tokens before the append, whether they and ``new`` more fit)``."""
    start = cache_length
    if HAS_LENGTHS:
        start = tl.load(seqlens_ptr + row)
    # not start + new, which may pass 2**31
    return start, (start >= 0) & (start <= capacity - new)


@triton.jit
def row_of(rank, bounds_ptr, rows, num_tokens, per_token, BLOCK: tl.constexpr):
    """``(row, block in it)`` of the rank-th program over rows whose tokens stand side by side.

    A token has ``per_token`` lanes.  Row b has the programs from ``bounds[b] per_token // BLOCK +
    b`` on: so many or one more than it needs, without a sum over counts.
    """
    lanes = tl.arange(0, 128)
    before = 0
    for start in range(0, rows, 128):
        candidates = start + lanes
        inside = candidates < rows
        bounds = tl.load(bounds_ptr + candidates, mask=inside, other=0)
        bounds = tl.minimum(tl.maximum(bounds, 0), num_tokens).to(tl.int64)
        first = bounds * per_token // BLOCK + candidates
        before += tl.sum((inside & (first <= rank)).to(tl.int32), 0)
    row = tl.maximum(before - 1, 0)
    token, _ = document_bounds(row, bounds_ptr, rows, num_tokens)
    return row, (rank - (token.to(tl.int64) * per_token // BLOCK + row)).to(tl.int32)


@triton.jit
def pages_exist(start, end, row, table_ptr, max_pages, page_size, num_pages):
    """Whether the table names pages for the tokens from ``start`` to ``end`` of a row."""
    exist = end >= 0
    lanes = tl.arange(0, 128)
    for first in range(start // page_size, tl.cdiv(end, page_size), 128):
        inside = first + lanes < tl.cdiv(end, page_size)
        pages = tl.load(table_ptr + row * max_pages + first + lanes, mask=inside, other=0)
        all_exist = tl.min(((pages >= 0) & (pages < num_pages)).to(tl.int32), 0)
        exist = exist & (all_exist == 1)
    return exist


@triton.jit
def token_offsets(
    tokens, mask, row, table_ptr, max_pages, page_size, stride_row, stride_token,
    IS_PAGED: tl.constexpr,
):  # fmt: skip
    """Elements from the cache's beginning to each of a row's ``tokens``, where ``mask``."""
    # int64: a cache of 4 rows of 524,288 tokens of 8 heads of 128 has 2**31 elements
    tokens = tokens.to(tl.int64)
    if IS_PAGED:
        pages = tl.load(table_ptr + row * max_pages + tokens // page_size, mask=mask, other=0)
        return pages.to(tl.int64) * stride_row + tokens % page_size * stride_token
    else:
        return row * stride_row + tokens * stride_token


@triton.jit
def load_turned(
    x_ptr, offsets, inside, positions, cos_ptr, sin_ptr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """``(len(offsets), BLOCK)``: heads at ``offsets``, turned by the angles of ``positions``.

    Channel c becomes x[c] cos -+ x[partner of c] sin, rounded to the dtype of x; from 2 PAIRS on it
    stays.  With PAIRS == 0 nothing turns.
    """
    cols = tl.arange(0, BLOCK)
    mask = inside[:, None] & (cols < DIM)[None, :]
    x = tl.load(x_ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0)
    if PAIRS > 0:
        if INTERLEAVED:
            partner, pair, is_first = cols ^ 1, cols // 2, cols % 2 == 0
        else:
            is_first = cols < PAIRS
            pair = tl.where(is_first, cols, cols - PAIRS)
            partner = tl.where(is_first, cols + PAIRS, cols - PAIRS)
        turns = inside[:, None] & (cols < 2 * PAIRS)[None, :]
        other = tl.load(x_ptr + offsets[:, None] + partner[None, :], mask=turns, other=0.0)
        angles = positions.to(tl.int64)[:, None] * PAIRS + pair[None, :]
        cos = tl.load(cos_ptr + angles, mask=turns, other=1.0).to(ACC)
        sin = tl.load(sin_ptr + angles, mask=turns, other=0.0).to(ACC)
        sin = tl.where(is_first[None, :], -sin, sin)
        x = (x.to(ACC) * cos + other.to(ACC) * sin).to(x.dtype)
    return x


@triton.jit
def quantized(x, ACC: tl.constexpr):
    """``(int8, float32 scales)`` of the rows of a tile.

    The nearest multiples, of two the even one, of a row's largest magnitude / 127; a row that has
    something else than numbers has the scale NaN.  Division must be that of IEEE 754, for all
    backends to store the same.
    """
    x = x.to(ACC)
    largest = tl.max(tl.abs(x), 1)
    is_finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1) == 1
    scale = divided(largest, tl.full(largest.shape, 127.0, ACC)).to(tl.float32)
    scale = tl.where(is_finite & (scale < float("inf")), scale, float("nan"))
    divisor = scale.to(ACC)[:, None] + tl.zeros(x.shape, ACC)
    ratio = tl.where(divisor > 0, divided(x, divisor), 0.0)
    # a sum this large has no bits after the point: it is rounded to an integer
    if ratio.dtype == tl.float64:
        ratio = (ratio + 6755399441055744.0) - 6755399441055744.0
    else:
        ratio = (ratio + 12582912.0) - 12582912.0
    # a scale that underflows may be too small by half
    return tl.minimum(tl.maximum(ratio, -127.0), 127.0).to(tl.int8), scale


@triton.jit
def divided(x, y):
    """Rounded to nearest: what ``/`` is in float64 alone."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)
