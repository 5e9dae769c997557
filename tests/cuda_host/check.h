// What the programs share that run launchers for sanitizers to watch.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

// Elements from `offset` on of a block that ends with the last: behind it AddressSanitizer watches,
// and with an offset the first is at no multiple of 16 bytes.
template <typename T>
class Block {
 public:
  explicit Block(size_t count, size_t offset = 0) : count_(count) {
    if (posix_memalign(&memory_, 16, (offset + count) * sizeof(T))) throw std::bad_alloc();
    memset(memory_, 0xFF, (offset + count) * sizeof(T));
    data_ = static_cast<T*>(memory_) + offset;
  }
  ~Block() { free(memory_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  void* memory_;
  T* data_;
  size_t count_;
};

inline int failures = 0, launches = 0;

inline void expect(double got, double want, double allowed, const char* what,
                   const std::string& where) {
  const bool fine = std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= allowed;
  if (fine) return;
  ++failures;
  fprintf(stderr, "%s: %s is %.9g, not %.9g\n", where.c_str(), what, got, want);
}

inline void require(const std::string& error) {
  ++launches;
  if (error.empty()) return;
  ++failures;
  fprintf(stderr, "%s\n", error.c_str());
}
