// Runs the launcher of csrc/glu.h on heap blocks of their exact size, for sanitizers to watch, and
// compares with the definition in float64, of an activation that is one line.
//
//     check_glu [small] [forward|reverse|random]

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "checking.h"
#include "glu.h"
#include "numbers.cuh"

using namespace checking;
using namespace fastlm;

namespace {

template <typename T>
void check(double unit, int64_t size, int64_t stride, int64_t offset) {
  using A = Acc<T>;
  constexpr Dtype dtype = kDtype<T>;
  constexpr int64_t kRows = 5;
  const std::string where = "dtype " + std::to_string(int(dtype)) + ", size " +
                            std::to_string(size) + ", stride " + std::to_string(stride);
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  // halves of one projection
  const int64_t step = 2 * size * stride + offset;
  const Block<T> both((kRows - 1) * step + 2 * size * stride - stride + 1, offset);
  const Block<T> dout(kRows * size), out(kRows * size), dgate(kRows * size), dup(kRows * size);
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t i = 0; i < 2 * size; ++i)
      both[row * step + i * stride] = narrowed<T>(A(normal(random)));
  for (int64_t i = 0; i < kRows * size; ++i) dout[i] = narrowed<T>(A(normal(random)));

  const Rows gate{both.data(), dtype, 0, step, stride};
  const Rows up{both.data() + size * stride, dtype, 0, step, stride};
  GatedUnits units{gate, up, {nullptr, dtype, 0, 0, 0}, out.data(), nullptr,
                   kRows, kRows, size, Activation::kSigmoid};
  require(glu(units, 64, 0, nullptr));
  units.dout = {dout.data(), dtype, 0, size, 1};
  units.out = dgate.data();
  units.dup = dup.data();
  require(glu(units, 64, 0, nullptr));
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = row * size + i;
      const double g = widened(both[row * step + i * stride]), d = widened(dout[at]);
      const double u = widened(both[row * step + (size + i) * stride]);
      const double s = 1 / (1 + std::exp(-g));
      const auto near = [&](T got, double want, const char* what) {
        expect(widened(got), want, 1e-5 + unit * std::fabs(want), what, where);
      };
      near(out[at], s * u, "out");
      near(dgate[at], d * u * s * (1 - s), "gradient of the gate");
      near(dup[at], d * s, "gradient of up");
    }
}

template <typename T>
void check_all(double unit, bool small) {
  for (const int64_t size : {1, 7, 8, 9, 300})
    for (const int64_t stride : {1, 2})
      for (const int64_t offset : {0, 1})
        if (!small || size == 300) check<T>(unit, size, stride, offset);
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
