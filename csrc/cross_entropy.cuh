// Cross-entropy kernels.  With u = logit_scale logits, and x = u or softcap tanh(u / softcap),
//
//   log_sum = log sum_v exp(x[v] - maximum)           forward: one block per row, one read
//   logprob = (x[target] - maximum) - log_sum
//   entropy = log_sum - sum_v p[v] (x[v] - maximum)   p = exp(x - maximum - log_sum)
//   loss    = -(1 - s) w[target] logprob + s / V sum_v w[v] (log_sum - (x[v] - maximum))
//
// w are class weights and s is the label smoothing.  The gradient is in losses.cuh; the backward
// kernel reads the logits once more.
//
// Never maximum + log_sum: rounded, it has lost what the loss of a likely target consists of.
// Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867, algorithm 3.
//
// A NaN or +inf among the x of a row, or nothing but -inf, makes its loss and gradient NaN, as does
// a target outside the vocabulary; no other row changes and nothing outside the tensors is read.
//
// Options are branches at run time, the same for a whole launch: four dtypes are all that is
// compiled.
#pragma once

#include "cross_entropy.h"
#include "losses.cuh"

namespace fastlm {

// Of a block, and blocks that share a multiprocessor: 85 registers a thread, 128 for float64, which
// all kernels do with on every architecture.
constexpr int kMostThreads = 256;
template <typename T>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 2 : 3;

// Reads that a thread of the forward kernel has under way.
template <typename T>
constexpr int kReads = sizeof(T) == 8 ? 1 : 2;

// A row's logits and target.
template <typename T>
struct Row {
  const T* logits;
  int64_t target;
  bool is_ignored;
  bool is_class;  // the target, in [0, vocab_size) and not ignored

  __device__ Row(const LossRows& rows, int64_t row) {
    // 64 bits: a vocabulary of 128,256 passes 2^31 elements at row 16,744
    logits = static_cast<const T*>(rows.logits) + row / rows.inner * rows.stride_outer +
             row % rows.inner * rows.stride_inner;
    target = rows.targets[row];
    is_ignored = target == rows.ignore_index;
    is_class = target >= 0 && target < rows.vocab_size && !is_ignored;
  }
};

template <typename T>
__device__ inline Transform<Acc<T>> transform_of(const LossRows& rows) {
  return {static_cast<Acc<T>>(rows.logit_scale), static_cast<Acc<T>>(rows.softcap)};
}

// w[target]; 0 for a target that is no class.
template <typename T>
__device__ inline Acc<T> target_weight(const LossRows& rows, const Row<T>& row) {
  if (!rows.weight) return 1;
  return row.is_class ? static_cast<const Acc<T>*>(rows.weight)[row.target] : 0;
}

// sum_v w[v]
template <typename T>
__device__ inline Acc<T> weight_sum(const LossRows& rows) {
  if (!rows.weight) return static_cast<Acc<T>>(rows.vocab_size);
  return *static_cast<const Acc<T>*>(rows.weight_sum);
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads, kBlocksAtOnce<T>)
    cross_entropy_forward_kernel(const LossRows rows, const LossResults results) {
  using A = Acc<T>;
  const int64_t number = blockIdx.x;
  const Row<T> row(rows, number);
  const Transform<A> transform = transform_of<T>(rows);
  A x_target = NAN;
  if (row.is_class) x_target = transform(widened(row.logits[row.target * rows.stride_vocab]));

  Gathering<A> gathering;
  gathering.need_stats = results.logprobs != nullptr;
  gathering.is_smoothed = rows.label_smoothing > 0;
  gathering.weight = static_cast<const A*>(rows.weight);
  // of a target that is no class, or huge, zero: it would swallow the others
  gathering.origin = x_target > -1000 && x_target < 1000 ? x_target : 0;

  RowSums<A> own;
  const bool whole = moves_whole(row.logits, rows.stride_vocab);
  const int64_t step = static_cast<int64_t>(blockDim.x) * kGroup<T>;
  for (int64_t start = threadIdx.x * kGroup<T>; start < rows.vocab_size; start += kReads<T> * step) {
    Group<T> groups[kReads<T>];
#pragma unroll
    for (int read = 0; read < kReads<T>; ++read)
      groups[read] = load_group(row.logits, rows.stride_vocab, start + read * step,
                                rows.vocab_size, whole);
#pragma unroll
    for (int read = 0; read < kReads<T>; ++read) {
      const int64_t first = start + read * step;
      A x[kGroup<T>];
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i)
        x[i] = first + i < rows.vocab_size ? transform(widened(groups[read].items[i]))
                                           : -kInfinity<A>;
      gather(own, x, first, rows.vocab_size, gathering);
    }
  }
  const RowSums<A> sums = combine_threads(own, rows.vocab_size, gathering);
  if (threadIdx.x != 0) return;

