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

__host__ __device__ inline float widened(float x) { return x; }
__host__ __device__ inline double widened(double x) { return x; }
__host__ __device__ inline float widened(__half x) { return __half2float(x); }
__host__ __device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded once, to nearest even.
template <typename T>
__host__ __device__ T narrowed(Acc<T> x);
template <>
__host__ __device__ inline float narrowed<float>(float x) {
  return x;
}
template <>
__host__ __device__ inline double narrowed<double>(double x) {
  return x;
}
template <>
__host__ __device__ inline __half narrowed<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ inline __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// As many neighbours as one access moves.
template <typename T>
constexpr int kGroup = 16 / sizeof(T);

template <typename T>
struct Group {
  T items[kGroup<T>];
};

// By how many elements `at` lies behind a multiple of 16 bytes.
template <typename T>
__device__ inline int behind(const T* at) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(at) % 16 / sizeof(T));
}

// Bytes [shift, shift + 16) of the 32 of two neighbours; shift is even.
__device__ inline uint4 shifted(const uint4& low, const uint4& high, int shift) {
  unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = shift & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = shift & 4 ? words[i + 1] : words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = shift & 2 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
  return {words[0], words[1], words[2], words[3]};
}

// Elements [first, first + kGroup) of a row of `size`; zeros before and beyond it.
//
// Without gaps they come in 16 bytes, or out of the two times 16 bytes they lie in, if all of these
// are the row's; at its ends, or with gaps, one by one.  They are the same elements however they are
// read: a layout changes no result.
template <typename T>
__device__ inline Group<T> load_group(const T* row, int64_t stride, int64_t first, int64_t size) {
  Group<T> group;
  if (stride == 1) {
    const int late = behind(row + first);
    const int64_t begin = first - late;
    if (begin >= 0 && begin + (late ? 2 : 1) * kGroup<T> <= size) {
      const uint4* const vectors = reinterpret_cast<const uint4*>(row + begin);
      uint4 bits = vectors[0];
      if (late) bits = shifted(bits, vectors[1], late * static_cast<int>(sizeof(T)));
      memcpy(&group, &bits, sizeof bits);
      return group;
    }
  }
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i) {
    const int64_t at = first + i;
    group.items[i] = at >= 0 && at < size ? row[at * stride] : narrowed<T>(0);
  }
  return group;
}

// The reverse, into a row without gaps: at once where the address is a multiple of 16 bytes.
template <typename T>
__device__ inline void store_group(T* row, int64_t first, int64_t size, const Group<T>& group) {
  if (first >= 0 && first + kGroup<T> <= size && behind(row + first) == 0) {
    uint4 bits;
    memcpy(&bits, &group, sizeof bits);
    *reinterpret_cast<uint4*>(row + first) = bits;
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i)
    if (first + i >= 0 && first + i < size) row[first + i] = group.items[i];
}

// Whether groups that begin at multiples of kGroup from `row`, without gaps, can be moved at once.
__device__ inline bool moves_whole(const void* row) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// Both for rows without gaps of which that is known, with `first` at a multiple of kGroup: registers
// that the questions above take are for the sums of attention.
template <typename T>
__device__ inline Group<T> load_group_if_whole(const T* row, int64_t first, int64_t size,
                                               bool whole) {
  Group<T> group;
  if (whole && first + kGroup<T> <= size) {
    const uint4 bits = *reinterpret_cast<const uint4*>(row + first);
    memcpy(&group, &bits, sizeof bits);
    return group;
  }
#pragma unroll
  for (int i = 0; i < kGroup<T>; ++i)
    group.items[i] = first + i < size ? row[first + i] : narrowed<T>(0);
  return group;
}

template <typename T>
__device__ inline void store_group_if_whole(T* row, int64_t first, int64_t size, bool whole,
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
