#include "attention_with_kv_cache.cuh"
#include "kv_cache_append.cuh"

#include "launch.h"

namespace fastlm {
namespace {

template <typename A>
std::string append(Dtype dtype, const CachedRows& rows, const Given& key, const Given& value,
                   int device, void* stream) {
  const int64_t tokens = (rows.bounds ? int64_t(1) : rows.rows) * rows.num_tokens;
  const int64_t blocks = (tokens * rows.kv_heads + kAppendWarps - 1) / kAppendWarps;
  const Launch how{"append_to_kv_cache", blocks, rows.rows != 0, kAppendWarps * kWarpSize, 0,
                   device, stream};
  return launch(how, append_kernel<A>, rows, key, value, dtype);
}

template <typename T>
std::string attend(const CachedRows& rows, const Given& query, const CacheOptions& options,
                   const Attended& results, const CachePlan& plan, int device, void* stream) {
    const bool is_int8 = rows.keys.scales != nullptr;
  const auto layout = DecodeLayout::of<T>(is_int8, rows.keys.dim, rows.values.dim, plan);
  const Launch how{"attend_to_kv_cache", rows.kv_heads * ranks_of(rows, plan) * plan.splits,
                   rows.rows != 0,
                   plan.teams * kTeamThreads, layout.bytes, device, stream};
  const std::string error =
      launch(how, decode_kernel<T>, rows, query, options, results, plan, layout);
  if (!error.empty() || plan.splits == 1) return error;
  // no row that is put together has more queries
  int64_t queries = rows.num_tokens;
  if (rows.bounds && plan.row_slots) queries = plan.row_slots;
  const Launch combining{"combine_parts", int64_t(rows.rows) * rows.kv_heads * rows.group_size,
                         queries < USHRT_MAX ? queries : USHRT_MAX, kCombineThreads, 0, device,
                         stream};
  return launch(combining, combine_kernel<Acc<T>>, rows, results, plan, kDtype<T>);
}

}  // namespace

std::string append_to_kv_cache(Dtype dtype, const CachedRows& rows, const Given& key,
                               const Given& value, int device, void* stream) {
  if (!is_served(dtype)) return "append_to_kv_cache: no such dtype";
  FASTLM_FLOAT64(if (dtype == Dtype::kFloat64)
                     return append<double>(dtype, rows, key, value, device, stream));
  return append<float>(dtype, rows, key, value, device, stream);
}

std::string attend_to_kv_cache(Dtype dtype, const CachedRows& rows, const Given& query,
                               const CacheOptions& options, const Attended& results,
                               const CachePlan& plan, int device, void* stream) {
  switch (dtype) {
    case Dtype::kFloat32:
      return attend<float>(rows, query, options, results, plan, device, stream);
    case Dtype::kBfloat16:
      return attend<__nv_bfloat16>(rows, query, options, results, plan, device, stream);
    case Dtype::kFloat16:
      return attend<__half>(rows, query, options, results, plan, device, stream);
    case Dtype::kFloat64:
      FASTLM_FLOAT64(
          return attend<double>(rows, query, options, results, plan, device, stream));
      break;
  }
  return "attend_to_kv_cache: no such dtype";
}

}  // namespace fastlm
