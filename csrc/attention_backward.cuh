// Causal attention, backward.
//
//   p     = exp(score - lse)                        recomputed, never stored
//   delta = sum_v dout out - dlse                   one number per query
//   ds    = p (dout value^T - delta)                times 1 - (score / softcap)^2 under a softcap
//   dvalue = p^T dout      dkey = scale ds^T query      dquery = scale ds key
//
// (Dao, 2023, https://arxiv.org/abs/2307.08691, algorithm 2, in two kernels.)  One keeps some keys,
// and the queries of every head that shares them stream past; the other keeps queries, and keys
// stream past.  Scores are computed twice, and in exchange nothing is added through memory: no
// atomics, no order to depend on.  A sink's gradient needs lse and delta alone: the caller computes
// it.
#pragma once

#include "attention_forward.cuh"

namespace fastlm {

// In base 2; +inf, which makes p = 0, for a query that sees no key.
template <typename A>
__device__ inline A usable_lse(A lse) {
  return lse == -kInfinity<A> ? kInfinity<A> : lse * kLog2E<A>;
}

// Shared memory of a backward kernel, in elements: two tensors of kept rows and, for each stage, two
// of streamed rows with two statistics each.
template <typename Tiles, int kTile>
struct BackwardMemory {
  using T = typename Tiles::Element;
  using A = typename Tiles::A;
  int kept[2], streamed[2];  // widths

  // Of a kernel with sums for so many tensors, the first of each pair.
  __host__ __device__ BackwardMemory(int head_dim, int value_dim, bool sums_both)
      : kept{Tiles::width_of_kept(head_dim),
             sums_both ? Tiles::width_of_kept(value_dim) : rounded_up(value_dim, 16)},
        streamed{Tiles::width_of_sums(head_dim),
                 sums_both ? Tiles::width_of_sums(value_dim) : rounded_up(value_dim, 16)} {}

  __host__ __device__ int kept_rows(int warps, int which) const {
    return warps * Tiles::kWarpRows * tile_stride<T>(kept[which]);
  }
  __host__ __device__ int streamed_rows(int which) const {
    return kTile * tile_stride<T>(streamed[which]);
  }
  __host__ __device__ int statistics() const { return 2 * kTile * int{sizeof(A) / sizeof(T)}; }
  __host__ __device__ int stage_size() const {
    return streamed_rows(0) + streamed_rows(1) + statistics();
  }
  __host__ __device__ int bytes(int warps, int stages) const {
    return (kept_rows(warps, 0) + kept_rows(warps, 1) + warps * Tiles::kScratch +
            stages * stage_size()) *
           int{sizeof(T)};
  }
};

// From scores to p, and from dout value^T to ds without its scale.  Statistics and visibility are
// functions of an element's place (i, j).
template <typename Tiles, typename A, int kColumns, typename Lse, typename Delta, typename Sees>
__device__ inline void differentiate(A (&scores)[Tiles::kRows][kColumns],
                                     A (&gradients)[Tiles::kRows][kColumns],
                                     const ScoreScale<A>& scale, bool is_masked, Lse lse,
                                     Delta delta, Sees sees) {
#pragma unroll
  for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) gradients[i][j] -= delta(i, j);
  if (scale.is_capped) {
#pragma unroll
    for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) gradients[i][j] *= scale.slope(scores[i][j]);
  }
#pragma unroll
  for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      scores[i][j] = power_of_two(relative_score<Tiles>(scores[i][j], scale.outer, lse(i, j)));
      gradients[i][j] *= scores[i][j];
    }
  if (!is_masked) return;
#pragma unroll
  for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      // not left to p = 0: values of keys out of sight may be NaN
      if (!sees(i, j)) scores[i][j] = gradients[i][j] = 0;
}

