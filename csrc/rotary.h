// Launcher of the rotary kernel: plain C++, for callers that know nothing of CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"

namespace fastlm {

struct Rotation {
  const void* heads;  // (batch, length, num_heads, head_dim), by strides in elements
  int64_t stride_b, stride_t, stride_h, stride_d;
  const void* cos;  // (batch, length, pairs), by strides that may be 0, the same for both
  const void* sin;
  Dtype angle_dtype;
  int64_t angle_b, angle_t, angle_p;
  void* out;  // of the shape of heads, without gaps
  Dtype dtype;  // of heads and out
  int64_t batch, length, num_heads, head_dim, pairs;
  bool is_interleaved;
  bool turns_back;  // by the opposite angles: the gradient
};

// Returns why nothing was launched, or an empty string; neither waits nor allocates.  `stream` is a
// cudaStream_t.
std::string rotate(const Rotation& rotation, int threads, int device, void* stream);

}  // namespace fastlm
