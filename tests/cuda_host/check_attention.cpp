// Runs the launchers of csrc/causal_attention.h on heap blocks of their exact size, for sanitizers to
// watch, and compares with the definition in float64.
//
//     check_attention [small] [forward|reverse|random]
//
// How close is right is judged elsewhere, by the rule for all backends; here a wrong element, a race
// or a wrong address shows.

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "causal_attention.h"
#include "checking.h"
#include "vectors.cuh"

using namespace checking;
using namespace fastlm;

namespace {

struct Case {
  const char* name;
  int batch, num_queries, num_keys, heads, group_size, head_dim, value_dim;
  int window;
  double scale, softcap;
  bool has_sinks;
  std::vector<int> bounds_q, bounds_k, key_start, key_end;
};

struct Layout {
  const char* name;
  int64_t offset, row_gap;
};

// What a query sees: keys [first, end).
struct Seen {
  int first, end;
};

Seen seen_by(const Case& c, int row, int query) {
  int low = 0, high = c.num_keys, diagonal = query + c.num_keys - c.num_queries;
  if (!c.bounds_q.empty()) {
    const size_t documents = c.bounds_q.size() - 1;
    size_t d = 0;
    while (d < documents && query >= c.bounds_q[d + 1]) ++d;
    if (d == documents) return {0, 0};
    low = c.bounds_k[d];
    high = c.bounds_k[d + 1];
    diagonal = high - (c.bounds_q[d + 1] - query);
  }
  int first = low, end = std::min(diagonal + 1, high);
  if (c.window) first = std::max(first, diagonal + 1 - c.window);
  if (!c.key_start.empty()) first = std::max(first, c.key_start[row]);
  if (!c.key_end.empty()) end = std::min(end, c.key_end[row]);
  end = std::max(end, 0);
  return {std::min(std::max(first, 0), end), end};
}

// A tensor (rows, tokens, heads, dim) as doubles, and in memory with gaps.
template <typename T>
struct Tensor {
  int tokens, heads, dim;
  AttentionStrides strides;
  Block<T> memory;

  Tensor(int rows, int tokens, int heads, int dim, const Layout& layout)
      : tokens(tokens),
        heads(heads),
        dim(dim),
        strides{tokens * (heads * (dim + layout.row_gap)), heads * (dim + layout.row_gap),
                dim + layout.row_gap},
        memory((rows - 1) * strides.batch + (tokens - 1) * strides.token +
                   (heads - 1) * strides.head + dim,
               layout.offset) {}

  T& at(int row, int token, int head, int column) const {
    return memory[row * strides.batch + token * strides.token + head * strides.head + column];
  }
  double number(int row, int token, int head, int column) const {
    return widened(at(row, token, head, column));
  }
  void fill(int rows, std::mt19937& random) const {
    std::normal_distribution<double> normal;
    for (int b = 0; b < rows; ++b)
      for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < heads; ++h)
          for (int d = 0; d < dim; ++d) at(b, t, h, d) = narrowed<T>(Acc<T>(normal(random)));
  }
};

using Numbers = std::vector<double>;

