#include "attention_paths.cuh"

namespace fastlm {

std::string attention_forward(Dtype dtype, const AttentionInputs& in,
                              const AttentionResults& results, const AttentionPlan& plan,
                              int device, void* stream) {
  if (!is_served(dtype)) return "attention_forward: no such dtype";
  return on_forward_path(dtype, in.value_dim, [&](auto path) {
    using P = decltype(path);
    using Tiles = typename P::Tiles;
    const ForwardMemoryOf<P> memory(in.head_dim, in.value_dim);
    const Cut cut = cut_within(plan, 1, [&](int warps, int) { return memory.bytes(warps); });
    if (!cut.warps) return does_not_fit("attention_forward", plan);
    const int64_t blocks = query_blocks(in, cut.warps * Tiles::kWarpRows);
    const Launch how{"attention_forward", blocks * in.batch * in.heads,
                     parts_of(in.value_dim, Tiles::kWidth), cut.warps * kWarpSize, cut.bytes,
                     device, stream};
    return launch(how, attention_forward_kernel<Tiles, P::kTile>, in, results,
                  dtype == Dtype::kFloat16);
  });
}

}  // namespace fastlm
