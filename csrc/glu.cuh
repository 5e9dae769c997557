// The kernel of gated linear units (Shazeer, 2020, https://arxiv.org/abs/2002.05202).
//
//   out   = act(gate) up                                forward
//   dgate = dout up act'(gate),  dup = dout act(gate)   backward, which activates the gate again
//
// A thread has eight elements of a row and reads each once.  Dtypes, the activation and the step are
// branches at run time, the same for a whole launch.
#pragma once

#include "arithmetic.cuh"
#include "glu.h"
#include "numbers.cuh"

namespace fastlm {

constexpr int kGluThreads = 256;

// An activation and its derivative.
template <typename A>
struct Activated {
  A value, slope;
};

template <typename A>
__device__ inline Activated<A> activated(A x, Activation activation) {
  switch (activation) {
    case Activation::kSilu: {
      const A share = 1 / (1 + exponential(-x));
      return {x * share, share * (1 + x * (1 - share))};
    }
    case Activation::kGelu: {
      const A below = A(0.5) * (1 + error_function(x * A(0.7071067811865476)));
      const A density = exponential(A(-0.5) * x * x) * A(0.3989422804014327);
      return {x * below, below + x * density};
    }
    case Activation::kGeluTanh: {
      // Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415
      const A root = A(0.7978845608028654);
      const A t = hyperbolic_tangent(root * (x + A(0.044715) * x * x * x));
      const A rise = root * (1 + A(3 * 0.044715) * x * x) * (1 - t * t);
      return {A(0.5) * x * (1 + t), A(0.5) * (1 + t) + A(0.5) * x * rise};
    }
    case Activation::kSigmoid: {
      const A value = 1 / (1 + exponential(-x));
      return {value, value * (1 - value)};
    }
    case Activation::kRelu:
    case Activation::kRelu2: break;
  }
  // not the larger of it and 0, which would drop NaN
  const A positive = x <= 0 ? A(0) : x;
  if (activation == Activation::kRelu) return {positive, x > 0 ? A(1) : A(0)};
  return {positive * positive, 2 * positive};
}

template <typename A>
__device__ inline Eight<A> eight_of(const Rows& rows, int64_t row, int64_t inner, int64_t first,
                                    int64_t size) {
  const int64_t place = row / inner * rows.stride_outer + row % inner * rows.stride_inner;
  return load_eight<A>(moved(rows.elements, place, rows.dtype), rows.dtype, rows.stride_col, first,
                       size);
}

template <typename A>
__global__ void __launch_bounds__(kGluThreads, 2)
    glu_kernel(const GatedUnits in, const int64_t total) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= total) return;
  const int64_t eights = (in.size + kEight - 1) / kEight;
  // 64 bits: rows of 14,336 pass 2^31 elements at row 149,797
  const int64_t row = number / eights, first = number % eights * kEight;
  const Dtype dtype = in.gate.dtype;
  const Eight<A> gate = eight_of<A>(in.gate, row, in.inner, first, in.size);
  const Eight<A> up = eight_of<A>(in.up, row, in.inner, first, in.size);
  Eight<A> dout, out, dup;
  if (in.dout.elements) dout = eight_of<A>(in.dout, row, in.inner, first, in.size);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const Activated<A> act = activated(gate.items[i], in.activation);
    if (in.dout.elements) {
      out.items[i] = dout.items[i] * up.items[i] * act.slope;
      dup.items[i] = dout.items[i] * act.value;
    } else {
      out.items[i] = act.value * up.items[i];
    }
  }
  store_eight(moved(in.out, row * in.size, dtype), dtype, first, in.size, out);
  if (in.dout.elements)
    store_eight(moved(in.dup, row * in.size, dtype), dtype, first, in.size, dup);
}

}  // namespace fastlm
