// Kernels with one bug each, which the shim or a sanitizer must name, and some without.
//
//     planted NAME [forward|reverse|random]
//
// Prints what the kernel computed, as floats and as integers.  Exit code 3: the shim found a bug, and its message is on stderr.
// The line of a bug ends in `// bug: NAME`; tests compare it with what is reported.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "async_copy.cuh"
#include "launch.h"
#include "mma.cuh"
#include "reduce.cuh"

using namespace fastlm;

namespace {

constexpr int kThreads = 64;
constexpr unsigned kHalf = 0x0000FFFFu;

// ---- no bug

__global__ void block_sums(const float* x, float* sums) {
  FASTLM_SHARED(float, by_warp, kThreads / kWarpSize);
  reduce_warps(x[blockIdx.x * blockDim.x + threadIdx.x], by_warp, Sum());
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = combined(by_warp, Sum());
}

__global__ void atomics(const float* x, float* sums) {
  atomicAdd(sums, x[blockIdx.x * blockDim.x + threadIdx.x]);
  int* extremes = reinterpret_cast<int*>(sums) + 1;
  atomicMax(extremes, int(blockIdx.x));
  atomicMin(extremes + 1, -int(blockIdx.x));
  if (atomicCAS(extremes + 2, 0, 7) == 7) atomicExch(extremes + 2, 9);
}

__global__ void staged(const float* x, float* sums) {
  FASTLM_SHARED(float4, stage, kThreads);
  const float4* from = reinterpret_cast<const float4*>(x);
  copy_async16(stage + threadIdx.x, from + threadIdx.x % 32, threadIdx.x < 32);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  const float4 other = stage[kThreads - 1 - threadIdx.x];
  atomicAdd(sums + blockIdx.x, other.x + other.y + other.z + other.w);
}

__global__ void halves_apart(const float* x, float* sums) {
  // lanes of a warp on two ways, each with a mask of its own
  float value = x[threadIdx.x];
  const bool low = threadIdx.x % 32 < 16;
  if (low) {
    value = __shfl_sync(kHalf, value, 3);
  } else {
    value = __shfl_down_sync(~kHalf, value, 1);
  }
  const unsigned ballot = __ballot_sync(kAllLanes, low);
  const bool some = __any_sync(kAllLanes, low) && !__all_sync(kAllLanes, low);
  value = __shfl_up_sync(kAllLanes, value, 2, 8);
  if (threadIdx.x == 17 && some && ballot == kHalf) sums[blockIdx.x] = value;
}

__global__ void dynamic_sums(const float* x, float* sums) {
  FASTLM_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += values[i];
  sums[blockIdx.x] = sum;
}

// A product of 16 x 16 by 16 x 8, x in their rows, its elements weighted by 1, 2, ...
constexpr int kPadded = 24;  // elements from row to row, 48 bytes

template <typename T>
__device__ void fill(uint16_t* a, uint16_t* b, const float* x) {
  for (int i = threadIdx.x; i < 16 * kPadded; i += blockDim.x) {
    const int row = i / kPadded, column = i % kPadded;
    const unsigned nan = packed<T>(NAN, NAN);
    a[i] = uint16_t(column < 16 ? packed<T>(x[(16 * row + column) % kThreads], 0) : nan);
    b[i] = uint16_t(column < 8 ? packed<T>(x[(8 * row + column) % kThreads], 0) : nan);
  }
  __syncthreads();
}

template <typename T>
__device__ void product_of(const uint16_t* a, const uint16_t* b, int stride, bool by_shuffles,
                           float (&c)[4]) {
  unsigned of_a[4], of_b[4];
  const int lane = lane_of_warp();
  load_matrices<false>(of_a, a + lane % 16 * stride + lane / 16 * 8);
  load_matrices<true>(of_b, b + lane % 16 * stride);
  if (by_shuffles)
    multiply_by_shuffles<T>(c[0], c[1], c[2], c[3], of_a, of_b[0], of_b[1]);
  else
    multiply<T>(c[0], c[1], c[2], c[3], of_a, of_b[0], of_b[1]);
}

__device__ void add_weighted(float* sum, const float (&c)[4]) {
  const int row = lane_of_warp() / 4, column = lane_of_warp() % 4 * 2;
  for (int i = 0; i < 4; ++i)
    atomicAdd(sum, c[i] * ((row + i / 2 * 8) * 8 + column + i % 2 + 1));
}

__global__ void matrix_products(const float* x, float* sums) {
  FASTLM_SHARED(uint4, memory, 2 * 16 * kPadded / 8);
  const auto a = reinterpret_cast<uint16_t*>(memory), b = a + 16 * kPadded;
  float c[4] = {0, 0, 0, 0};
  if (blockIdx.x < 2) {
    fill<__half>(a, b, x);
    product_of<__half>(a, b, kPadded, blockIdx.x == 1, c);
  } else {
    fill<__nv_bfloat16>(a, b, x);
    product_of<__nv_bfloat16>(a, b, kPadded, blockIdx.x == 3, c);
  }
  if (threadIdx.x < kWarpSize) add_weighted(sums + blockIdx.x, c);
}

// ---- found in any build

template <typename Bug>
__device__ void with_matrices(const float* x, Bug bug) {
  FASTLM_SHARED(uint4, memory, 2 * 16 * kPadded / 8);
  const auto a = reinterpret_cast<uint16_t*>(memory), b = a + 16 * kPadded;
  fill<__half>(a, b, x);
  bug(a, b);
}

__global__ void product_of_some_lanes(const float* x, float* sums) {
  float c[4] = {0, 0, 0, 0};
  const unsigned a[4] = {0, 0, 0, 0};
  if (threadIdx.x % 32 != 5) multiply<__half>(c[0], c[1], c[2], c[3], a, 0, 0);
  sums[0] = c[0] + x[0];
}

__global__ void product_on_two_ways(const float* x, float* sums) {
  float c[4] = {0, 0, 0, 0};
  const unsigned a[4] = {0, 0, 0, 0};
  if (threadIdx.x % 2)
    multiply<__half>(c[0], c[1], c[2], c[3], a, 0, 0);
  else
    multiply<__nv_bfloat16>(c[0], c[1], c[2], c[3], a, 0, 0);
  sums[0] = c[0] + x[0];
}

__global__ void misaligned_matrix(const float* x, float* sums) {
  with_matrices(x, [=](const uint16_t* a, const uint16_t* b) {
    float c[4] = {0, 0, 0, 0};
    product_of<__half>(a, b, kPadded - 4, false, c);
    sums[0] = c[0];
  });
}

__global__ void matrix_beyond(const float* x, float* sums) {
  with_matrices(x, [=](const uint16_t* a, const uint16_t* b) {
    float c[4] = {0, 0, 0, 0};
    product_of<__half>(a, b, kPadded + 8, false, c);
    sums[0] = c[0];
  });
}

__global__ void matrix_in_global_memory(const float* x, float* sums) {
  unsigned of_a[4];
  load_matrices<false>(of_a, reinterpret_cast<const uint16_t*>(x));
  sums[0] = float(of_a[0]);
}

// numbers, but wrong ones
__global__ void wrong_leading_dimension(const float* x, float* sums) {
  with_matrices(x, [=](const uint16_t* a, const uint16_t* b) {
    float c[4] = {0, 0, 0, 0};
    product_of<__half>(a, b, kPadded - 8, false, c);
    if (threadIdx.x < kWarpSize) add_weighted(sums + blockIdx.x, c);
  });
}

__global__ void wrong_fragment(const float* x, float* sums) {
  with_matrices(x, [=](const uint16_t* a, const uint16_t* b) {
    float c[4] = {0, 0, 0, 0};
    product_of<__half>(a, b, kPadded, false, c);
    const float by_columns[4] = {c[0], c[2], c[1], c[3]};
    if (threadIdx.x < kWarpSize) add_weighted(sums + blockIdx.x, by_columns);
  });
}

__global__ void divergent_barrier(const float*, float*) {
  if (threadIdx.x < 16) {
    __syncthreads();  // another line for other threads
  } else {
    __syncthreads();  // bug: divergent_barrier
  }
}

__global__ void barrier_for_some(const float*, float*) {
  if (threadIdx.x < 16) __syncthreads();  // bug: barrier_for_some
}

__global__ void deadlock(const float* x, float* sums) {
  if (threadIdx.x % 32 == 0) __syncthreads();  // bug: deadlock
  sums[0] = __shfl_xor_sync(kAllLanes, x[threadIdx.x], 1);
  if (threadIdx.x % 32 != 0) __syncthreads();
}

__global__ void caller_not_in_mask(const float* x, float* sums) {
  sums[0] = __shfl_xor_sync(kHalf, x[threadIdx.x], 1);  // bug: caller_not_in_mask
}

__global__ void source_not_in_mask(const float* x, float* sums) {
  if (threadIdx.x % 32 < 16)
    sums[0] = __shfl_sync(kHalf, x[threadIdx.x], 20);  // bug: source_not_in_mask
}

__global__ void two_masks(const float* x, float* sums) {
  const unsigned mask = threadIdx.x % 32 < 16 ? kAllLanes : ~1u;
  sums[0] = __shfl_xor_sync(mask, x[threadIdx.x], 1);  // bug: two_masks
}

__global__ void two_functions(const float* x, float* sums) {
  if (threadIdx.x % 2) {
    sums[0] = __shfl_xor_sync(kAllLanes, x[threadIdx.x], 1);  // bug: two_functions
  } else {
    sums[0] = float(__ballot_sync(kAllLanes, 1));
  }
}

__global__ void copies_never_waited_for(const float* x, float*) {
  FASTLM_SHARED(float4, stage, kThreads);
  copy_async16(stage + threadIdx.x, x, true);
  commit_copies();
}

__global__ void waits_for_too_few(const float* x, float* sums) {
  FASTLM_SHARED(float4, stage, kThreads);
  copy_async16(stage + threadIdx.x, x, true);
  commit_copies();
  wait_for_copies<1>();  // bug: waits_for_too_few
  sums[blockIdx.x] = stage[threadIdx.x].x;
  wait_for_copies<0>();
}

__global__ void misaligned_copy(const float* x, float*) {
  FASTLM_SHARED(float4, stage, kThreads);
  copy_async16(stage + threadIdx.x, x + 1, true);
}

__global__ void reads_shared_unwritten(const float*, float* sums) {
  FASTLM_SHARED(float, values, kThreads);
  sums[blockIdx.x] = values[threadIdx.x];  // bug: reads_shared_unwritten
}

__global__ void too_much_shared(const float*, float* sums) {
  FASTLM_SHARED(float, values, 13 * 1024);  // bug: too_much_shared
  sums[0] = values[0];
}

__global__ void reads_another_block(const float* x, float* sums) {
  sums[blockIdx.x] = x[1] + (blockIdx.x ? sums[blockIdx.x - 1] : 0.f);
}

// ---- found by AddressSanitizer and UndefinedBehaviorSanitizer

__global__ void reads_past_the_end(const float* x, float* sums) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x == 0) sums[blockIdx.x] = 0;
  sums[blockIdx.x] += x[i + 1];  // bug: reads_past_the_end
}

