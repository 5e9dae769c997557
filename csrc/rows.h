// Rows of a tensor, however its leading dimensions lie.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastlm {

// Row r begins at (r / inner) * stride_outer + (r % inner) * stride_inner, in elements.
struct Rows {
  const void* elements;  // null: there is no such tensor
  Dtype dtype;
  int64_t stride_outer, stride_inner, stride_col;
};

}  // namespace fastlm
