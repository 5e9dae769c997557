// Starts kernels, and says in words why one did not start.
#pragma once

#include <cuda_runtime_api.h>

#include <climits>
#include <cstdint>
#include <string>

#include "device.cuh"

namespace fastlm {

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Where and how a kernel runs.
struct Launch {
  const char* kernel;
  int64_t grid_x, grid_y;
  int threads;
  int shared_bytes;  // of dynamic shared memory
  int device;
  void* stream;

  std::string described(const std::string& why) const {
    return std::string(kernel) + " did not start: " + why + " (grid (" + std::to_string(grid_x) +
           ", " + std::to_string(grid_y) + "), " + std::to_string(threads) +
           " threads and " + std::to_string(shared_bytes) + " bytes of shared memory a block, device " +
           std::to_string(device) + ")";
  }
};

// What a block may have without being asked for by name.
constexpr int kUsualShared = 48 * 1024;

// Returns why the kernel did not start, or an empty string.  A grid with a side of zero starts
// nothing.
template <typename... P>
std::string launch(const Launch& how, void (*kernel)(P...), const P&... parameters) {
  if (how.grid_x == 0 || how.grid_y == 0) return "";
  if (how.grid_x > INT_MAX || how.grid_y > USHRT_MAX) return how.described("grid is too large");
  const DeviceGuard guard(how.device);
  if (guard.error() != cudaSuccess) return how.described(cudaGetErrorString(guard.error()));
  if (how.shared_bytes > kUsualShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // said here, not by the next launch
      return how.described(cudaGetErrorString(error));
    }
  }
  const dim3 grid(static_cast<unsigned>(how.grid_x), static_cast<unsigned>(how.grid_y));
#ifdef __CUDACC__
  const auto stream = static_cast<cudaStream_t>(how.stream);
  kernel<<<grid, how.threads, how.shared_bytes, stream>>>(parameters...);
#else
  shim::launch_kernel(how.kernel, kernel, grid, how.threads, how.shared_bytes, parameters...);
#endif
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : how.described(cudaGetErrorString(error));
}

}  // namespace fastlm
