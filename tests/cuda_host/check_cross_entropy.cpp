// Runs the launchers of csrc/cross_entropy.h on heap blocks of their exact size, for sanitizers to
// watch, and compares with the definition in float64.
//
//     check_cross_entropy [small] [forward|reverse|random]
//
// How close is right is judged elsewhere, by the rule for all backends; here a wrong element, a race
// or a wrong address shows.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "checking.h"
#include "cross_entropy.h"
#include "loss_definition.h"
#include "vectors.cuh"

using namespace checking;
using namespace fastlm;

namespace {

struct Layout {
  const char* name;
  int64_t offset, row_gap, stride_vocab;
};

template <typename T>
void check(Dtype dtype, double unit, int64_t vocab_size, int threads, const Layout& layout,
           const LossOptions& options) {
  using A = Acc<T>;
  constexpr int64_t kOuter = 2, kInner = 3, kRows = kOuter * kInner;
  const std::string where = "dtype " + std::to_string(int(dtype)) + ", V " +
                            std::to_string(vocab_size) + ", " + std::to_string(threads) +
                            " threads, " + layout.name + (options.with_stats ? ", options" : "");
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  const int64_t stride_inner = (vocab_size - 1) * layout.stride_vocab + 1 + layout.row_gap;
  const int64_t stride_outer = stride_inner * kInner + layout.row_gap;
  const int64_t extent = (kOuter - 1) * stride_outer + (kInner - 1) * stride_inner +
                         (vocab_size - 1) * layout.stride_vocab + 1;

  const Block<T> logits(extent, layout.offset), dlogits(kRows * vocab_size);
  const Block<int64_t> targets(kRows), predictions(kRows);
  const Block<A> losses(kRows), maximum(kRows), log_sum(kRows), logprobs(kRows), entropy(kRows);
  const Block<A> dlosses(kRows), dlogprobs(kRows), dlse(kRows), dentropy(kRows);
  const Block<A> weight(vocab_size), weight_sum(1);
  std::vector<double> w(vocab_size, 1.0);
  weight_sum[0] = 0;
  for (int64_t v = 0; v < vocab_size; ++v) {
    weight[v] = A(0.25) * A(1 + v % 7);
    weight_sum[0] += weight[v];
    if (options.weighted) w[v] = weight[v];
  }
  const int64_t chosen[kRows] = {0, vocab_size - 1, kIgnore, vocab_size, -1, vocab_size / 2};
  for (int64_t row = 0; row < kRows; ++row) {
    T* at = logits.data() + row / kInner * stride_outer + row % kInner * stride_inner;
    for (int64_t v = 0; v < vocab_size; ++v)
      at[v * layout.stride_vocab] = narrowed<T>(A(4 * normal(random)));
    targets[row] = chosen[row];
    dlosses[row] = A(normal(random));
    dlogprobs[row] = A(normal(random));
    dlse[row] = A(normal(random));
    dentropy[row] = A(normal(random));
  }

  const LossRows rows{logits.data(),
                      targets.data(),
                      options.weighted ? weight.data() : nullptr,
                      options.weighted ? weight_sum.data() : nullptr,
                      kRows,
                      kInner,
                      stride_outer,
                      stride_inner,
                      layout.stride_vocab,
                      vocab_size,
                      kIgnore,
                      options.label_smoothing,
                      options.softcap,
                      options.logit_scale};
  const bool stats = options.with_stats;
  const LossPlan plan{threads, 2};
  const LossResults results{losses.data(),
                            maximum.data(),
                            log_sum.data(),
                            stats ? logprobs.data() : nullptr,
                            entropy.data(),
                            predictions.data()};
  require(cross_entropy_forward(dtype, rows, results, plan, 0, nullptr));
  const LossUpstream upstream{maximum.data(),
                              log_sum.data(),
                              entropy.data(),
                              dlosses.data(),
                              stats ? dlogprobs.data() : nullptr,
                              stats ? dlse.data() : nullptr,
                              stats ? dentropy.data() : nullptr};
  require(cross_entropy_backward(dtype, rows, upstream, dlogits.data(), plan, 0, nullptr));

  for (int64_t row = 0; row < kRows; ++row) {
    const T* at = logits.data() + row / kInner * stride_outer + row % kInner * stride_inner;
    std::vector<double> x(vocab_size);
    for (int64_t v = 0; v < vocab_size; ++v) x[v] = widened(at[v * layout.stride_vocab]);
    const double incoming[4] = {dlosses[row], stats ? dlogprobs[row] : 0, stats ? dlse[row] : 0,
                                stats ? dentropy[row] : 0};
    const LossOfRow truth = loss_of(x, w, targets[row], options, incoming);
    const double allowed = 1e-5;
    expect(losses[row], truth.loss, allowed, "loss", where);
    expect(maximum[row] + log_sum[row], truth.lse, allowed, "lse", where);
    if (stats) {
      expect(logprobs[row], truth.logprob, allowed, "logprob", where);
      expect(entropy[row], truth.entropy, allowed, "entropy", where);
      const int64_t first = std::max_element(x.begin(), x.end()) - x.begin();
      expect(double(predictions[row]), targets[row] == kIgnore ? -1 : double(first), 0,
             "prediction", where);
    }
    for (int64_t v = 0; v < vocab_size; ++v) {
      const double want = truth.dlogits[v];
      expect(widened(dlogits[row * vocab_size + v]), want, allowed + unit * std::fabs(want),
             "gradient", where);
    }
  }
}

template <typename T>
void check_all(Dtype dtype, double unit, bool small) {
  const Layout layouts[] = {{"contiguous", 0, 0, 1},
                            {"rows apart", 0, int64_t(16 / sizeof(T)), 1},
                            {"off by one element", 1, 0, 1},
                            {"every third class", 0, 2, 3}};
  const LossOptions plain{false, false, 0, 0, 1};
  const LossOptions all{true, true, 0.1, 20, 0.7};
  // around a group of 16 bytes, and around what a block of two warps takes at once
  std::vector<int64_t> sizes{1, 7, 8, 9, 33, 1024, 1025, 2600};
  if (small) sizes = {600};
  for (int64_t vocab_size : sizes)
    for (const Layout& layout : layouts)
      for (const LossOptions& options : {plain, all}) {
        if (small && strcmp(layout.name, "contiguous")) continue;
        check<T>(dtype, unit, vocab_size, 64, layout, options);
      }
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
