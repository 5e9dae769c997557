// Causal attention, forward.
//
//   score = scale query . key, or softcap tanh(scale query . key / softcap)
//   lse   = log(sum_s exp(score_s) + exp(sink))                  over visible keys
//   out   = sum_s exp(score_s - lse) value_s
//
// A block has some queries of one head, and the keys and values they see stream past, with a running
// maximum and sum (Dao, 2023, https://arxiv.org/abs/2307.08691, algorithm 1).  Values come while the
// scores are computed, the next keys while they are added up.  kWidth columns of out are one block's
// work: for wider values scores are computed once more, and every head_dim runs on the same code.
//
// Exponentials are base 2.  A sink is the score of a key without a value: what sums begin with.
#pragma once

#include "attention_places.cuh"
#include "attention_tiles.cuh"

namespace fastlm {

// The rows of one head of a tensor, from a token on.
template <typename T>
struct HeadRows {
  const T* data;
  int64_t stride;
  int columns;
  bool whole;  // see stage()

  __device__ HeadRows(const void* tensor, const AttentionStrides& strides, int64_t row,
                      int64_t head, int64_t token, int all_columns)
      : data(static_cast<const T*>(tensor) + row * strides.batch + head * strides.head +
             token * strides.token),
        stride(strides.token),
        columns(all_columns) {
    // of one row no stride is used, but none may be odd either: the layout changes no bit
    whole = moves_whole(data) && stride % kGroup<T> == 0 && columns % kGroup<T> == 0;
  }

  // Some neighbouring columns, from a multiple of a group on.
  __device__ HeadRows part(int first, int count) const {
    HeadRows some = *this;
    some.data += first;
    some.columns = clamped(columns - first, 0, count);
    return some;
  }

  __device__ void stage_to(T* tile, int width, int first, int count, int rows) const {
    stage(tile, width, data, stride, first, count, rows, columns, whole);
  }
};

// Shared memory of the forward kernel, in elements.
template <typename Tiles, int kTile>
struct ForwardMemory {
  using T = typename Tiles::Element;
  int query_width, key_width, value_width;

  __host__ __device__ ForwardMemory(int head_dim, int value_dim)
      : query_width(Tiles::width_of_kept(head_dim)),
        key_width(rounded_up(head_dim, 16)),
        value_width(Tiles::width_of_sums(value_dim < Tiles::kWidth ? value_dim : Tiles::kWidth)) {}

  __host__ __device__ int queries(int warps) const {
    return warps * Tiles::kWarpRows * tile_stride<T>(query_width);
  }
  __host__ __device__ int keys() const { return kTile * tile_stride<T>(key_width); }
  __host__ __device__ int values() const { return kTile * tile_stride<T>(value_width); }
  __host__ __device__ int bytes(int warps) const {
    return (queries(warps) + keys() + values() + warps * Tiles::kScratch) * int{sizeof(T)};
  }
};

// Scores that a warp's rows do not see become -inf.  The tile begins at key `first`.
template <typename Tiles, typename A, int kColumns>
__device__ inline void hide_keys(A (&scores)[Tiles::kRows][kColumns], const Visibility& sees,
                                 int first_query, int first) {
#pragma unroll
  for (int i = 0; i < Tiles::kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      if (!sees(first_query + Tiles::row(i), first + Tiles::column(j)))
        scores[i][j] = -kInfinity<A>;
}

// A score in base 2, less what it is taken relative to.
template <typename Tiles, typename A>
__device__ inline A relative_score(A reduced, A factor, A pivot) {
  // in one operation where narrow weights hide its rounding; a single weight must be 1 elsewhere
  return Tiles::kIsNarrow ? reduced * factor - pivot : product(reduced, factor) - pivot;
}

// One more tile of scores, which become weights; `sums` are rescaled.
template <typename Tiles, typename A, int kColumns, int kSums>
__device__ inline void softmax_step(A (&scores)[Tiles::kRows][kColumns], A (&maximum)[Tiles::kRows],
                                    A (&total)[Tiles::kRows], A (&sums)[Tiles::kRows][kSums],
                                    A factor) {
#pragma unroll
  for (int i = 0; i < Tiles::kRows; ++i) {
    A highest = scores[i][0];
#pragma unroll
    for (int j = 1; j < kColumns; ++j) highest = larger(highest, scores[i][j]);
    highest = Tiles::combined_row(highest, Larger());
    const A risen = larger(maximum[i], product(highest, factor));
    // inf - inf is NaN; a row that has seen -inf alone keeps a total of 0, one of +inf gets +inf
    const A pivot = risen == kInfinity<A> || risen == -kInfinity<A> ? A(0) : risen;
    const A decay = power_of_two(maximum[i] - pivot);
    maximum[i] = risen;
    total[i] *= decay;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      scores[i][j] = power_of_two(relative_score<Tiles>(scores[i][j], factor, pivot));
      total[i] += scores[i][j];
    }
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[i][j] *= decay;
  }
}

template <typename Tiles, int kTile>
__global__ void __launch_bounds__(Tiles::kMostThreads, 1)
    attention_forward_kernel(const AttentionInputs in, const AttentionResults results,
                             const bool is_half) {
  using T = typename Tiles::Element;
  using A = typename Tiles::A;
  constexpr int kRows = Tiles::kRows;
  const int warps = warps_of_block(), warp = threadIdx.x / kWarpSize;
  const Place at = place_queries(in, warps * Tiles::kWarpRows);
  const int first_column = blockIdx.y * Tiles::kWidth;

  const ForwardMemory<Tiles, kTile> memory(in.head_dim, in.value_dim);
  FASTLM_DYNAMIC_SHARED(T, queries);
  T* const keys = queries + memory.queries(warps);
  T* const values = keys + memory.keys();
  T* const scratch = values + memory.values() + warp * Tiles::kScratch;
  const int query_stride = tile_stride<T>(memory.query_width);
  T* const own_queries = queries + warp * Tiles::kWarpRows * query_stride;

  const int64_t kv_head = at.head / in.group_size;
  const HeadRows<T> q(in.query, in.query_strides, at.row, at.head, at.q_token, in.head_dim);
  const HeadRows<T> k(in.key, in.key_strides, at.row, kv_head, at.k_token, in.head_dim);
  const HeadRows<T> v =
      HeadRows<T>(in.value, in.value_strides, at.row, kv_head, at.k_token, in.value_dim)
          .part(first_column, Tiles::kWidth);

  A maximum[kRows], total[kRows];
  A sums[kRows][Tiles::template kColumns<Tiles::kWidth>];
  A sink = -kInfinity<A>;
  if (results.sinks) sink = static_cast<const A*>(results.sinks)[at.head] * kLog2E<A>;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    maximum[i] = sink;
    // lanes that share a row add up their totals in the end
    total[i] = sink != -kInfinity<A> && Tiles::leads() ? 1 : 0;
#pragma unroll
    for (int j = 0; j < Tiles::template kColumns<Tiles::kWidth>; ++j) sums[i][j] = 0;
  }

