// ldmatrix and mma.sync of 16-bit elements, by the layouts that PTX documents.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "runtime.h"

namespace shim {

constexpr int kMatrixRow = 16;  // bytes

// Changes, for each lane, the row that it has read to its parts of four matrices.
void distribute_matrices(unsigned char* const (&lanes)[kWarp]);
void distribute_transposed(unsigned char* const (&lanes)[kWarp]);

// What a lane brings to a product, and c is what it takes home.
struct Fragments {
  float c[4];
  unsigned a[4], b[2];
};
void multiply_bfloat16(unsigned char* const (&lanes)[kWarp]);
void multiply_float16(unsigned char* const (&lanes)[kWarp]);

inline void load_matrices(unsigned (&registers)[4], const void* row, bool transposed, Where at) {
  if (reinterpret_cast<uintptr_t>(row) % kMatrixRow)
    fail("ldmatrix at an address that is no multiple of 16", at);
  if (!is_shared(row, kMatrixRow)) fail("ldmatrix beyond the block's shared memory", at);
  memcpy(registers, row, kMatrixRow);  // here, where sanitizers watch
  whole_warp(registers, kMatrixRow, transposed ? distribute_transposed : distribute_matrices, at);
}

template <typename T>
void multiply_matrices(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4],
                       unsigned b0, unsigned b1, Where at) {
  static_assert(sizeof(T) == 2, "elements have 16 bits");
  Fragments fragments{{c0, c1, c2, c3}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  constexpr bool is_half = std::is_same_v<T, __half>;
  whole_warp(&fragments, sizeof fragments, is_half ? multiply_float16 : multiply_bfloat16, at);
  c0 = fragments.c[0], c1 = fragments.c[1], c2 = fragments.c[2], c3 = fragments.c[3];
}

}  // namespace shim
