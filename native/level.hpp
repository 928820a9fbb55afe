// What every kernel file shares. Each is compiled once per instruction level; nothing here may be shared between levels
// (no inline functions of the standard library that a linker could merge), hence the unnamed namespace and malloc.
#pragma once

#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

// For what runs once an element: a call that is left in such a loop keeps it from vectorising.
#define ALWAYS_INLINE __attribute__((always_inline))

namespace spikeloom {
namespace SPIKELOOM_LEVEL {
namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const bfloat16* p, int64_t i) {
  const uint32_t bits = static_cast<uint32_t>(p[i].bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void store(float* p, int64_t i, float value) { p[i] = value; }
inline void store(bfloat16* p, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // Round to nearest, ties to even; a NaN stays one.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p[i].bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

ALWAYS_INLINE inline float absolute(float x) { return __builtin_fabsf(x); }

// a b + c, rounded once where the processor can.
ALWAYS_INLINE inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(-x) for x >= 0, to 2 units in the last place; written out so that it vectorises.
ALWAYS_INLINE inline float exp_negative(float x) {
  x = x > 87.f ? 87.f : x;
  const int32_t whole = static_cast<int32_t>(fused(x, 1.44269504f, 0.5f));
  const float n = static_cast<float>(whole);
  const float r = fused(n, -2.12194440e-4f, fused(n, 0.693359375f, -x));
  float poly = 1.9875691500e-4f;
  poly = fused(poly, r, 1.3981999507e-3f);
  poly = fused(poly, r, 8.3334519073e-3f);
  poly = fused(poly, r, 4.1665795894e-2f);
  poly = fused(poly, r, 1.6666665459e-1f);
  poly = fused(poly, r, 5.0000001201e-1f);
  poly = fused(poly * r, r, r) + 1.f;
  const int32_t bits = (127 - whole) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return poly * scale;
}

template <Surrogate kind>
ALWAYS_INLINE inline float derivative(float u, float p, float q) {
  if constexpr (kind == Surrogate::rational) {
    const float w = q * u;
    return p / fused(w, w, 1.f);
  } else if constexpr (kind == Surrogate::rectangle) {
    return absolute(u) < q ? p : 0.f;
  } else if constexpr (kind == Surrogate::triangle) {
    const float y = p - q * absolute(u);
    return y > 0.f ? y : 0.f;
  } else if constexpr (kind == Surrogate::fast_sigmoid) {
    const float w = fused(q, absolute(u), 1.f);
    return p / (w * w);
  } else {
    const float e = exp_negative(q * absolute(u)), w = 1.f + e;
    return p * e / (w * w);
  }
}

// sigmoid(x).
ALWAYS_INLINE inline float logistic(float x) {
  const float e = exp_negative(absolute(x)), small = e / (1.f + e);
  return x < 0.f ? small : 1.f - small;
}

// tanh(x), from its series near 0 where the quotient cancels.
ALWAYS_INLINE inline float hyperbolic(float x) {
  const float a = absolute(x), e = exp_negative(2.f * a), square = a * a;
  const float far = (1.f - e) / (1.f + e);
  const float near = a * (1.f - square * (1.f / 3.f - square * (2.f / 15.f - square * (17.f / 315.f))));
  const float y = a < 0.15f ? near : far;
  return x < 0.f ? -y : y;
}

// A uniform number in (0, 1) of its own for every (seed, index): two rounds of Murmur's finaliser.
ALWAYS_INLINE inline float uniform(uint32_t seed, uint32_t index) {
  uint32_t h = index * 0x9e3779b9u ^ seed;
  h ^= h >> 16, h *= 0x85ebca6bu, h ^= h >> 13, h *= 0xc2b2ae35u, h ^= h >> 16;
  h += seed;
  h ^= h >> 16, h *= 0x85ebca6bu, h ^= h >> 13, h *= 0xc2b2ae35u, h ^= h >> 16;
  return static_cast<float>(static_cast<int32_t>(h >> 8)) * 5.9604645e-8f + 2.9802322e-8f;
}

// A row of derivatives of a surrogate chosen at run time (not Surrogate::slope).
inline void derivative_row(Surrogate kind, int64_t n, const float* u, float p, float q, float* out) {
  const auto run = [=](auto derive) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = derive(u[i]);
  };
  switch (kind) {
    case Surrogate::rational: return run([=](float x) { return derivative<Surrogate::rational>(x, p, q); });
    case Surrogate::rectangle: return run([=](float x) { return derivative<Surrogate::rectangle>(x, p, q); });
    case Surrogate::triangle: return run([=](float x) { return derivative<Surrogate::triangle>(x, p, q); });
    case Surrogate::fast_sigmoid: return run([=](float x) { return derivative<Surrogate::fast_sigmoid>(x, p, q); });
    default: return run([=](float x) { return derivative<Surrogate::sigmoid>(x, p, q); });
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows that are worked on soon. A block of T steps is T rows far apart in each tensor: more places than a processor follows
// by itself, so every row would begin with waiting.
template <class T>
class Soon {
 public:
  void read(const T* row) { rows_[count_++] = row; }
  void write(const T* row) { rows_[count_++] = row; }

  // Asks for `count` elements of all rows from the i-th on. Memory behind the rows may be asked for: it is not touched.
  ALWAYS_INLINE void ask(int64_t i, int64_t count) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (int r = 0; r < count_; r++)
      for (int64_t k = i; k < i + count; k += line) __builtin_prefetch(rows_[r] + k);
  }

 private:
  static constexpr int MOST = 6;
  const T* rows_[MOST];
  int count_ = 0;
};

// Asks for the part-th of `parts` of memory that is wanted soon, while there is something else to compute; into the first
// cache, or the second.
template <bool first_cache = true, class T>
inline void ahead(const T* from, int64_t count, int64_t part, int64_t parts) {
  const int64_t last = count * (part + 1) / parts;
  for (int64_t i = count * part / parts; i < last; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, first_cache ? 3 : 2);
  // Else GCC takes a function that only prefetches for one without effect, and leaves its calls out.
  __asm__ volatile("");
}

// Runs step(i) over [0, n), and asks for a piece of the rows of `soon` before each piece of as many elements: all at once,
// requests would wait for one another, and the core for them.
template <int PIECE = 32, class T, class Body>
ALWAYS_INLINE inline void in_pieces(int64_t n, const Soon<T>& soon, const Body& body) {
  int64_t i = 0;
  for (; i + PIECE <= n; i += PIECE) {
    soon.ask(i, PIECE);
    body(i, i + PIECE);
  }
  soon.ask(i, n - i);
  body(i, n);
}
template <class T, class Step>
ALWAYS_INLINE inline void each_in_pieces(int64_t n, const Soon<T>& soon, const Step& step) {
  in_pieces(n, soon, [=](int64_t first, int64_t last) ALWAYS_INLINE {
#pragma omp simd
    for (int64_t i = first; i < last; i++) step(i);
  });
}

// Whether caches would have lost the beginning of a tensor before anybody reads it again.
template <class T>
inline bool large(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T)) >= 4 << 20;
}

// Writes a row of such a tensor past the caches, without reading what it overwrites; `streamed` makes it seen by others.
// Whole lines only: parts of them would wait for one another.
template <class T>
inline void stream(T* to, const T* from, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  constexpr int64_t LINE = 64, count = LINE / sizeof(T);
  i = smaller(n, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % LINE / sizeof(T)));
  std::memcpy(to, from, i * sizeof(T));
  for (; i + count <= n; i += count) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    const __m256i* half = reinterpret_cast<const __m256i*>(from + i);
    const __m256i low = _mm256_loadu_si256(half), high = _mm256_loadu_si256(half + 1);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i) + 1, high);
