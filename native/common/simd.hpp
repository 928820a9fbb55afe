// Vectors of one register. Kernels whose loops branch or mix types are written with them, instead of leaving it to the
// compiler to vectorise: it compiles ten times faster, and the code is the same on every compiler.
#pragma once

#include <type_traits>

#include "common/prefetch.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
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
#elif defined(__AVX2__)
  const __m256i words = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
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
#elif defined(__AVX2__)
  const __m128i halves = reinterpret_cast<__m128i>(narrow(x));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
#else
  const Bytes bytes = __builtin_convertvector(x, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
#endif
}

inline Vec get_floats(const float* p) { return get(p); }
inline void put_floats(float* p, Vec v) { put(p, v); }
inline Vec get_floats(const bfloat16* p) {
#if defined(__SSE2__) && !defined(__AVX__)
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm_unpacklo_epi16(_mm_setzero_si128(), half));
#else
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<Vec>(widen(bits) << 16);
#endif
}

// Integers of 16 bits, twice as many in a register as there are floats.
typedef int16_t Shorts __attribute__((vector_size(LANES * 4)));
constexpr int SHORTS = 2 * LANES;

inline Shorts get_shorts(const int16_t* p) {
  Shorts v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Shorts get_shorts(const int8_t* p) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Shorts>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Shorts>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t Chars __attribute__((vector_size(SHORTS)));
  Chars bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Shorts);
#endif
}
inline void put_shorts(int16_t* p, Shorts v) { std::memcpy(p, &v, sizeof v); }
inline Vec get_floats(const int16_t* p) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(words));
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(words));
#else
  typedef int16_t Half __attribute__((vector_size(LANES * 2)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Vec);
#endif
}
inline Vec get_floats(const int32_t* p) {
  typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
  Integers integers;
  std::memcpy(&integers, p, sizeof integers);
  return __builtin_convertvector(integers, Vec);
}

// Rounds as `store`.
inline void put_floats(bfloat16* p, Vec v) {
  const Words bits = reinterpret_cast<Words>(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#if defined(__AVX512F__)
  const __m512 value = reinterpret_cast<__m512>(v);
  const __mmask16 unordered = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_mov_epi32(reinterpret_cast<__m512i>(rounded), unordered, _mm512_set1_epi32(0x7fc0));
  const __m256i half = _mm512_cvtepi32_epi16(words);
#elif defined(__SSE2__) && !defined(__AVX__)
  // Packing saturates signed words: these are sign-extended, so that it keeps all sixteen bits.
  const __m128i words = _mm_srai_epi32(reinterpret_cast<__m128i>(rounded << 16), 16);
  const __m128i unordered = reinterpret_cast<__m128i>(v != v), quiet = _mm_set1_epi32(0x7fc0);
  const __m128i kept = _mm_or_si128(_mm_andnot_si128(unordered, words), _mm_and_si128(unordered, quiet));
  const __m128i half = _mm_packs_epi32(kept, kept);
#else
  const Words unordered = reinterpret_cast<Words>(v != v);
  const Halves half = narrow((rounded & ~unordered) | (0x7fc0u & unordered));
#endif
  std::memcpy(p, &half, LANES * sizeof *p);
}

// a b + c, rounded once where the processor can.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  const auto raw = [](Vec v) ALWAYS_INLINE { return reinterpret_cast<__m512>(v); };
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(raw(a), raw(b), raw(c)));
#elif defined(__FMA__)
  const auto raw = [](Vec v) ALWAYS_INLINE { return reinterpret_cast<__m256>(v); };
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(raw(a), raw(b), raw(c)));
#else
  return a * b + c;
#endif
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

inline Vec all(float value) { return value - Vec{}; }  // the compiler leaves the subtraction out

// Which lanes of a comparison hold.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
inline Mask at_least(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
}
inline Mask below(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_LT_OQ);
}
inline Vec select(Mask which, Vec yes, Vec no) {
  return reinterpret_cast<Vec>(
      _mm512_mask_blend_ps(which, reinterpret_cast<__m512>(no), reinterpret_cast<__m512>(yes)));
}
#else
typedef int32_t Mask __attribute__((vector_size(LANES * 4)));
inline Mask at_least(Vec a, Vec b) { return a >= b; }
inline Mask below(Vec a, Vec b) { return a < b; }
inline Vec select(Mask which, Vec yes, Vec no) { return which ? yes : no; }
#endif