template <typename T>
void check(Dtype dtype, double unit, const Case& c, const Layout& layout,
           const AttentionPlan& plan) {
  using A = Acc<T>;
  const std::string where = std::string(c.name) + ", dtype " + std::to_string(int(dtype)) + ", " +
                            layout.name + ", " + std::to_string(plan.shared_limit) + " bytes";
  const int kv_heads = c.heads / c.group_size;
  const Layout tight{"", 0, 0};
  std::mt19937 random(7);
  const Tensor<T> query(c.batch, c.num_queries, c.heads, c.head_dim, layout);
  const Tensor<T> key(c.batch, c.num_keys, kv_heads, c.head_dim, layout);
  const Tensor<T> value(c.batch, c.num_keys, kv_heads, c.value_dim, layout);
  const Tensor<T> dout(c.batch, c.num_queries, c.heads, c.value_dim, layout);
  const Tensor<T> out(c.batch, c.num_queries, c.heads, c.value_dim, tight);
  const Tensor<T> dquery(c.batch, c.num_queries, c.heads, c.head_dim, tight);
  const Tensor<T> dkey(c.batch, c.num_keys, kv_heads, c.head_dim, tight);
  const Tensor<T> dvalue(c.batch, c.num_keys, kv_heads, c.value_dim, tight);
  for (const Tensor<T>* x : {&query, &key, &value, &dout}) x->fill(c.batch, random);
  for (const Tensor<T>* x : {&dkey, &dvalue})  // padding is not written
    for (size_t i = 0; i < x->memory.size(); ++i) x->memory[i] = narrowed<T>(0);
  const size_t statistics = size_t(c.batch) * c.heads * c.num_queries;
  const Block<A> sinks(c.heads), lse(statistics), delta(statistics), dlse(statistics);
  std::normal_distribution<double> normal;
  for (int h = 0; h < c.heads; ++h) sinks[h] = A(normal(random));
  for (size_t i = 0; i < statistics; ++i) dlse[i] = A(normal(random));

  const auto held = [](const std::vector<int>& numbers) {
    auto block = std::make_unique<Block<int>>(numbers.size());
    for (size_t i = 0; i < numbers.size(); ++i) (*block)[i] = numbers[i];
    return block;
  };
  const auto bounds_q = held(c.bounds_q), bounds_k = held(c.bounds_k);
  const auto key_start = held(c.key_start), key_end = held(c.key_end);
  const auto given = [](const Block<int>& block) { return block.size() ? block.data() : nullptr; };
  const AttentionInputs inputs{query.memory.data(),
                               key.memory.data(),
                               value.memory.data(),
                               query.strides,
                               key.strides,
                               value.strides,
                               c.batch,
                               c.heads,
                               c.group_size,
                               c.num_queries,
                               c.num_keys,
                               c.head_dim,
                               c.value_dim,
                               given(*bounds_q),
                               given(*bounds_k),
                               given(*key_start),
                               given(*key_end),
                               std::max(0, int(c.bounds_q.size()) - 1),
                               c.window,
                               1,
                               c.scale,
                               c.softcap};
  const AttentionResults results{c.has_sinks ? sinks.data() : nullptr, out.memory.data(),
                                 lse.data()};
  const AttentionUpstream upstream{dout.memory.data(), dout.strides, lse.data(), delta.data()};
  require(attention_forward(dtype, inputs, results, plan, 0, nullptr));
  require(attention_delta(dtype, inputs, upstream, out.memory.data(), dlse.data(), delta.data(),
                          0, nullptr));
  require(attention_dkdv(dtype, inputs, upstream, dkey.memory.data(), dvalue.memory.data(), plan,
                         0, nullptr));
  require(attention_dq(dtype, inputs, upstream, dquery.memory.data(), plan, 0, nullptr));

  // narrow weights, and delta of a rounded out, are off by some units
  const double allowed = 1e-4 + 8 * unit;
  for (int b = 0; b < c.batch; ++b) {
    Numbers true_dkey(size_t(c.num_keys) * kv_heads * c.head_dim);
    Numbers true_dvalue(size_t(c.num_keys) * kv_heads * c.value_dim);
    for (int h = 0; h < c.heads; ++h)
      for (int t = 0; t < c.num_queries; ++t) {
        const int g = h / c.group_size;
        const size_t statistic = (size_t(b) * c.heads + h) * c.num_queries + t;
        const Seen seen = seen_by(c, b, t);
        Numbers scores, slopes;
        double maximum = c.has_sinks ? double(sinks[h]) : -INFINITY;
        for (int s = seen.first; s < seen.end; ++s) {
          double score = 0;
          for (int d = 0; d < c.head_dim; ++d)
            score += query.number(b, t, h, d) * key.number(b, s, g, d);
          score *= c.scale;
          const double capped = c.softcap ? std::tanh(score / c.softcap) : 0;
          if (c.softcap) score = c.softcap * capped;
          scores.push_back(score);
          slopes.push_back(1 - capped * capped);
          maximum = std::max(maximum, score);
        }
        double total = c.has_sinks ? std::exp(sinks[h] - maximum) : 0;
        for (double score : scores) total += std::exp(score - maximum);
        const double true_lse = maximum == -INFINITY ? -INFINITY : maximum + std::log(total);
        if (std::isinf(true_lse))
          expect(std::isinf(lse[statistic]) && lse[statistic] < 0, 1, 0, "lse is -inf", where);
        else
          expect(lse[statistic], true_lse, 1e-4, "lse", where);
        Numbers true_out(c.value_dim), true_dquery(c.head_dim);
        for (size_t i = 0; i < scores.size(); ++i)
          for (int d = 0; d < c.value_dim; ++d)
            true_out[d] +=
                std::exp(scores[i] - true_lse) * value.number(b, seen.first + int(i), g, d);
        double sum = scores.empty() ? 0 : -double(dlse[statistic]);
        for (int d = 0; d < c.value_dim; ++d) {
          expect(out.number(b, t, h, d), true_out[d], allowed, "out", where);
          sum += true_out[d] * dout.number(b, t, h, d);
        }
        for (size_t i = 0; i < scores.size(); ++i) {
          const int s = seen.first + int(i);
          const double p = std::exp(scores[i] - true_lse);
          double dp = 0;
          for (int d = 0; d < c.value_dim; ++d) {
            dp += dout.number(b, t, h, d) * value.number(b, s, g, d);
            true_dvalue[(size_t(s) * kv_heads + g) * c.value_dim + d] +=
                p * dout.number(b, t, h, d);
          }
          const double ds = c.scale * p * (dp - sum) * slopes[i];
          for (int d = 0; d < c.head_dim; ++d) {
            true_dquery[d] += ds * key.number(b, s, g, d);
            true_dkey[(size_t(s) * kv_heads + g) * c.head_dim + d] +=
                ds * query.number(b, t, h, d);
          }
        }
        for (int d = 0; d < c.head_dim; ++d)
          expect(dquery.number(b, t, h, d), true_dquery[d], 4 * allowed, "dquery", where);
      }
    for (int s = 0; s < c.num_keys; ++s)
      for (int g = 0; g < kv_heads; ++g) {
        for (int d = 0; d < c.head_dim; ++d)
          expect(dkey.number(b, s, g, d), true_dkey[(size_t(s) * kv_heads + g) * c.head_dim + d],
                 4 * allowed, "dkey", where);
        for (int d = 0; d < c.value_dim; ++d)
          expect(dvalue.number(b, s, g, d),
                 true_dvalue[(size_t(s) * kv_heads + g) * c.value_dim + d], 4 * allowed, "dvalue",
                 where);
      }
  }
}

