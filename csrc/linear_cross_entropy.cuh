// Cross-entropy of a chunk of logits, and their gradient in place of them.
//
//   u       = logit_scale (logits + bias)
//   x       = u, or softcap tanh(u / softcap)
//   lse     = log sum_v exp(x[v])
//   logprob = x[target] - lse
//   entropy = lse - sum_v p[v] x[v]                        p = exp(x - lse)
//   loss    = -(1 - s) w[target] logprob + s / V sum_v w[v] (lse - x[v])
//
// w are class weights and s is the label smoothing.  The gradient, in losses.cuh, is written over
// the logits: of the sum over rows of loss + z_weight lse^2, or of what comes in; beside the loss, as
// in Hsu et al., 2024, https://arxiv.org/abs/2410.10989.  One block per row, but for the bias.
//
// The gradient may be narrower than the logits it overwrites.  Rows keep their place, so element v
// then lies in the bytes of logits v / 2: never ahead of what has been read.  What the cast took from
// the target's element of a row, and from the one of the others that lost most, is kept wide.
//
// A row with an ignored target has loss, statistics and gradient zero; one with a target out of
// range, NaN, but for its lse and entropy.
#pragma once

#include "linear_cross_entropy.h"
#include "losses.cuh"

namespace fastlm {

// What the target of a row is.
struct ChunkTarget {
  bool is_ignored;
  bool is_class;   // in [0, num_classes) and not ignored
  int64_t column;  // of a class, counted from the first of the logits here; else -1
  bool is_here;    // it has one of these logits

  __device__ ChunkTarget(const ChunkRows& rows, int64_t row) {
    const int64_t target = rows.targets[row];
    is_ignored = target == rows.ignore_index;
    is_class = target >= 0 && target < rows.num_classes && !is_ignored;
    column = is_class ? target - rows.first_class : -1;
    is_here = column >= 0 && column < rows.vocab_size;
  }
};

// A row's logits and target.
template <typename A>
struct ChunkRow : ChunkTarget {
  const A* logits;
  A x_target;  // x[target]; NaN for a target that is not here

  __device__ ChunkRow(const ChunkRows& rows, int64_t row, const Transform<A>& transform)
      : ChunkTarget(rows, row) {
    // 64 bits: a vocabulary of 262,144 passes 2^31 elements at row 8,192
    logits = static_cast<const A*>(rows.logits) + row * rows.vocab_size;
    x_target = is_here ? x_at(rows, column, transform) : static_cast<A>(NAN);
  }

