// What the loss kernels compute from the logits of a row.
//
// The definition is in the kernels' heads.  Scale and softcap belong to the logits: they are applied
// where logits are read, and their slope where the gradient is written.
#pragma once

#include <cstdint>
#include <type_traits>

#include "arithmetic.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

namespace fastlm {

// Of a block, and blocks that share a multiprocessor: 85 registers a thread, 128 for float64, which
// all kernels do with on every architecture.
constexpr int kMostThreads = 256;
template <typename T>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 2 : 3;

// Reads of a row that a thread has under way.
template <typename T>
constexpr int kReads = sizeof(T) == 8 ? 1 : 2;

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

  // of nothing but -inf the total is zero
  const A pivot = row.maximum == -kInfinity<A> ? 0 : row.maximum;
  const A share = exponential(own.maximum - pivot);
  reduce_warps(own.total * share, totals, Sum());
  if (gathering.need_stats) {
    const A fall = own.maximum == -kInfinity<A> ? 0 : own.maximum - pivot;
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

// x of a group that begins at `first`; -inf beyond the row.
template <typename T>
__device__ inline void transformed(Acc<T> (&x)[kGroup<T>], const Group<T>& logits,
                                   const Acc<T>* bias, int64_t first, int64_t size,
                                   const Transform<Acc<T>>& transform) {
  using A = Acc<T>;
  A logit[kGroup<T>];
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) logit[i] = widened(logits.items[i]);
  if constexpr (std::is_same_v<T, A>) {
    if (bias) {
      const Group<A> added = load_group(bias, 1, first, size);
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) logit[i] += added.items[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i)
    x[i] = first + i < size ? transform(logit[i]) : -kInfinity<A>;
}

// The sums of a row, in one read by the threads of a block; thread 0 has them all.  Which elements a
// thread takes, and in what order, is a matter of their number alone.  Logits of 16 bits take no
// bias; null: none.
template <typename T>
__device__ inline RowSums<Acc<T>> sums_of_row(const T* logits, int64_t stride, const Acc<T>* bias,
                                              int64_t size, const Transform<Acc<T>>& transform,
                                              const Gathering<Acc<T>>& gathering) {
  RowSums<Acc<T>> own;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kGroup<T>;
  for (int64_t start = threadIdx.x * kGroup<T>; start < size; start += kReads<T> * step) {
    Group<T> groups[kReads<T>];
#pragma unroll
    for (int read = 0; read < kReads<T>; ++read)
      groups[read] = load_group(logits, stride, start + read * step, size);
#pragma unroll
    for (int read = 0; read < kReads<T>; ++read) {
      const int64_t first = start + read * step;
      Acc<T> x[kGroup<T>];
      transformed(x, groups[read], bias, first, size, transform);
      gather(own, x, first, size, gathering);
    }
  }
  return combine_threads(own, size, gathering);
}

// Of a target that is no class, or huge, zero: it would swallow the others.
template <typename A>
__device__ inline A origin_at(A x) {
  return x > -1000 && x < 1000 ? x : 0;
}

// The logarithm of a total; NaN of nothing but -inf, as of NaN and of +inf.
template <typename A>
__device__ inline A log_sum_of(const RowSums<A>& sums) {
  return sums.total > 0 ? logarithm(sums.total) : static_cast<A>(NAN);
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

// What class weights and label smoothing make of a row.
template <typename A>
struct Weighing {
  A of_target;  // w[target]
  A smoothing;  // s
  A per_class;  // s / V
  A sum;        // sum_v w[v], read if labels are smoothed

  // -log p[target], and log-sum-exp less the origin of `weighted`
  __device__ A loss(A surprisal, A lse_above_origin, A weighted) const {
    const A loss = of_target * surprisal;
    if (smoothing == 0) return loss;
    return (1 - smoothing) * loss + per_class * (sum * lse_above_origin - weighted);
  }

  // of a loss alone
  __device__ Factors<A> factors(A dloss) const {
    Factors<A> factors{dloss * of_target, 0, 0, 0};
    if (smoothing > 0) {
      factors.of_target *= 1 - smoothing;
      factors.of_weight = per_class * dloss;
      factors.of_all = factors.of_weight * sum;
    }
    return factors;
  }
};

// Of a row what comes in for it; null: zeros.
template <typename A>
__device__ inline A of_row(const void* gradients, int64_t row) {
  return gradients ? static_cast<const A*>(gradients)[row] : 0;
}

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
