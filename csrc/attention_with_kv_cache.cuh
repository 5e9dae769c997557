// Causal attention over a cache, with the keys of a row divided among blocks.
//
//   part i:   out_i = sum_s exp(score_s - lse_i) value_s     over the keys of the part
//             lse_i = log(sum_s exp(score_s))
//   together: out = sum_i exp(lse_i - lse) out_i,  lse = log(sum_i exp(lse_i))
//
// Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.  Into how many parts
// follows from the length of the row alone, so neighbours and the size of the cache change no bit.
//
// Decoding is bound by reading the cache.  A block has one head of keys, one part and up to 16 pairs
// of a query and a head, for which each key and value is read once, 16 bytes at a time, the next
// tile while this one is computed with.  Arithmetic is of single numbers, in float32, float64 for
// float64: there are too few queries for tensor cores.
//
// A row that does not fit, or whose pages are none, is NaN, and nothing of it is written.  Options
// are branches at run time, the same for a whole launch.
#pragma once

#include "async_copy.cuh"
#include "kv_cache.cuh"
#include "mma.cuh"

namespace fastlm {

constexpr int kCombineThreads = 128;

// A team has 8 pairs, and with them all keys of a tile: four lanes for each of 32 keys.
constexpr int kTeamPairs = 8;
constexpr int kTeamThreads = 128;
constexpr int kTeamWarps = kTeamThreads / kWarpSize;
constexpr int kMostTeams = 2;
constexpr int kMostTile = 32;
constexpr int kLanesOfKey = 4;
constexpr int kKeysOfWarp = kWarpSize / kLanesOfKey;
constexpr int kPairsOfWarp = kTeamPairs / kTeamWarps;  // in the softmax
constexpr int kStages = 2;
// Channels that a thread takes at a time, for all pairs of its team: with 8, registers run out.
template <typename T>
constexpr int kShare = kGroup<T> < 4 ? kGroup<T> : 4;

// Into how many parts the keys of a row are divided.
struct Division {
  int keys, count;
  bool is_put_together;  // from parts; else the only one is the result

  __device__ Division(const CachePlan& plan, int length, int pairs) {
    const int tokens = larger(length, 1);
    keys = tokens;
    if (plan.parts)
      keys = blocks_of(blocks_of(tokens, plan.parts), plan.tile) * plan.tile;
    else if (pairs <= plan.most_pairs)
      keys = plan.split_keys * blocks_of(tokens, plan.split_keys * plan.most_splits);
    count = blocks_of(tokens, keys);
    is_put_together = plan.splits > 1 && (plan.parts || pairs <= plan.most_pairs);
  }
};

// Where the results of the parts of a row's first query are.
__device__ inline int64_t first_slot(const CachedRows& in, const CachePlan& plan,
                                     const CachedRow& row) {
  if (plan.row_slots) return row.row * plan.row_slots;
  return in.bounds ? row.queries.first : int64_t(row.row) * in.num_tokens;
}

// Where the results of a pair go: a row of value_dim channels and a log-sum-exp.
struct ResultPlace {
  int64_t out, lse;
};

// Shared memory of a block, in bytes from its beginning; made by the host, since registers are
// scarce.
struct DecodeLayout {
  int head_shares, value_shares;  // of kShare<T> channels
  int key_row, value_row, stage;  // bytes
  int pairs, queries, scores, factors, maxima, totals, places, query_of, scales, tiles, bytes;