__global__ void writes_past_shared(const float* x, float*) {
  FASTLM_SHARED(float, values, kThreads);
  float* value = values + threadIdx.x;
  value[1] = x[0];  // bug: writes_past_shared
}

__global__ void index_past_shared(const float* x, float*) {
  FASTLM_SHARED(float, values, kThreads);
  values[threadIdx.x * 2] = x[0];  // bug: index_past_shared
}

__global__ void past_dynamic_shared(const float* x, float*) {
  FASTLM_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + 1] = x[threadIdx.x];  // bug: past_dynamic_shared
}

__global__ void misaligned_vector(const float* x, float* sums) {
  sums[0] = reinterpret_cast<const float4*>(x + 1)->x;  // bug: misaligned_vector
}

// ---- found by ThreadSanitizer

__global__ void no_barrier(const float* x, float* sums) {
  FASTLM_SHARED(float, values, kThreads);
  values[threadIdx.x] = x[threadIdx.x];  // bug: no_barrier
  if (threadIdx.x == 0) sums[blockIdx.x] = values[1];
}

__global__ void reused_too_early(const float* x, float* sums) {
  FASTLM_SHARED(float, values, kThreads);
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = x[threadIdx.x] + round;  // bug: reused_too_early
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = values[1];
  }
}

__global__ void blocks_add(const float* x, float* sums) {
  if (threadIdx.x == 0) sums[0] += x[blockIdx.x];  // bug: blocks_add
}

