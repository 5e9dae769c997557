// Products on tensor cores: 16 x 16 by 16 x 8, of bfloat16 or float16, summed in float32.
//
// Fragments are those of PTX, which fixes what each lane holds ("Matrix Fragments for
// mma.m16n8k16", https://docs.nvidia.com/cuda/parallel-thread-execution/); nvcuda::wmma leaves it
// open, and sums would have to go through memory to become operands.  With g = lane / 4 and
// t = lane % 4, the elements of a lane are, two to a register where they have 16 bits,
//
//   a[0..3]  (g, 2t), (g, 2t+1);  (g+8, same);  (g, 2t+8), (g, 2t+9);  (g+8, same)
//   b[0..1]  (2t, g), (2t+1, g);  (2t+8, g), (2t+9, g)
//   c[0..3]  (g, 2t);  (g, 2t+1);  (g+8, 2t);  (g+8, 2t+1)
//
// so that the sums of two products side by side, narrowed, are the a of the next.
// All 32 lanes of a warp take part.
#pragma once

#include <cstring>

#include "reduce.cuh"
#include "vectors.cuh"

namespace fastlm {

__device__ inline int lane_of_warp() { return threadIdx.x % kWarpSize; }

// What a register of a fragment holds; the first is in its lower half.
template <typename T>
struct Pair {
  T first, second;
};

template <typename T>
__device__ inline unsigned packed(float first, float second) {
  const Pair<T> pair{narrowed<T>(first), narrowed<T>(second)};
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <typename T>
__device__ inline float2 unpacked(unsigned bits) {
  Pair<T> pair;
  memcpy(&pair, &bits, sizeof bits);
  return {widened(pair.first), widened(pair.second)};
}

// Four matrices of 8 x 8 elements of 16 bits from shared memory.  Lane i gives the address, a
// multiple of 16, of row i % 8 of matrix i / 8; of each it gets elements 2t and 2t+1 of row g, or,
// transposed, those of column g.
template <bool kTransposed>
__device__ inline void load_matrices(unsigned (&registers)[4], const uint16_t* row) {
#ifdef __CUDACC__
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from)
                 : "memory");
#else
  shim::load_matrices(registers, row, kTransposed, shim::Where::here());
#endif
}

// c += a b without tensor cores: for bfloat16 on sm_75, which has none for it.
template <typename T>
__device__ inline void multiply_by_shuffles(float& c0, float& c1, float& c2, float& c3,
                                            const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int pair = lane_of_warp() % 4, quad = lane_of_warp() - pair;
#pragma unroll
  for (int t = 0; t < 4; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned mine = half ? b1 : b0;
      const float2 upper = unpacked<T>(__shfl_sync(kAllLanes, a[2 * half], quad + t));
      const float2 lower = unpacked<T>(__shfl_sync(kAllLanes, a[2 * half + 1], quad + t));
      const float2 left = unpacked<T>(__shfl_sync(kAllLanes, mine, 8 * pair + t));
      const float2 right = unpacked<T>(__shfl_sync(kAllLanes, mine, 8 * pair + 4 + t));
      c0 += upper.x * left.x + upper.y * left.y;
      c1 += upper.x * right.x + upper.y * right.y;
      c2 += lower.x * left.x + lower.y * left.y;
      c3 += lower.x * right.x + lower.y * right.y;
    }
}

// c += a b
template <typename T>
__device__ inline void multiply(float& c0, float& c1, float& c2, float& c3,
                                const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void multiply<__nv_bfloat16>(float& c0, float& c1, float& c2, float& c3,
                                               const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifndef __CUDACC__
  shim::multiply_matrices<__nv_bfloat16>(c0, c1, c2, c3, a, b0, b1, shim::Where::here());
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  multiply_by_shuffles<__nv_bfloat16>(c0, c1, c2, c3, a, b0, b1);
#endif
}

template <>
__device__ inline void multiply<__half>(float& c0, float& c1, float& c2, float& c3,
                                        const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifndef __CUDACC__
  shim::multiply_matrices<__half>(c0, c1, c2, c3, a, b0, b1, shim::Where::here());
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // half as deep: the first eight columns of a and rows of b, then the others
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

}  // namespace fastlm