  template <typename T>
  static DecodeLayout of(bool is_int8, int head_dim, int value_dim,
                                             const CachePlan& plan) {
    DecodeLayout at;
    const int size = is_int8 ? 1 : sizeof(T), accumulator = sizeof(Acc<T>);
    at.head_shares = (head_dim + kShare<T> - 1) / kShare<T>;
    at.value_shares = (value_dim + kShare<T> - 1) / kShare<T>;
    at.key_row = row_bytes<T>(at.head_shares, size);
    at.value_row = row_bytes<T>(at.value_shares, size);
    at.stage = plan.tile * (at.key_row + at.value_row);
    at.pairs = plan.teams * kTeamPairs;
    const int widest = at.head_shares > at.value_shares ? at.head_shares : at.value_shares;
    at.queries = 0;  // and at last the sums
    at.scores = at.queries + widest * kShare<T> * (at.pairs + 1) * accumulator;
    at.factors = at.scores + plan.tile * (at.pairs + kGroup<Acc<T>>) * accumulator;
    at.maxima = at.factors + at.pairs * accumulator;
    at.totals = at.maxima + at.pairs * accumulator;
    at.places = at.totals + at.pairs * accumulator;
    at.query_of = at.places + at.pairs * static_cast<int>(sizeof(ResultPlace));
    at.scales = at.query_of + at.pairs * static_cast<int>(sizeof(int));
    at.tiles = at.scales + kStages * 2 * kMostTile * static_cast<int>(sizeof(float));
    at.tiles = (at.tiles + 15) / 16 * 16;
    at.bytes = at.tiles + kStages * at.stage;
    return at;
  }

  // Behind a multiple of all banks, as far apart as four lanes read: those of the next key are in
  // other banks.
  template <typename T>
  static int row_bytes(int shares, int size) {
    const int read = kLanesOfKey * kShare<T> * size;
    return (shares * kShare<T> * size + 127) / 128 * 128 + (read < 16 ? 16 : read);
  }
};

// Neighbouring channels as numbers, from a row of a tile.
template <typename T, int kCount>
__device__ inline void load_numbers(const char* row, int first, bool is_int8,
                                    Acc<T> (&numbers)[kCount]) {
  if (is_int8) {
    struct alignas(kCount) Integers {
      int8_t items[kCount];
    };
    const Integers integers = *reinterpret_cast<const Integers*>(row + first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) numbers[i] = static_cast<Acc<T>>(integers.items[i]);
    return;
  }
  struct alignas(kCount * sizeof(T)) Elements {
    T items[kCount];
  };
  const Elements elements = *reinterpret_cast<const Elements*>(row + first * sizeof(T));
#pragma unroll
  for (int i = 0; i < kCount; ++i) numbers[i] = widened(elements.items[i]);
}

// The same from shared memory of accumulators at a multiple of 16 bytes.
template <int kCount, typename A>
__device__ inline void load_accumulators(const A* from, A (&numbers)[kCount]) {
  constexpr int kAtOnce = kGroup<A> < kCount ? kGroup<A> : kCount;
#pragma unroll
  for (int first = 0; first < kCount; first += kAtOnce) {
    const Group<A> group = load_group_if_whole(from, first, first + kGroup<A>, true);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) numbers[first + i] = group.items[i];
  }
}

