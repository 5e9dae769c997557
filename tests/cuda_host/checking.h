// What the programs that check kernels share: memory of exact size, and a count of what is wrong.
//
// They run on a CPU through the shim, under its sanitizers, and, compiled by nvcc with -x cu, on a GPU
// under compute-sanitizer.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "device.cuh"

namespace checking {

inline int failures = 0, launches = 0;

inline void expect(double got, double want, double allowed, const char* what,
                   const std::string& where) {
  const bool fine = std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= allowed;
  if (fine) return;
  ++failures;
  fprintf(stderr, "%s: %s is %.9g, not %.9g\n", where.c_str(), what, got, want);
}

// Takes what a launcher returns, and waits for the kernel.
inline void require(std::string error) {
  ++launches;
#ifdef __CUDACC__
  const cudaError_t status = cudaDeviceSynchronize();
  if (error.empty() && status != cudaSuccess) error = cudaGetErrorString(status);
#endif
  if (error.empty()) return;
  ++failures;
  fprintf(stderr, "%s\n", error.c_str());
}

// Elements from `offset` on of a block that ends with the last: behind it the sanitizers watch, and
// with an offset the first is at no multiple of 16 bytes.  Filled with NaN.
template <typename T>
class Block {
 public:
  explicit Block(size_t count, size_t offset = 0) : count_(count) {
    const size_t bytes = (offset + count) * sizeof(T);
#ifdef __CUDACC__
    const cudaError_t status = cudaMallocManaged(&memory_, bytes > 0 ? bytes : 1);
    if (status != cudaSuccess) {
      fprintf(stderr, "cudaMallocManaged: %s\n", cudaGetErrorString(status));
      exit(2);
    }
#else
    if (posix_memalign(&memory_, 16, bytes)) throw std::bad_alloc();
#endif
    memset(memory_, 0xFF, bytes);
    data_ = static_cast<T*>(memory_) + offset;
  }
  ~Block() {
#ifdef __CUDACC__
    cudaFree(memory_);
#else
    free(memory_);
#endif
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  void* memory_ = nullptr;
  T* data_;
  size_t count_;
};

// Whether the words of the command line ask for `small`; takes the order of blocks from them.
inline bool is_small(int count, char** words) {
  bool small = false;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "small") small = true;
#ifndef __CUDACC__
    if (word == "reverse") shim_set_order(1, 0);
    if (word == "random") shim_set_order(2, 1);
#endif
  }
  return small;
}

// Says what happened; the exit code.
inline int result() {
  printf("%d launches, %d failures\n", launches, failures);
  return failures ? 1 : 0;
}

}  // namespace checking
