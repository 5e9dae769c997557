// Elements of a dtype that is known at run time: one kernel serves them all.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "vectors.cuh"

namespace fastlm {

// One element.
template <typename A>
__device__ inline A number_at(const void* elements, int64_t place, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return widened(static_cast<const float*>(elements)[place]);
    case Dtype::kBfloat16: return widened(static_cast<const __nv_bfloat16*>(elements)[place]);
    case Dtype::kFloat16: return widened(static_cast<const __half*>(elements)[place]);
    case Dtype::kFloat64: break;
  }
  return static_cast<A>(static_cast<const double*>(elements)[place]);
}

// What a number of float32, or of float64, becomes as an element of the dtype.
__device__ inline float rounded(float x, Dtype dtype) {
  if (dtype == Dtype::kBfloat16) return widened(narrowed<__nv_bfloat16>(x));
  if (dtype == Dtype::kFloat16) return widened(narrowed<__half>(x));
  return x;
}
__device__ inline double rounded(double x, Dtype) { return x; }

__device__ inline void put_number(void* elements, int64_t place, Dtype dtype, float x) {
  if (dtype == Dtype::kBfloat16)
    static_cast<__nv_bfloat16*>(elements)[place] = narrowed<__nv_bfloat16>(x);
  else if (dtype == Dtype::kFloat16)
    static_cast<__half*>(elements)[place] = narrowed<__half>(x);
  else
    static_cast<float*>(elements)[place] = x;
}
__device__ inline void put_number(void* elements, int64_t place, Dtype, double x) {
  static_cast<double*>(elements)[place] = x;
}

template <typename T>
constexpr Dtype kDtype = Dtype::kFloat32;
template <>
constexpr Dtype kDtype<__nv_bfloat16> = Dtype::kBfloat16;
template <>
constexpr Dtype kDtype<__half> = Dtype::kFloat16;
template <>
constexpr Dtype kDtype<double> = Dtype::kFloat64;

__host__ __device__ inline int64_t bytes_of(Dtype dtype) {
  if (dtype == Dtype::kFloat64) return 8;
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

// The address of an element.
__device__ inline const void* moved(const void* elements, int64_t places, Dtype dtype) {
  return static_cast<const char*>(elements) + places * bytes_of(dtype);
}
__device__ inline void* moved(void* elements, int64_t places, Dtype dtype) {
  return static_cast<char*>(elements) + places * bytes_of(dtype);
}

// What a thread goes through at a time: 16 bytes of a narrow dtype, 32 of float32.
constexpr int kEight = 8;

template <typename A>
struct Eight {
  A items[kEight];
};

template <typename T, typename A>
__device__ inline void take_groups(const void* from, Eight<A>& eight) {
  constexpr int kGroups = kEight / kGroup<T>;
  Group<T> groups[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const uint4 bits = static_cast<const uint4*>(from)[g];
    memcpy(&groups[g], &bits, sizeof bits);
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i)
    eight.items[i] = static_cast<A>(widened(groups[i / kGroup<T>].items[i % kGroup<T>]));
}

template <typename T>
__device__ inline void put_groups(void* to, const Eight<Acc<T>>& eight) {
  constexpr int kGroups = kEight / kGroup<T>;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    Group<T> group;
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i)
      group.items[i] = narrowed<T>(eight.items[g * kGroup<T> + i]);
    uint4 bits;
    memcpy(&bits, &group, sizeof bits);
    static_cast<uint4*>(to)[g] = bits;
  }
}

// Elements [first, first + 8) of a row of `size`; zeros beyond it.
//
// Where they lie without gaps at a multiple of 16 bytes they come at once, else one by one: the same
// elements, so that a layout changes no result.
template <typename A>
__device__ inline Eight<A> load_eight(const void* row, Dtype dtype, int64_t stride, int64_t first,
                                      int64_t size) {
  Eight<A> eight;
  const void* const from = moved(row, first * stride, dtype);
  if (stride == 1 && first + kEight <= size && dtype != Dtype::kFloat64 && moves_whole(from)) {
    if (dtype == Dtype::kBfloat16)
      take_groups<__nv_bfloat16>(from, eight);
    else if (dtype == Dtype::kFloat16)
      take_groups<__half>(from, eight);
    else
      take_groups<float>(from, eight);
    return eight;
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i)
    eight.items[i] = first + i < size ? number_at<A>(from, i * stride, dtype) : A(0);
  return eight;
}

// The reverse, into a row without gaps.
__device__ inline void store_eight(void* row, Dtype dtype, int64_t first, int64_t size,
                                   const Eight<float>& eight) {
  void* const to = moved(row, first, dtype);
  if (first + kEight <= size && moves_whole(to)) {
    if (dtype == Dtype::kBfloat16)
      put_groups<__nv_bfloat16>(to, eight);
    else if (dtype == Dtype::kFloat16)
      put_groups<__half>(to, eight);
    else
      put_groups<float>(to, eight);
    return;
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i)
    if (first + i < size) put_number(to, i, dtype, eight.items[i]);
}
__device__ inline void store_eight(void* row, Dtype dtype, int64_t first, int64_t size,
                                   const Eight<double>& eight) {
#pragma unroll
  for (int i = 0; i < kEight; ++i)
    if (first + i < size) put_number(row, first + i, dtype, eight.items[i]);
}

}  // namespace fastlm