#endif
  }
#endif
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
}

inline void streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Rows from the one that is worked on to the one that is asked for: far enough to have come by then, and few enough to
// stay in cache until then.
inline int64_t rows_ahead(int64_t steps) { return steps < 8 ? steps : 8; }

// While it lives, numbers below the normal ones become 0: a gradient that has decayed that far is nothing, but would cost
// a hundred cycles an operation.
class NoSubnormals {
 public:
#if defined(__SSE__)
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | FLUSH_RESULTS | TAKE_AS_ZERO); }
  ~NoSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned FLUSH_RESULTS = 0x8000, TAKE_AS_ZERO = 0x40;
  const unsigned before_;
#else
  NoSubnormals() {}
  ~NoSubnormals() {}
#endif
};

// Elements of a block: `bytes` of scratch memory per element and core, in whole cache lines.
int64_t block_size(int64_t bytes_per_element, int64_t budget, int64_t most) {
  const int64_t n = budget / bytes_per_element / 64 * 64;
  return n < 64 ? 64 : smaller(n, most);
}

// The largest block of at most `most` elements, whole cache lines, of which as many make up `size` as 2 or 4 cores share
// evenly.
inline int64_t even_block(int64_t size, int64_t most) {
  const int64_t blocks = (size + most - 1) / most, even = (blocks + 3) / 4 * 4;
  return blocks < 3 ? most : smaller(most, (size + 32 * even - 1) / (32 * even) * 32);
}

