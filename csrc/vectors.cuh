// Elements of any dtype as numbers to compute with, and 16 bytes of them at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.cuh"

namespace fastlm {

// What is computed in: float32, for narrower dtypes too (sm_75 has no bfloat16 arithmetic); float64
// for float64.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded once, to nearest even.
template <typename T>
__device__ T narrowed(Acc<T> x);
template <>
__device__ inline float narrowed<float>(float x) {
  return x;
}
template <>
__device__ inline double narrowed<double>(double x) {
  return x;
}
template <>
__device__ inline __half narrowed<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// As many neighbours as one access moves.
template <typename T>
constexpr int kGroup = 16 / sizeof(T);

template <typename T>
struct Group {
  T items[kGroup<T>];
};

// Whether groups that begin at multiples of kGroup from `row` can be moved whole.
__device__ inline bool moves_whole(const void* row, int64_t stride) {
  return stride == 1 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// Elements [first, first + kGroup) of a row of `size`; zeros beyond it.  The same elements whether
// they are read together, which `whole` allows, or one by one: a layout changes no result.
template <typename T>
__device__ inline Group<T> load_group(const T* row, int64_t stride, int64_t first, int64_t size,
                                      bool whole) {
  Group<T> group;
  if (whole && first + kGroup<T> <= size) {
    const uint4 bits = *reinterpret_cast<const uint4*>(row + first);
    memcpy(&group, &bits, sizeof bits);
    return group;
  }
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i)
    group.items[i] = first + i < size ? row[(first + i) * stride] : narrowed<T>(0);
  return group;
}

// The reverse, into a row without gaps.
template <typename T>
__device__ inline void store_group(T* row, int64_t first, int64_t size, bool whole,
                                   const Group<T>& group) {
  if (whole && first + kGroup<T> <= size) {
    uint4 bits;
    memcpy(&bits, &group, sizeof bits);
    *reinterpret_cast<uint4*>(row + first) = bits;
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i)
    if (first + i < size) row[first + i] = group.items[i];
}

}  // namespace fastlm
