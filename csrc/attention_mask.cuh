// Which keys a query sees, and what makes a score of a product: what attention kernels share.
//
// A block works in one sequence: a row of the batch without its padding, or one of the documents
// packed into a row.  In it queries are numbered t in [0, T), keys s in [0, S), and query t sees
// the keys s <= t + offset, of them the last `window`.  The offset is S - T, which aligns the ends,
// and less by the padding in front; if it is negative, the first -offset queries see no key.
// Boundaries that are none give wrong results, but stay inside the tensors.
#pragma once

#include <cstdint>

#include "arithmetic.cuh"

namespace fastlm {

__device__ inline int clamped(int x, int low, int high) {
  return x < low ? low : x > high ? high : x;
}
__device__ inline int larger(int a, int b) { return a > b ? a : b; }
__device__ inline int smaller(int a, int b) { return a < b ? a : b; }

// x / size, upwards; x >= 0.
__device__ inline int blocks_of(int x, int size) { return (x + size - 1) / size; }

struct Span {
  int first, count;
};

// Where a row of the batch has keys that are no padding; null: from 0, to num_keys.
__device__ inline Span padded_row(const int* key_start, const int* key_end, int64_t row,
                                  int num_keys) {
  const int start = key_start ? clamped(key_start[row], 0, num_keys) : 0;
  const int end = key_end ? clamped(key_end[row], start, num_keys) : num_keys;
  return {start, end - start};
}

// The tokens of a document; those after the last count as one more.
__device__ inline Span document_span(const int* bounds, int document, int num_documents,
                                     int num_tokens) {
  const int first = clamped(bounds[document], 0, num_tokens);
  const int end = document < num_documents ? bounds[document + 1] : num_tokens;
  return {first, clamped(end, first, num_tokens) - first};
}

struct DocumentBlock {
  int document, block;
};

// Which document, and which block of it, the rank-th block of tokens is.  Document d has those from
// bounds[d] / size + d on: so many or one more than it needs, without a sum over lengths.
__device__ inline DocumentBlock document_block(int rank, const int* bounds, int num_documents,
                                               int num_tokens, int size) {
  int low = 0, high = num_documents;  // the last that begins at or before the rank
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (clamped(bounds[middle], 0, num_tokens) / size + middle <= rank)
      low = middle;
    else
      high = middle - 1;
  }
  return {low, rank - (clamped(bounds[low], 0, num_tokens) / size + low)};
}

// The mask.
struct Visibility {
  int num_queries, num_keys, offset;
  int window;  // 0: none

  __device__ bool operator()(int query, int key) const {
    const int latest = query + offset;
    return key <= latest && key < num_keys && (window == 0 || key > latest - window);
  }
};

// Of a walk in whole tiles: those in [whole_start, whole_end) need no mask, the others in
// [start, end) do, and outside nothing is seen.
struct Walk {
  int start, whole_start, whole_end, end;
};

// Over keys, `tile` at a time, for the queries [first, first + count).
__device__ inline Walk keys_seen(const Visibility& sees, int first, int count, int tile) {
  const int past_first = first + sees.offset + 1;
  const int past_last = smaller(first + count, sees.num_queries) + sees.offset;
  Walk walk;
  walk.start = walk.whole_start = 0;
  walk.end = clamped(past_last, 0, sees.num_keys);
  walk.whole_end = clamped(past_first, 0, sees.num_keys) / tile * tile;
  if (sees.window) {
    walk.start = larger(past_first - sees.window, 0) / tile * tile;
    walk.whole_end = larger(walk.whole_end, walk.start);
    const int inside = blocks_of(larger(past_last - sees.window, 0), tile) * tile;
    walk.whole_start = clamped(inside, walk.start, walk.whole_end);
  }
  return walk;
}

// Over queries, `tile` at a time, for the keys [first, first + count).
__device__ inline Walk queries_seeing(const Visibility& sees, int first, int count, int tile) {
  Walk walk;
  walk.start = larger(first - sees.offset, 0) / tile * tile;
  walk.end = sees.num_queries;
  if (sees.window) {
    const int past_last =
        smaller(first + count, sees.num_keys) - 1 - sees.offset + sees.window;
    walk.end = clamped(past_last, 0, walk.end);
  }
  const int all_seen = blocks_of(larger(first + count - 1 - sees.offset, 0), tile) * tile;
  walk.whole_start = smaller(all_seen, walk.end);
  walk.whole_end = walk.end;
  if (sees.window) {
    const int inside = larger(first - sees.offset + sees.window, 0) / tile * tile;
    walk.whole_end = larger(smaller(inside, walk.end), walk.whole_start);
  }
  return walk;
}

template <typename A>
constexpr A kLog2E = static_cast<A>(1.4426950408889634);
template <typename A>
constexpr A kLn2 = static_cast<A>(0.6931471805599453);

// 2^x; in float32 one instruction, off by 2 ulp, and 0 for what is below 2^-126.
__device__ inline float power_of_two(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ inline double power_of_two(double x) { return exp2(x); }

// 1 / x, off by 1 ulp; 0 for infinity.
__device__ inline float inverse(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}
__device__ inline double inverse(double x) { return 1 / x; }

__device__ inline float binary_logarithm(float x) { return log2f(x); }
__device__ inline double binary_logarithm(double x) { return log2(x); }

// From a product of query and key to a score: scale * product, or softcap tanh(that / softcap).
//
// In two steps, reduced() and then a factor above 0, so that the largest score is that of the
// largest reduced one, and the factor joins the exponential: exp(score) = 2^(outer reduced).
template <typename A>
struct ScoreScale {
  A inner;  // under a softcap scale / softcap; else the sign of the scale, 0 for 0
  A outer;  // base 2
  bool is_capped;
  bool is_fast;  // tanh off by 1e-7 near 0

  __device__ ScoreScale(double scale, double softcap, bool is_narrow) {
    is_capped = softcap != 0;
    // where that is below what a score of narrow inputs is rounded to
    is_fast = is_narrow && softcap <= 128;
    const A factor = static_cast<A>(scale), cap = static_cast<A>(softcap);
    if (is_capped) {
      inner = factor / cap;
      outer = cap * kLog2E<A>;
    } else {
      inner = factor > 0 ? 1 : factor < 0 ? -1 : factor;
      outer = (factor == 0 ? 1 : factor < 0 ? -factor : factor) * kLog2E<A>;
    }
  }

  // For all scores of a thread: one branch, the same for a whole launch, and none for each score.
  template <int kRows, int kColumns>
  __device__ void reduce(A (&products)[kRows][kColumns]) const {
    if (!is_capped && inner == 1) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const A x = products[i][j] * inner;
        products[i][j] = !is_capped ? x : is_fast ? quick_tanh(x) : hyperbolic_tangent(x);
      }
  }

  // dscore / (scale dproduct)
  __device__ A slope(A reduced) const { return is_capped ? 1 - reduced * reduced : 1; }

  __device__ static A quick_tanh(A x) {
    return 1 - 2 * inverse(power_of_two(x * (2 * kLog2E<A>)) + 1);
  }
};

}  // namespace fastlm