  const A log_sum = logarithm(sums.total);
  // inf - inf: NaN for a row with +inf, or of -inf alone; maxima drop NaN, sums keep it
  const A maximum = log_sum != log_sum ? static_cast<A>(NAN) : sums.maximum;
  static_cast<A*>(results.maximum)[number] = maximum;
  static_cast<A*>(results.log_sum)[number] = log_sum;

  const A surprisal = log_sum - (x_target - maximum);
  A loss = target_weight(rows, row) * surprisal;
  if (gathering.is_smoothed) {
    const A smoothing = static_cast<A>(rows.label_smoothing);
    const A uniform =
        weight_sum<T>(rows) * (log_sum - (gathering.origin - maximum)) - sums.weighted;
    loss = (1 - smoothing) * loss + smoothing / static_cast<A>(rows.vocab_size) * uniform;
  }
  static_cast<A*>(results.losses)[number] = row.is_ignored ? 0 : loss;
  if (gathering.need_stats) {
    static_cast<A*>(results.logprobs)[number] = row.is_ignored ? 0 : -surprisal;
    const A entropy = log_sum - sums.moment / sums.total;
    static_cast<A*>(results.entropy)[number] = row.is_ignored ? 0 : entropy;
    results.predictions[number] = row.is_ignored ? -1 : sums.first;
  }
}

template <typename T>
__device__ inline Acc<T> upstream_of(const void* gradients, int64_t row) {
  return gradients ? static_cast<const Acc<T>*>(gradients)[row] : 0;
}

template <typename T>
__device__ inline Factors<Acc<T>> factors_of(const LossRows& rows, const Row<T>& row,
                                             const LossUpstream& upstream, int64_t number) {
  using A = Acc<T>;
  const A dloss = upstream_of<T>(upstream.dlosses, number);
  Factors<A> factors{dloss * target_weight(rows, row), 0, 0, 0};
  if (rows.label_smoothing > 0) {
    const A smoothing = static_cast<A>(rows.label_smoothing);
    factors.of_target *= 1 - smoothing;
    factors.of_weight = smoothing / static_cast<A>(rows.vocab_size) * dloss;
    factors.of_all = factors.of_weight * weight_sum<T>(rows);
  }
  factors.of_target -= upstream_of<T>(upstream.dlogprobs, number);
  factors.of_all += upstream_of<T>(upstream.dlse, number);
  factors.of_entropy = upstream_of<T>(upstream.dentropy, number);
  return factors;
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads, kBlocksAtOnce<T>)
    cross_entropy_backward_kernel(const LossRows rows, const LossUpstream upstream,
                                  T* __restrict__ dlogits) {
  using A = Acc<T>;
  const int64_t number = blockIdx.x;
  const Row<T> row(rows, number);
  const Transform<A> transform = transform_of<T>(rows);
  const Factors<A> factors = factors_of(rows, row, upstream, number);
  const A maximum = static_cast<const A*>(upstream.maximum)[number];
  const A log_sum = static_cast<const A*>(upstream.log_sum)[number];
  const A entropy = upstream.dentropy ? static_cast<const A*>(upstream.entropy)[number] : 0;
  const A* weight = rows.label_smoothing > 0 ? static_cast<const A*>(rows.weight) : nullptr;

  dlogits += number * rows.vocab_size;
  const bool reads_whole = moves_whole(row.logits, rows.stride_vocab);
  const bool writes_whole = moves_whole(dlogits, 1);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * kGroup<T>;
  const int64_t begin = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kGroup<T>;
  for (int64_t first = begin; first < rows.vocab_size; first += step) {
    Group<T> group;
    if (row.is_class) {
      group = load_group(row.logits, rows.stride_vocab, first, rows.vocab_size, reads_whole);
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) {
        const A x = transform(widened(group.items[i]));
        const A w = weight && first + i < rows.vocab_size ? weight[first + i] : A(1);
        const A dx = gradient(x - maximum - log_sum, first + i == row.target, w, entropy, factors);
        group.items[i] = narrowed<T>(dx * transform.slope(x));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i)
        group.items[i] = narrowed<T>(row.is_ignored ? A(0) : static_cast<A>(NAN));
    }
    store_group(dlogits, first, rows.vocab_size, writes_whole, group);
  }
}

}  // namespace fastlm
