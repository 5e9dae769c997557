// Rows of a cache: how long they are, where their tokens stand, whether they fit; and the rotation.
#pragma once

#include "attention_mask.cuh"
#include "attention_with_kv_cache.h"
#include "numbers.cuh"
#include "reduce.cuh"

namespace fastlm {

// Of two the even one.
__device__ inline float nearest_integer(float x) { return rintf(x); }
__device__ inline double nearest_integer(double x) { return rint(x); }

// Of one row: its queries among those of all rows, and its tokens in the cache.
struct CachedRow {
  int row;
  Span queries;  // of which the first is the row's own token 0
  int start;     // tokens before the append
  int length;    // after it; 0 if they do not fit
  bool fits;

  __device__ CachedRow(const CachedRows& in, int number) : row(number) {
    queries = {0, in.num_tokens};
    if (in.bounds) queries = document_span(in.bounds, row, in.rows, in.num_tokens);
    const int added = in.appends ? queries.count : 0;
    start = in.lengths ? in.lengths[row] : in.length;
    // not start + added, which may pass 2^31
    fits = start >= 0 && start <= in.capacity - added;
    length = fits ? start + added : 0;
  }

  // In the batch of queries and of new tokens.
  __device__ int64_t given_row(const CachedRows& in) const { return in.bounds ? 0 : row; }
};

// Whether the table names pages for the tokens [first, end) of a row.  The same for all lanes.
__device__ inline bool pages_exist(const CachedRows& in, int row, int first, int end) {
  if (!in.table || first >= end) return true;
  const int past = (end - 1) / in.page_size + 1;
  for (int page = first / in.page_size; page < past; page += kWarpSize) {
    const int own = page + threadIdx.x % kWarpSize;
    const int named = own < past ? in.table[int64_t(row) * in.max_pages + own] : 0;
    if (!__all_sync(kAllLanes, named >= 0 && named < in.num_pages)) return false;
  }
  return true;
}

// Where a token of a row stands: the row or page, and the place there.
struct Slot {
  int64_t row, token;

  __device__ Slot(const CachedRows& in, int number, int position) {
    row = number;
    token = position;
    if (in.table) {
      row = in.table[int64_t(number) * in.max_pages + position / in.page_size];
      token = position % in.page_size;
    }
  }

  // 64 bits: 4 rows of 524,288 tokens of 8 heads of 128 have 2^31 elements
  __device__ int64_t element(const Stored& stored, int64_t head) const {
    return row * stored.row_stride + token * stored.token_stride + head * stored.head_stride;
  }
  __device__ int64_t scale(const Stored& stored, int64_t head) const {
    return row * stored.scale_row_stride + token * stored.scale_token_stride +
           head * stored.scale_head_stride;
  }
};

// Channel `channel` of a head at `head`, turned by the angles of `position`: x cos -+ partner sin,
// in the dtype; from 2 turned on it stays.
template <typename A>
__device__ inline A turned_number(const CachedRows& in, const void* heads, int64_t head, Dtype dtype,
                                  int channel, int position) {
  const A x = number_at<A>(heads, head + channel, dtype);
  if (!in.cos || channel >= 2 * in.turned) return x;
  const bool is_first = in.is_interleaved ? channel % 2 == 0 : channel < in.turned;
  const int step = in.is_interleaved ? 1 : in.turned;
  const int pair = in.is_interleaved ? channel / 2 : channel % in.turned;
  const A partner = number_at<A>(heads, head + (is_first ? channel + step : channel - step), dtype);
  const int64_t angle = static_cast<int64_t>(position) * in.turned + pair;
  const A cos = number_at<A>(in.cos, angle, in.table_dtype);
  const A sin = number_at<A>(in.sin, angle, in.table_dtype);
  return rounded(x * cos + (is_first ? -partner : partner) * sin, dtype);
}

}  // namespace fastlm
