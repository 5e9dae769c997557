// Runs the launchers of csrc/linear_cross_entropy.h as check_cross_entropy.cpp does those beside.
//
//     check_linear_cross_entropy [small] [forward|reverse|random]

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "checking.h"
#include "linear_cross_entropy.h"
#include "loss_definition.h"
#include "vectors.cuh"

using namespace checking;
using namespace fastlm;

namespace {

constexpr int64_t kRows = 6;
constexpr double kAllowed = 2e-5, kZWeight = 0.03;
const LossPlan kPlan{64, 1};

// A chunk, what comes in for its rows, and what is true of them.
template <typename A>
struct Chunk {
  const LossOptions options;
  const int64_t size;
  const size_t offset;
  const std::string where;
  const Block<A> logits, bias, weight, weight_sum, z_weight;
  const Block<A> dlosses, dlogprobs, dlse, dentropy, losses, lse, logprobs, entropy;
  const Block<int64_t> targets, predictions;
  std::vector<LossOfRow> truth;

  Chunk(int64_t vocab_size, size_t offset, const LossOptions& options)
      : options(options),
        size(vocab_size),
        offset(offset),
        where("ACC of " + std::to_string(sizeof(A)) + " bytes, V " + std::to_string(vocab_size) +
              ", offset " + std::to_string(offset) + (options.with_stats ? ", options" : "")),
        logits(kRows * vocab_size, offset),
        bias(vocab_size, offset),
        weight(vocab_size),
        weight_sum(1),
        z_weight(1),
        dlosses(kRows),
        dlogprobs(kRows),
        dlse(kRows),
        dentropy(kRows),
        losses(kRows),
        lse(kRows),
        logprobs(kRows),
        entropy(kRows),
        targets(kRows),
        predictions(kRows) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    std::vector<double> w(size, 1.0);
    weight_sum[0] = 0;
    for (int64_t v = 0; v < size; ++v) {
      bias[v] = A(normal(random));
      weight[v] = A(0.25) * A(1 + v % 7);
      weight_sum[0] += weight[v];
      if (options.weighted) w[v] = weight[v];
    }
    z_weight[0] = A(kZWeight);
    const int64_t chosen[kRows] = {0, size - 1, kIgnore, size, -1, size / 2};
    for (int64_t row = 0; row < kRows; ++row) {
      targets[row] = chosen[row];
      for (const Block<A>* block : {&dlosses, &dlogprobs, &dlse, &dentropy})
        (*block)[row] = A(normal(random));
      std::vector<double> x(size);
      for (int64_t v = 0; v < size; ++v) {
        const A logit = A(3 * normal(random));
        logits[row * size + v] = logit;
        x[v] = options.with_stats ? double(logit) + bias[v] : logit;
      }
      double incoming[4] = {1, 0, 0, 0};
      if (options.with_stats) {
        const double lse = loss_of(x, w, targets[row], options, incoming).lse;
        incoming[0] = dlosses[row];
        incoming[1] = dlogprobs[row];
        incoming[2] = dlse[row] + 2 * kZWeight * lse;
        incoming[3] = dentropy[row];
      }
      truth.push_back(loss_of(x, w, targets[row], options, incoming));
      truth.back().prediction = std::max_element(x.begin(), x.end()) - x.begin();
    }
  }

  // Classes [first, first + count) of logits that lie at `chunk`, in rows of `count`.
  ChunkRows rows(const A* chunk, int64_t first, int64_t count, const A* sum) const {
    return {chunk,
            options.with_stats ? bias.data() + first : nullptr,
            options.weighted ? weight.data() : nullptr,
            options.weighted ? sum : nullptr,
            targets.data(),
            kRows,
            count,
            first,
            size,
            kIgnore,
            options.label_smoothing,
            options.softcap,
            options.logit_scale};
  }

  ChunkRows rows(const A* chunk) const { return rows(chunk, 0, size, weight_sum.data()); }

  ChunkResults results() const {
    return {losses.data(),      lse.data(),         logprobs.data(), entropy.data(),
            predictions.data(), options.with_stats, nullptr};
  }

