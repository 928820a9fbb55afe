// Rows of weights added up in registers for the inputs that are not zero: the inner part of sparse convolutions.
#pragma once

#include "common/simd.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// What rows of weights are added up in: float32, or 16 bits where weights are integers. The vectors of one register,
// and their lanes.
template <class Weight>
struct Added {
  using Number = float;
  using Vector = Vec;
  static constexpr int LANES_OF = LANES;
  static Vector get(const Number* p) { return SPIKELOOM_LEVEL::get(p); }
  static void put(Number* p, Vector v) { SPIKELOOM_LEVEL::put(p, v); }
};
struct AddedShorts {
  using Number = int16_t;
  using Vector = Shorts;
  static constexpr int LANES_OF = SHORTS;
  static Vector get(const Number* p) { return get_shorts(p); }
  static void put(Number* p, Vector v) { put_shorts(p, v); }
};
template <>
struct Added<int16_t> : AddedShorts {};
template <>
struct Added<int8_t> : AddedShorts {};

// An image is laid out by columns, so that what a column of the filter sees lies side by side: [column, row, channel]
// values with the padding's zeros, and one bit each. The bits of one column and filter window are cut into groups of
// at most 64, whose weights for a block of output channels stay in the first cache.

struct Window {
  int64_t in, out, kernel_height, kernel_width, stride, out_h, out_w;
};

struct Plan {
  int64_t C, rows, columns, bits, groups, group, block, blocks;
};

// Bits of a group at most: of integers that are added up in 16 bits fewer where inputs may exceed one, so that a group
// does not exceed these.
inline int64_t most_bits(bool integers, bool binary) { return integers && !binary ? 32 : 64; }

inline Plan plan_gather(const Window& w, int64_t block, int64_t most = 64) {
  Plan p;
  p.C = round_up(w.in, 8);
  p.rows = (w.out_h - 1) * w.stride + w.kernel_height;
  p.columns = (w.out_w - 1) * w.stride + w.kernel_width;
  p.bits = w.kernel_height * p.C;
  p.groups = (p.bits + most - 1) / most;
  p.group = round_up((p.bits + p.groups - 1) / p.groups, 8);
  p.block = block;
  p.blocks = (w.out + block - 1) / block;
  return p;
}

// Columns of a filter that are added to neighbouring outputs at once (1: every output for itself), and the vectors of a
// block of output channels: as many as the registers hold sums of, so that additions need not wait for one another.
// Calls run(columns, vectors) with integral constants.
template <class Weight, class Run>
inline auto by_shape(const Window& w, const Run& run) {
  constexpr int lanes = Added<Weight>::LANES_OF;
  const auto by_width = [&](auto columns) {
    constexpr int most =
        LANES == 16 ? (decltype(columns)::value == 1 ? 4 : 2) : (decltype(columns)::value == 1 ? 8 : 4);
    if (w.out <= lanes) return run(columns, Constant<1>{});
    if constexpr (LANES < 16 || lanes > LANES) {
      if (w.out <= 2 * lanes) return run(columns, Constant<2>{});
    }
    if constexpr (LANES < 16) {
      if (w.out < most * lanes) return run(columns, Constant<4>{});
    }
    return run(columns, Constant<most>{});
  };
  if (w.stride == 1 && w.kernel_width == 3) return by_width(Constant<3>{});
  return by_width(Constant<1>{});
}

// Without the row of zeros behind them.
inline int64_t weight_floats(const Window& w, const Plan& p) {
  return p.blocks * p.groups * p.group * w.kernel_width * p.block;
}
inline int64_t packed_floats(const Window& w, const Plan& p) { return weight_floats(w, p) + w.kernel_width * p.block; }

// Weights as [block, group, (kernel column) bit (kernel column), channel of the block], columns inside where several
// are added at once, and a row of zeros. weight(o, c, ky, kx) reads one.
template <class Weight>
void pack_gather(const Window& w, const Plan& p, int columns, const Weight& weight, float* packed) {
  const int64_t KW = w.kernel_width;
  std::memset(packed, 0, packed_floats(w, p) * 4);
  const int64_t step = columns > 1 ? -p.block : p.group * p.block;  // from one kernel column to the next
  for (int64_t o = 0; o < w.out; o++) {
    float* const of_output = packed + o / p.block * p.groups * p.group * KW * p.block + o % p.block;
    for (int64_t ky = 0; ky < w.kernel_height; ky++) {
      int64_t g = ky * p.C / p.group, b = ky * p.C % p.group;
      for (int64_t c = 0; c < w.in; c++) {
        float* to = of_output + (g * p.group * KW + (columns > 1 ? b * KW + KW - 1 : b)) * p.block;
        for (int64_t kx = 0; kx < KW; kx++, to += step) *to = weight(o, c, ky, kx);
        if (++b == p.group) b = 0, g++;
      }
    }
  }
}

// The bits that belong to a group.
inline uint64_t group_mask(const Plan& p, int64_t g) {
  const int64_t width = smaller(p.group, p.bits - g * p.group);
  return width == 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
}

