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

template <typename T>
__device__ inline Weighing<Acc<T>> weighing_of(const LossRows& rows, const Row<T>& row) {
  using A = Acc<T>;
  const A smoothing = static_cast<A>(rows.label_smoothing);
  const A size = static_cast<A>(rows.vocab_size);
  const A* weight = static_cast<const A*>(rows.weight);
  if (!weight) return {1, smoothing, smoothing / size, size};
  // 0 for a target that is no class
  const A of_target = row.is_class ? weight[row.target] : 0;
  const A sum = smoothing > 0 ? *static_cast<const A*>(rows.weight_sum) : 0;
  return {of_target, smoothing, smoothing / size, sum};
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
  gathering.origin = origin_at(x_target);
  const RowSums<A> sums = sums_of_row<T>(row.logits, rows.stride_vocab, nullptr, rows.vocab_size,
                                         transform, gathering);
  if (threadIdx.x != 0) return;

  const A log_sum = log_sum_of(sums);
  // maxima drop NaN, sums keep it
  const A maximum = log_sum != log_sum ? static_cast<A>(NAN) : sums.maximum;
  static_cast<A*>(results.maximum)[number] = maximum;
  static_cast<A*>(results.log_sum)[number] = log_sum;

  const A surprisal = log_sum - (x_target - maximum);
  const A loss = weighing_of(rows, row).loss(surprisal, log_sum - (gathering.origin - maximum),
                                             sums.weighted);
  static_cast<A*>(results.losses)[number] = row.is_ignored ? 0 : loss;
  if (gathering.need_stats) {
    static_cast<A*>(results.logprobs)[number] = row.is_ignored ? 0 : -surprisal;
    const A entropy = log_sum - sums.moment / sums.total;
    static_cast<A*>(results.entropy)[number] = row.is_ignored ? 0 : entropy;
    results.predictions[number] = row.is_ignored ? -1 : sums.first;
  }
}

template <typename T>
__global__ void __launch_bounds__(kMostThreads, kBlocksAtOnce<T>)
    cross_entropy_backward_kernel(const LossRows rows, const LossUpstream upstream,
                                  T* __restrict__ dlogits) {
  using A = Acc<T>;
  const int64_t number = blockIdx.x;
  const Row<T> row(rows, number);
  const Transform<A> transform = transform_of<T>(rows);
  Factors<A> factors = weighing_of(rows, row).factors(of_row<A>(upstream.dlosses, number));
  factors.of_target -= of_row<A>(upstream.dlogprobs, number);
  factors.of_all += of_row<A>(upstream.dlse, number);
  factors.of_entropy = of_row<A>(upstream.dentropy, number);
  const A maximum = static_cast<const A*>(upstream.maximum)[number];
  const A log_sum = static_cast<const A*>(upstream.log_sum)[number];
  const A entropy = upstream.dentropy ? static_cast<const A*>(upstream.entropy)[number] : 0;
  const A* weight = rows.label_smoothing > 0 ? static_cast<const A*>(rows.weight) : nullptr;

  dlogits += number * rows.vocab_size;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * kGroup<T>;
  // groups begin where they can be written at once
  const int64_t begin =
      (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kGroup<T> - behind(dlogits);
  for (int64_t first = begin; first < rows.vocab_size; first += step) {
    Group<T> group;
    if (row.is_class) {
      group = load_group(row.logits, rows.stride_vocab, first, rows.vocab_size);
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) {
        const int64_t v = first + i;
        const A x = transform(widened(group.items[i]));
        const A w = weight && v >= 0 && v < rows.vocab_size ? weight[v] : A(1);
        const A dx = gradient(x - maximum - log_sum, v == row.target, w, entropy, factors);
        group.items[i] = narrowed<T>(dx * transform.slope(x));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i)
        group.items[i] = narrowed<T>(row.is_ignored ? A(0) : static_cast<A>(NAN));
    }
    store_group(dlogits, first, rows.vocab_size, group);
  }
}

}  // namespace fastlm
