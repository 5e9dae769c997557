#include "linear_cross_entropy.cuh"

#include "launch.h"

namespace fastlm {
namespace {

template <typename A, typename D>
std::string run(const char* name, const ChunkRows& rows, const ChunkResults& results,
                const ChunkUpstream& upstream, const ChunkGradient& gradient, const LossPlan& plan,
                int device, void* stream) {
  const Launch how{name, rows.rows, 1, plan.threads, 0, device, stream};
  return launch(how, linear_cross_entropy_kernel<A, D>, rows, results, upstream, gradient);
}

template <typename A>
std::string bias(const ChunkRows& rows, const ChunkResults& results, const ChunkUpstream& upstream,
                 void* dbias, const LossPlan& plan, int device, void* stream) {
  constexpr int64_t kColumns = kWarpSize * kGroup<A>;
  const int64_t blocks = (rows.vocab_size + kColumns - 1) / kColumns;
  const Launch how{"linear_cross_entropy_bias", blocks, 1, plan.threads, 0, device, stream};
  return launch(how, linear_cross_entropy_bias_kernel<A>, rows, results, upstream,
                static_cast<A*>(dbias));
}

}  // namespace

std::string linear_cross_entropy_loss(Dtype dtype, const ChunkRows& rows,
                                      const ChunkResults& results, const LossPlan& plan, int device,
                                      void* stream) {
  const char* name = "linear_cross_entropy_loss";
  const ChunkUpstream nothing{};
  const ChunkGradient nowhere{};
  if (dtype == Dtype::kFloat32)
    return run<float, float>(name, rows, results, nothing, nowhere, plan, device, stream);
  FASTLM_FLOAT64(
      if (dtype == Dtype::kFloat64) return run<double, double>(
          name, rows, results, nothing, nowhere, plan, device, stream));
  return "linear_cross_entropy_loss: no such dtype of logits";
}

std::string linear_cross_entropy_gradient(Dtype dtype, Dtype narrow, const ChunkRows& rows,
                                          const ChunkResults& results,
                                          const ChunkUpstream& upstream,
                                          const ChunkGradient& gradient, const LossPlan& plan,
                                          int device, void* stream) {
  const auto as = [&](auto kernels_run) {
    return kernels_run("linear_cross_entropy_gradient", rows, results, upstream, gradient, plan,
                       device, stream);
  };
  FASTLM_FLOAT64(if (dtype == Dtype::kFloat64 && narrow == dtype) return as(run<double, double>));
  if (dtype == Dtype::kFloat32) {
    switch (narrow) {
      case Dtype::kFloat32: return as(run<float, float>);
      case Dtype::kBfloat16: return as(run<float, __nv_bfloat16>);
      case Dtype::kFloat16: return as(run<float, __half>);
      case Dtype::kFloat64: break;
    }
  }
  return "linear_cross_entropy_gradient: no such pair of dtypes";
}

std::string linear_cross_entropy_bias(Dtype dtype, const ChunkRows& rows,
                                      const ChunkResults& results, const ChunkUpstream& upstream,
                                      void* dbias, const LossPlan& plan, int device,
                                      void* stream) {
  if (dtype == Dtype::kFloat32)
    return bias<float>(rows, results, upstream, dbias, plan, device, stream);
  FASTLM_FLOAT64(if (dtype == Dtype::kFloat64)
                     return bias<double>(rows, results, upstream, dbias, plan, device, stream));
  return "linear_cross_entropy_bias: no such dtype of logits";
}

}  // namespace fastlm
