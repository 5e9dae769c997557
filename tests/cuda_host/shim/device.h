// CUDA C++ for g++: what csrc/*.cuh may use of the language, as functions of the runtime beside.
//
// NVIDIA's own headers give the vector types, bfloat16 and half, whose host code rounds as the
// device does.  Not here, because no kernel uses it: wmma, wgmma, clusters, TMA, textures.
#pragma once

// These would declare threadIdx anew, and use keywords that are gone below.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <vector_types.h>

#include <cstring>
#include <type_traits>

#include "matrices.h"
#include "runtime.h"

#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __host__
#undef __launch_bounds__
#undef __restrict__
#undef __shared__
#define __constant__
#define __device__
#define __forceinline__ inline
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static_assert(false, "shared memory is declared by FASTLM_SHARED");

#define FASTLM_SHARED(T, name, count)        \
  static const char name##_site = 0;         \
  T(&name)[count] = *static_cast<T(*)[count]>( \
      shim::shared(&name##_site, sizeof(T) * (count), shim::Where::here()))
#define FASTLM_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(shim::dynamic_shared(shim::Where::here()))

#define __syncthreads() shim::block_barrier(shim::Where::here())

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, shim::Where at = shim::Where::here()) {
  shim::collective(shim::Collective::sync, mask, nullptr, 0, -1, at);
}

namespace shim {

// `source` is a lane of the caller's part of `width` lanes, or outside it: then the value stays.
template <typename T>
T shuffled(unsigned mask, T value, int source, int width, Where at) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
  const bool inside = source >= 0 && source < kWarp && source / width == lane() / width;
  collective(Collective::shuffle, mask, &value, sizeof value, inside ? source : -1, at);
  return value;
}

inline unsigned ballot(unsigned mask, int predicate, Where at) {
  int value = predicate != 0;
  collective(Collective::vote, mask, &value, sizeof value, -1, at);
  return unsigned(value);
}

}  // namespace shim

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              shim::Where at = shim::Where::here()) {
  const int first = shim::lane() / width * width;
  return shim::shuffled(mask, value, first + source % width, width, at);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  shim::Where at = shim::Where::here()) {
  return shim::shuffled(mask, value, shim::lane() ^ bits, width, at);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 shim::Where at = shim::Where::here()) {
  return shim::shuffled(mask, value, shim::lane() - int(distance), width, at);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   shim::Where at = shim::Where::here()) {
  return shim::shuffled(mask, value, shim::lane() + int(distance), width, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              shim::Where at = shim::Where::here()) {
  return shim::ballot(mask, predicate, at);
}
inline int __any_sync(unsigned mask, int predicate, shim::Where at = shim::Where::here()) {
  return shim::ballot(mask, predicate, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, shim::Where at = shim::Where::here()) {
  return shim::ballot(mask, !predicate, at) == 0;
}

// Through the compiler's own atomics, which TSan knows.

namespace shim {

template <typename T, typename Change>
T atomically(T* at, Change change) {
  using Bits = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
  static_assert(sizeof(T) == sizeof(Bits), "atomics change 4 or 8 bytes");
  auto bits = reinterpret_cast<Bits*>(at);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED), after;
  T value;
  do {
    memcpy(&value, &before, sizeof value);
    const T changed = change(value);
    memcpy(&after, &changed, sizeof after);
  } while (!__atomic_compare_exchange_n(bits, &before, after, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  memcpy(&value, &before, sizeof value);
  return value;
}

}  // namespace shim

template <typename T>
T atomicAdd(T* at, T value) {
  return shim::atomically(at, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMax(T* at, T value) {
  return shim::atomically(at, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* at, T value) {
  return shim::atomically(at, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* at, T value) {
  return shim::atomically(at, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  return shim::atomically(at, [=](T old) { return old == expected ? value : old; });
}
// Threads take turns: what one has written, the next sees.
inline void __threadfence() {}
inline void __threadfence_block() {}

// As the device computes it: the product is rounded before the power is taken.
inline float __expf(float x) { return exp2f(x * 1.44269504f); }
// A product that no sum contracts.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

namespace shim {

// kernel<<<grid, block, shared_bytes>>>(parameters...), of which each thread has a copy.
template <typename... P>
void launch_kernel(const char* name, void (*kernel)(P...), dim3 grid, dim3 block,
                   size_t shared_bytes, const P&... parameters) {
  auto thread = [&] { kernel(parameters...); };
  auto body = [](void* function) { (*static_cast<decltype(thread)*>(function))(); };
  launch({name, reinterpret_cast<const void*>(kernel), body, &thread}, grid, block, shared_bytes);
}

}  // namespace shim
