// Dtypes by number, as Python hands them over.
#pragma once

namespace fastlm {

enum class Dtype : int { kFloat32, kBfloat16, kFloat16, kFloat64 };

// float64 is for tests of derivatives: a build leaves it out, a quarter of all code, unless told.
#ifdef FASTLM_WITH_FLOAT64
#define FASTLM_FLOAT64(...) __VA_ARGS__
inline bool is_served(Dtype) { return true; }
#else
#define FASTLM_FLOAT64(...)
inline bool is_served(Dtype dtype) { return dtype != Dtype::kFloat64; }
#endif

}  // namespace fastlm
