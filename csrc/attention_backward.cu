#include "attention_backward.cuh"

#include "attention_paths.cuh"

namespace fastlm {
namespace {

template <typename P>
using BackwardMemoryOf = BackwardMemory<typename P::Tiles, P::kTile>;

}  // namespace

bool attention_fits(AttentionStep step, Dtype dtype, int head_dim, int value_dim,
                    int shared_limit) {
  if (!is_served(dtype)) return false;
  switch (step) {
    case AttentionStep::kForward:
      return on_forward_path(dtype, value_dim, [&](auto path) {
        return ForwardMemoryOf<decltype(path)>(head_dim, value_dim).bytes(1) <= shared_limit;
      });
    case AttentionStep::kDkDv:
      return on_dkdv_path(dtype, head_dim, value_dim, [&](auto path) {
        const BackwardMemoryOf<decltype(path)> memory(head_dim, value_dim, true);
        return memory.bytes(1, 1) <= shared_limit;
      });
    case AttentionStep::kDq:
      return on_dq_path(dtype, head_dim, [&](auto path) {
        const BackwardMemoryOf<decltype(path)> memory(head_dim, value_dim, false);
        return memory.bytes(1, 1) <= shared_limit;
      });
  }
  return false;
}

std::string attention_delta(Dtype dtype, const AttentionInputs& in,
                            const AttentionUpstream& upstream, const void* out, const void* dlse,
                            void* delta, int device, void* stream) {
  constexpr int kWarps = kDeltaThreads / kWarpSize;
  const int64_t queries = in.batch * in.heads * in.num_queries;
  const Launch how{"attention_delta", (queries + kWarps - 1) / kWarps, 1, kDeltaThreads, 0,
                   device, stream};
  return launch(how, attention_delta_kernel, in, upstream, out, dlse, delta, dtype);
}

std::string attention_dkdv(Dtype dtype, const AttentionInputs& in,
                           const AttentionUpstream& upstream, void* dkey, void* dvalue,
                           const AttentionPlan& plan, int device, void* stream) {
  if (!is_served(dtype)) return "attention_dkdv: no such dtype";
  return on_dkdv_path(dtype, in.head_dim, in.value_dim, [&](auto path) {
    using P = decltype(path);
    using Tiles = typename P::Tiles;
    const BackwardMemoryOf<P> memory(in.head_dim, in.value_dim, true);
    const Cut cut = cut_within(
        plan, 2, [&](int warps, int stages) { return memory.bytes(warps, stages); });
    if (!cut.warps) return does_not_fit("attention_dkdv", plan);
    const int64_t blocks = key_blocks(in, cut.warps * Tiles::kWarpRows);
    const int widest = in.head_dim > in.value_dim ? in.head_dim : in.value_dim;
    const Launch how{"attention_dkdv", blocks * in.batch * (in.heads / in.group_size),
                     parts_of(widest, Tiles::kWidth), cut.warps * kWarpSize, cut.bytes, device,
                     stream};
    return launch(how, attention_dkdv_kernel<Tiles, P::kTile>, in, upstream, dkey, dvalue,
                  cut.stages, dtype == Dtype::kFloat16);
  });
}

std::string attention_dq(Dtype dtype, const AttentionInputs& in,
                         const AttentionUpstream& upstream, void* dquery,
                         const AttentionPlan& plan, int device, void* stream) {
  if (!is_served(dtype)) return "attention_dq: no such dtype";
  return on_dq_path(dtype, in.head_dim, [&](auto path) {
    using P = decltype(path);
    using Tiles = typename P::Tiles;
    const BackwardMemoryOf<P> memory(in.head_dim, in.value_dim, false);
    const Cut cut = cut_within(
        plan, 2, [&](int warps, int stages) { return memory.bytes(warps, stages); });
    if (!cut.warps) return does_not_fit("attention_dq", plan);
    const int64_t blocks = query_blocks(in, cut.warps * Tiles::kWarpRows);
    const Launch how{"attention_dq", blocks * in.batch * in.heads,
                     parts_of(in.head_dim, Tiles::kWidth), cut.warps * kWarpSize, cut.bytes,
                     device, stream};
    return launch(how, attention_dq_kernel<Tiles, P::kTile>, in, upstream, dquery, cut.stages,
                  dtype == Dtype::kFloat16);
  });
}

}  // namespace fastlm
