// Rows of weights added up in registers for the inputs that are not zero: the inner part of sparse convolutions.
#pragma once

#include <type_traits>

#include "level.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

// Vectors of one register; registers hold 8 WIDE sums beside what is added to them.
#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 2;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDE = 1;
#else
constexpr int LANES = 4, WIDE = 1;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec get(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void put(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// One instruction each where the processor has it: GCC makes several of __builtin_convertvector.
inline Words widen(Halves x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}
inline Halves narrow(Words x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#else
  return __builtin_convertvector(x, Halves);
#endif
}
inline Words get_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Words);
#endif
}
inline void put_bytes(uint8_t* p, Words x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#else
  const Bytes bytes = __builtin_convertvector(x, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
#endif
}

inline Vec get_floats(const float* p) { return get(p); }
inline void put_floats(float* p, Vec v) { put(p, v); }
inline Vec get_floats(const bfloat16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<Vec>(widen(bits) << 16);
}
// Rounds as `store`.
inline void put_floats(bfloat16* p, Vec v) {
  const Words bits = reinterpret_cast<Words>(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words unordered = reinterpret_cast<Words>(v != v);
  const Halves half = narrow((rounded & ~unordered) | (0x7fc0u & unordered));
  std::memcpy(p, &half, sizeof half);
}

// An integer that is part of a type.
template <int N>
using Constant = std::integral_constant<int, N>;

// Runs body(vectors, first channel) over all channels: four vectors of them at a time, then one; then single channels
// (0 vectors).
template <class Body>
inline void by_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES) body(Constant<4>{}, c);
  for (; c + LANES <= channels; c += LANES) body(Constant<1>{}, c);
  for (; c < channels; c++) body(Constant<0>{}, c);
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// An image is laid out by columns, so that what a column of the filter sees lies side by side: [column, row, channel]
// values with the padding's zeros, and one bit each. The bits of one column and filter window are cut into groups of
// at most 64, whose weights for a block of output channels stay in the first cache.

struct Window {
  int64_t in, out, kernel_height, kernel_width, stride, out_h, out_w;
};

struct Plan {
  int64_t C, rows, columns, bits, groups, group, block, blocks;
};

inline Plan plan_gather(const Window& w, int64_t block) {
  Plan p;
  p.C = round_up(w.in, 8);
  p.rows = (w.out_h - 1) * w.stride + w.kernel_height;
  p.columns = (w.out_w - 1) * w.stride + w.kernel_width;
  p.bits = w.kernel_height * p.C;
  p.groups = (p.bits + 63) / 64;
  p.group = round_up((p.bits + p.groups - 1) / p.groups, 8);
  p.block = block;
  p.blocks = (w.out + block - 1) / block;
  return p;
}

// Columns of a filter that are added to neighbouring outputs at once (1: every output for itself), and the vectors of a
// block of output channels: as many as the registers hold sums of, so that additions need not wait for one another.
// Calls run(columns, vectors) with integral constants.
template <class Run>
inline auto by_shape(const Window& w, const Run& run) {
  const auto by_width = [&](auto columns) {
    constexpr int most = LANES == 16 ? (decltype(columns)::value == 1 ? 4 : 2) : (decltype(columns)::value == 1 ? 8 : 4);
    if (w.out <= LANES) return run(columns, Constant<1>{});
    if constexpr (LANES < 16) {
      if (w.out <= 2 * LANES) return run(columns, Constant<2>{});
      if (w.out < most * LANES) return run(columns, Constant<4>{});
    }
    return run(columns, Constant<most>{});
  };
  if (w.stride == 1 && w.kernel_width == 2) return by_width(Constant<2>{});
  if (w.stride == 1 && w.kernel_width == 3) return by_width(Constant<3>{});
  return by_width(Constant<1>{});
}

inline int64_t packed_floats(const Window& w, const Plan& p) {
  return p.blocks * p.groups * p.group * w.kernel_width * p.block;
}

// Weights as [block, group, (kernel column) bit (kernel column), channel of the block], columns inside where they slide.
// weight(o, c, ky, kx) reads one.
template <int COLS, class Weight>
void pack_gather(const Window& w, const Plan& p, const Weight& weight, float* packed) {
  const int64_t KW = w.kernel_width;
  std::memset(packed, 0, packed_floats(w, p) * 4);
  for (int64_t o = 0; o < w.out; o++)
    for (int64_t ky = 0; ky < w.kernel_height; ky++)
      for (int64_t c = 0; c < w.in; c++)
        for (int64_t kx = 0; kx < KW; kx++) {
          const int64_t bit = ky * p.C + c, g = bit / p.group, b = bit % p.group;
          const int64_t row = COLS > 1 ? b * KW + (KW - 1 - kx) : kx * p.group + b;
          packed[((o / p.block * p.groups + g) * p.group * KW + row) * p.block + o % p.block] = weight(o, c, ky, kx);
        }
}

// The bits that belong to a group.
inline uint64_t group_mask(const Plan& p, int64_t g) {
  const int64_t width = smaller(p.group, p.bits - g * p.group);
  return width == 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
}

// One row of outputs, of one block and group: out[x] (+)= sum over columns and bits of value x weights. Of `Ones` the
// values are not read.
struct Ones {};
template <int COLS, int NV, class Value>
void gather_row(const Window& a, const Plan& p, const uint8_t* bits, const Value* values, const float* weight,
                uint64_t mask, bool first, float* out, int64_t out_step) {
  constexpr int ROW = COLS * NV * LANES;
  const int64_t step = p.rows * p.C;
  const auto gather = [&](int64_t column, const float* w, Vec* sum) {
    uint64_t word;
    std::memcpy(&word, bits + column * step / 8, 8);
    for (word &= mask; word != 0; word &= word - 1) {
      const int64_t b = __builtin_ctzll(word);
      const float* row = w + b * ROW;
      if constexpr (std::is_same_v<Value, Ones>) {
        for (int j = 0; j < COLS * NV; j++) sum[j] += get(row + j * LANES);
      } else {
        const float v = values[column * step + b];
        for (int j = 0; j < COLS * NV; j++) sum[j] += v * get(row + j * LANES);
      }
    }
  };
  if constexpr (COLS == 1) {
    for (int64_t x = 0; x < a.out_w; x++) {
      Vec sum[NV];
      for (int j = 0; j < NV; j++) sum[j] = first ? Vec{} : get(out + x * out_step + j * LANES);
      for (int64_t kx = 0; kx < a.kernel_width; kx++) gather(x * a.stride + kx, weight + kx * p.group * ROW, sum);
      for (int j = 0; j < NV; j++) put(out + x * out_step + j * LANES, sum[j]);
    }
    return;
  }
  // A column belongs to COLS outputs: sum[q] is that of output x - COLS + 1 + q.
  Vec sum[COLS * NV] = {};
  for (int64_t x = 0; x < p.columns; x++) {
    if (!first && x < a.out_w)
      for (int j = 0; j < NV; j++) sum[(COLS - 1) * NV + j] = get(out + x * out_step + j * LANES);
    gather(x, weight, sum);
    if (x >= COLS - 1)
      for (int j = 0; j < NV; j++) put(out + (x - COLS + 1) * out_step + j * LANES, sum[j]);
    for (int j = 0; j < (COLS - 1) * NV; j++) sum[j] = sum[j + NV];
    for (int j = (COLS - 1) * NV; j < COLS * NV; j++) sum[j] = Vec{};
  }
}

}  // namespace
}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