#ifndef __CUDACC__

// ---- the program

using Kernel = void (*)(const float*, float*);

struct Case {
  const char* name;
  Kernel kernel;
  int64_t grid_x = 4, grid_y = 1;
  int threads = kThreads;
  int shared_bytes = 0;
};
constexpr int kDynamic = kThreads * sizeof(float);

#define NAMED(kernel) #kernel, kernel
const Case kCases[] = {
    {NAMED(block_sums)},
    {NAMED(atomics)},
    {NAMED(staged)},
    {NAMED(halves_apart)},
    {NAMED(dynamic_sums), 4, 1, kThreads, kDynamic},
    {NAMED(matrix_products)},
    {NAMED(product_of_some_lanes)},
    {NAMED(product_on_two_ways)},
    {NAMED(misaligned_matrix)},
    {NAMED(matrix_beyond)},
    {NAMED(matrix_in_global_memory)},
    {NAMED(wrong_leading_dimension)},
    {NAMED(wrong_fragment)},
    {NAMED(divergent_barrier)},
    {NAMED(barrier_for_some)},
    {NAMED(deadlock)},
    {NAMED(caller_not_in_mask)},
    {NAMED(source_not_in_mask)},
    {NAMED(two_masks)},
    {NAMED(two_functions)},
    {NAMED(copies_never_waited_for)},
    {NAMED(waits_for_too_few)},
    {NAMED(misaligned_copy)},
    {NAMED(reads_shared_unwritten)},
    {NAMED(too_much_shared)},
    {NAMED(reads_another_block)},
    {NAMED(reads_past_the_end)},
    {NAMED(writes_past_shared)},
    {NAMED(index_past_shared)},
    {NAMED(past_dynamic_shared), 4, 1, kThreads, kDynamic},
    {NAMED(misaligned_vector)},
    {NAMED(no_barrier)},
    {NAMED(reused_too_early)},
    {NAMED(blocks_add)},
    {"grid_too_wide", block_sums, int64_t{1} << 31},
    {"grid_too_high", block_sums, 1, 65536},
    {"block_too_large", block_sums, 1, 1, 1056},
    {"no_threads", block_sums, 1, 1, 0},
    {"shared_by_name", dynamic_sums, 4, 1, kThreads, 227 * 1024},
    {"shared_beyond", dynamic_sums, 4, 1, kThreads, 227 * 1024 + 1},
    {"shared_not_asked_for", dynamic_sums},
};