template <typename Tiles, int kTile>
__global__ void __launch_bounds__(Tiles::kMostThreads, 1)
    attention_dkdv_kernel(const AttentionInputs in, const AttentionUpstream upstream, void* dkey,
                          void* dvalue, const int stages, const bool is_half) {
  using T = typename Tiles::Element;
  using A = typename Tiles::A;
  constexpr int kRows = Tiles::kRows;
  constexpr int kColumns = Tiles::template kColumns<kTile>;
  constexpr int kSums = Tiles::template kColumns<Tiles::kWidth>;
  const int warps = warps_of_block(), warp = threadIdx.x / kWarpSize;
  const Place at = place_keys(in, warps * Tiles::kWarpRows);
  const int first_column = blockIdx.y * Tiles::kWidth;

  const BackwardMemory<Tiles, kTile> memory(in.head_dim, in.value_dim, true);
  FASTLM_DYNAMIC_SHARED(T, keys);
  T* const values = keys + memory.kept_rows(warps, 0);
  T* const all_scratch = values + memory.kept_rows(warps, 1);
  T* const scratch = all_scratch + warp * Tiles::kScratch;
  T* const buffers = all_scratch + warps * Tiles::kScratch;
  const int key_stride = tile_stride<T>(memory.kept[0]);
  const int value_stride = tile_stride<T>(memory.kept[1]);
  const int query_stride = tile_stride<T>(memory.streamed[0]);
  const int dout_stride = tile_stride<T>(memory.streamed[1]);
  T* const own_keys = keys + warp * Tiles::kWarpRows * key_stride;
  T* const own_values = values + warp * Tiles::kWarpRows * value_stride;

  const int own_first = at.first + warp * Tiles::kWarpRows;
  const Walk walk = queries_seeing(at.sees, at.first, warps * Tiles::kWarpRows, kTile);
  const Walk own = queries_seeing(at.sees, own_first, Tiles::kWarpRows, kTile);
  const ScoreScale<A> scale(in.scale, in.softcap, Tiles::kIsNarrow);

  const auto stage_queries = [&](T* buffer, int64_t member, int first) {
    const int64_t head = at.head * in.group_size + member;
    const HeadRows<T> q(in.query, in.query_strides, at.row, head, at.q_token, in.head_dim);
    q.stage_to(buffer, memory.streamed[0], first, kTile, at.sees.num_queries);
    T* const dout_tile = buffer + memory.streamed_rows(0);
    const HeadRows<T> dout(upstream.dout, upstream.dout_strides, at.row, head, at.q_token,
                           in.value_dim);
    dout.stage_to(dout_tile, memory.streamed[1], first, kTile, at.sees.num_queries);
    commit_copies();
    A* const statistics = reinterpret_cast<A*>(dout_tile + memory.streamed_rows(1));
    const int64_t begin = (at.row * in.heads + head) * in.num_queries + at.q_token;
    for (int i = threadIdx.x; i < kTile; i += blockDim.x) {
      const bool inside = first + i < at.sees.num_queries;
      const int64_t query = begin + first + i;
      statistics[i] =
          inside ? usable_lse(static_cast<const A*>(upstream.lse)[query]) : kInfinity<A>;
      statistics[kTile + i] = inside ? static_cast<const A*>(upstream.delta)[query] : A(0);
    }
  };

  A of_key[kRows][kSums], of_value[kRows][kSums];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kSums; ++j) of_key[i][j] = of_value[i][j] = 0;
  const int key_columns = clamped(in.head_dim - first_column, 0, Tiles::kWidth);
  const int value_columns = clamped(in.value_dim - first_column, 0, Tiles::kWidth);

  const bool is_seen = walk.start < walk.end;
  if (is_seen) {
    const HeadRows<T> k(in.key, in.key_strides, at.row, at.head, at.k_token, in.head_dim);
    const HeadRows<T> v(in.value, in.value_strides, at.row, at.head, at.k_token, in.value_dim);
    const int rows = warps * Tiles::kWarpRows;
    k.stage_to(keys, memory.kept[0], at.first, rows, at.sees.num_keys);
    v.stage_to(values, memory.kept[1], at.first, rows, at.sees.num_keys);
    stage_queries(buffers, 0, walk.start);
  }
  T* queries = buffers;  // those of this round, and where the next go
  T* next_queries = buffers + (stages - 1) * memory.stage_size();
  int64_t member = 0;
  // one loop over all heads of the group and their queries
  for (int first = walk.start; is_seen && member < in.group_size;) {
    wait_for_copies<0>();
    __syncthreads();  // this round's rows are there, and those of the last were used
    const bool is_last_of_head = first + kTile >= walk.end;
    const int64_t next_member = is_last_of_head ? member + 1 : member;
    const int next_first = is_last_of_head ? walk.start : first + kTile;
    const bool goes_on = next_member < in.group_size;
    if (stages > 1 && goes_on) stage_queries(next_queries, next_member, next_first);
    if (first >= own.start && first < own.end) {
      const T* const dout_tile = queries + memory.streamed_rows(0);
      const A* const statistics =
          reinterpret_cast<const A*>(dout_tile + memory.streamed_rows(1));
      A scores[kRows][kColumns], gradients[kRows][kColumns];
      Tiles::template multiply<kTile>(scores, own_keys, key_stride, queries, query_stride,
                                      rounded_up(in.head_dim, 16), is_half);
      scale.reduce(scores);
      Tiles::template multiply<kTile>(gradients, own_values, value_stride, dout_tile,
                                      dout_stride, rounded_up(in.value_dim, 16), is_half);
      differentiate<Tiles>(
          scores, gradients, scale, first < own.whole_start || first >= own.whole_end,
          [&](int, int j) { return statistics[Tiles::column(j)]; },
          [&](int, int j) { return statistics[kTile + Tiles::column(j)]; },
          [&](int i, int j) {
            return at.sees(first + Tiles::column(j), own_first + Tiles::row(i));
          });
      if (value_columns)
        Tiles::template accumulate<kTile>(of_value, scores, dout_tile + first_column, dout_stride,
                                          value_columns, scratch, is_half);
      if (key_columns)
        Tiles::template accumulate<kTile>(of_key, gradients, queries + first_column, query_stride,
                                          key_columns, scratch, is_half);
    }
    if (stages == 1 && goes_on) {
      __syncthreads();
      stage_queries(next_queries, next_member, next_first);
    }
    T* const used = queries;
    queries = next_queries;
    next_queries = used;
    member = next_member;
    first = next_first;
  }

  const int rows = at.sees.num_keys - own_first;
  if (rows <= 0) return;
  const A factor = static_cast<A>(in.scale);
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kSums; ++j) of_key[i][j] *= factor;
  const int64_t kv_heads = in.heads / in.group_size;
  const int64_t first_row =
      (at.row * in.num_keys + at.k_token + own_first) * kv_heads + at.head;
  if (value_columns)
    Tiles::store(static_cast<T*>(dvalue) + first_row * in.value_dim + first_column,
                 kv_heads * in.value_dim, rows, value_columns, of_value, own_values, value_stride,
                 is_half);
  if (key_columns)
    Tiles::store(static_cast<T*>(dkey) + first_row * in.head_dim + first_column,
                 kv_heads * in.head_dim, rows, key_columns, of_key, own_keys, key_stride,
                 is_half);
}