  ChunkUpstream upstream() const {
    if (!options.with_stats) return {};
    return {dlosses.data(), dlogprobs.data(), dlse.data(), dentropy.data(), z_weight.data()};
  }

  // A copy of logits to be overwritten.
  void copy_to(const Block<A>& chunk) const {
    memcpy(chunk.data(), logits.data(), kRows * size * sizeof(A));
  }

  void forget() const {
    for (const Block<A>* block : {&losses, &lse, &logprobs, &entropy})
      memset(block->data(), 0xFF, kRows * sizeof(A));
  }

  void expect_results(const char* step) const {
    const std::string here = where + ", " + step;
    for (int64_t row = 0; row < kRows; ++row) {
      const bool is_ignored = targets[row] == kIgnore;
      expect(losses[row], truth[row].loss, kAllowed, "loss", here);
      expect(lse[row], is_ignored ? 0 : truth[row].lse, kAllowed, "lse", here);
      if (!options.with_stats) continue;
      expect(logprobs[row], truth[row].logprob, kAllowed, "logprob", here);
      expect(entropy[row], truth[row].entropy, kAllowed, "entropy", here);
      expect(double(predictions[row]), is_ignored ? -1 : double(truth[row].prediction), 0,
             "prediction", here);
    }
  }
};

template <typename A, typename D>
void check_gradient(const Chunk<A>& chunk, Dtype dtype, Dtype narrow, double unit,
                    bool lse_is_known) {
  constexpr bool kIsNarrow = sizeof(D) < sizeof(A);
  const std::string where = chunk.where + ", gradient of " + std::to_string(sizeof(D)) + " bytes" +
                            (lse_is_known ? ", lse known" : "");
  const int64_t size = chunk.size;
  const Block<A> logits(kRows * size, chunk.offset);
  const Block<int64_t> columns(kIsNarrow ? 2 * kRows : 0);
  const Block<A> residuals(columns.size());
  chunk.copy_to(logits);
  if (!lse_is_known) chunk.forget();
  const ChunkGradient gradient{logits.data(), 4.0, lse_is_known, columns.data(), residuals.data()};
  require(linear_cross_entropy_gradient(dtype, narrow, chunk.rows(logits.data()), chunk.results(),
                                        chunk.upstream(), gradient, kPlan, 0, nullptr));
  chunk.expect_results(where.c_str());
  for (int64_t row = 0; row < kRows; ++row) {
    const D* got = reinterpret_cast<const D*>(logits.data() + row * size);
    const std::vector<double>& want = chunk.truth[row].dlogits;
    for (int64_t v = 0; v < size; ++v)
      expect(widened(got[v]) / 4, want[v], kAllowed + unit * std::fabs(want[v]), "gradient", where);
    // with what was lost, the two elements are wide
    for (int64_t place = 2 * row; place < 2 * row + (kIsNarrow ? 2 : 0); ++place) {
      const int64_t v = columns[place];
      expect(v >= 0 && v < size, 1, 0, "column", where);
      if (std::isnan(want[0])) continue;
      if (place == 2 * row && chunk.targets[row] >= 0)
        expect(double(v), double(chunk.targets[row]), 0, "column of the target", where);
      // the only class is the target's: there is no other
      const double lost = size == 1 ? residuals[2 * row] : residuals[place];
      expect((widened(got[v]) + lost) / 4, want[v], kAllowed, "residual", where);
    }
  }
}

template <typename A>
void check_bias(const Chunk<A>& chunk, Dtype dtype) {
  const Block<A> dbias(chunk.size);
  std::vector<double> want(chunk.size, 0.5);
  for (int64_t v = 0; v < chunk.size; ++v) dbias[v] = A(0.5);
  for (const LossOfRow& row : chunk.truth)
    for (int64_t v = 0; v < chunk.size; ++v) want[v] += row.dlogits[v];
  require(linear_cross_entropy_bias(dtype, chunk.rows(chunk.logits.data()), chunk.results(),
                                    chunk.upstream(), dbias.data(), kPlan, 0, nullptr));
  for (int64_t v = 0; v < chunk.size; ++v)
    expect(dbias[v], want[v], kAllowed * kRows, "gradient of the bias", chunk.where);
}