// Runs body(first, count, scratch) over blocks of [0, size), one scratch buffer a thread. Returns 0, or -1 without memory.
template <class Body>
int for_blocks(int64_t size, int64_t block, int64_t scratch_bytes, int threads, bool small, const Body& body) {
  int failed = 0;
  const int64_t blocks = (size + block - 1) / block;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (!small && blocks > 1)
#endif
  {
    void* scratch = std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64);
    if (scratch == nullptr) {
#ifdef _OPENMP
#pragma omp atomic write
#endif
      failed = -1;
    }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t b = 0; b < blocks; b++) {
      if (scratch != nullptr) body(b * block, smaller(block, size - b * block), static_cast<float*>(scratch));
    }
    std::free(scratch);
  }
  return failed;
}

// Groups of blocks, to share among cores: at most 64, and of at least 8 blocks (but two groups) where a group has rows
// of its own to prepare.
inline int64_t groups_of(int64_t blocks, bool prepared) {
  const int64_t groups = smaller(prepared ? blocks / 8 : blocks, 64);
  return groups < 2 ? smaller(blocks, 2) : groups;
}

// Runs body(group, first block, last block, scratch) over groups of blocks.
template <class Body>
int for_groups(int64_t blocks, int64_t groups, int64_t scratch_bytes, int threads, bool small, const Body& body) {
  return for_blocks(groups, 1, scratch_bytes, threads, small, [&](int64_t group, int64_t, float* scratch) {
    body(group, blocks * group / groups, blocks * (group + 1) / groups, scratch);
  });
}

// Adds the groups' values to out, in order, of rows `stride` apart.
template <class Number>
inline void add_groups(const Number* partial, int64_t groups, int64_t stride, int64_t count, Number* out) {
  for (int64_t g = 0; g < groups; g++) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] += partial[g * stride + i];
  }
}

// --- channels ---------------------------------------------------------------------------------------------------------

// The largest block of at most `block` elements in which every channel has the same places as in the first: a multiple
// of channels x inner, or `block` itself where that does not fit.
inline int64_t whole_periods(const Channels& layout, int64_t block) {
  const int64_t period = layout.channels * layout.inner;
  return period <= block ? block / period * period : block;
}

inline bool repeats(const Channels& layout, int64_t block) { return block % (layout.channels * layout.inner) == 0; }

// Runs body(channel, first, last) over the runs of one channel in the elements [i0, i0 + n), counted from i0.
template <class Body>
inline void for_runs(const Channels& layout, int64_t i0, int64_t n, const Body& body) {
  int64_t place = i0 % layout.inner, channel = i0 / layout.inner % layout.channels;
  for (int64_t i = 0; i < n;) {
    const int64_t last = smaller(n, i + layout.inner - place);
    body(channel, i, last);
    i = last, place = 0;
    channel = channel + 1 == layout.channels ? 0 : channel + 1;
  }
}

// A value a channel, spread over the elements [i0, i0 + n).
inline void spread(const Channels& layout, int64_t i0, int64_t n, const float* values, float* row) {
  if (layout.inner == 1) {
    for (int64_t i = 0, c = i0 % layout.channels; i < n; c = 0) {
      const int64_t count = smaller(layout.channels - c, n - i);
      std::memcpy(row + i, values + c, count * 4);
      i += count;
    }
    return;
  }
  for_runs(layout, i0, n, [&](int64_t c, int64_t first, int64_t last) {
    const float value = values[c];
    for (int64_t i = first; i < last; i++) row[i] = value;
  });
}

// Adds a row of elements to a sum a channel, and clears the row.
inline void gather(const Channels& layout, int64_t i0, int64_t n, float* row, double* sums) {
  if (layout.inner == 1) {
    for (int64_t i = 0, c = i0 % layout.channels; i < n; c = 0) {
      const int64_t count = smaller(layout.channels - c, n - i);
#pragma omp simd
      for (int64_t j = 0; j < count; j++) sums[c + j] += row[i + j];
      i += count;
    }
  } else {
    for_runs(layout, i0, n, [&](int64_t c, int64_t first, int64_t last) {
      float total = 0.f;
#pragma omp simd reduction(+ : total)
      for (int64_t i = first; i < last; i++) total += row[i];
      sums[c] += total;
    });
  }
  std::memset(row, 0, n * 4);
}

constexpr int64_t SMALL = 1 << 14;  // elements below which waking the threads costs more than it gives

}  // namespace
}  // namespace SPIKELOOM_LEVEL
}  // namespace spikeloom
