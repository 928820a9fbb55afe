// Small matrix products, rows of c in registers.
#pragma once

#include "common/simd.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// c[i, :] (+)= sum_k a[k, i] b[k, :] for ROWS rows i (a_k and a_i apart) of NV vectors.
template <int ROWS, int NV, bool ADD>
inline void multiply(int64_t depth, const float* a, int64_t a_k, int64_t a_i, const float* b, int64_t b_k, float* c,
                     int64_t c_i) {
  Vec sum[ROWS][NV];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sum[i][j] = ADD ? get(c + i * c_i + j * LANES) : Vec{};
  for (int64_t k = 0; k < depth; k++) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) row[j] = get(b + k * b_k + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const float factor = a[k * a_k + i * a_i];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sum[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) put(c + i * c_i + j * LANES, sum[i][j]);
}

template <int N>
struct RowCount {
  static constexpr int count = N;
};

// The same for any number of rows and of whole vectors.
template <bool ADD>
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_k, int64_t a_i, const float* b,
             float* c) {
  constexpr int MANY = LANES == 16 ? 12 : 6;  // with two vectors each, what the registers hold
  for (int64_t j = 0; j < columns;) {
    const bool two = columns - j >= 2 * LANES;
    for (int64_t i = 0; i < rows;) {
      const auto run = [&](auto part) {
        constexpr int R = decltype(part)::count;
        if (two)
          multiply<R, 2, ADD>(depth, a + i * a_i, a_k, a_i, b + j, columns, c + i * columns + j, columns);
        else
          multiply<R, 1, ADD>(depth, a + i * a_i, a_k, a_i, b + j, columns, c + i * columns + j, columns);
        i += R;
      };
      const int64_t left = rows - i;
      if (left >= MANY && left != MANY + 2)
        run(RowCount<MANY>{});  // few rows at a time leave the processor waiting
      else if (left >= 4)
        run(RowCount<4>{});
      else if (left >= 2)
        run(RowCount<2>{});
      else
        run(RowCount<1>{});
    }
    j += two ? 2 * LANES : LANES;
  }
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
