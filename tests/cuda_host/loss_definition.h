// The losses of a row by their definition, in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace checking {

constexpr int64_t kIgnore = -100;

struct LossOptions {
  bool weighted, with_stats;
  double label_smoothing, softcap, logit_scale;
};

// One row by the definition.
struct LossOfRow {
  double loss, lse, logprob = 0, entropy = 0;
  int64_t prediction = -1;  // the caller's to set
  std::vector<double> dlogits;
};

inline LossOfRow loss_of(const std::vector<double>& logits, const std::vector<double>& w,
                         int64_t target, const LossOptions& options, const double (&upstream)[4]) {
  const size_t size = logits.size();
  const double s = options.label_smoothing;
  std::vector<double> x(size), slope(size);
  double maximum = -INFINITY, total = 0, weight_sum = 0;
  for (size_t v = 0; v < size; ++v) {
    const double u = options.logit_scale * logits[v];
    const double t = options.softcap ? std::tanh(u / options.softcap) : 0;
    x[v] = options.softcap ? options.softcap * t : u;
    slope[v] = (1 - t * t) * options.logit_scale;
    maximum = std::fmax(maximum, x[v]);
    weight_sum += w[v];
  }
  for (double value : x) total += std::exp(value - maximum);
  LossOfRow truth;
  truth.lse = maximum + std::log(total);
  truth.dlogits.assign(size, 0.0);
  truth.loss = 0;
  if (target == kIgnore) return truth;
  const bool is_class = target >= 0 && target < int64_t(size);
  const double nan = std::nan("");
  double uniform = 0;
  for (size_t v = 0; v < size; ++v) {
    const double log_p = x[v] - truth.lse;
    truth.entropy -= std::exp(log_p) * log_p;
    uniform -= w[v] * log_p;
  }
  truth.logprob = is_class ? x[target] - truth.lse : nan;
  truth.loss = is_class ? -(1 - s) * w[target] * truth.logprob + s / size * uniform : nan;
  for (size_t v = 0; v < size; ++v) {
    const double log_p = x[v] - truth.lse, p = std::exp(log_p);
    const double hit = int64_t(v) == target ? 1.0 : 0.0;
    double dx = (p - hit) * ((1 - s) * (is_class ? w[target] : nan) * upstream[0] - upstream[1]);
    dx += p * (s * weight_sum / size * upstream[0] + upstream[2]) - s / size * w[v] * upstream[0];
    dx -= p * (log_p + truth.entropy) * upstream[3];
    truth.dlogits[v] = dx * slope[v];
  }
  return truth;
}

}  // namespace checking
