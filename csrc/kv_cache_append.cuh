// New tokens into a cache: keys turned, and both rounded to its dtype, or to int8 with a scale for
// each head of a token.
#pragma once

#include "kv_cache.cuh"

namespace fastlm {

constexpr int kAppendWarps = 4;

// One warp writes one head of one new token, the key turned.
template <bool kTurns, typename A>
__device__ inline void append_head(const CachedRows& in, const Given& given, const Stored& stored,
                                   Dtype dtype, int64_t from_row, int64_t from_token,
                                   const Slot& slot, int head, int position) {
  const int lane = lane_of_warp();
  const int64_t from = from_row * given.row_stride + from_token * given.token_stride +
                       head * given.head_stride;
  const int64_t to = slot.element(stored, head);
  const auto channel_of = [&](int channel) {
    if (kTurns) return turned_number<A>(in, given.elements, from, dtype, channel, position);
    return number_at<A>(given.elements, from + channel, dtype);
  };
  if (!stored.scales) {
#pragma unroll 1
    for (int channel = lane; channel < stored.dim; channel += kWarpSize)
      put_number(stored.elements, to + channel, dtype, channel_of(channel));
    return;
  }
  A largest = 0;
  bool is_finite = true;
#pragma unroll 1
  for (int channel = lane; channel < stored.dim; channel += kWarpSize) {
    const A x = channel_of(channel), size = x < 0 ? -x : x;
    largest = larger(largest, size);
    is_finite = is_finite && size < kInfinity<A>;
  }
  float scale = static_cast<float>(warp_reduce(largest, Larger()) / 127);
  is_finite = __all_sync(kAllLanes, is_finite) && scale < kInfinity<float>;
  if (!is_finite) scale = NAN;
  if (lane == 0) stored.scales[slot.scale(stored, head)] = scale;
#pragma unroll 1
  for (int channel = lane; channel < stored.dim; channel += kWarpSize) {
    const A ratio = scale > 0 ? nearest_integer(channel_of(channel) / scale) : A(0);
    // a scale that underflows may be too small by half
    static_cast<int8_t*>(stored.elements)[to + channel] =
        static_cast<int8_t>(ratio > 127 ? A(127) : ratio < -127 ? A(-127) : ratio);
  }
}

template <typename A>
__global__ void __launch_bounds__(kAppendWarps* kWarpSize)
    append_kernel(const CachedRows in, const Given key, const Given value, const Dtype dtype) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / kWarpSize;
  const int64_t rank = unit / in.kv_heads;
  const int head = unit % in.kv_heads;
  if (rank >= (in.bounds ? int64_t(1) : in.rows) * in.num_tokens) return;
  int number = static_cast<int>(rank / in.num_tokens);
  if (in.bounds) {
    // the last row that begins at or before the token
    int low = 0, high = in.rows - 1;
    while (low < high) {
      const int middle = low + (high - low + 1) / 2;
      if (clamped(in.bounds[middle], 0, in.num_tokens) <= rank)
        low = middle;
      else
        high = middle - 1;
    }
    number = low;
  }
  const CachedRow row(in, number);
  const int given_token = static_cast<int>(rank % in.num_tokens);
  const int token = given_token - row.queries.first;
  if (!row.fits || token < 0 || token >= row.queries.count) return;
  // of all its tokens, so that a row is written where its result is a number
  if (!pages_exist(in, row.row, 0, row.length)) return;
  const int position = row.start + token;
  const Slot slot(in, row.row, position);
  append_head<true, A>(in, key, in.keys, dtype, row.given_row(in), given_token, slot, head,
                       position);
  append_head<false, A>(in, value, in.values, dtype, row.given_row(in), given_token, slot, head,
                        position);
}

}  // namespace fastlm
