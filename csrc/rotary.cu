#include "rotary.cuh"

#include "launch.h"

namespace fastlm {

std::string rotate(const Rotation& rotation, int threads, int device, void* stream) {
  if (!is_served(rotation.dtype)) return "rotate: no such dtype";
  const int64_t heads = rotation.batch * rotation.length * rotation.num_heads;
  const int64_t total = heads * units_of_head(rotation);
  const Launch how{"rotate", (total + threads - 1) / threads, 1, threads, 0, device, stream};
  FASTLM_FLOAT64(if (rotation.dtype == Dtype::kFloat64)
                     return launch(how, rotate_kernel<double>, rotation, total));
  return launch(how, rotate_kernel<float>, rotation, total);
}

}  // namespace fastlm
