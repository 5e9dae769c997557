// PTX ISA, "Warp-level matrix instructions": ldmatrix, and the fragments of mma.m16n8k16.
//
// Compiled without sanitizers: it touches nothing but what lanes have brought.

#include "matrices.h"

#include <vector>

namespace shim {
namespace {

using Lanes = unsigned char* const (&)[kWarp];

void distribute(Lanes lanes, bool transposed) {
  uint16_t rows[kWarp][8];
  for (int lane = 0; lane < kWarp; ++lane) memcpy(rows[lane], lanes[lane], sizeof rows[lane]);
  for (int lane = 0; lane < kWarp; ++lane) {
    uint16_t parts[4][2];
    const int row = lane / 4, column = lane % 4 * 2;
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int i = 0; i < 2; ++i)
        parts[matrix][i] = transposed ? rows[8 * matrix + column + i][row]
                                      : rows[8 * matrix + row][column + i];
    memcpy(lanes[lane], parts, sizeof parts);
  }
}

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

float from_float16(uint16_t bits) {
  static const std::vector<float>& all = *[] {
    auto values = new std::vector<float>(1 << 16);
    for (uint32_t x = 0; x < values->size(); ++x) {
      __half_raw bits;
      bits.x = uint16_t(x);
      (*values)[x] = __half2float(bits);
    }
    return values;
  }();
  return all[bits];
}

template <float (*kWidened)(uint16_t)>
void multiply(Lanes lanes) {
  float a[16][16], b[16][8], c[16][8];
  Fragments fragments[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    Fragments& own = fragments[lane];
    memcpy(&own, lanes[lane], sizeof own);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i)
      a[i % 4 < 2 ? g : g + 8][t * 2 + i % 2 + (i < 4 ? 0 : 8)] =
          kWidened(uint16_t(own.a[i / 2] >> i % 2 * 16));
    for (int i = 0; i < 4; ++i)
      b[t * 2 + i % 2 + (i < 2 ? 0 : 8)][g] = kWidened(uint16_t(own.b[i / 2] >> i % 2 * 16));
    for (int i = 0; i < 4; ++i) c[i < 2 ? g : g + 8][t * 2 + i % 2] = own.c[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) fragments[lane].c[i] = c[i < 2 ? g : g + 8][t * 2 + i % 2];
    memcpy(lanes[lane], &fragments[lane], sizeof fragments[lane]);
  }
}

}  // namespace

void distribute_matrices(Lanes lanes) { distribute(lanes, false); }
void distribute_transposed(Lanes lanes) { distribute(lanes, true); }
void multiply_bfloat16(Lanes lanes) { multiply<from_bfloat16>(lanes); }
void multiply_float16(Lanes lanes) { multiply<from_float16>(lanes); }

}  // namespace shim
