// Copies from global to shared memory that run beside arithmetic (cp.async, sm_80 and newer).
//
// A copy is done when the thread that issued it has waited for its group; other threads see it
// after a __syncthreads() that follows.
#pragma once

#include "device.cuh"

namespace fastlm {

// 16 bytes, both addresses multiples of 16; zeros where not `valid`, and `global` is not read.
__device__ inline void copy_async16(void* shared, const void* global, bool valid) {
#ifdef __CUDACC__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
#else
  shim::copy_async(shared, global, 16, valid ? 16 : 0, shim::Where::here());
#endif
}

// Ends a group: the copies issued since the last one.
__device__ inline void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  shim::commit_copies();
#endif
}

// Waits for all groups of this thread but the last `kPending`.
template <int kPending>
__device__ inline void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  shim::wait_for_copies(kPending);
#endif
}

}  // namespace fastlm
