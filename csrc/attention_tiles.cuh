// Tiles of attention: how a warp holds scores and sums, and the two products between them.
//
// A block keeps some rows, queries or keys, for as long as it runs, and the rows of the other side
// stream past, a tile at a time; both are in shared memory.  A warp has rows of its own and does
//
//   multiply    scores = kept streamed^T       over the head_dim, of any size
//   accumulate  sums += scores streamed        kWidth columns; wider heads take several blocks
//
// with scores and sums in registers.  Thread by thread, element (i, j) of either is at row(i) of the
// warp and column(j), so that what kernels do with them is written once, for tensor cores and for
// arithmetic of single numbers.
#pragma once

#include "async_copy.cuh"
#include "mma.cuh"

namespace fastlm {

__host__ __device__ constexpr int rounded_up(int x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Rows of a tile are this far apart: a multiple of 16 bytes, and an odd one, so that eight
// neighbouring rows are in different banks.
template <typename T>
__host__ __device__ constexpr int tile_stride(int width) {
  return rounded_up(width, 16) + kGroup<T>;
}

// Copies rows [first, first + count) of a matrix into a tile; zeros beyond its `rows` rows and, up
// to `width`, a multiple of 16, beyond its `columns` columns.  Ends nothing: wait_for_copies() does.
// `whole`: rows begin at multiples of 16 bytes and consist of whole groups.
template <typename T>
__device__ inline void stage(T* tile, int width, const T* matrix, int64_t row_stride, int first,
                             int count, int rows, int columns, bool whole) {
  const int groups = width / kGroup<T>;
  int row = threadIdx.x / groups, group = threadIdx.x % groups;
  const int row_step = blockDim.x / groups, group_step = blockDim.x % groups;
#pragma unroll 1  // copies run beside each other anyway
  while (row < count) {
    T* to = tile + row * tile_stride<T>(width) + group * kGroup<T>;
    const int column = group * kGroup<T>;
    const int present = first + row < rows ? columns - column : 0;
    // 64 bits: 8 heads of 128 side by side pass 2^31 elements at token 2,097,152
    const T* from = matrix + (first + row) * row_stride + column;
    if (whole) {
      copy_async16(to, present > 0 ? from : matrix, present > 0);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) to[i] = i < present ? from[i] : T(0);
    }
    row += row_step;
    group += group_step;
    if (group >= groups) {
      group -= groups;
      ++row;
    }
  }
  __syncwarp();  // lanes leave the loop apart, and products need them together
}

// Of bfloat16 or float16, which is decided at run time: one kernel for both.
template <int kWidth_, int kStrips>
struct TensorTiles {
  using Element = uint16_t;
  using A = float;
  static constexpr bool kIsNarrow = true;
  static constexpr int kMostThreads = 128;
  static constexpr int kWidth = kWidth_;
  static constexpr int kWarpRows = 16 * kStrips;
  static constexpr int kRows = 2 * kStrips;  // of a thread
  template <int kTile>
  static constexpr int kColumns = kTile / 4;
  static constexpr int kScratch = 0;  // elements for each warp

  __device__ static int row(int i) { return 8 * i + lane_of_warp() / 4; }
  __device__ static int column(int j) { return j / 2 * 8 + lane_of_warp() % 4 * 2 + j % 2; }
  // One of the lanes that share a row.
  __device__ static bool leads() { return lane_of_warp() % 4 == 0; }