inline Vec absolute(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Words>(x) & 0x7fffffffu); }

inline float sum_of(Vec v) {
  float sum = 0.f;
  for (int j = 0; j < LANES; j++) sum += v[j];
  return sum;
}

// Small integers, which bfloat16 holds without rounding.
inline void put_integers(float* p, Vec v) { put(p, v); }
inline void put_integers(bfloat16* p, Vec v) {
#if defined(__SSE2__) && !defined(__AVX__)
  const __m128i words = _mm_srai_epi32(reinterpret_cast<__m128i>(v), 16);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(words, words));
#else
  const Halves half = narrow(reinterpret_cast<Words>(v) >> 16);
  std::memcpy(p, &half, sizeof half);
#endif
}

// The first n elements, with zeros behind them; memory behind the n-th is not touched. Functions of their own: what
// happens once a row at most is not to fill loops.
#if !defined(__AVX512BW__)
template <class T>
__attribute__((noinline)) Vec get_first(const T* p, int64_t n) {
  T all[LANES] = {};
  n == 4 ? std::memcpy(all, p, 4 * sizeof(T)) : std::memcpy(all, p, n * sizeof(T));
  return get_floats(all);
}
template <class T>
__attribute__((noinline)) void put_first(T* p, Vec v, int64_t n) {
  T all[LANES];
  put_floats(all, v);
  n == 4 ? std::memcpy(p, all, 4 * sizeof(T)) : std::memcpy(p, all, n * sizeof(T));
}
#endif

// How a vector's elements are read and written: all of them,
struct Whole {
  template <class T>
  ALWAYS_INLINE Vec get(const T* p) const {
    return get_floats(p);
  }
  template <class T>
  ALWAYS_INLINE void put(T* p, Vec v) const {
    put_floats(p, v);
  }
  template <class T>
  ALWAYS_INLINE void put_integers(T* p, Vec v) const {
    SPIKELOOM_LEVEL::put_integers(p, v);
  }
};

// or the first n, with zeros behind them; memory behind the n-th is not touched.
struct Some {
  int64_t n;
#if defined(__AVX512BW__)
  __mmask16 mask() const { return static_cast<__mmask16>((1u << n) - 1); }
  Vec get(const float* p) const { return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(mask(), p)); }
  void put(float* p, Vec v) const { _mm512_mask_storeu_ps(p, mask(), reinterpret_cast<__m512>(v)); }
  Vec get(const bfloat16* p) const {
    const Halves bits = reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(mask(), p));
    return reinterpret_cast<Vec>(widen(bits) << 16);
  }
  void put(bfloat16* p, Vec v) const {
    bfloat16 all[LANES];
    put_floats(all, v);
    _mm256_mask_storeu_epi16(p, mask(), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(all)));
  }
#else
  template <class T>
  Vec get(const T* p) const {
    return n == LANES ? get_floats(p) : get_first(p, n);
  }
  template <class T>
  void put(T* p, Vec v) const {
    n == LANES ? put_floats(p, v) : put_first(p, v, n);
  }
#endif
  template <class T>
  void put_integers(T* p, Vec v) const {
    put(p, v);
  }
};

// Runs step(i, Whole or Some) for the vectors of n elements, and prefetches a piece of the listed rows before each
// piece of as many elements: issued all at once, prefetches would fill the core's miss buffers and stall it.
template <class T, class Step>
ALWAYS_INLINE inline void each_vector(int64_t n, const PrefetchList<T>& prefetch, const Step& step) {
  constexpr int64_t PIECE = 32;
  int64_t i = 0;
  for (; i + PIECE <= n; i += PIECE) {
    prefetch.issue(i, PIECE);
#pragma GCC unroll 1
    for (int64_t j = i; j < i + PIECE; j += 2 * LANES) step(j, Whole{}), step(j + LANES, Whole{});
  }
  prefetch.issue(i, n - i);
#pragma GCC unroll 1
  for (; i < n; i += LANES) step(i, Some{smaller(LANES, n - i)});
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
