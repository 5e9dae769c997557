// Runs the launcher of csrc/rotary.h on heap blocks of their exact size, for sanitizers to watch, and
// compares with the definition in float64.
//
//     check_rotary [small] [forward|reverse|random]

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "checking.h"
#include "numbers.cuh"
#include "rotary.h"

using namespace checking;
using namespace fastlm;

namespace {

template <typename T>
void check(double unit, int64_t pairs, int64_t rest, int64_t stride, bool interleaved, bool back) {
  using A = Acc<T>;
  constexpr Dtype dtype = kDtype<T>;
  constexpr int64_t kBatch = 2, kLength = 3, kHeads = 2;
  const int64_t dim = 2 * pairs + rest;
  const std::string where = "dtype " + std::to_string(int(dtype)) + ", " + std::to_string(pairs) +
                            " pairs and " + std::to_string(rest) + ", stride " +
                            std::to_string(stride) + (interleaved ? ", interleaved" : "") +
                            (back ? ", back" : "");
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  const int64_t step = (dim - 1) * stride + 1;  // from head to head
  const Block<T> heads(kBatch * kLength * kHeads * step), out(kBatch * kLength * kHeads * dim);
  const Block<T> cos(kLength * pairs), sin(kLength * pairs);
  for (int64_t i = 0; i < kBatch * kLength * kHeads; ++i)
    for (int64_t d = 0; d < dim; ++d) heads[i * step + d * stride] = narrowed<T>(A(normal(random)));
  for (int64_t i = 0; i < kLength * pairs; ++i) {
    const double angle = normal(random);
    cos[i] = narrowed<T>(A(std::cos(angle)));
    sin[i] = narrowed<T>(A(std::sin(angle)));
  }
  const Rotation rotation{heads.data(), kLength * kHeads * step, kHeads * step, step, stride,
                          cos.data(),   sin.data(),              dtype,         0,    pairs,
                          1,            out.data(),              dtype,         kBatch, kLength,
                          kHeads,       dim,                     pairs,         interleaved, back};
  require(rotate(rotation, 64, 0, nullptr));
  for (int64_t i = 0; i < kBatch * kLength * kHeads; ++i) {
    const int64_t angle = i / kHeads % kLength * pairs;
    for (int64_t d = 0; d < dim; ++d) {
      const auto x = [&](int64_t channel) { return double(widened(heads[i * step + channel * stride])); };
      double want = x(d);
      if (d < 2 * pairs) {
        const int64_t pair = interleaved ? d / 2 : d % pairs;
        const bool is_first = interleaved ? d % 2 == 0 : d < pairs;
        const int64_t away = interleaved ? 1 : pairs;
        const double s = widened(sin[angle + pair]) * (back ? -1 : 1);
        want = x(d) * widened(cos[angle + pair]) + (is_first ? -x(d + away) : x(d - away)) * s;
      }
      expect(widened(out[i * dim + d]), want, 1e-5 + unit * std::fabs(want), "channel", where);
    }
  }
}

template <typename T>
void check_all(double unit, bool small) {
  for (const int64_t pairs : {1, 4, 8, 9, 32})
    for (const int64_t rest : {0, 1, 16})
      for (const int64_t stride : {1, 2})
        for (const bool interleaved : {false, true})
          for (const bool back : {false, true})
            if (!small || (pairs == 9 && rest == 1)) check<T>(unit, pairs, rest, stride, interleaved, back);
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
