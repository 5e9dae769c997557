// Reductions over the threads of a block, in an order that depends on nothing but its size.
#pragma once

#include "arithmetic.cuh"
#include "device.cuh"

namespace fastlm {

constexpr int kWarpSize = 32;
constexpr int kMostWarps = 1024 / kWarpSize;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Larger {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return larger(a, b);
  }
};
struct Sum {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Smaller {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return b < a ? b : a;
  }
};

// Every lane gets the result.
template <typename A, typename Combine>
__device__ inline A warp_reduce(A value, Combine combine) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

__device__ inline int warps_of_block() { return blockDim.x / kWarpSize; }

// Writes the results of the warps to `by_warp`, shared memory for kMostWarps values; after the next
// __syncthreads() combined() gives that of the block.  Blocks consist of whole warps.
template <typename A, typename Combine>
__device__ inline void reduce_warps(A value, A* by_warp, Combine combine) {
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarpSize == 0) by_warp[threadIdx.x / kWarpSize] = value;
}

template <typename A, typename Combine>
__device__ inline A combined(const A* by_warp, Combine combine) {
  A value = by_warp[0];
  for (int warp = 1; warp < warps_of_block(); ++warp) value = combine(value, by_warp[warp]);
  return value;
}

}  // namespace fastlm
