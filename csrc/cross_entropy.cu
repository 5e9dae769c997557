#include "cross_entropy.cuh"

#include "launch.h"

namespace fastlm {
namespace {

template <typename T>
std::string forward(const LossRows& rows, const LossResults& results, const LossPlan& plan,
                    int device, void* stream) {
  const Launch how{"cross_entropy_forward", rows.rows, 1, plan.threads, 0, device, stream};
  return launch(how, cross_entropy_forward_kernel<T>, rows, results);
}

template <typename T>
std::string backward(const LossRows& rows, const LossUpstream& upstream, void* dlogits,
                     const LossPlan& plan, int device, void* stream) {
  const Launch how{"cross_entropy_backward", rows.rows, plan.blocks_per_row, plan.threads, 0,
                   device, stream};
  return launch(how, cross_entropy_backward_kernel<T>, rows, upstream, static_cast<T*>(dlogits));
}

}  // namespace

std::string cross_entropy_forward(Dtype dtype, const LossRows& rows, const LossResults& results,
                                  const LossPlan& plan, int device, void* stream) {
  switch (dtype) {
    case Dtype::kFloat32: return forward<float>(rows, results, plan, device, stream);
    case Dtype::kBfloat16: return forward<__nv_bfloat16>(rows, results, plan, device, stream);
    case Dtype::kFloat16: return forward<__half>(rows, results, plan, device, stream);
    case Dtype::kFloat64:
      FASTLM_FLOAT64(return forward<double>(rows, results, plan, device, stream));
      break;
  }
  return "cross_entropy_forward: no such dtype";
}

std::string cross_entropy_backward(Dtype dtype, const LossRows& rows, const LossUpstream& upstream,
                                   void* dlogits, const LossPlan& plan, int device, void* stream) {
  switch (dtype) {
    case Dtype::kFloat32:
      return backward<float>(rows, upstream, dlogits, plan, device, stream);
    case Dtype::kBfloat16:
      return backward<__nv_bfloat16>(rows, upstream, dlogits, plan, device, stream);
    case Dtype::kFloat16:
      return backward<__half>(rows, upstream, dlogits, plan, device, stream);
    case Dtype::kFloat64:
      FASTLM_FLOAT64(return backward<double>(rows, upstream, dlogits, plan, device, stream));
      break;
  }
  return "cross_entropy_backward: no such dtype";
}

}  // namespace fastlm