  // Over the lanes that share a row; each gets the result.
  template <typename Combine>
  __device__ static float combined_row(float value, Combine combine) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, 1));
    return combine(value, __shfl_xor_sync(kAllLanes, value, 2));
  }

  // What accumulate() reads of `columns` streamed columns.
  __host__ __device__ static constexpr int width_of_sums(int columns) {
    return rounded_up(columns, kWidth);
  }

  // The other way round a warp's sums leave through its kept rows, which have this width.
  __host__ __device__ static constexpr int width_of_kept(int columns) {
    return rounded_up(columns, 16) > kWidth ? rounded_up(columns, 16) : kWidth;
  }

  template <int kTile>
  __device__ static void multiply(float (&scores)[kRows][kTile / 4], const uint16_t* kept,
                                  int kept_stride, const uint16_t* streamed, int streamed_stride,
                                  int depth, bool is_half) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kTile / 4; ++j) scores[i][j] = 0;
    if (is_half)
      multiply_of<__half, kTile>(scores, kept, kept_stride, streamed, streamed_stride, depth);
    else
      multiply_of<__nv_bfloat16, kTile>(scores, kept, kept_stride, streamed, streamed_stride,
                                        depth);
  }

  template <int kTile>
  __device__ static void accumulate(float (&sums)[kRows][kWidth / 4],
                                    const float (&scores)[kRows][kTile / 4],
                                    const uint16_t* streamed, int stride, int, uint16_t*,
                                    bool is_half) {
    if (is_half)
      accumulate_of<__half, kTile>(sums, scores, streamed, stride);
    else
      accumulate_of<__nv_bfloat16, kTile>(sums, scores, streamed, stride);
  }

  // Rows of sums, the first `rows` of them, to memory without gaps in a row.  They take the place of
  // the warp's kept rows first, so that neighbouring lanes write neighbouring groups.
  __device__ static void store(uint16_t* to, int64_t row_stride, int rows, int columns,
                               const float (&sums)[kRows][kWidth / 4], uint16_t* kept,
                               int kept_stride, bool is_half) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kWidth / 4; j += 2) {
        const float first = sums[i][j], second = sums[i][j + 1];
        const unsigned bits =
            is_half ? packed<__half>(first, second) : packed<__nv_bfloat16>(first, second);
        *reinterpret_cast<unsigned*>(kept + row(i) * kept_stride + column(j)) = bits;
      }
    __syncwarp();
    const bool whole = moves_whole(to) && row_stride % kGroup<uint16_t> == 0;
    constexpr int kGroups = kWidth / kGroup<uint16_t>;
    for (int at = lane_of_warp(); at < kWarpRows * kGroups; at += kWarpSize) {
      const int row = at / kGroups, column = at % kGroups * kGroup<uint16_t>;
      if (row >= rows || column >= columns) continue;
      Group<uint16_t> group;
      const uint4 bits = *reinterpret_cast<const uint4*>(kept + row * kept_stride + column);
      memcpy(&group, &bits, sizeof bits);
      store_group_if_whole(to + row * row_stride, column, columns, whole, group);
    }
  }

 private:
  template <typename T, int kTile>
  __device__ static void multiply_of(float (&scores)[kRows][kTile / 4], const uint16_t* kept,
                                     int kept_stride, const uint16_t* streamed,
                                     int streamed_stride, int depth) {
    const int lane = lane_of_warp();
    kept += lane % 16 * kept_stride + lane / 16 * 8;
    streamed += (lane % 8 + lane / 16 * 8) * streamed_stride + lane / 8 % 2 * 8;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      unsigned a[kStrips][4];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip)
        load_matrices<false>(a[strip], kept + strip * 16 * kept_stride + k);
#pragma unroll
      for (int n = 0; n < kTile; n += 16) {
        unsigned b[4];
        load_matrices<false>(b, streamed + n * streamed_stride + k);
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip)
          multiply_pair<T>(scores[2 * strip], scores[2 * strip + 1], n / 4, a[strip], b);
      }
    }
  }

  template <typename T, int kTile>
  __device__ static void accumulate_of(float (&sums)[kRows][kWidth / 4],
                                       const float (&scores)[kRows][kTile / 4],
                                       const uint16_t* streamed, int stride) {
    const int lane = lane_of_warp();
    streamed += lane % 16 * stride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kTile; k += 16) {
      unsigned a[kStrips][4];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
        for (int at = 0; at < 4; ++at) {
          const float(&row)[kTile / 4] = scores[2 * strip + at % 2];
          const int j = k / 4 + at / 2 * 2;
          a[strip][at] = packed<T>(row[j], row[j + 1]);
        }
#pragma unroll
      for (int n = 0; n < kWidth; n += 16) {
        unsigned b[4];
        load_matrices<true>(b, streamed + k * stride + n);
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip)
          multiply_pair<T>(sums[2 * strip], sums[2 * strip + 1], n / 4, a[strip], b);
      }
    }
  }

  // Two products side by side, whose sums are elements j to j + 3 of two rows of a thread.
  template <typename T, int kCount>
  __device__ static void multiply_pair(float (&upper)[kCount], float (&lower)[kCount], int j,
                                       const unsigned (&a)[4], const unsigned (&b)[4]) {
    fastlm::multiply<T>(upper[j], upper[j + 1], lower[j], lower[j + 1], a, b[0], b[1]);
    fastlm::multiply<T>(upper[j + 2], upper[j + 3], lower[j + 2], lower[j + 3], a, b[2], b[3]);
  }
};