  __device__ A x_at(const ChunkRows& rows, int64_t v, const Transform<A>& transform) const {
    const A* bias = static_cast<const A*>(rows.bias);
    return transform(bias ? logits[v] + bias[v] : logits[v]);
  }
};

template <typename A>
__device__ inline Transform<A> transform_of(const ChunkRows& rows) {
  return {static_cast<A>(rows.logit_scale), static_cast<A>(rows.softcap)};
}

template <typename A>
__device__ inline Weighing<A> weighing_of(const ChunkRows& rows, const ChunkTarget& target) {
  const A smoothing = static_cast<A>(rows.label_smoothing);
  const A per_class = smoothing / static_cast<A>(rows.num_classes);
  const A* weight = static_cast<const A*>(rows.weight);
  if (!weight) return {1, smoothing, per_class, static_cast<A>(rows.num_classes)};
  // 0 for a target that is no class
  const A of_target = target.is_class ? weight[target.column + rows.first_class] : 0;
  const A sum = smoothing > 0 ? *static_cast<const A*>(rows.weight_sum) : 0;
  return {of_target, smoothing, per_class, sum};
}

// Weights of the classes here, where the gradient or a sum needs them all.
template <typename A>
__device__ inline const A* weights_here(const ChunkRows& rows) {
  const A* weight = static_cast<const A*>(rows.weight);
  return weight && rows.label_smoothing > 0 ? weight + rows.first_class : nullptr;
}

template <typename A>
__device__ inline Factors<A> factors_of(const ChunkRows& rows, const ChunkTarget& target,
                                        const ChunkUpstream& upstream, int64_t number, A lse) {
  const A dloss = upstream.dlosses ? of_row<A>(upstream.dlosses, number) : A(1);
  Factors<A> factors = weighing_of<A>(rows, target).factors(dloss);
  factors.of_target -= of_row<A>(upstream.dlogprobs, number);
  factors.of_all += of_row<A>(upstream.dlse, number);
  if (upstream.z_weight) factors.of_all += 2 * *static_cast<const A*>(upstream.z_weight) * lse;
  factors.of_entropy = of_row<A>(upstream.dentropy, number);
  return factors;
}

template <typename A>
__device__ inline RowSums<A> sums_of(const ChunkRows& rows, const ChunkRow<A>& row,
                                     const Transform<A>& transform, bool need_stats, A origin) {
  const Gathering<A> gathering{need_stats, rows.label_smoothing > 0, weights_here<A>(rows), origin};
  return sums_of_row(row.logits, 1, static_cast<const A*>(rows.bias), rows.vocab_size, transform,
                     gathering);
}

// What is known of a row, by thread 0, which alone has its sums.
template <typename A>
__device__ inline void write_results(const ChunkRows& rows, const ChunkRow<A>& row,
                                     const RowSums<A>& sums, A origin, int64_t number,
                                     const ChunkResults& results, A& lse, A& entropy) {
  const A log_sum = log_sum_of(sums);
  lse = sums.maximum + log_sum;
  // not from lse: rounded, it has lost what the loss of a likely target consists of
  const A surprisal = log_sum - (row.x_target - sums.maximum);
  const A loss = weighing_of<A>(rows, row).loss(surprisal, log_sum - (origin - sums.maximum),
                                                sums.weighted);
  static_cast<A*>(results.losses)[number] = row.is_ignored ? 0 : loss;
  static_cast<A*>(results.lse)[number] = row.is_ignored ? 0 : lse;
  if (!results.need_stats) return;
  entropy = log_sum - sums.moment / sums.total;
  static_cast<A*>(results.logprobs)[number] = row.is_ignored ? 0 : -surprisal;
  static_cast<A*>(results.entropy)[number] = row.is_ignored ? 0 : entropy;
  results.predictions[number] = row.is_ignored ? -1 : sums.first;
}

// What a shard knows of a row, for all shards to be put together, by thread 0.  Sums are relative to
// the maximum, or 0 where that is -inf.
template <typename A>
__device__ inline void write_sums(const ChunkRows& rows, const ChunkRow<A>& row,
                                  const RowSums<A>& own, A origin, int64_t number,
                                  const ChunkResults& results) {
  A* sums = static_cast<A*>(results.sums) + number;
  const auto write = [&](A value) {
    *sums = value;
    sums += rows.rows;
  };
  write(own.maximum);
  write(own.total);
  write(row.is_here ? row.x_target : A(0));
  if (results.need_stats) {
    write(own.moment);
    write(static_cast<A>(own.first));
  }
  if (rows.label_smoothing > 0) {
    const A pivot = own.maximum == -kInfinity<A> ? 0 : own.maximum;
    const A* weight_sum = static_cast<const A*>(rows.weight_sum);
    const A sum = rows.weight ? *weight_sum : static_cast<A>(rows.vocab_size);
    write(own.weighted - (pivot - origin) * sum);
  }
}

// The element of a row, but for the target's, that rounding took most of.
template <typename A>
struct Lost {
  A taken = 0;
  int64_t column = threadIdx.x;  // of nothing taken, one that no other thread has

