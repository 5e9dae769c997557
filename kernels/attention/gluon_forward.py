"""Causal attention, forward, for Hopper (sm_90), in Gluon.

The function of ``forward.py`` with none of its options.  A program has two blocks of BLOCK_M
queries of one head and three partitions: one warp copies tiles of keys and values into shared
memory by TMA, and two groups of four warps, the consumers, compute a block of queries each.  The
keys are walked downward, so that those with a mask come first, and a consumer issues the scores of
block i before the sum of block i - 1, which leaves the tensor cores with work while it computes
exponentials (Shah et al., 2024, https://arxiv.org/abs/2407.08608).

    copies      K0 V0 K1 V1 K2 V2 ...
    consumer    S0 | softmax 0 | S1 O0 | softmax 1 | S2 O1 | softmax 2 | ... | O(n-1)

Key tile i is in stage i % STAGES, and so is value tile i.  For each stage four barriers say what is
true of it, i // STAGES times before:

    key_full, value_full      the copy has arrived      1 arrival, by the copying warp, and bytes
    key_empty, value_empty    it is read                1 arrival by each consumer
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .tiles import LOG2_E, locate, softmax_step, visible

CONSUMERS: gl.constexpr = gl.constexpr(2)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def _rows_of_warps(columns):
    """Layout of a product with so many columns: 16 rows a warp."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _stage(tile, STAGES: gl.constexpr):
    return tile % STAGES


@gluon.jit
def _turn(tile, STAGES: gl.constexpr):
    """Parity of the phase in which a stage's barriers tell of ``tile``."""
    return tile // STAGES & 1


@gluon.jit
def _matrix(tile):
    """``(1, rows, 1, columns)`` in shared memory as ``(rows, columns)``."""
    return tile.reshape([tile.shape[1], tile.shape[3]])