template <typename Tiles, int kTile>
__global__ void __launch_bounds__(Tiles::kMostThreads, 1)
    attention_dq_kernel(const AttentionInputs in, const AttentionUpstream upstream, void* dquery,
                        const int stages, const bool is_half) {
  using T = typename Tiles::Element;
  using A = typename Tiles::A;
  constexpr int kRows = Tiles::kRows;
  constexpr int kColumns = Tiles::template kColumns<kTile>;
  constexpr int kSums = Tiles::template kColumns<Tiles::kWidth>;
  const int warps = warps_of_block(), warp = threadIdx.x / kWarpSize;
  const Place at = place_queries(in, warps * Tiles::kWarpRows);
  const int first_column = blockIdx.y * Tiles::kWidth;

  const BackwardMemory<Tiles, kTile> memory(in.head_dim, in.value_dim, false);
  FASTLM_DYNAMIC_SHARED(T, queries);
  T* const dout_rows = queries + memory.kept_rows(warps, 0);
  T* const all_scratch = dout_rows + memory.kept_rows(warps, 1);
  T* const scratch = all_scratch + warp * Tiles::kScratch;
  T* const buffers = all_scratch + warps * Tiles::kScratch;
  const int query_stride = tile_stride<T>(memory.kept[0]);
  const int dout_stride = tile_stride<T>(memory.kept[1]);
  const int key_stride = tile_stride<T>(memory.streamed[0]);
  const int value_stride = tile_stride<T>(memory.streamed[1]);
  T* const own_queries = queries + warp * Tiles::kWarpRows * query_stride;
  T* const own_dout = dout_rows + warp * Tiles::kWarpRows * dout_stride;

  const int64_t kv_head = at.head / in.group_size;
  const HeadRows<T> k(in.key, in.key_strides, at.row, kv_head, at.k_token, in.head_dim);
  const HeadRows<T> v(in.value, in.value_strides, at.row, kv_head, at.k_token, in.value_dim);
  const int own_first = at.first + warp * Tiles::kWarpRows;
  const Walk walk = keys_seen(at.sees, at.first, warps * Tiles::kWarpRows, kTile);
  const Walk own = keys_seen(at.sees, own_first, Tiles::kWarpRows, kTile);
  const ScoreScale<A> scale(in.scale, in.softcap, Tiles::kIsNarrow);

  const auto stage_keys = [&](T* buffer, int first) {
    k.stage_to(buffer, memory.streamed[0], first, kTile, at.sees.num_keys);
    v.stage_to(buffer + memory.streamed_rows(0), memory.streamed[1], first, kTile,
               at.sees.num_keys);
    commit_copies();
  };

  A sums[kRows][kSums], lse[kRows], delta[kRows];
  const int64_t begin =
      (at.row * in.heads + at.head) * in.num_queries + at.q_token + own_first;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const bool inside = own_first + Tiles::row(i) < at.sees.num_queries;
    const int64_t query = begin + Tiles::row(i);
    lse[i] = inside ? usable_lse(static_cast<const A*>(upstream.lse)[query]) : kInfinity<A>;
    delta[i] = inside ? static_cast<const A*>(upstream.delta)[query] : A(0);
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[i][j] = 0;
  }

  if (walk.start < walk.end) {
    const HeadRows<T> q(in.query, in.query_strides, at.row, at.head, at.q_token, in.head_dim);
    const HeadRows<T> dout(upstream.dout, upstream.dout_strides, at.row, at.head, at.q_token,
                           in.value_dim);
    const int rows = warps * Tiles::kWarpRows;
    q.stage_to(queries, memory.kept[0], at.first, rows, at.sees.num_queries);
    dout.stage_to(dout_rows, memory.kept[1], at.first, rows, at.sees.num_queries);
    stage_keys(buffers, walk.start);
  }
  const int key_columns = clamped(in.head_dim - first_column, 0, Tiles::kWidth);
  T* keys = buffers;  // those of this round, and where the next go
  T* next_keys = buffers + (stages - 1) * memory.stage_size();
  for (int first = walk.start; first < walk.end; first += kTile) {
    wait_for_copies<0>();
    __syncthreads();  // these keys are there, and the last were used
    if (stages > 1 && first + kTile < walk.end) stage_keys(next_keys, first + kTile);
    if (first >= own.start && first < own.end) {
      const T* const values = keys + memory.streamed_rows(0);
      A scores[kRows][kColumns], gradients[kRows][kColumns];
      Tiles::template multiply<kTile>(scores, own_queries, query_stride, keys, key_stride,
                                      rounded_up(in.head_dim, 16), is_half);
      scale.reduce(scores);
      Tiles::template multiply<kTile>(gradients, own_dout, dout_stride, values, value_stride,
                                      rounded_up(in.value_dim, 16), is_half);
      differentiate<Tiles>(
          scores, gradients, scale, first < own.whole_start || first >= own.whole_end,
          [&](int i, int) { return lse[i]; }, [&](int i, int) { return delta[i]; },
          [&](int i, int j) {
            return at.sees(own_first + Tiles::row(i), first + Tiles::column(j));
          });
      Tiles::template accumulate<kTile>(sums, gradients, keys + first_column, key_stride,
                                        key_columns, scratch, is_half);
    }
    if (stages == 1 && first + kTile < walk.end) {
      __syncthreads();
      stage_keys(next_keys, first + kTile);
    }
    T* const used = keys;
    keys = next_keys;
    next_keys = used;
  }

  const int rows = at.sees.num_queries - own_first;
  if (rows <= 0) return;
  const A factor = static_cast<A>(in.scale);
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[i][j] *= factor;
  const int64_t first_row =
      (at.row * in.num_queries + at.q_token + own_first) * in.heads + at.head;
  Tiles::store(static_cast<T*>(dquery) + first_row * in.head_dim + first_column,
               in.heads * in.head_dim, rows, key_columns, sums, own_queries, query_stride,
               is_half);
}

