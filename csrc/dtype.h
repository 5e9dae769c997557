// Dtypes by number, as Python hands them over.
#pragma once

namespace fastlm {

enum class Dtype : int { kFloat32, kBfloat16, kFloat16, kFloat64 };

}  // namespace fastlm