  const int own_first = at.first + warp * Tiles::kWarpRows;
  const Walk walk = keys_seen(at.sees, at.first, warps * Tiles::kWarpRows, kTile);
  const Walk own = keys_seen(at.sees, own_first, Tiles::kWarpRows, kTile);
  const ScoreScale<A> scale(in.scale, in.softcap, Tiles::kIsNarrow);
  if (walk.start < walk.end) {
    q.stage_to(queries, memory.query_width, at.first, warps * Tiles::kWarpRows,
               at.sees.num_queries);
    k.stage_to(keys, memory.key_width, walk.start, kTile, at.sees.num_keys);
    commit_copies();
  }
  for (int first = walk.start; first < walk.end; first += kTile) {
    wait_for_copies<0>();
    __syncthreads();  // the keys are there, and the last values were used
    v.stage_to(values, memory.value_width, first, kTile, at.sees.num_keys);
    commit_copies();
    A scores[kRows][Tiles::template kColumns<kTile>];
    const bool is_seen = first >= own.start && first < own.end;
    if (is_seen) {
      Tiles::template multiply<kTile>(scores, own_queries, query_stride, keys,
                                      tile_stride<T>(memory.key_width), memory.key_width,
                                      is_half);
      scale.reduce(scores);
      if (first < own.whole_start || first >= own.whole_end)
        hide_keys<Tiles>(scores, at.sees, own_first, first);
      softmax_step<Tiles>(scores, maximum, total, sums, scale.outer);
    }
    wait_for_copies<0>();
    __syncthreads();  // the values are there, and the keys were used
    if (first + kTile < walk.end) {
      k.stage_to(keys, memory.key_width, first + kTile, kTile, at.sees.num_keys);
      commit_copies();
    }
    if (is_seen)
      Tiles::template accumulate<kTile>(sums, scores, values, tile_stride<T>(memory.value_width),
                                        v.columns, scratch, is_half);
  }

  const int rows = at.sees.num_queries - own_first;
  if (rows <= 0) return;
  const int64_t first_token = at.row * in.num_queries + at.q_token + own_first;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    // a row that sees no key has a total of 0 and a maximum of -inf: out 0, lse -inf
    const A sum = Tiles::combined_row(total[i], Sum());
    const A divisor = sum == 0 ? A(1) : sum;
    const A factor = 1 / divisor;
#pragma unroll
    for (int j = 0; j < Tiles::template kColumns<Tiles::kWidth>; ++j) sums[i][j] *= factor;
    if (blockIdx.y == 0 && Tiles::leads() && Tiles::row(i) < rows) {
      const int64_t statistic = (at.row * in.heads + at.head) * in.num_queries + at.q_token +
                                own_first + Tiles::row(i);
      static_cast<A*>(results.lse)[statistic] =
          (maximum[i] + binary_logarithm(divisor)) * kLn2<A>;
    }
  }
  const int64_t row_stride = in.heads * in.value_dim;
  T* const out = static_cast<T*>(results.out) + first_token * row_stride +
                 at.head * in.value_dim + first_column;
  Tiles::store(out, row_stride, rows, v.columns, sums, own_queries, query_stride, is_half);
}

}  // namespace fastlm
