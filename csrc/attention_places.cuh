// Which block of an attention kernel works on what.
//
// Blocks of queries and of keys are counted from the beginning of their sequence, so that what
// surrounds it changes no bit; lengths are read on the device.
#pragma once

#include "attention_mask.cuh"
#include "causal_attention.h"

namespace fastlm {

// Blocks of one head, whatever the lengths of documents are.
__host__ __device__ inline int64_t query_blocks(const AttentionInputs& in, int size) {
  if (in.bounds_q) return in.num_queries / size + in.num_documents + 1;
  // one more where padding in front takes queries away from whole blocks
  return (in.num_queries + size - 1) / size + (in.key_start ? 1 : 0);
}
__host__ __device__ inline int64_t key_blocks(const AttentionInputs& in, int size) {
  if (in.bounds_q) return in.num_keys / size + in.num_documents + 1;
  return (in.num_keys + size - 1) / size;
}

struct Place {
  int64_t row, head;         // of the batch; the head is one of queries or one of keys
  int64_t q_token, k_token;  // where the sequence begins
  int first;                 // of the block's queries, or keys, in the sequence
  Visibility sees;
};

struct HeadAndRank {
  int64_t head;
  int rank;
};

// Heads come in sections, what they walk over fits the L2 cache together; inside a section the rank
// changes slowest, so that all heads run their longest block first and the shortest last.
__device__ inline HeadAndRank head_and_rank(int64_t blocks, int64_t heads, int64_t section_heads) {
  const int64_t block = blockIdx.x;
  const int64_t section = block / (section_heads * blocks);
  const int64_t first_head = section * section_heads;
  const int64_t here = heads - first_head < section_heads ? heads - first_head : section_heads;
  const int64_t within = block - first_head * blocks;
  return {first_head + within % here, static_cast<int>(within / here)};
}

// Of a block with `size` queries of one head.
__device__ inline Place place_queries(const AttentionInputs& in, int size) {
  const int64_t blocks = query_blocks(in, size);
  const auto [head, rank] = head_and_rank(blocks, in.batch * in.heads, in.heads_per_section);
  Place at{head / in.heads, head % in.heads, 0, 0, 0, {in.num_queries, 0, 0, in.window}};
  if (in.bounds_q) {
    const auto [document, block] =
        document_block(rank, in.bounds_q, in.num_documents, in.num_queries, size);
    const Span queries = document_span(in.bounds_q, document, in.num_documents, in.num_queries);
    const Span keys = document_span(in.bounds_k, document, in.num_documents, in.num_keys);
    at.first = block * size;
    // nothing to see after the last document, nor for a block that its document does not need
    const bool is_spare = document == in.num_documents || at.first >= queries.count;
    at.q_token = queries.first;
    at.k_token = keys.first;
    at.sees = {queries.count, is_spare ? 0 : keys.count, keys.count - queries.count, in.window};
    return at;
  }
  const Span keys = padded_row(in.key_start, in.key_end, at.row, in.num_keys);
  at.k_token = keys.first;
  at.sees.num_keys = keys.count;
  at.sees.offset = in.num_keys - in.num_queries - keys.first;
  // the last block of queries sees the most keys
  int block = static_cast<int>(blocks) - 1 - rank;
  if (in.key_start) {
    // queries that see keys have blocks of their own, and so the same as without padding
    const int blind = clamped(-at.sees.offset, 0, in.num_queries);
    const int seeing = blocks_of(in.num_queries - blind, size);
    if (block >= seeing) {
      block -= seeing;
      at.sees.num_queries = blind;
      at.sees.num_keys = 0;
    } else {
      at.q_token = blind;
      at.sees.num_queries = in.num_queries - blind;
      at.sees.offset += blind;
    }
  }
  at.first = block * size;
  return at;
}

// Of a block with `size` keys of one head of keys; queries begin with the first that sees a key.
__device__ inline Place place_keys(const AttentionInputs& in, int size) {
  const int64_t kv_heads = in.heads / in.group_size;
  const int64_t blocks = key_blocks(in, size);
  const auto [head, rank] = head_and_rank(blocks, in.batch * kv_heads, in.heads_per_section);
  Place at{head / kv_heads, head % kv_heads, 0, 0, 0, {in.num_queries, 0, 0, in.window}};
  if (in.bounds_q) {
    const auto [document, block] =
        document_block(rank, in.bounds_k, in.num_documents, in.num_keys, size);
    const Span queries = document_span(in.bounds_q, document, in.num_documents, in.num_queries);
    const Span keys = document_span(in.bounds_k, document, in.num_documents, in.num_keys);
    at.first = block * size;
    const bool is_spare = document == in.num_documents || at.first >= keys.count;
    at.q_token = queries.first;
    at.k_token = keys.first;
    at.sees = {is_spare ? 0 : queries.count, keys.count, keys.count - queries.count, in.window};
  } else {
    const Span keys = padded_row(in.key_start, in.key_end, at.row, in.num_keys);
    // the first block of keys is seen by the most queries
    at.first = rank * size;
    at.k_token = keys.first;
    at.sees.num_keys = keys.count;
    at.sees.offset = in.num_keys - in.num_queries - keys.first;
  }
  // blocks of queries are counted from here, so that padding in front changes no sum
  const int blind = clamped(-at.sees.offset, 0, at.sees.num_queries);
  at.q_token += blind;
  at.sees.num_queries -= blind;
  at.sees.offset += blind;
  return at;
}

}  // namespace fastlm