// sum(dout out) of one query and head, by a warp; lane 0 has it.
template <typename T>
__device__ inline Acc<T> dout_out(const AttentionInputs& in, const AttentionUpstream& upstream,
                                  const void* out, int64_t row, int64_t token, int64_t head) {
  const HeadRows<T> dout(upstream.dout, upstream.dout_strides, row, head, token, in.value_dim);
  const T* const mine = static_cast<const T*>(out) +
                        ((row * in.num_queries + token) * in.heads + head) * in.value_dim;
  const bool moves_out = moves_whole(mine);
  Acc<T> sum = 0;
  for (int first = lane_of_warp() * kGroup<T>; first < in.value_dim;
       first += kWarpSize * kGroup<T>) {
    const Group<T> a = load_group_if_whole(dout.data, first, in.value_dim, moves_whole(dout.data));
    const Group<T> b = load_group_if_whole(mine, first, in.value_dim, moves_out);
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) sum += widened(a.items[i]) * widened(b.items[i]);
  }
  return warp_reduce(sum, Sum());
}

constexpr int kDeltaThreads = 256;

// One warp has one query of one head, counted like lse.
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(const AttentionInputs in, const AttentionUpstream upstream,
                           const void* out, const void* dlse, void* delta, const Dtype dtype) {
  const int64_t query =
      static_cast<int64_t>(blockIdx.x) * warps_of_block() + threadIdx.x / kWarpSize;
  if (query >= in.batch * in.heads * in.num_queries) return;
  const int64_t token = query % in.num_queries;
  const int64_t head = query / in.num_queries % in.heads;
  const int64_t row = query / in.num_queries / in.heads;
  const auto write = [&](auto sum) {
    using A = decltype(sum);
    if (lane_of_warp() != 0) return;
    if (dlse) sum -= static_cast<const A*>(dlse)[query];
    // p = 0 in a row that sees no key, but 0 * NaN is NaN, and the gradient of its lse may be that
    const bool sees_nothing = static_cast<const A*>(upstream.lse)[query] == -kInfinity<A>;
    static_cast<A*>(delta)[query] = sees_nothing ? A(0) : sum;
  };
  if (dtype == Dtype::kFloat64)
    write(dout_out<double>(in, upstream, out, row, token, head));
  else if (dtype == Dtype::kFloat32)
    write(dout_out<float>(in, upstream, out, row, token, head));
  else if (dtype == Dtype::kFloat16)
    write(dout_out<__half>(in, upstream, out, row, token, head));
  else
    write(dout_out<__nv_bfloat16>(in, upstream, out, row, token, head));
}

}  // namespace fastlm
