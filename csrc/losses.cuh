// What the loss kernels compute from the logits of a row.
//
// The definition is in cross_entropy.cuh.  Scale and softcap belong to the logits: they are applied
// where logits are read, and their slope where the gradient is written.
#pragma once

#include <cstdint>

#include "arithmetic.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

namespace fastlm {

// From logits to what the softmax is taken of.
template <typename A>
struct Transform {
  A scale;
  A softcap;  // 0: none

  __device__ A operator()(A logit) const {
    const A x = product(logit, scale);
    return softcap == 0 ? x : product(softcap, hyperbolic_tangent(x / softcap));
  }

  // dx / dlogit
  __device__ A slope(A x) const {
    if (softcap == 0) return scale;
    const A ratio = x / softcap;
    return (1 - ratio * ratio) * scale;
  }
};

// Of a row, what one read gathers.
template <typename A>
struct RowSums {
  A maximum = -kInfinity<A>;
  A total = 0;        // sum of exp(x - maximum)
  A moment = 0;       // sum of exp(x - maximum) (x - maximum), if statistics are asked for
  A weighted = 0;     // sum of w (x - origin), if labels are smoothed
  int64_t first = 0;  // the first place of the maximum, if statistics are asked for
};

// What beside maximum and total is gathered.
template <typename A>
struct Gathering {
  bool need_stats;
  bool is_smoothed;
  const A* weight;  // of the classes; null: all 1
  A origin;         // what x is taken relative to: the loss is a difference to x[target]
};

// Takes elements [first, first + kCount) of a row into the sums of a thread, which sees them in
// ascending order.  x is -inf beyond the row.
template <int kCount, typename A>
__device__ inline void gather(RowSums<A>& sums, const A (&x)[kCount], int64_t first, int64_t size,
                              const Gathering<A>& gathering) {
  A highest = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) highest = larger(highest, x[i]);
  if (highest > sums.maximum) {
    if (gathering.need_stats) {
      // when the maximum rises by d, the mean of x - maximum falls by d; nothing has none
      const A rise = sums.maximum == -kInfinity<A> ? 0 : highest - sums.maximum;
      sums.moment -= rise * sums.total;
      int place = 0;
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i)
        if (x[i] == highest) place = i;
      sums.first = first + place;
    }
    const A decay = exponential(sums.maximum - highest);
    sums.total *= decay;
    sums.moment *= decay;
    sums.maximum = highest;
  }
  // exp(-inf - -inf) is NaN; a thread that has seen only -inf keeps a total of zero
  const A pivot = sums.maximum == -kInfinity<A> ? 0 : sums.maximum;
  if (gathering.need_stats) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A e = exponential(x[i] - pivot);
      sums.total += e;
      sums.moment += e * (x[i] == -kInfinity<A> ? 0 : x[i] - pivot);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums.total += exponential(x[i] - pivot);
  }
  if (gathering.is_smoothed) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i >= size) continue;
      const A difference = x[i] - gathering.origin;
      sums.weighted += gathering.weight ? gathering.weight[first + i] * difference : difference;
    }
  }
}

// The sums of a block's threads as those of their row; thread 0 has them all, the others the
// maximum.  `first` is in the row even where all is NaN.
template <typename A>
__device__ inline RowSums<A> combine_threads(const RowSums<A>& own, int64_t size,
                                             const Gathering<A>& gathering) {
  FASTLM_SHARED(A, maxima, kMostWarps);
  FASTLM_SHARED(A, totals, kMostWarps);
  FASTLM_SHARED(A, moments, kMostWarps);
  FASTLM_SHARED(A, weighted, kMostWarps);
  FASTLM_SHARED(int64_t, firsts, kMostWarps);

  RowSums<A> row;
  reduce_warps(own.maximum, maxima, Larger());
  __syncthreads();
  row.maximum = combined(maxima, Larger());

  const A share = exponential(own.maximum - row.maximum);
  reduce_warps(own.total * share, totals, Sum());
  if (gathering.need_stats) {
    const A fall = own.maximum == -kInfinity<A> ? 0 : own.maximum - row.maximum;
    reduce_warps(share * (own.moment + fall * own.total), moments, Sum());
    reduce_warps(own.maximum == row.maximum ? own.first : size - 1, firsts, Smaller());
  }
  if (gathering.is_smoothed) reduce_warps(own.weighted, weighted, Sum());
  __syncthreads();
  if (threadIdx.x == 0) {
    row.total = combined(totals, Sum());
    if (gathering.need_stats) {
      row.moment = combined(moments, Sum());
      row.first = combined(firsts, Smaller());
    }
    if (gathering.is_smoothed) row.weighted = combined(weighted, Sum());
  }
  return row;
}

// The four factors of a row's gradient,
//   dx = (p - [v = t]) of_target + p of_all - w of_weight - p (log p + entropy) of_entropy
template <typename A>
struct Factors {
  A of_target;   // (1 - s) w[target] dloss - dlogprob
  A of_all;      // s mean(w) dloss + dlse
  A of_weight;   // s / V dloss
  A of_entropy;  // dentropy
};

template <typename A>
__device__ inline A gradient(A log_p, bool is_target, A weight, A entropy,
                             const Factors<A>& factors) {
  const A p = exponential(log_p);
  // (p - 1) before the factor: the other order loses p when the target is nearly certain
  A dx = (p - (is_target ? A(1) : A(0))) * factors.of_target;
  dx += p * factors.of_all;
  dx -= weight * factors.of_weight;
  // 0 * -inf: a class of probability zero has no part in the entropy
  if (factors.of_entropy != 0) dx -= p * (p == 0 ? 0 : log_p + entropy) * factors.of_entropy;
  return dx;
}

}  // namespace fastlm
