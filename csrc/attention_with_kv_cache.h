// Launchers of the kernels over a cache of keys and values: plain C++, for callers that know nothing
// of CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"

namespace fastlm {

// Keys or values of a cache.  Channels of a head stand side by side.
struct Stored {
  void* elements;     // of the dtype of the queries, or int8 with scales
  float* scales;      // one for each token and head; null: none
  int64_t row_stride; // from row to row, or from page to page
  int64_t token_stride, head_stride;
  int64_t scale_row_stride, scale_token_stride, scale_head_stride;
  int dim;
};

// Queries, or new keys or values; (batch, tokens, heads, dim).  Null: none.
struct Given {
  const void* elements;
  int64_t row_stride, token_stride, head_stride;
};

// Rows, where their tokens stand, and how they turn.
struct CachedRows {
  Stored keys, values;
  const int* lengths;  // (rows,) tokens before the append; null: `length` of every row
  const int* table;    // (rows, max_pages); null: the cache is not in pages
  const int* bounds;   // (rows + 1,) where rows begin among num_tokens; null: each has num_tokens
  const void* cos;     // (positions, turned); null: nothing turns
  const void* sin;
  Dtype table_dtype;  // of cos and sin
  int turned;         // pairs of channels
  bool is_interleaved;
  bool appends;
  int rows;
  // rows, and pairs of a query and a head of a row, are below 2^31, tokens of a row below 2^30
  int num_tokens, kv_heads, group_size;  // query heads of a head of keys
  int length, capacity;
  int max_pages, page_size, num_pages;
};

struct CacheOptions {
  double scale, softcap;  // 0: none
  int window;             // keys; 0: none
  const void* sinks;      // (heads,); null: none
  Dtype sinks_dtype;
};

// out (batch, tokens, heads, dim) without gaps, lse (batch, heads, tokens) in float32, in float64 for
// float64.  The results of parts are (heads, slots, splits) and by dim; read where splits > 1.
struct Attended {
  void* out;
  void* lse;
  void* part_outs;
  void* part_lses;
};

// How keys are divided.  Rows whose pairs of query and head are at most `most_pairs` have parts of
// split_keys keys, or more where these would be more than most_splits; with `parts` every row has so
// many at most.
struct CachePlan {
  int tile;   // keys at a time, at most 32
  int teams;  // of a block, which has so many times 8 pairs
  int parts;  // 0: the length decides
  int split_keys, most_splits, most_pairs;
  int splits;               // that there is room for
  int64_t slots, row_slots;  // queries that there is room for; those of a row, 0: each has one
};

// All return why nothing was launched, or an empty string; they neither wait nor allocate.
// `stream` is a cudaStream_t.
std::string append_to_kv_cache(Dtype dtype, const CachedRows& rows, const Given& key,
                               const Given& value, int device, void* stream);

// After the append.
std::string attend_to_kv_cache(Dtype dtype, const CachedRows& rows, const Given& query,
                               const CacheOptions& options, const Attended& results,
                               const CachePlan& plan, int device, void* stream);

}  // namespace fastlm