// sum[j] = add(sum[j], weights), of SUMS vectors side by side. Two vectors of bfloat16 are one of words, the first in
// the lower halves
// (`halve`): one load for both.
template <int SUMS, class Add>
ALWAYS_INLINE inline void add_row(Vec* sum, const float* row, const Add& add) {
  for (int j = 0; j < SUMS; j++) sum[j] = add(sum[j], get(row + j * LANES));
}
template <int SUMS, class Weight, class Add>
ALWAYS_INLINE inline void add_row(Shorts* sum, const Weight* row, const Add& add) {
  for (int j = 0; j < SUMS; j++) sum[j] = add(sum[j], get_shorts(row + j * SHORTS));
}
template <int SUMS, class Add>
ALWAYS_INLINE inline void add_row(Vec* sum, const bfloat16* row, const Add& add) {
  for (int j = 0; j + 1 < SUMS; j += 2) {
    Words both;
    std::memcpy(&both, row + j * LANES, sizeof both);
    sum[j] = add(sum[j], reinterpret_cast<Vec>(both << 16));
    sum[j + 1] = add(sum[j + 1], reinterpret_cast<Vec>(both & 0xffff0000u));
  }
  if (SUMS % 2 == 1) sum[SUMS - 1] = add(sum[SUMS - 1], get_floats(row + (SUMS - 1) * LANES));
}
// The same for an input with one of many values, or with ones.
template <int SUMS, class Weight>
ALWAYS_INLINE inline void add_scaled(Vec* sum, const Weight* row, float value) {
  add_row<SUMS>(sum, row, [value](Vec s, Vec w) ALWAYS_INLINE { return fused(Vec{} + value, w, s); });
}
template <int SUMS, class Weight>
ALWAYS_INLINE inline void add_scaled(Shorts* sum, const Weight* row, uint8_t value) {
  add_row<SUMS>(sum, row, [value](Shorts s, Shorts w) ALWAYS_INLINE { return s + w * static_cast<int16_t>(value); });
}
template <int SUMS, class Vector, class Weight>
ALWAYS_INLINE inline void add_weights(Vector* sum, const Weight* row) {
  add_row<SUMS>(sum, row, [](Vector s, Vector w) ALWAYS_INLINE { return s + w; });
}

// Packed weights in rows of `sums` vectors as bfloat16 of the same values, as `add_row` reads them.
inline void halve(const float* packed, int64_t floats, int sums, uint16_t* half) {
  for (int64_t i = 0; i < floats; i++) {
    uint32_t bits;
    std::memcpy(&bits, packed + i, 4);
    const int64_t j = i / LANES % sums, lane = i % LANES, pair = i - j % 2 * LANES - lane;
    const bool alone = sums % 2 == 1 && j == sums - 1;
    half[alone ? i : pair + 2 * lane + j % 2] = static_cast<uint16_t>(bits >> 16);
  }
}

// How far apart the bits, values and outputs of several rows are that are worked on at once, and a row of zeros.
template <class Weight>
struct Apart {
  int64_t bits = 0, values = 0, out = 0;
  const Weight* zeros = nullptr;
};

// One row of outputs (or ROWS of them), of one block and group: out[x] (+)= sum over columns and bits of value x
// weights. Of `Ones` the values are not read. Short lists of bits cost a wrongly guessed branch each: rows that are
// worked on together share it, and those with fewer bits add zeros meanwhile.
struct Ones {};
template <int COLS, int NV, int ROWS = 1, class Value, class Weight>
void gather_row(const Window& a, const Plan& p, const uint8_t* bits, const Value* values, const Weight* weight,
                uint64_t mask, bool first, typename Added<Weight>::Number* out, int64_t out_step,
                const Apart<Weight>& apart = {}) {
  using Sum = Added<Weight>;
  using Vector = typename Sum::Vector;
  constexpr int SUMS = COLS * NV, STEP = Sum::LANES_OF, ROW = SUMS * STEP;
  const int64_t step = p.rows * p.C;
  const auto gather = [&](int64_t column, const Weight* w, Vector(*sum)[SUMS]) ALWAYS_INLINE {
    uint64_t words[ROWS], any = 0;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      std::memcpy(&words[r], bits + r * apart.bits + column * step / 8, 8);
      any |= words[r] &= mask;
    }
    while (any != 0) {
      any = 0;
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const bool more = ROWS == 1 || words[r] != 0;
        const int64_t b = __builtin_ctzll(ROWS == 1 ? words[r] : words[r] | uint64_t{1} << 63);
        const Weight* row = more ? w + b * ROW : apart.zeros;
        any |= words[r] &= words[r] - 1;
        if constexpr (std::is_same_v<Value, Ones>) {
          add_weights<SUMS>(sum[r], row);
        } else {
          add_scaled<SUMS>(sum[r], row, values[r * apart.values + column * step + (more ? b : 0)]);
        }
      }
    }
  };
  Vector sum[ROWS][SUMS] = {};
  if constexpr (COLS == 1) {
    for (int64_t x = 0; x < a.out_w; x++) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < NV; j++)
          sum[r][j] = first ? Vector{} : Sum::get(out + r * apart.out + x * out_step + j * STEP);
      for (int64_t kx = 0; kx < a.kernel_width; kx++) gather(x * a.stride + kx, weight + kx * p.group * ROW, sum);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < NV; j++) Sum::put(out + r * apart.out + x * out_step + j * STEP, sum[r][j]);
    }
    return;
  }
  // A column belongs to COLS outputs: sum[q] is that of output x - COLS + 1 + q.
  for (int64_t x = 0; x < p.columns; x++) {
    if (!first && x < a.out_w) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < NV; j++)
          sum[r][(COLS - 1) * NV + j] = Sum::get(out + r * apart.out + x * out_step + j * STEP);
    }
    gather(x, weight, sum);
    if (x >= COLS - 1) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < NV; j++) Sum::put(out + r * apart.out + (x - COLS + 1) * out_step + j * STEP, sum[r][j]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      for (int j = 0; j < (COLS - 1) * NV; j++) sum[r][j] = sum[r][j + NV];
      for (int j = (COLS - 1) * NV; j < SUMS; j++) sum[r][j] = Vector{};
    }
  }
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