// Whether rows of a cache can be copied 16 bytes at a time.
__device__ inline bool copies_whole(const Stored& stored, int size) {
  const auto is_whole = [size](int64_t elements) { return elements * size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(stored.elements) % 16 == 0 && is_whole(stored.dim) &&
         is_whole(stored.row_stride) && is_whole(stored.token_stride) &&
         is_whole(stored.head_stride);
}

// A row of `bytes`, and zeros up to `padded`, by one warp: 16 bytes at a time, or, in caches whose
// rows begin elsewhere, one.  Zeros where the token is not `valid`.
__device__ inline void copy_row(char* to, const char* from, int bytes, int padded, bool valid,
                                bool whole) {
  const int lane = lane_of_warp();
  if (whole) {
#pragma unroll 1
    for (int first = lane * 16; first < bytes; first += kWarpSize * 16)
      copy_async16(to + first, from + first, valid);
  } else {
#pragma unroll 1
    for (int i = lane; i < padded; i += kWarpSize) to[i] = valid && i < bytes ? from[i] : 0;
  }
}

// Blocks of pairs of one head of keys and one part: of rows side by side so many or one more for
// each than it needs.
__host__ __device__ inline int64_t ranks_of(const CachedRows& in, const CachePlan& plan) {
  const int size = plan.teams * kTeamPairs;
  const int64_t pairs = static_cast<int64_t>(in.num_tokens) * in.group_size;
  return in.bounds ? pairs / size + in.rows : in.rows * ((pairs + size - 1) / size);
}

// What a block of the decode kernel works on.
struct DecodePlace {
  int row, kv_head, part;
  int first_pair;  // of the row

  __device__ DecodePlace(const CachedRows& in, const CachePlan& plan) {
    const int size = plan.teams * kTeamPairs;
    kv_head = blockIdx.x % in.kv_heads;
    int64_t rank = blockIdx.x / in.kv_heads;
    part = static_cast<int>(rank / ranks_of(in, plan));
    rank %= ranks_of(in, plan);
    row = static_cast<int>(rank % in.rows);
    int64_t block = rank / in.rows;
    if (in.bounds) {
      const auto first_rank = [&](int number) {
        const int64_t token = clamped(in.bounds[number], 0, in.num_tokens);
        return token * in.group_size / size + number;
      };
      int low = 0, high = in.rows - 1;  // the last that begins at or before the rank
      while (low < high) {
        const int middle = low + (high - low + 1) / 2;
        if (first_rank(middle) <= rank)
          low = middle;
        else
          high = middle - 1;
      }
      row = low;
      block = rank - first_rank(low);
    }
    first_pair = static_cast<int>(block * size);
  }
};

template <typename T>
__global__ void __launch_bounds__(kMostTeams* kTeamThreads, 2)
    decode_kernel(const CachedRows in, const Given query, const CacheOptions options,
                  const Attended results, const CachePlan plan, const DecodeLayout layout) {
  using A = Acc<T>;
  const DecodePlace at(in, plan);
  const CachedRow row(in, at.row);
  const int num_pairs = row.queries.count * in.group_size;
  const Division division(plan, row.length, num_pairs);
  if (at.first_pair < 0 || at.first_pair >= num_pairs || at.part >= division.count) return;

  const bool is_int8 = in.keys.scales != nullptr;
  FASTLM_DYNAMIC_SHARED(char, memory);
  A* const queries = reinterpret_cast<A*>(memory + layout.queries);
  A* const scores = reinterpret_cast<A*>(memory + layout.scores);
  A* const factors = reinterpret_cast<A*>(memory + layout.factors);
  A* const maxima = reinterpret_cast<A*>(memory + layout.maxima);
  A* const totals = reinterpret_cast<A*>(memory + layout.totals);
  ResultPlace* const places = reinterpret_cast<ResultPlace*>(memory + layout.places);
  int* const query_of = reinterpret_cast<int*>(memory + layout.query_of);
  float* const scales = reinterpret_cast<float*>(memory + layout.scales);
  const int score_stride = layout.pairs + kGroup<A>;
  const int lane = lane_of_warp(), warp = threadIdx.x / kWarpSize;
  const int team = threadIdx.x / kTeamThreads, member = threadIdx.x % kTeamThreads;
  const int first_heads = at.kv_head * in.group_size;

  // the part, its pages, and the keys of it that somebody sees
  const int offset = row.length - row.queries.count;
  int start = at.part * division.keys;
  int stored_end = smaller(start + division.keys, row.length);
  const bool fits = row.fits && pages_exist(in, row.row, start, stored_end);
  if (!fits) stored_end = start;
  const int first_query = at.first_pair / in.group_size;
  const int last_query =
      (smaller(at.first_pair + layout.pairs, num_pairs) - 1) / in.group_size;
  const int end = smaller(stored_end, last_query + offset + 1);
  if (options.window) {
    const int first_seen = larger(first_query + offset + 1 - options.window, 0);
    start = larger(start, first_seen / plan.tile * plan.tile);
  }
  const Visibility sees{row.queries.count, stored_end, offset, options.window};

  // all pairs side by side for each share of channels, and a gap: four of them are in different
  // banks; so for queries, and at last for sums
  const int share_stride = (layout.pairs + 1) * kShare<T>;
  const int padded = layout.head_shares * kShare<T>;
  for (int i = threadIdx.x; i < layout.pairs * padded; i += blockDim.x) {
    const int channel = i % padded, pair = at.first_pair + i / padded;
    const int own = pair / in.group_size;
    const int64_t place = row.given_row(in) * query.row_stride +
                          (row.queries.first + own) * query.token_stride +
                          (first_heads + pair % in.group_size) * query.head_stride;
    const bool is_there = pair < num_pairs && fits && channel < in.keys.dim;
    queries[channel / kShare<T> * share_stride + i / padded * kShare<T> + channel % kShare<T>] =
        is_there ? turned_number<A>(in, query.elements, place, kDtype<T>, channel,
                                    offset + own)
                 : A(0);
  }
  for (int i = threadIdx.x; i < layout.pairs; i += blockDim.x) {
    const int pair = at.first_pair + i;
    query_of[i] = pair / in.group_size;
    const int64_t head = first_heads + pair % in.group_size;
    const int64_t heads = static_cast<int64_t>(in.kv_heads) * in.group_size;
    const int64_t token = row.queries.first + pair / in.group_size;
    const int64_t slot = head * plan.slots + first_slot(in, plan, row) + pair / in.group_size;
    const int64_t part = slot * plan.splits + at.part, given = row.given_row(in);
    places[i] = division.is_put_together
                    ? ResultPlace{part, part}
                    : ResultPlace{(given * in.num_tokens + token) * heads + head,
                                  (given * heads + head) * in.num_tokens + token};
    A maximum = -kInfinity<A>;
    if (options.sinks && at.part == 0 && pair < num_pairs)
      maximum = number_at<A>(options.sinks, head, options.sinks_dtype) * kLog2E<A>;
    maxima[i] = maximum;
    totals[i] = maximum == -kInfinity<A> ? 0 : 1;
  }

  const int size = is_int8 ? 1 : sizeof(T);
  const bool keys_whole = copies_whole(in.keys, size), values_whole = copies_whole(in.values, size);
  const auto fetch = [&](int first, int stage) {
    // each lane looks one token up
    const bool valid = lane < plan.tile && first + lane < stored_end;
    int64_t key_from = 0, value_from = 0;
    float key_scale = 0, value_scale = 0;
    if (valid) {
      const Slot slot(in, row.row, first + lane);
      key_from = slot.element(in.keys, at.kv_head) * size;
      value_from = slot.element(in.values, at.kv_head) * size;
      if (is_int8 && warp == 0) {
        key_scale = in.keys.scales[slot.scale(in.keys, at.kv_head)];
        value_scale = in.values.scales[slot.scale(in.values, at.kv_head)];
      }
    }
    if (is_int8 && warp == 0) {
      scales[stage * 2 * kMostTile + lane] = key_scale;
      scales[(stage * 2 + 1) * kMostTile + lane] = value_scale;
    }
    char* const keys = memory + layout.tiles + stage * layout.stage;
#pragma unroll 1
    for (int key = warp; key < plan.tile; key += plan.teams * kTeamWarps) {
      const bool is_there = first + key < stored_end;
      const char* const k =
          static_cast<const char*>(in.keys.elements) + __shfl_sync(kAllLanes, key_from, key);
      copy_row(keys + key * layout.key_row, k, in.keys.dim * size, padded * size, is_there,
               keys_whole);
      const char* const v =
          static_cast<const char*>(in.values.elements) + __shfl_sync(kAllLanes, value_from, key);
      copy_row(keys + plan.tile * layout.key_row + key * layout.value_row, v, in.values.dim * size,
               layout.value_shares * kShare<T> * size, is_there, values_whole);
    }
  };

  const ScoreScale<A> score_scale(options.scale, options.softcap, sizeof(T) == 2);
  // in the product with keys: one of them, and every fourth share of channels
  const int own_key = member / kLanesOfKey, piece = member % kLanesOfKey;
  // in that with values: a share of channels, and some of the keys
  int columns = 1;
  while (columns < layout.value_shares) columns *= 2;
  const int column = member % columns, subset = member / columns;
  A sums[kTeamPairs][kShare<T>];
#pragma unroll
  for (int pair = 0; pair < kTeamPairs; ++pair)
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) sums[pair][i] = 0;

  const int tiles = start < end ? blocks_of(end - start, plan.tile) : 0;
  for (int tile = -1; tile < tiles; ++tile) {
    const int first = start + tile * plan.tile, stage = tile % kStages;
    if (tile + 1 < tiles) fetch(first + plan.tile, (tile + 1) % kStages);
    commit_copies();
    if (tile < 0) continue;
    wait_for_copies<kStages - 1>();
    __syncthreads();
    const char* const keys = memory + layout.tiles + stage * layout.stage;
    const char* const values = keys + plan.tile * layout.key_row;

    A products[kTeamPairs];
#pragma unroll
    for (int pair = 0; pair < kTeamPairs; ++pair) products[pair] = 0;
    if (own_key < plan.tile) {
      const A* const own_queries = queries + team * kTeamPairs * kShare<T>;
#pragma unroll 1
      for (int share = piece; share < layout.head_shares; share += kLanesOfKey) {
        A key[kShare<T>];
        load_numbers<T>(keys + own_key * layout.key_row, share * kShare<T>, is_int8, key);
#pragma unroll
        for (int pair = 0; pair < kTeamPairs; ++pair) {
          A own_query[kShare<T>];
          load_accumulators(own_queries + share * share_stride + pair * kShare<T>, own_query);
#pragma unroll
          for (int i = 0; i < kShare<T>; ++i) products[pair] += own_query[i] * key[i];
        }
      }
    }
    // of the pairs, each of the four lanes goes on with two
    A own[1][kTeamPairs / kLanesOfKey];
#pragma unroll
    for (int pair = 0; pair < kTeamPairs; ++pair) {
      products[pair] += __shfl_xor_sync(kAllLanes, products[pair], 1);
      products[pair] += __shfl_xor_sync(kAllLanes, products[pair], 2);
      if (pair / (kTeamPairs / kLanesOfKey) == piece)
        own[0][pair % (kTeamPairs / kLanesOfKey)] = products[pair];
    }
    if (own_key < plan.tile) {
      const A scale = is_int8 ? scales[stage * 2 * kMostTile + own_key] : A(1);
#pragma unroll
      for (int j = 0; j < kTeamPairs / kLanesOfKey; ++j) own[0][j] *= scale;
      score_scale.reduce(own);
#pragma unroll
      for (int j = 0; j < kTeamPairs / kLanesOfKey; ++j) {
        const int pair = team * kTeamPairs + piece * (kTeamPairs / kLanesOfKey) + j;
        scores[own_key * score_stride + pair] =
            sees(query_of[pair], first + own_key) ? product(own[0][j], score_scale.outer)
                                                  : -kInfinity<A>;
      }
    }
    __syncthreads();

#pragma unroll
    for (int j = 0; j < kPairsOfWarp; ++j) {
      const int pair = warp * kPairsOfWarp + j;
      const A before = maxima[pair], total = totals[pair];
      A* const own_score = scores + lane * score_stride + pair;
      const A score = lane < plan.tile ? *own_score : -kInfinity<A>;
      const A largest = larger(before, warp_reduce(score, Larger()));
      // inf - inf is NaN: who has seen -inf alone keeps a sum of 0
      const A pivot = largest == -kInfinity<A> || largest == kInfinity<A> ? A(0) : largest;
      const A factor = power_of_two(before - pivot), p = power_of_two(score - pivot);
      const A sum = warp_reduce(p, Sum());
      if (lane < plan.tile)
        *own_score = is_int8 ? p * scales[(stage * 2 + 1) * kMostTile + lane] : p;
      __syncwarp();  // all lanes have read them
      if (lane == 0) {
        factors[pair] = factor;
        maxima[pair] = largest;
        totals[pair] = total * factor + sum;
      }
    }
    __syncthreads();

#pragma unroll
    for (int pair = 0; pair < kTeamPairs; ++pair) {
      const A factor = factors[team * kTeamPairs + pair];
#pragma unroll
      for (int i = 0; i < kShare<T>; ++i) sums[pair][i] *= factor;
    }
    if (column < layout.value_shares)
#pragma unroll 1
      for (int key = subset; key < plan.tile; key += kTeamThreads / columns) {
        A value[kShare<T>], p[kTeamPairs];
        load_numbers<T>(values + key * layout.value_row, column * kShare<T>, is_int8, value);
        load_accumulators(scores + key * score_stride + team * kTeamPairs, p);
#pragma unroll
        for (int pair = 0; pair < kTeamPairs; ++pair)
#pragma unroll
          for (int i = 0; i < kShare<T>; ++i) sums[pair][i] += p[pair] * value[i];
      }
    __syncthreads();
  }
  wait_for_copies<0>();
  __syncthreads();

  const int there = smaller(layout.pairs, num_pairs - at.first_pair);
  for (int i = threadIdx.x; i < there; i += blockDim.x) {
    if (totals[i] == 0) totals[i] = 1;  // sees no key: out 0, lse -inf
    const A lse = fits ? maxima[i] + binary_logarithm(totals[i]) : static_cast<A>(NAN);
    if (division.is_put_together)
      static_cast<A*>(results.part_lses)[places[i].lse] = lse;
    else
      static_cast<A*>(results.lse)[places[i].lse] = lse * kLn2<A>;
  }

  // keys were dealt out: first within warps, then warp by warp
  for (int distance = columns; distance < kWarpSize; distance *= 2)
#pragma unroll
    for (int pair = 0; pair < kTeamPairs; ++pair)
#pragma unroll
      for (int i = 0; i < kShare<T>; ++i)
        sums[pair][i] += __shfl_xor_sync(kAllLanes, sums[pair][i], distance);
  const int in_turn = larger(columns, kWarpSize);
  const bool gives = column < layout.value_shares && member % in_turn < columns;
  for (int turn = 0; turn < kTeamThreads / in_turn; ++turn) {
    if (gives && member / in_turn == turn) {
#pragma unroll
      for (int pair = 0; pair < kTeamPairs; ++pair)
#pragma unroll
        for (int i = 0; i < kShare<T>; ++i) {
          A& sum = queries[column * share_stride + (team * kTeamPairs + pair) * kShare<T> + i];
          sum = turn ? sum + sums[pair][i] : sums[pair][i];
        }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < there * in.values.dim; i += blockDim.x) {
    const int channel = i % in.values.dim, pair = i / in.values.dim;
    const A sum =
        queries[channel / kShare<T> * share_stride + pair * kShare<T> + channel % kShare<T>];
    const A out = fits ? sum / totals[pair] : static_cast<A>(NAN);
    const int64_t place = places[pair].out * in.values.dim + channel;
    if (division.is_put_together)
      static_cast<A*>(results.part_outs)[place] = out;
    else
      static_cast<T*>(results.out)[place] = narrowed<T>(out);
  }
}

// One block puts one query of one head together, or some queries of a row.
template <typename A>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const CachedRows in, const Attended results, const CachePlan plan,
                   const Dtype dtype) {
  const int64_t heads = static_cast<int64_t>(in.kv_heads) * in.group_size;
  const int64_t head = blockIdx.x % heads;
  const CachedRow row(in, static_cast<int>(blockIdx.x / heads));
  const Division division(plan, row.length, row.queries.count * in.group_size);
  if (!division.is_put_together) return;
  const int dim = in.values.dim;
  for (int query = blockIdx.y; query < row.queries.count; query += gridDim.y) {
    const int64_t slot = head * plan.slots + first_slot(in, plan, row) + query;
    const A* const lses = static_cast<const A*>(results.part_lses) + slot * plan.splits;
    const A* const outs = static_cast<const A*>(results.part_outs) + slot * plan.splits * dim;
    A largest = -kInfinity<A>;
    for (int part = 0; part < division.count; ++part) largest = larger(largest, lses[part]);
    // inf - inf is NaN: where nothing is seen, or a score is +inf
    const A pivot = largest == -kInfinity<A> || largest == kInfinity<A> ? A(0) : largest;
    A total = 0;
    for (int part = 0; part < division.count; ++part) total += power_of_two(lses[part] - pivot);
    if (total == 0) total = 1;
    const int64_t token = row.queries.first + query;
    const int64_t place =
        ((row.given_row(in) * in.num_tokens + token) * heads + head) * dim;
    for (int channel = threadIdx.x; channel < dim; channel += blockDim.x) {
      A out = 0;
      for (int part = 0; part < division.count; ++part)
        out += power_of_two(lses[part] - pivot) * outs[static_cast<int64_t>(part) * dim + channel];
      put_number(results.out, place + channel, dtype, out / total);
    }
    if (threadIdx.x == 0)
      static_cast<A*>(results.lse)[(row.given_row(in) * heads + head) * in.num_tokens + token] =
          (largest + binary_logarithm(total)) * kLn2<A>;
  }
}

}  // namespace fastlm
