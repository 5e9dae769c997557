// What the launchers of attention share: which kernels a call runs on, and how blocks are cut.
#pragma once

#include <string>

#include "attention_forward.cuh"
#include "launch.h"

namespace fastlm {

// How a warp holds scores and sums, and how many rows stream past at a time.
template <typename Tiles_, int kTile_>
struct Path {
  using Tiles = Tiles_;
  static constexpr int kTile = kTile_;
};

inline bool is_narrow(Dtype dtype) {
  return dtype == Dtype::kFloat16 || dtype == Dtype::kBfloat16;
}

// These call `run` with the path of a step.  Sums of more columns than a path has are divided among
// blocks.
template <typename Run>
auto on_scalars([[maybe_unused]] Dtype dtype, Run run) {
  FASTLM_FLOAT64(if (dtype == Dtype::kFloat64) return run(Path<ScalarTiles<double, 2>, 32>()));
  return run(Path<ScalarTiles<float, 4>, 32>());
}
template <typename Run>
auto on_forward_path(Dtype dtype, int value_dim, Run run) {
  if (!is_narrow(dtype)) return on_scalars(dtype, run);
  return value_dim <= 64 ? run(Path<TensorTiles<64, 2>, 64>())
                         : run(Path<TensorTiles<128, 1>, 64>());
}
template <typename Run>
auto on_dkdv_path(Dtype dtype, int head_dim, int value_dim, Run run) {
  if (!is_narrow(dtype)) return on_scalars(dtype, run);
  return head_dim <= 64 && value_dim <= 64 ? run(Path<TensorTiles<64, 1>, 32>())
                                           : run(Path<TensorTiles<128, 1>, 32>());
}
template <typename Run>
auto on_dq_path(Dtype dtype, int head_dim, Run run) {
  if (!is_narrow(dtype)) return on_scalars(dtype, run);
  return head_dim <= 64 ? run(Path<TensorTiles<64, 2>, 32>())
                        : run(Path<TensorTiles<128, 1>, 32>());
}

template <typename P>
using ForwardMemoryOf = ForwardMemory<typename P::Tiles, P::kTile>;

// As many warps as the plan allows, halved until they fit, and of streamed rows two stages where
// they fit beside them; no warps if nothing does.
struct Cut {
  int warps, stages, bytes;
};

template <typename Bytes>
Cut cut_within(const AttentionPlan& plan, int most_stages, Bytes bytes) {
  for (int warps = plan.most_warps; warps > 0; warps /= 2)
    for (int stages = most_stages; stages > 0; --stages)
      if (bytes(warps, stages) <= plan.shared_limit) return {warps, stages, bytes(warps, stages)};
  return {0, 0, 0};
}

inline int parts_of(int columns, int width) { return (columns + width - 1) / width; }

inline std::string does_not_fit(const char* kernel, const AttentionPlan& plan) {
  return std::string(kernel) + " does not fit " + std::to_string(plan.shared_limit) +
         " bytes of shared memory";
}

}  // namespace fastlm
