// RMSNorm kernels (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).
//
//   x       = vectors, or vectors + residual rounded to the dtype it is returned in
//   rstd    = (mean(x^2) + eps)^(-1/2)
//   out     = x rstd (weight_offset + weight)                                  forward
//   n       = x rstd,  g = dout (weight_offset + weight)
//   dx      = rstd (g - n mean(g n)) [+ dtotal]                                backward
//   dweight = sum over rows of dout n
//
// A row is a team's, a warp or a block, which reads it twice: the second time from a cache.  Which
// elements a thread takes is a matter of their number alone, and so are the sums.  In the backward
// kernel a team goes through rows_per_team rows and writes its sum of dout n as one row of partial
// sums: each element of that is one thread's from the first row to the last.
//
// Dtypes and options are branches at run time, the same for a whole launch: each kernel is compiled
// once, and once more for float64.
#pragma once

#include "numbers.cuh"
#include "reduce.cuh"
#include "rms_norm.h"

namespace fastlm {

constexpr int kNormThreads = 256;

// Threads that share a row.
struct Team {
  int size, thread;
  int64_t number;  // among all of the grid

  __device__ explicit Team(int size) : size(size), thread(threadIdx.x % size) {
    number = static_cast<int64_t>(blockIdx.x) * (blockDim.x / size) + threadIdx.x / size;
  }

  __device__ int64_t first() const { return thread * kEight; }
  __device__ int64_t step() const { return size * kEight; }