// Several blocks each way, a ragged end, and every option.
const Case kCases[] = {
    {"plain", 1, 70, 100, 2, 2, 16, 16, 0, 0.3, 0, false, {}, {}, {}, {}},
    {"no keys for some", 2, 45, 20, 1, 1, 9, 13, 0, -0.3, 0, false, {}, {}, {}, {}},
    {"documents", 1, 90, 80, 2, 1, 8, 24, 0, 0.4, 0, true, {0, 40, 40, 75}, {0, 33, 50, 70}, {}, {}},
    {"padding", 2, 50, 55, 2, 2, 24, 8, 0, 0.4, 1.5, false, {}, {}, {7, 30}, {55, 41}},
    {"window", 1, 100, 100, 1, 1, 8, 8, 37, 0.5, 0, true, {}, {}, {}, {}},
    {"wide", 1, 35, 35, 1, 1, 136, 200, 0, 0.1, 3, true, {}, {}, {}, {}},
};
const Case kSmall = {"small", 1, 40, 40, 2, 2, 8, 8, 21, 0.5, 2, true, {}, {}, {3}, {39}};

template <typename T>
void check_all(Dtype dtype, double unit, bool small) {
  const Layout layouts[] = {{"whole groups", 0, int64_t(16 / sizeof(T))},
                            {"off by one element", 1, 3}};
  if (small) return check<T>(dtype, unit, kSmall, layouts[0], {2, 227 * 1024});
  // two stages of streamed rows, or one; in a block of four warps, or of as many as fit
  for (const Case& c : kCases)
    for (const Layout& layout : layouts)
      for (int limit : {227 * 1024, c.head_dim > 64 ? 150 * 1024 : 20 * 1024})
        check<T>(dtype, unit, c, layout, {4, limit});
}

}  // namespace

int main(int count, char** words) {
  const bool small = is_small(count, words);
  check_all<float>(Dtype::kFloat32, 0, small);
  check_all<__nv_bfloat16>(Dtype::kBfloat16, 1.0 / 256, small);
  if (!small) {
    check_all<__half>(Dtype::kFloat16, 1.0 / 2048, small);
    FASTLM_FLOAT64(check_all<double>(Dtype::kFloat64, 0, small));
  }
  return result();
}
