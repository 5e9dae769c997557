// Launchers of the cross-entropy kernels: plain C++, for callers that know nothing of CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"

namespace fastlm {

// The logits of each row, their targets, and the options.  ACC is float32, float64 for float64.
struct LossRows {
  const void* logits;       // row r is at (r / inner) * stride_outer + (r % inner) * stride_inner
  const int64_t* targets;   // (rows,)
  const void* weight;       // (vocab_size,) ACC; null: all classes weigh 1
  const void* weight_sum;   // (1,) ACC, read with weight and label_smoothing
  int64_t rows, inner;
  int64_t stride_outer, stride_inner, stride_vocab;
  int64_t vocab_size;
  int64_t ignore_index;
  double label_smoothing;
  double softcap;  // 0: none
  double logit_scale;
};

// (rows,) ACC, but the predictions; where logprobs is null, the last three are not written.
struct LossResults {
  void* losses;
  void* maximum;
  void* log_sum;
  void* logprobs;
  void* entropy;
  int64_t* predictions;
};

// (rows,) ACC: what the forward pass has written, and what comes in for it.
struct LossUpstream {
  const void* maximum;
  const void* log_sum;
  const void* entropy;    // read with dentropy
  const void* dlosses;
  const void* dlogprobs;  // null: zeros, as the next two
  const void* dlse;
  const void* dentropy;
};

// How a launch is cut; none of it changes what is computed, but for rounding.
struct LossPlan {
  int threads;         // of a block, a multiple of 32, at most 256
  int blocks_per_row;  // of the backward kernel, at most 65,535
};

// Both return why nothing was launched, or an empty string; they neither wait nor allocate.
// `stream` is a cudaStream_t.
std::string cross_entropy_forward(Dtype dtype, const LossRows& rows, const LossResults& results,
                                  const LossPlan& plan, int device, void* stream);

// `dlogits` has the dtype of the logits, rows without gaps.
std::string cross_entropy_backward(Dtype dtype, const LossRows& rows, const LossUpstream& upstream,
                                   void* dlogits, const LossPlan& plan, int device, void* stream);

}  // namespace fastlm