// Of float32 or float64, each product of two numbers by itself.  A lane has all kRows rows of the
// warp, of scores one column, of sums every 32nd.
template <typename T, int kRows_>
struct ScalarTiles {
  using Element = T;
  using A = T;
  static constexpr bool kIsNarrow = false;
  static constexpr int kMostThreads = 256;
  static constexpr int kWidth = 128;
  static constexpr int kRows = kRows_, kWarpRows = kRows_;
  template <int kTile>
  static constexpr int kColumns = kTile / kWarpSize;
  static constexpr int kScratch = kRows * kWarpSize;

  __device__ static int row(int i) { return i; }
  __device__ static int column(int j) { return lane_of_warp() + j * kWarpSize; }
  __device__ static bool leads() { return lane_of_warp() == 0; }

  template <typename Combine>
  __device__ static T combined_row(T value, Combine combine) {
    return warp_reduce(value, combine);
  }

  __host__ __device__ static constexpr int width_of_sums(int columns) {
    return rounded_up(columns, kWarpSize);
  }
  __host__ __device__ static constexpr int width_of_kept(int columns) {
    return rounded_up(columns, 16);
  }

  template <int kTile>
  __device__ static void multiply(T (&scores)[kRows][1], const T* kept, int kept_stride,
                                  const T* streamed, int streamed_stride, int depth, bool) {
    static_assert(kTile == kWarpSize, "a lane has one column");
#pragma unroll
    for (int i = 0; i < kRows; ++i) scores[i][0] = 0;
    streamed += lane_of_warp() * streamed_stride;
#pragma unroll 2
    for (int k = 0; k < depth; k += kGroup<T>) {
      const Group<T> column = group_at(streamed + k);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Group<T> row = group_at(kept + i * kept_stride + k);
#pragma unroll
        for (int at = 0; at < kGroup<T>; ++at)
          scores[i][0] += row.items[at] * column.items[at];
      }
    }
  }

  template <int kTile>
  __device__ static void accumulate(T (&sums)[kRows][kWidth / kWarpSize],
                                    const T (&scores)[kRows][1], const T* streamed, int stride,
                                    int columns, T* scratch, bool) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRows; ++i) scratch[i * kWarpSize + lane_of_warp()] = scores[i][0];
    __syncwarp();
    streamed += lane_of_warp();
    for (int k = 0; k < kTile; k += kGroup<T>) {
      Group<T> weights[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) weights[i] = group_at(scratch + i * kWarpSize + k);
#pragma unroll
      for (int at = 0; at < kGroup<T>; ++at)
#pragma unroll
        for (int j = 0; j < kWidth / kWarpSize; ++j) {
          if (j * kWarpSize >= columns) continue;
          const T x = streamed[(k + at) * stride + j * kWarpSize];
#pragma unroll
          for (int i = 0; i < kRows; ++i) sums[i][j] += weights[i].items[at] * x;
        }
    }
  }

  __device__ static void store(T* to, int64_t row_stride, int rows, int columns,
                               const T (&sums)[kRows][kWidth / kWarpSize], T*, int, bool) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kWidth / kWarpSize; ++j)
        if (i < rows && column(j) < columns) to[i * row_stride + column(j)] = sums[i][j];
  }

 private:
  __device__ static Group<T> group_at(const T* at) {
    Group<T> group;
    const uint4 bits = *reinterpret_cast<const uint4*>(at);
    memcpy(&group, &bits, sizeof bits);
    return group;
  }
};

}  // namespace fastlm
