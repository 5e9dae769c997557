// Copies from global to shared memory that run beside arithmetic (cp.async, sm_80 and newer; before
// that, copies that are done at once).
//
// A copy is done when the thread that issued it has waited for its group; other threads see it
// after a __syncthreads() that follows.
#pragma once

#include "device.cuh"

#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define FASTLM_HAS_ASYNC_COPY 1
#else
#define FASTLM_HAS_ASYNC_COPY 0
#endif

namespace fastlm {

// 16 bytes, both addresses multiples of 16; zeros where not `valid`, and `global` is not read.
__device__ inline void copy_async16(void* shared, const void* global, bool valid) {
#if FASTLM_HAS_ASYNC_COPY
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
#elif defined(__CUDACC__)
  *static_cast<uint4*>(shared) =
      valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#else
  shim::copy_async(shared, global, 16, valid ? 16 : 0, shim::Where::here());
#endif
}

// Ends a group: the copies issued since the last one.
__device__ inline void commit_copies() {
#if FASTLM_HAS_ASYNC_COPY
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  shim::commit_copies();
#endif
}

// Waits for all groups of this thread but the last `kPending`.
template <int kPending>
__device__ inline void wait_for_copies() {
#if FASTLM_HAS_ASYNC_COPY
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif !defined(__CUDACC__)
  shim::wait_for_copies(kPending);
#endif
}

}  // namespace fastlm