@gluon.jit
def _copying_warp(
    descs, tiles, barriers, place, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc = descs
    queries, keys, values = tiles
    q_full, k_full, k_empty, v_full, v_empty = barriers
    batch_head, heads, kv_head, first_query = place
    _, _, num_tiles, _ = sizes
    batch, head = (batch_head // heads).to(gl.int32), (batch_head % heads).to(gl.int32)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(consumer), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [batch, first_query + consumer * BLOCK_M, head, 0],
            q_full.index(consumer), queries.index(consumer),
        )  # fmt: skip
    for tile in range(num_tiles):
        stage, turn = _stage(tile, STAGES), _turn(tile, STAGES)
        first_key = (num_tiles - 1 - tile) * BLOCK_N
        # the phase before the first counts as over, so nothing is waited for in the first turn
        mbarrier.wait(k_empty.index(stage), turn ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_desc, [batch, first_key, kv_head, 0], k_full.index(stage), keys.index(stage)
        )
        mbarrier.wait(v_empty.index(stage), turn ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_desc, [batch, first_key, kv_head, 0], v_full.index(stage), values.index(stage)
        )


@gluon.jit
def _scores(query, keys, stage, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Begin the product of the queries and a tile of keys."""
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, _rows_of_warps(BLOCK_N))
    key = _matrix(keys.index(stage)).permute((1, 0))
    return warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)


@gluon.jit
def _masked(scores, queries, first_key, num_keys, offset, BLOCK_N: gl.constexpr):
    keys = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, _rows_of_warps(BLOCK_N)))
    seen = visible(queries[:, None], keys[None, :], num_keys, offset, 0, False)
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _left(weights, DTYPE: gl.constexpr, HEAD_DIM: gl.constexpr):
    """As the left side of a product: in the registers that they are in already."""
    layout: gl.constexpr = gl.DotOperandLayout(0, _rows_of_warps(HEAD_DIM), 2)
    return gl.convert_layout(weights.to(DTYPE), layout)


@gluon.jit
def _step(
    tile, acc, p, row_max, row_sum, query, tiles, barriers, queries, sizes, factor,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of ``tile`` and, at the same time, the sum over the tile before; then exponentials."""
    _, keys, values = tiles
    _, k_full, k_empty, v_full, v_empty = barriers
    num_queries, num_keys, num_tiles, _ = sizes
    stage, before = _stage(tile, STAGES), _stage(tile - 1, STAGES)
    mbarrier.wait(k_full.index(stage), _turn(tile, STAGES))
    scores = _scores(query, keys, stage, BLOCK_M, BLOCK_N)
    mbarrier.wait(v_full.index(before), _turn(tile - 1, STAGES))
    acc = warpgroup_mma(p, _matrix(values.index(before)), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        first_key = (num_tiles - 1 - tile) * BLOCK_N
        scores = _masked(scores, queries, first_key, num_keys, num_keys - num_queries, BLOCK_N)
    weights, rescale, row_max = softmax_step(scores, row_max, factor)
    row_sum = row_sum * rescale + gl.sum(weights, 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc *= gl.convert_layout(rescale, gl.SliceLayout(1, _rows_of_warps(HEAD_DIM)))[:, None]
    return acc, _left(weights, query.dtype, HEAD_DIM), row_max, row_sum


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, tiles, barriers, out_ptr, lse_ptr, place, sizes, factor,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps, which compute one block of queries."""
    all_queries, keys, values = tiles
    q_full, k_full, k_empty, v_full, _ = barriers
    batch_head, heads, _, first_query = place
    num_queries, num_keys, num_tiles, num_masked = sizes
    query = _matrix(all_queries.index(CONSUMER))
    first_row = first_query + CONSUMER * BLOCK_M
    by_row: gl.constexpr = gl.SliceLayout(1, _rows_of_warps(BLOCK_N))
    queries = first_row + gl.arange(0, BLOCK_M, by_row)
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, _rows_of_warps(HEAD_DIM))
    row_max = gl.full([BLOCK_M], float("-inf"), gl.float32, by_row)

    # the first tile, with the mask
    mbarrier.wait(q_full.index(CONSUMER), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, deps=[_scores(query, keys, 0, BLOCK_M, BLOCK_N)])
    mbarrier.arrive(k_empty.index(0), count=1)
    first_key = (num_tiles - 1) * BLOCK_N
    scores = _masked(scores, queries, first_key, num_keys, num_keys - num_queries, BLOCK_N)
    weights, _, row_max = softmax_step(scores, row_max, factor)
    row_sum = gl.sum(weights, 1)
    p = _left(weights, query.dtype, HEAD_DIM)

    for tile in range(1, num_masked):
        acc, p, row_max, row_sum = _step(
            tile, acc, p, row_max, row_sum, query, tiles, barriers, queries, sizes, factor,
            HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, True,
        )  # fmt: skip
    for tile in range(num_masked, num_tiles):
        acc, p, row_max, row_sum = _step(
            tile, acc, p, row_max, row_sum, query, tiles, barriers, queries, sizes, factor,
            HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, False,
        )  # fmt: skip
    last = _stage(num_tiles - 1, STAGES)
    mbarrier.wait(v_full.index(last), _turn(num_tiles - 1, STAGES))
    acc = warpgroup_mma(p, _matrix(values.index(last)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    # a row that sees no key has a sum of 0 and a maximum of -inf: out 0, lse -inf
    row_sum = gl.where(row_sum == 0, 1.0, row_sum)
    lse = (row_max + gl.log2(row_sum)) * LN_2
    gl.store(lse_ptr + batch_head * num_queries + queries, lse, mask=queries < num_queries)
    by_row_of_out: gl.constexpr = gl.SliceLayout(1, _rows_of_warps(HEAD_DIM))
    acc = acc / gl.convert_layout(row_sum, by_row_of_out)[:, None]
    rows = first_row + gl.arange(0, BLOCK_M, by_row_of_out)
    channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, _rows_of_warps(HEAD_DIM)))
    batch, head = batch_head // heads, batch_head % heads
    # int64: 8 heads of 128 side by side pass 2**31 elements at token 2,097,152
    places = ((batch * num_queries + rows.to(gl.int64)) * heads + head) * HEAD_DIM
    gl.store(
        out_ptr + places[:, None] + channels[None, :], acc.to(query.dtype),
        mask=(rows < num_queries)[:, None],
    )  # fmt: skip


@gluon.jit
def _first_consumer(
    tiles, barriers, out_ptr, lse_ptr, place, sizes, factor,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consume(
        0, tiles, barriers, out_ptr, lse_ptr, place, sizes, factor,
        HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip


@gluon.jit
def _second_consumer(
    tiles, barriers, out_ptr, lse_ptr, place, sizes, factor,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consume(
        1, tiles, barriers, out_ptr, lse_ptr, place, sizes, factor,
        HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["batch_heads", "num_queries", "num_keys", "heads_per_section"])
def forward_kernel(
    q_desc,  # (B, T, H, HEAD_DIM), tiles of (1, BLOCK_M, 1, HEAD_DIM)
    k_desc,  # (B, S, G, HEAD_DIM), tiles of (1, BLOCK_N, 1, HEAD_DIM), as those of v
    v_desc,
    out_ptr,  # (B, T, H, HEAD_DIM), contiguous
    lse_ptr,  # (B, H, T), contiguous, float32
    batch_heads,  # B H
    heads,
    group_size,  # H / G
    num_queries,
    num_keys,
    heads_per_section,
    scale,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    ROWS: gl.constexpr = CONSUMERS * BLOCK_M
    num_blocks = gl.cdiv(num_queries, ROWS)
    rank, batch_head = locate(num_blocks, batch_heads, heads_per_section)
    # the last block of queries sees the most keys
    first_query = (num_blocks - 1 - rank) * ROWS
    kv_head = (batch_head % heads // group_size).to(gl.int32)
    offset = num_keys - num_queries
    # keys in front of `seen_by_all` need no mask; where no query sees one, a tile of them is masked
    end = gl.minimum(gl.minimum(first_query + ROWS, num_queries) + offset, num_keys)
    num_tiles = gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    seen_by_all = gl.minimum(gl.maximum(first_query + offset + 1, 0), num_keys)
    num_masked = gl.maximum(num_tiles - seen_by_all // BLOCK_N, 1)

    DTYPE: gl.constexpr = q_desc.dtype
    q_layout: gl.constexpr = q_desc.layout
    k_layout: gl.constexpr = k_desc.layout
    all_queries = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, BLOCK_M, 1, HEAD_DIM], q_layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], k_layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], k_layout)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(consumer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()

    tiles = (all_queries, keys, values)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    place = (batch_head, heads, kv_head, first_query)
    sizes = (num_queries, num_keys, num_tiles, num_masked)
    factor = scale * LOG2_E
    # constants in a tuple that has a name would no longer be constants
    gl.warp_specialize(
        [
            (_first_consumer, (
                tiles, barriers, out_ptr, lse_ptr, place, sizes, factor,
                HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_second_consumer, (
                tiles, barriers, out_ptr, lse_ptr, place, sizes, factor,
                HEAD_DIM, BLOCK_M, BLOCK_N, STAGES,
            )),
            (_copying_warp, (
                (q_desc, k_desc, v_desc), tiles, barriers, place, sizes, BLOCK_M, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
