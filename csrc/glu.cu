#include "glu.cuh"

#include "launch.h"

namespace fastlm {

std::string glu(const GatedUnits& units, int threads, int device, void* stream) {
  if (!is_served(units.gate.dtype)) return "glu: no such dtype";
  const int64_t total = units.rows * ((units.size + kEight - 1) / kEight);
  const Launch how{"glu", (total + threads - 1) / threads, 1, threads, 0, device, stream};
  FASTLM_FLOAT64(if (units.gate.dtype == Dtype::kFloat64)
                     return launch(how, glu_kernel<double>, units, total));
  return launch(how, glu_kernel<float>, units, total);
}

}  // namespace fastlm
