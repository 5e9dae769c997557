// Launchers of the kernels of linear_cross_entropy, on a chunk of logits: plain C++.
#pragma once

#include <cstdint>
#include <string>

#include "cross_entropy.h"
#include "dtype.h"

namespace fastlm {

// A chunk of logits without their bias, the targets, and the options.  ACC is the dtype of the
// logits, float32 or float64.  The logits are those of classes [first_class, first_class +
// vocab_size) of num_classes: others may be elsewhere.
struct ChunkRows {
  const void* logits;      // (rows, vocab_size) ACC, without gaps
  const void* bias;        // (vocab_size,) ACC; null: none
  const void* weight;      // (num_classes,) ACC; null: all classes weigh 1
  const void* weight_sum;  // (1,) ACC, read with weight and label_smoothing
  const int64_t* targets;  // (rows,)
  int64_t rows;
  int64_t vocab_size;
  int64_t first_class, num_classes;
  int64_t ignore_index;
  double label_smoothing;
  double softcap;  // 0: none
  double logit_scale;
};

// (rows,) ACC, but the predictions.
struct ChunkResults {
  void* losses;
  void* lse;
  void* logprobs;  // written if need_stats, as the next two
  void* entropy;
  int64_t* predictions;
  bool need_stats;
  // What a shard of the classes knows of each row, (3 + 2 need_stats + smoothed, rows) ACC: maximum,
  // total, x[target], [moment, first], [weighted].  If not null, nothing else is written, and the
  // weight_sum of the rows is that of the classes here.
  void* sums;
};

// (rows,) ACC, what comes in for each row, but z_weight: (1,), and the gradient is also that of
// z_weight lse^2.  Null is 1 for dlosses, 0 for the others.
struct ChunkUpstream {
  const void* dlosses;
  const void* dlogprobs;
  const void* dlse;
  const void* dentropy;
  const void* z_weight;
};

// The gradient, over the memory of the logits, perhaps narrower.
struct ChunkGradient {
  void* dlogits;  // (rows, vocab_size); rows begin where those of the logits do
  double scale;   // its factor, a power of two
  bool lse_is_known;  // then lse and, with dentropy, entropy are read and no result is written
  // (rows, 2), of the target and of the element that lost most beside it; if dlogits is narrow
  int64_t* columns;
  void* residuals;  // ACC, what rounding took
};

// As those of cross_entropy.h, these return why nothing was launched, or an empty string.
std::string linear_cross_entropy_loss(Dtype dtype, const ChunkRows& rows,
                                      const ChunkResults& results, const LossPlan& plan, int device,
                                      void* stream);

std::string linear_cross_entropy_gradient(Dtype dtype, Dtype narrow, const ChunkRows& rows,
                                          const ChunkResults& results,
                                          const ChunkUpstream& upstream,
                                          const ChunkGradient& gradient, const LossPlan& plan,
                                          int device, void* stream);

// Adds to `dbias`, (vocab_size,) ACC, the gradient of the logits, summed over the rows; reads lse
// and, with dentropy, entropy.
std::string linear_cross_entropy_bias(Dtype dtype, const ChunkRows& rows,
                                      const ChunkResults& results, const ChunkUpstream& upstream,
                                      void* dbias, const LossPlan& plan, int device, void* stream);

}  // namespace fastlm
