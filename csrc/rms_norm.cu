#include "rms_norm.cuh"

#include "launch.h"

namespace fastlm {
namespace {

// Blocks for a number of teams.
int64_t blocks_for(int64_t teams, const NormPlan& plan) {
  const int64_t of_block = plan.threads / plan.team;
  return (teams + of_block - 1) / of_block;
}

template <typename A>
std::string forward(const NormInputs& inputs, const NormResults& results, const NormPlan& plan,
                    int device, void* stream) {
  const Launch how{"rms_norm_forward", blocks_for(inputs.rows, plan), 1, plan.threads, 0, device,
                   stream};
  return launch(how, rms_norm_forward_kernel<A>, inputs, results, plan.team);
}

template <typename A>
std::string backward(const NormInputs& inputs, const NormUpstream& upstream,
                     const NormGradients& gradients, const NormPlan& plan, int device,
                     void* stream) {
  const int64_t teams = (inputs.rows + plan.rows_per_team - 1) / plan.rows_per_team;
  // sums of wider rows are added up where they will lie
  const int64_t bytes = plan.threads / plan.team * inputs.size * int64_t(sizeof(A));
  const bool has_room = gradients.partial && bytes <= kUsualShared - int64_t(sizeof(A)) * kMostWarps;
  const Launch how{"rms_norm_backward", blocks_for(teams, plan), 1, plan.threads,
                   has_room ? int(bytes) : 0, device, stream};
  return launch(how, rms_norm_backward_kernel<A>, inputs, upstream, gradients, plan, has_room);
}

}  // namespace

std::string rms_norm_forward(const NormInputs& inputs, const NormResults& results,
                             const NormPlan& plan, int device, void* stream) {
  if (!is_served(results.dtype)) return "rms_norm_forward: no such dtype";
  FASTLM_FLOAT64(if (results.dtype == Dtype::kFloat64)
                     return forward<double>(inputs, results, plan, device, stream));
  return forward<float>(inputs, results, plan, device, stream);
}

std::string rms_norm_backward(const NormInputs& inputs, const NormUpstream& upstream,
                              const NormGradients& gradients, const NormPlan& plan, int device,
                              void* stream) {
  if (!is_served(inputs.vectors.dtype)) return "rms_norm_backward: no such dtype";
  FASTLM_FLOAT64(if (inputs.vectors.dtype == Dtype::kFloat64)
                     return backward<double>(inputs, upstream, gradients, plan, device, stream));
  return backward<float>(inputs, upstream, gradients, plan, device, stream);
}

}  // namespace fastlm
