// Runs the launchers of csrc/attention_with_kv_cache.h on heap blocks of their exact size, for
// sanitizers to watch, and compares with the definition in float64.
//
//     check_attention_with_kv_cache [small] [forward|reverse|random]
//
// How close is right is judged elsewhere, by the rule for all backends; here a wrong element, a race
// or a wrong address shows.

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention_with_kv_cache.h"
#include "checking.h"
#include "vectors.cuh"

using namespace checking;
using namespace fastlm;

namespace {

struct Options {
  bool has_pages, is_int8, has_bounds;
  int window, head_dim;
  double softcap;
};

constexpr int kRows = 3, kQueries = 2, kKvHeads = 2, kGroupSize = 3, kValueDim = 11, kPage = 7;
constexpr int kCapacity = 42, kPages = kCapacity / kPage;

// Three rows, of which the last does not fit.
template <typename T>
void check(Dtype dtype, double allowed, int tile, const Options& options) {
  using A = Acc<T>;
  const std::string where = "dtype " + std::to_string(int(dtype)) + ", tile " +
                            std::to_string(tile) + ", D " + std::to_string(options.head_dim) +
                            (options.has_pages ? ", pages" : "") +
                            (options.is_int8 ? ", int8" : "") +
                            (options.has_bounds ? ", bounds" : "");
  const int dim = options.head_dim, heads = kKvHeads * kGroupSize, tokens = kRows * kQueries;
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  const int starts[kRows] = {37, 0, 41};
  const Block<int> lengths(kRows), table(kRows * kPages), bounds(kRows + 1);
  for (int row = 0; row < kRows; ++row) lengths[row] = starts[row];
  for (int i = 0; i < kRows * kPages; ++i) table[i] = (i * 5 + 2) % (kRows * kPages);
  for (int row = 0; row <= kRows; ++row) bounds[row] = row * kQueries;

  const Block<T> query(tokens * heads * dim, dim % 8 ? 1 : 0), key(tokens * kKvHeads * dim);
  const Block<T> value(tokens * kKvHeads * kValueDim);
  for (int i = 0; i < tokens * heads * dim; ++i) query[i] = narrowed<T>(A(normal(random)));
  for (int i = 0; i < tokens * kKvHeads * dim; ++i) key[i] = narrowed<T>(A(normal(random)));
  for (int i = 0; i < tokens * kKvHeads * kValueDim; ++i) value[i] = narrowed<T>(A(normal(random)));

  // what no row has stays NaN, or 99 with the scale NaN
  const int places = kRows * kCapacity * kKvHeads;
  const Block<T> k_cache(options.is_int8 ? 1 : places * dim);
  const Block<T> v_cache(options.is_int8 ? 1 : places * kValueDim);
  const Block<int8_t> k_ints(options.is_int8 ? places * dim : 1);
  const Block<int8_t> v_ints(options.is_int8 ? places * kValueDim : 1);
  const Block<float> k_scales(places), v_scales(places);
  const auto place_of = [&](int row, int token, int head) {
    const int page = options.has_pages ? table[row * kPages + token / kPage] : 0;
    const int at = options.has_pages ? page * kPage + token % kPage : row * kCapacity + token;
    return at * kKvHeads + head;
  };
  for (int row = 0; row < kRows; ++row)
    for (int token = 0; token < starts[row]; ++token)
      for (int head = 0; head < kKvHeads; ++head) {
        const int place = place_of(row, token, head);
        if (options.is_int8) k_scales[place] = v_scales[place] = 0.02f;
        for (int i = 0; i < dim; ++i)
          if (options.is_int8) k_ints[place * dim + i] = int8_t(int(random() % 255) - 127);
          else k_cache[place * dim + i] = narrowed<T>(A(normal(random)));
        for (int i = 0; i < kValueDim; ++i)
          if (options.is_int8) v_ints[place * kValueDim + i] = int8_t(int(random() % 255) - 127);
          else v_cache[place * kValueDim + i] = narrowed<T>(A(normal(random)));
      }
  const int turned = dim / 2, angles = kCapacity * turned;
  const Block<float> cos(angles ? angles : 1), sin(angles ? angles : 1);
  for (int i = 0; i < angles; ++i) {
    cos[i] = std::cos(0.3f * i);
    sin[i] = std::sin(0.3f * i);
  }

  const int rows_of = options.has_pages ? kPage : kCapacity;
  const auto stored = [&](void* elements, float* scales, int size) {
    return Stored{elements, options.is_int8 ? scales : nullptr, int64_t(rows_of) * kKvHeads * size,
                  kKvHeads * size, size, int64_t(rows_of) * kKvHeads, kKvHeads, 1, size};
  };
  void* const k_elements = options.is_int8 ? (void*)k_ints.data() : (void*)k_cache.data();
  void* const v_elements = options.is_int8 ? (void*)v_ints.data() : (void*)v_cache.data();
  const CachedRows rows{stored(k_elements, k_scales.data(), dim),
                        stored(v_elements, v_scales.data(), kValueDim),
                        lengths.data(),
                        options.has_pages ? table.data() : nullptr,
                        options.has_bounds ? bounds.data() : nullptr,
                        turned ? cos.data() : nullptr,
                        sin.data(),
                        Dtype::kFloat32,
                        turned,
                        false,
                        true,
                        kRows,
                        options.has_bounds ? tokens : kQueries,
                        kKvHeads,
                        kGroupSize,
                        0,
                        kCapacity,
                        kPages,
                        options.has_pages ? kPage : kCapacity,
                        options.has_pages ? kRows * kPages : kRows};
  const auto given = [&](const T* elements, int count, int size) {
    return Given{elements, options.has_bounds ? 0 : int64_t(kQueries) * count * size, count * size,
                 size};
  };
  require(append_to_kv_cache(dtype, rows, given(key.data(), kKvHeads, dim),
                             given(value.data(), kKvHeads, kValueDim), 0, nullptr));

  const int splits = 3;
  const Block<T> out(tokens * heads * kValueDim);
  const Block<A> lse(tokens * heads);
  const Block<A> part_outs(tokens * heads * splits * kValueDim), part_lses(tokens * heads * splits);
  const CachePlan plan{tile, 1, 0, 16, splits, 64, splits, tokens, 0};
  const CacheOptions cache_options{0.4, options.softcap, options.window, nullptr, dtype};
  require(attend_to_kv_cache(dtype, rows, given(query.data(), heads, dim), cache_options,
                             {out.data(), lse.data(), part_outs.data(), part_lses.data()}, plan, 0,
                             nullptr));

  const auto turned_number = [&](const T* x, int channel, int position) {
    const double own = widened(x[channel]);
    if (channel >= 2 * turned) return own;
    const bool is_first = channel < turned;
    const double other = widened(x[is_first ? channel + turned : channel - turned]);
    const int angle = position * turned + channel % turned;
    return own * cos[angle] + (is_first ? -other : other) * sin[angle];
  };
  for (int row = 0; row < kRows; ++row)
    for (int t = 0; t < kQueries; ++t)
      for (int head = 0; head < heads; ++head) {
        const bool fits = starts[row] + kQueries <= kCapacity;
        const int kv_head = head / kGroupSize, last = starts[row] + t;
        const int first = options.window ? std::max(0, last + 1 - options.window) : 0;
        std::vector<double> scores;
        double total = 0, maximum = -INFINITY;
        for (int s = first; fits && s <= last; ++s) {
          const int place = place_of(row, s, kv_head);
          double score = 0;
          for (int i = 0; i < dim; ++i) {
            const T* q = query.data() + ((row * kQueries + t) * heads + head) * dim;
            const double k = options.is_int8 ? k_scales[place] * double(k_ints[place * dim + i])
                                             : double(widened(k_cache[place * dim + i]));
            score += turned_number(q, i, last) * k;
          }
          score *= 0.4;
          if (options.softcap) score = options.softcap * std::tanh(score / options.softcap);
          scores.push_back(score);
          maximum = std::max(maximum, score);
        }
        for (double& score : scores) total += score = std::exp(score - maximum);
        for (int i = 0; i < kValueDim; ++i) {
          double want = fits ? 0 : std::nan("");
          for (size_t s = 0; s < scores.size(); ++s) {
            const int place = place_of(row, first + int(s), kv_head) * kValueDim + i;
            const double v = options.is_int8
                                 ? v_scales[place / kValueDim] * double(v_ints[place])
                                 : double(widened(v_cache[place]));
            want += scores[s] / total * v;
          }
          const int at = ((row * kQueries + t) * heads + head) * kValueDim + i;
          expect(widened(out[at]), want, allowed, "out", where);
        }
        const int at = options.has_bounds ? head * tokens + row * kQueries + t
                                          : (row * heads + head) * kQueries + t;
        expect(lse[at], fits ? maximum + std::log(total) : std::nan(""), allowed, "lse", where);
      }
}

template <typename T>
void check_all(Dtype dtype, double allowed, bool small) {
  const Options all[] = {{false, false, false, 0, 16, 0},
                         {true, false, false, 20, 13, 1.5},
                         {true, true, false, 0, 16, 0},
                         {false, true, true, 20, 13, 0}};
  for (int tile : {32, 4})
    for (const Options& options : all) {
      // a part of four tiles
      if (small && (tile == 32 || options.head_dim == 13 || options.is_int8)) continue;
      check<T>(dtype, allowed, tile, options);
    }
}

}  // namespace

int main(int count, char** words) {
  const bool small = is_small(count, words);
  check_all<float>(Dtype::kFloat32, 1e-5, small);
  check_all<__nv_bfloat16>(Dtype::kBfloat16, 0.1, small);
  if (!small) {
    check_all<__half>(Dtype::kFloat16, 0.02, small);
    FASTLM_FLOAT64(check_all<double>(Dtype::kFloat64, 1e-6, small));
  }
  return result();
}
