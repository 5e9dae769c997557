// Functions of numbers that kernels share, in float32 and float64.
#pragma once

#include <math.h>

#include "device.cuh"

namespace fastlm {

template <typename A>
constexpr A kInfinity = static_cast<A>(INFINITY);

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }  // drops NaN
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// In float32 two instructions, off by 2 ulp and by the rounding of x log2(e).
__device__ inline float exponential(float x) { return __expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

__device__ inline float error_function(float x) { return erff(x); }
__device__ inline double error_function(double x) { return erf(x); }

__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

// a * b, rounded.  A compiler contracts a product and a sum to one rounding, and then x - max(x) is
// not zero where x is the maximum.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }

}  // namespace fastlm
