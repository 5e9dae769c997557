// What kernels may use beyond plain C++, for nvcc and, in the tests, for g++.
//
// tests/cuda_host runs the same kernels on a CPU, one fiber per thread.  It knows no __shared__:
// arrays are declared by the macros below, and kernels are launched by launch().
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// `T name[count]` in shared memory.
#define FASTLM_SHARED(T, name, count) __shared__ T name[count]
// `T* name` to the shared memory that the launch asked for, at a multiple of 128 bytes.
#define FASTLM_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(128) unsigned char fastlm_dynamic[]; \
  T* const name = reinterpret_cast<T*>(fastlm_dynamic)

#else

#include "shim/device.h"

#endif