  // Over all threads of the team, each of which gets it; `by_warp` is shared memory for kMostWarps.
  template <typename A>
  __device__ A sum(A value, A* by_warp) const {
    value = warp_reduce(value, Sum());
    if (size == kWarpSize) return value;
    if (threadIdx.x % kWarpSize == 0) by_warp[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = combined(by_warp, Sum());
    __syncthreads();  // the next sum writes there
    return value;
  }
};

// Row `row` of a tensor.
__device__ inline const void* row_of(const Rows& rows, int64_t row, int64_t inner) {
  // 64 bits: vectors of 4,096 pass 2^31 elements at row 524,288
  return moved(rows.elements, row / inner * rows.stride_outer + row % inner * rows.stride_inner,
               rows.dtype);
}

// weight_offset + weight, or ones.
template <typename A>
__device__ inline Eight<A> scale_of(const NormInputs& in, int64_t first) {
  Eight<A> scale;
  if (in.weight) scale = load_eight<A>(in.weight, in.weight_dtype, 1, first, in.size);
#pragma unroll
  for (int i = 0; i < kEight; ++i)
    scale.items[i] = in.weight ? scale.items[i] + static_cast<A>(in.weight_offset) : A(1);
  return scale;
}

// x of the head, with `other` the row of the residual.
template <typename A>
__device__ inline Eight<A> total_of(const NormInputs& in, const void* vector, const void* other,
                                    Dtype dtype, int64_t first) {
  Eight<A> x = load_eight<A>(vector, in.vectors.dtype, in.vectors.stride_col, first, in.size);
  if (in.residual.elements) {
    const Eight<A> added =
        load_eight<A>(other, in.residual.dtype, in.residual.stride_col, first, in.size);
#pragma unroll
    for (int i = 0; i < kEight; ++i) x.items[i] = rounded(x.items[i] + added.items[i], dtype);
  }
  return x;
}

template <typename A>
__global__ void __launch_bounds__(kNormThreads, 2)
    rms_norm_forward_kernel(const NormInputs in, const NormResults results, const int team_size) {
  FASTLM_SHARED(A, by_warp, kMostWarps);
  const Team team(team_size);
  const int64_t row = team.number;
  if (row >= in.rows) return;  // with its whole team
  const void* const vector = row_of(in.vectors, row, in.inner);
  const void* const other = in.residual.elements ? row_of(in.residual, row, in.inner) : nullptr;
  const Dtype dtype = results.dtype;

  A squares = 0;
  for (int64_t first = team.first(); first < in.size; first += team.step()) {
    const Eight<A> x = total_of<A>(in, vector, other, dtype, first);
#pragma unroll
    for (int i = 0; i < kEight; ++i) squares += x.items[i] * x.items[i];
    if (other) store_eight(moved(results.total, row * in.size, dtype), dtype, first, in.size, x);
  }
  squares = team.sum(squares, by_warp);
  const A rstd = 1 / square_root(squares / static_cast<A>(in.size) + static_cast<A>(in.eps));
  if (team.thread == 0) static_cast<A*>(results.rstd)[row] = rstd;

  void* const out = moved(results.out, row * in.size, dtype);
  for (int64_t first = team.first(); first < in.size; first += team.step()) {
    Eight<A> x = total_of<A>(in, vector, other, dtype, first);
    const Eight<A> scale = scale_of<A>(in, first);
#pragma unroll
    for (int i = 0; i < kEight; ++i) x.items[i] *= rstd * scale.items[i];
    store_eight(out, dtype, first, in.size, x);
  }
}

template <typename A>
__global__ void __launch_bounds__(kNormThreads, 2)
    rms_norm_backward_kernel(const NormInputs in, const NormUpstream upstream,
                             const NormGradients gradients, const NormPlan plan,
                             const bool has_room) {
  FASTLM_SHARED(A, by_warp, kMostWarps);
  const Team team(plan.team);
  const int64_t begin = team.number * plan.rows_per_team;
  if (begin >= in.rows) return;  // with its whole team
  const int64_t end = begin + plan.rows_per_team < in.rows ? begin + plan.rows_per_team : in.rows;
  A* const partial =
      gradients.partial ? static_cast<A*>(gradients.partial) + team.number * in.size : nullptr;
  // each element is read and written by one thread alone, wherever it is
  A* sums = partial;
  if (has_room) {
    FASTLM_DYNAMIC_SHARED(A, room);
    sums = room + threadIdx.x / plan.team * in.size;
  }
  const Dtype dtype = in.vectors.dtype;

  for (int64_t row = begin; row < end; ++row) {
    const void* const vector = row_of(in.vectors, row, in.inner);
    const void* const dout = row_of(upstream.dout, row, in.inner);
    const A rstd = static_cast<const A*>(upstream.rstd)[row];
    A dot = 0;
    for (int64_t first = team.first(); first < in.size; first += team.step()) {
      const Eight<A> x = load_eight<A>(vector, dtype, in.vectors.stride_col, first, in.size);
      const Eight<A> d =
          load_eight<A>(dout, upstream.dout.dtype, upstream.dout.stride_col, first, in.size);
      const Eight<A> scale = scale_of<A>(in, first);
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        const A product = d.items[i] * (x.items[i] * rstd);
        dot += product * scale.items[i];
        if (partial && first + i < in.size)
          sums[first + i] = row == begin ? product : sums[first + i] + product;
      }
    }
    if (!gradients.dvectors) continue;
    const A mean = team.sum(dot, by_warp) / static_cast<A>(in.size);
    const void* const dtotal =
        upstream.dtotal ? moved(upstream.dtotal, row * in.size, dtype) : nullptr;
    void* const dvector = moved(gradients.dvectors, row * in.size, dtype);
    for (int64_t first = team.first(); first < in.size; first += team.step()) {
      const Eight<A> x = load_eight<A>(vector, dtype, in.vectors.stride_col, first, in.size);
      Eight<A> d =
          load_eight<A>(dout, upstream.dout.dtype, upstream.dout.stride_col, first, in.size);
      const Eight<A> scale = scale_of<A>(in, first);
#pragma unroll
      for (int i = 0; i < kEight; ++i)
        d.items[i] = (d.items[i] * scale.items[i] - x.items[i] * rstd * mean) * rstd;
      if (dtotal) {
        const Eight<A> added = load_eight<A>(dtotal, dtype, 1, first, in.size);
#pragma unroll
        for (int i = 0; i < kEight; ++i) d.items[i] += added.items[i];
      }
      store_eight(dvector, dtype, first, in.size, d);
    }
  }
  if (!partial || !has_room) return;
  for (int64_t first = team.first(); first < in.size; first += team.step())
    for (int64_t at = first; at < first + kEight && at < in.size; ++at) partial[at] = sums[at];
}

}  // namespace fastlm
