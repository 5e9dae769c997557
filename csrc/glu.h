// Launcher of the kernel of gated linear units: plain C++, for callers that know nothing of CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "rows.h"

namespace fastlm {

// In the order of ACTIVATIONS in fastlm/ops/glu.py.
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSigmoid };

struct GatedUnits {
  Rows gate, up;
  Rows dout;  // of the gradient; null in the forward pass
  void* out;  // (rows, size) without gaps, as the next; the gradient of gate with dout
  void* dup;
  int64_t rows, inner, size;
  Activation activation;
};

// Returns why nothing was launched, or an empty string; neither waits nor allocates.  `stream` is a
// cudaStream_t.
std::string glu(const GatedUnits& units, int threads, int device, void* stream);

}  // namespace fastlm