// On the heap, so that AddressSanitizer sees one element beyond.
std::unique_ptr<float, void (*)(void*)> floats(int64_t count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, count * sizeof(float))) throw std::bad_alloc();
  return {static_cast<float*>(memory), free};
}

int run(const Case& chosen) {
  constexpr int64_t kBlocks = 4;
  constexpr int64_t kElements = kBlocks * kThreads;
  const auto x = floats(kElements);
  const auto sums = floats(kBlocks);
  for (int64_t i = 0; i < kElements; ++i) x.get()[i] = float(i % 7);
  memset(sums.get(), 0, kBlocks * sizeof(float));
  const Launch how{chosen.name, chosen.grid_x, chosen.grid_y, chosen.threads,
                   chosen.shared_bytes, 0, nullptr};
  const float* input = x.get();
  const std::string error = launch(how, chosen.kernel, input, sums.get());
  if (!error.empty()) {
    fprintf(stderr, "%s\n", error.c_str());
    return 3;
  }
  int bits[kBlocks];
  memcpy(bits, sums.get(), sizeof bits);
  for (int64_t i = 0; i < kBlocks; ++i) printf("%.9g ", sums.get()[i]);
  for (int64_t i = 0; i < kBlocks; ++i) printf("%d ", bits[i]);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  const std::string order = count > 2 ? words[2] : "forward";
  shim_set_order(order == "forward" ? 0 : order == "reverse" ? 1 : 2, 1);
  for (const Case& chosen : kCases) {
    if (count < 2 || strcmp(chosen.name, words[1])) continue;
    try {
      return run(chosen);
    } catch (const shim::KernelError& error) {
      fprintf(stderr, "%s\n", error.what());
      return 3;
    }
  }
  fprintf(stderr, "no such case\n");
  return 2;
}

#else

}  // namespace

#endif