  __device__ A size() const { return taken < 0 ? -taken : taken; }
};

// By the thread that has it: of all threads' the largest, of equals the first.
template <typename A>
__device__ inline void write_largest(const Lost<A>& own, int64_t number,
                                     const ChunkGradient& gradient) {
  FASTLM_SHARED(A, sizes, kMostWarps);
  FASTLM_SHARED(int64_t, columns, kMostWarps);
  reduce_warps(own.size(), sizes, Larger());
  __syncthreads();
  const bool is_largest = own.size() == combined(sizes, Larger());
  reduce_warps(is_largest ? own.column : INT64_MAX, columns, Smaller());
  __syncthreads();
  if (!is_largest || own.column != combined(columns, Smaller())) return;
  gradient.columns[2 * number + 1] = own.column;
  static_cast<A*>(gradient.residuals)[2 * number + 1] = own.taken;
}

// Overwrites a row with its gradient, in D.
template <typename A, typename D>
__device__ inline void write_gradient(const ChunkRows& rows, const ChunkRow<A>& row,
                                      const Transform<A>& transform, const Factors<A>& factors,
                                      A lse, A entropy, int64_t number,
                                      const ChunkGradient& place) {
  constexpr bool kIsNarrow = sizeof(D) < sizeof(A);
  const int64_t size = rows.vocab_size;
  const A* weight = weights_here<A>(rows);
  const A scale = static_cast<A>(place.scale);
  // the target's column, or, of a target elsewhere, the nearest
  const int64_t near = row.column < 0 ? 0 : row.column < size ? row.column : size - 1;
  D* const dlogits = reinterpret_cast<D*>(static_cast<A*>(place.dlogits) + number * size);
  Lost<A> lost;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kGroup<D>;
  // groups begin where they can be written at once
  int64_t start = -behind(dlogits);
  for (int round = 0; start < size; start += step, ++round) {
    const int64_t first = start + threadIdx.x * kGroup<D>;
    A dx[kGroup<D>];
    if (row.is_class) {
#pragma unroll
      for (int part = 0; part < kGroup<D>; part += kGroup<A>) {
        A x[kGroup<A>];
        const Group<A> group = load_group(row.logits, 1, first + part, size);
        transformed(x, group, static_cast<const A*>(rows.bias), first + part, size, transform);
#pragma unroll
        for (int i = 0; i < kGroup<A>; ++i) {
          const int64_t v = first + part + i;
          const A w = weight && v >= 0 && v < size ? weight[v] : A(1);
          const A slope = transform.slope(x[i]) * scale;
          dx[part + i] = gradient(x[i] - lse, v == row.column, w, entropy, factors) * slope;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<D>; ++i) dx[i] = row.is_ignored ? A(0) : static_cast<A>(NAN);
    }
    // Nothing is overwritten before all threads have read it.  Nobody else reads what a thread
    // overwrites but the target; unless it is narrow: round n then overwrites what was read up to
    // round n / 2, and rounds 0, 1, 3, 7, ... wait for that.
    if (round == 0 || (kIsNarrow && (round & (round + 1)) == 0)) __syncthreads();
    Group<D> stored;
#pragma unroll
    for (int i = 0; i < kGroup<D>; ++i) stored.items[i] = narrowed<D>(dx[i]);
    store_group(dlogits, first, size, stored);
    if constexpr (kIsNarrow) {
#pragma unroll
      for (int i = 0; i < kGroup<D>; ++i) {
        const int64_t v = first + i;
        if (v < 0 || v >= size) continue;
        const Lost<A> here{dx[i] - widened(stored.items[i]), v};
        if (v == near) {
          place.columns[2 * number] = v;
          static_cast<A*>(place.residuals)[2 * number] = here.taken;
        } else if (here.size() > lost.size()) {
          lost = here;  // never a NaN: the row of one is NaN anyway
        }
      }
    }
  }
  if constexpr (kIsNarrow) write_largest(lost, number, place);
}

// Losses and statistics of rows, where the lse is not known, and their gradient, where there is a
// place for it.
template <typename A, typename D>
__global__ void __launch_bounds__(kMostThreads, kBlocksAtOnce<A>)
    linear_cross_entropy_kernel(const ChunkRows rows, const ChunkResults results,
                                const ChunkUpstream upstream, const ChunkGradient gradient) {
  FASTLM_SHARED(A, known, 2);
  const int64_t number = blockIdx.x;
  const Transform<A> transform = transform_of<A>(rows);
  const ChunkRow<A> row(rows, number, transform);
  A lse = 0, entropy = 0;
  if (gradient.lse_is_known) {
    lse = static_cast<const A*>(results.lse)[number];
    if (upstream.dentropy) entropy = static_cast<const A*>(results.entropy)[number];
  } else {
    // Where the target is elsewhere, any element is near the others.
    const bool is_elsewhere = row.is_class && !row.is_here;
    const A origin = origin_at(is_elsewhere ? row.x_at(rows, 0, transform) : row.x_target);
    const RowSums<A> sums = sums_of(rows, row, transform, results.need_stats, origin);
    if (results.sums) {
      if (threadIdx.x == 0) write_sums(rows, row, sums, origin, number, results);
      return;
    }
    if (threadIdx.x == 0) {
      write_results(rows, row, sums, origin, number, results, lse, entropy);
      known[0] = lse;
      known[1] = entropy;
    }
    if (!gradient.dlogits) return;
    __syncthreads();
    lse = known[0];
    entropy = known[1];
  }
  const Factors<A> factors = factors_of(rows, row, upstream, number, lse);
  write_gradient<A, D>(rows, row, transform, factors, lse, entropy, number, gradient);
}

// dbias[v] += sum over rows of dlogits[row, v]
//
// A warp takes 32 groups of columns, and every n-th row where a block has n warps.  From the logits,
// since a column may cancel to far less than the rounding of a narrow gradient.
template <typename A>
__global__ void __launch_bounds__(kMostThreads, kBlocksAtOnce<A>)
    linear_cross_entropy_bias_kernel(const ChunkRows rows, const ChunkResults results,
                                     const ChunkUpstream upstream, A* dbias) {
  FASTLM_SHARED(A, by_warp, kMostThreads * kGroup<A>);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t size = rows.vocab_size;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarpSize + lane) * kGroup<A>;
  const Transform<A> transform = transform_of<A>(rows);
  const A* weight = weights_here<A>(rows);
  A sums[kGroup<A>] = {};
  for (int64_t number = warp; number < rows.rows; number += warps_of_block()) {
    const ChunkTarget target(rows, number);
    if (target.is_ignored) continue;
    const A lse = static_cast<const A*>(results.lse)[number];
    const A entropy = upstream.dentropy ? static_cast<const A*>(results.entropy)[number] : 0;
    const Factors<A> factors = factors_of(rows, target, upstream, number, lse);
    const A* logits = static_cast<const A*>(rows.logits) + number * size;
    A x[kGroup<A>];
    transformed(x, load_group(logits, 1, first, size), static_cast<const A*>(rows.bias), first, size,
                transform);
#pragma unroll
    for (int i = 0; i < kGroup<A>; ++i) {
      const int64_t v = first + i;
      const A w = weight && v < size ? weight[v] : A(1);
      const A dx = gradient(x[i] - lse, v == target.column, w, entropy, factors);
      sums[i] += target.is_class ? dx * transform.slope(x[i]) : static_cast<A>(NAN);
    }
  }
#pragma unroll
  for (int i = 0; i < kGroup<A>; ++i) by_warp[threadIdx.x * kGroup<A> + i] = sums[i];
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < kGroup<A>; ++i) {
    A sum = 0;
    for (int other = 0; other < warps_of_block(); ++other)
      sum += by_warp[(other * kWarpSize + lane) * kGroup<A> + i];
    if (first + i < size) dbias[first + i] += sum;
  }
}

}  // namespace fastlm
