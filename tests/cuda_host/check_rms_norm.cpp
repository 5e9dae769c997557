// Runs the launchers of csrc/rms_norm.h on heap blocks of their exact size, for sanitizers to watch,
// and compares with the definition in float64.
//
//     check_rms_norm [small] [forward|reverse|random]
//
// How close is right is judged elsewhere, by the rule for all backends; here a wrong element, a race
// or a wrong address shows.

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "checking.h"
#include "numbers.cuh"
#include "rms_norm.h"

using namespace checking;
using namespace fastlm;

namespace {

template <typename T>
void check(double unit, int64_t size, int team, int64_t stride, int64_t offset, bool all) {
  using A = Acc<T>;
  constexpr Dtype dtype = kDtype<T>;
  constexpr int64_t kOuter = 2, kInner = 3, kRows = kOuter * kInner;
  const std::string where = "dtype " + std::to_string(int(dtype)) + ", size " +
                            std::to_string(size) + ", team of " + std::to_string(team) +
                            ", stride " + std::to_string(stride) + (all ? ", residual" : "");
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  const int64_t inner = (size - 1) * stride + 1 + offset, outer = inner * kInner + offset;
  const int64_t extent = outer + 2 * inner + (size - 1) * stride + 1;
  const Block<T> vectors(extent, offset), residual(extent, offset), dout(extent, offset);
  const Block<T> weight(size), dtotal(kRows * size), out(kRows * size), total(kRows * size);
  const Block<T> dvectors(kRows * size);
  const NormPlan plan{64, team, 2};
  const int64_t teams = kRows / plan.rows_per_team;
  const Block<A> rstd(kRows), partial(teams * size);
  const auto place = [&](int64_t row, int64_t i) {
    return row / kInner * outer + row % kInner * inner + i * stride;
  };
  for (int64_t i = 0; i < size; ++i) weight[i] = narrowed<T>(A(1 + normal(random)));
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t i = 0; i < size; ++i) {
      vectors[place(row, i)] = narrowed<T>(A(normal(random)));
      residual[place(row, i)] = narrowed<T>(A(normal(random)));
      dout[place(row, i)] = narrowed<T>(A(normal(random)));
      dtotal[row * size + i] = narrowed<T>(A(normal(random)));
    }

  const Rows none{nullptr, dtype, 0, 0, 0};
  const auto rows_of = [&](const Block<T>& block) {
    return Rows{block.data(), dtype, outer, inner, stride};
  };
  const double eps = 1e-3, offset_of_weight = all ? 0.5 : 0;
  NormInputs in{rows_of(vectors), all ? rows_of(residual) : none, all ? weight.data() : nullptr,
                dtype, kRows, kInner, size, eps, offset_of_weight};
  require(rms_norm_forward(in, {out.data(), total.data(), rstd.data(), dtype}, plan, 0, nullptr));
  in.residual = none;
  if (all) in.vectors = {total.data(), dtype, kInner * size, size, 1};
  const NormUpstream upstream{rows_of(dout), all ? dtotal.data() : nullptr, rstd.data()};
  const NormGradients gradients{dvectors.data(), all ? partial.data() : nullptr};
  require(rms_norm_backward(in, upstream, gradients, plan, 0, nullptr));

  std::vector<double> dweight(size, 0.0);
  for (int64_t row = 0; row < kRows; ++row) {
    std::vector<double> x(size), grad(size);
    double squares = 0, dot = 0;
    for (int64_t i = 0; i < size; ++i) {
      x[i] = all ? widened(total[row * size + i]) : widened(vectors[place(row, i)]);
      squares += x[i] * x[i];
    }
    const double r = 1 / std::sqrt(squares / size + eps);
    expect(rstd[row], r, 1e-5 * r, "rstd", where);
    for (int64_t i = 0; i < size; ++i) {
      const double scale = all ? widened(weight[i]) + offset_of_weight : 1;
      const double want = x[i] * r * scale, d = widened(dout[place(row, i)]);
      expect(widened(out[row * size + i]), want, 1e-5 + unit * std::fabs(want), "out", where);
      grad[i] = d * scale;
      dot += grad[i] * x[i] * r;
      dweight[i] += d * x[i] * r;
    }
    for (int64_t i = 0; i < size; ++i) {
      double want = r * (grad[i] - x[i] * r * dot / size);
      if (all) want += widened(dtotal[row * size + i]);
      expect(widened(dvectors[row * size + i]), want, 1e-4 + unit * std::fabs(want), "gradient",
             where);
    }
  }
  if (!all) return;
  for (int64_t i = 0; i < size; ++i) {
    double got = 0;
    for (int64_t part = 0; part < teams; ++part) got += partial[part * size + i];
    expect(got, dweight[i], 1e-4, "gradient of the weight", where);
  }
}

template <typename T>
void check_all(double unit, bool small) {
  // around a group of 16 bytes and a round of a team; sums that shared memory cannot hold
  std::vector<int64_t> sizes{1, 7, 8, 9, 257, 13000};
  if (small) sizes = {600};
  for (const int64_t size : sizes)
    for (const int team : {32, 64})
      for (const int64_t stride : {1, 3})
        for (const int64_t offset : {0, 1})
          for (const bool all : {false, true})
            if (stride == 1 && offset == 0 ? !small || all : size < 1000 && !small)
              check<T>(unit, size, team, stride, offset, all);
}

}  // namespace

int main(int count, char** words) {
  const bool small = is_small(count, words);
  check_all<float>(0, small);
  check_all<__nv_bfloat16>(1.0 / 128, small);
  if (!small) {
    check_all<__half>(1.0 / 1024, small);
    FASTLM_FLOAT64(check_all<double>(0, small));
  }
  return result();
}
