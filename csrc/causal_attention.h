// Launchers of the attention kernels: plain C++, for callers that know nothing of CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"

namespace fastlm {

// Strides in elements; the last dimension has none.
struct AttentionStrides {
  int64_t batch, token, head;
};

// The inputs and options of a call.  ACC is float32, float64 for float64.
struct AttentionInputs {
  const void* query;  // (batch, num_queries, heads, head_dim)
  const void* key;    // (batch, num_keys, heads / group_size, head_dim)
  const void* value;  // (batch, num_keys, heads / group_size, value_dim)
  AttentionStrides query_strides, key_strides, value_strides;
  int64_t batch, heads, group_size;
  int num_queries, num_keys, head_dim, value_dim;
  const int* bounds_q;  // (num_documents + 1,); null: none, as the next three
  const int* bounds_k;
  const int* key_start;  // (batch,)
  const int* key_end;
  int num_documents;
  int window;                 // 0: none
  int64_t heads_per_section;  // heads of a grid, of queries or of keys, that run together
  double scale;
  double softcap;  // 0: none
};

struct AttentionResults {
  const void* sinks;  // (heads,) ACC; null: none
  void* out;          // (batch, num_queries, heads, value_dim), without gaps
  void* lse;          // (batch, heads, num_queries) ACC, without gaps
};

// What the backward kernels need besides; statistics are like lse.
struct AttentionUpstream {
  const void* dout;  // like out, of any strides but the last
  AttentionStrides dout_strides;
  const void* lse;
  const void* delta;
};

// What a launch is cut by; none of it changes a bit of the results.
struct AttentionPlan {
  int most_warps;    // of a block, at most 8
  int shared_limit;  // bytes that a block may have
};

enum class AttentionStep : int { kForward, kDkDv, kDq };

// Whether a step fits into so much shared memory.
bool attention_fits(AttentionStep step, Dtype dtype, int head_dim, int value_dim,
                    int shared_limit);

// All return why nothing was launched, or an empty string; they neither wait nor allocate.
// `stream` is a cudaStream_t.
std::string attention_forward(Dtype dtype, const AttentionInputs& inputs,
                              const AttentionResults& results, const AttentionPlan& plan,
                              int device, void* stream);

// delta = sum(dout out) - dlse for each query, 0 for one that sees no key.  out has no gaps; dlse is
// like lse, null for zeros.
std::string attention_delta(Dtype dtype, const AttentionInputs& inputs,
                            const AttentionUpstream& upstream, const void* out, const void* dlse,
                            void* delta, int device, void* stream);

// dkey and dvalue without gaps.  Those of padding are not written.
std::string attention_dkdv(Dtype dtype, const AttentionInputs& inputs,
                           const AttentionUpstream& upstream, void* dkey, void* dvalue,
                           const AttentionPlan& plan, int device, void* stream);

// dquery without gaps.
std::string attention_dq(Dtype dtype, const AttentionInputs& inputs,
                         const AttentionUpstream& upstream, void* dquery,
                         const AttentionPlan& plan, int device, void* stream);

}  // namespace fastlm
