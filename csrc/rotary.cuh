// The rotary kernel (Su et al., 2021, https://arxiv.org/abs/2104.09864).
//
//   (a, b) -> (a cos - b sin, b cos + a sin)        for each pair of channels
//
// The gradient is the rotation by the opposite angle.  A thread has eight pairs of a head, and reads
// each channel once; or eight of the channels beyond the pairs, which are copied.
//
// Dtypes are branches at run time, the same for a whole launch.
#pragma once

#include "numbers.cuh"
#include "rotary.h"

namespace fastlm {

constexpr int kRotaryThreads = 256;

__host__ __device__ inline int64_t eights_of(int64_t size) { return (size + kEight - 1) / kEight; }

// Threads that a head takes.
__host__ __device__ inline int64_t units_of_head(const Rotation& in) {
  return eights_of(in.pairs) + eights_of(in.head_dim - 2 * in.pairs);
}

template <typename A>
__global__ void __launch_bounds__(kRotaryThreads, 2)
    rotate_kernel(const Rotation in, const int64_t total) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= total) return;
  const int64_t units = units_of_head(in), of_pairs = eights_of(in.pairs);
  // 64 bits: 32 heads of 128 channels pass 2^31 elements at token 524,288
  const int64_t row = number / units, unit = number % units;
  const int64_t token = row / in.num_heads, head = row % in.num_heads;
  const int64_t batch = token / in.length, position = token % in.length;
  const void* const x = moved(
      in.heads, batch * in.stride_b + position * in.stride_t + head * in.stride_h, in.dtype);
  void* const out = moved(in.out, row * in.head_dim, in.dtype);
  if (unit >= of_pairs) {
    const int64_t first = 2 * in.pairs + (unit - of_pairs) * kEight;
    const Eight<A> rest = load_eight<A>(x, in.dtype, in.stride_d, first, in.head_dim);
    store_eight(out, in.dtype, first, in.head_dim, rest);
    return;
  }
  const int64_t pair = unit * kEight;
  const int64_t angle = batch * in.angle_b + position * in.angle_t;
  const Eight<A> cos = load_eight<A>(moved(in.cos, angle, in.angle_dtype), in.angle_dtype,
                                     in.angle_p, pair, in.pairs);
  const Eight<A> sin = load_eight<A>(moved(in.sin, angle, in.angle_dtype), in.angle_dtype,
                                     in.angle_p, pair, in.pairs);
  const A sign = in.turns_back ? A(-1) : A(1);
  // neighbours: all channels of four pairs, then of four more; else the first of each pair and then
  // the second, which is `pairs` further
  const int64_t size = in.is_interleaved ? 2 * in.pairs : in.pairs;
  const int64_t begin = in.is_interleaved ? 2 * pair : pair;
  const int64_t further = in.is_interleaved ? kEight : in.pairs;
  const void* const x_high = moved(x, further * in.stride_d, in.dtype);
  Eight<A> low = load_eight<A>(x, in.dtype, in.stride_d, begin, size);
  Eight<A> high = load_eight<A>(x_high, in.dtype, in.stride_d, begin,
                                in.is_interleaved ? size - kEight : size);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (in.is_interleaved) {
      Eight<A>& half = i < kEight / 2 ? low : high;
      const int at = i % (kEight / 2) * 2;
      const A a = half.items[at], b = half.items[at + 1];
      half.items[at] = a * cos.items[i] - b * (sign * sin.items[i]);
      half.items[at + 1] = b * cos.items[i] + a * (sign * sin.items[i]);
    } else {
      const A a = low.items[i], b = high.items[i];
      low.items[i] = a * cos.items[i] - b * (sign * sin.items[i]);
      high.items[i] = b * cos.items[i] + a * (sign * sin.items[i]);
    }
  }
  store_eight(out, in.dtype, begin, size, low);
  store_eight(moved(out, further, in.dtype), in.dtype, begin,
              in.is_interleaved ? size - kEight : size, high);
}

}  // namespace fastlm