// Two shards, their sums put together.
template <typename A>
void check_shards(const Chunk<A>& chunk, Dtype dtype) {
  const int64_t half = (chunk.size + 1) / 2;
  double maximum[2][kRows], total[2][kRows], x_target[kRows] = {};
  for (int part = 0; part < 2; ++part) {
    const int64_t first = part * half, count = part ? chunk.size - half : half;
    if (count == 0) continue;
    const Block<A> logits(kRows * count, chunk.offset), sum(1), sums(6 * kRows);
    for (int64_t row = 0; row < kRows; ++row)
      memcpy(logits.data() + row * count, chunk.logits.data() + row * chunk.size + first,
             count * sizeof(A));
    sum[0] = 0;
    for (int64_t v = first; v < first + count; ++v) sum[0] += chunk.weight[v];
    ChunkResults results{};
    results.need_stats = chunk.options.with_stats;
    results.sums = sums.data();
    require(linear_cross_entropy_loss(dtype, chunk.rows(logits.data(), first, count, sum.data()),
                                      results, kPlan, 0, nullptr));
    for (int64_t row = 0; row < kRows; ++row) {
      maximum[part][row] = sums[row];
      total[part][row] = sums[kRows + row];
      x_target[row] += sums[2 * kRows + row];
    }
  }
  if (chunk.size < 2) return;
  for (int64_t row = 0; row < kRows; ++row) {
    const double highest = std::fmax(maximum[0][row], maximum[1][row]);
    double sum = 0;
    for (int part = 0; part < 2; ++part)
      sum += total[part][row] * std::exp(maximum[part][row] - highest);
    const double lse = highest + std::log(sum);
    expect(lse, chunk.truth[row].lse, kAllowed, "lse of shards", chunk.where);
    const int64_t target = chunk.targets[row];
    if (target >= 0 && target < chunk.size && chunk.options.with_stats)
      expect(x_target[row] - lse, chunk.truth[row].logprob, kAllowed, "logprob of shards",
             chunk.where);
  }
}

template <typename A>
void check_all(Dtype dtype, bool small) {
  const LossOptions plain{false, false, 0, 0, 1};
  const LossOptions all{true, true, 0.1, 20, 0.7};
  // around a group of 16 bytes, and around what a block of two warps takes in one round and in four
  std::vector<int64_t> sizes{1, 3, 4, 5, 33, 511, 513, 2051};
  if (small) sizes = {1100};
  for (int64_t vocab_size : sizes)
    for (size_t offset : {0, 1})
      for (const LossOptions& options : {plain, all}) {
        if (small && offset == 0) continue;
        const Chunk<A> chunk(vocab_size, offset, options);
        require(linear_cross_entropy_loss(dtype, chunk.rows(chunk.logits.data()), chunk.results(),
                                          kPlan, 0, nullptr));
        chunk.expect_results("loss");
        check_bias(chunk, dtype);
        check_shards(chunk, dtype);
        for (bool lse_is_known : {true, false}) {
          check_gradient<A, A>(chunk, dtype, dtype, 0, lse_is_known);
          if constexpr (sizeof(A) == 4) {
            const double units[] = {1.0 / 256, 1.0 / 2048};
            check_gradient<A, __nv_bfloat16>(chunk, dtype, Dtype::kBfloat16, units[0],
                                             lse_is_known);
            check_gradient<A, __half>(chunk, dtype, Dtype::kFloat16, units[1], lse_is_known);
          }
        }
      }
}

}  // namespace

int main(int count, char** words) {
  const bool small = is_small(count, words);
  check_all<float>(Dtype::kFloat32, small);
  FASTLM_FLOAT64(if (!small) check_all<double>(Dtype::kFloat64, small));
  return result();
}
