// Launchers of the RMSNorm kernels: plain C++, for callers that know nothing of CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "rows.h"

namespace fastlm {

// What is normalised, and by what.  ACC is float32, float64 where the vectors are float64.
struct NormInputs {
  Rows vectors;
  Rows residual;       // added to them, if there is one
  const void* weight;  // (size,); null: ones
  Dtype weight_dtype;
  int64_t rows, inner, size;
  double eps, weight_offset;
};

// Without gaps.
struct NormResults {
  void* out;    // (rows, size)
  void* total;  // (rows, size), written with a residual
  void* rstd;   // (rows,) ACC
  Dtype dtype;  // of out and total
};

struct NormUpstream {
  Rows dout;
  const void* dtotal;  // (rows, size) without gaps, dtype of the vectors; null: zeros
  const void* rstd;    // (rows,) ACC
};

struct NormGradients {
  void* dvectors;  // (rows, size) without gaps, dtype of the vectors; null: not asked for
  void* partial;   // (teams, size) ACC: of the rows of each team; null: not asked for
};

// How a launch is cut; none of it changes what is computed, but for rounding.
struct NormPlan {
  int threads;        // of a block, a multiple of 32, at most 256
  int team;           // threads that share a row: 32, or all of a block
  int rows_per_team;  // of the backward kernel, one after the other
};

// Both return why nothing was launched, or an empty string; they neither wait nor allocate.
// `stream` is a cudaStream_t.
std::string rms_norm_forward(const NormInputs& inputs, const NormResults& results,
                             const NormPlan& plan, int device, void* stream);
std::string rms_norm_backward(const NormInputs& inputs, const NormUpstream& upstream,
                              const NormGradients& gradients, const NormPlan& plan, int device,
                              void* stream);

}  // namespace fastlm
