// The first numbers of a vector, read and written: nothing behind them is touched.
#pragma once

#include "common/simd.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint8_t ByteVec __attribute__((vector_size(LANES)));

#if defined(__AVX512BW__)
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#else
[[maybe_unused]] __attribute__((noinline)) Vec get_first(const uint8_t* p, int64_t n) {
  ByteVec v{};
  n == 4 ? std::memcpy(&v, p, 4) : std::memcpy(&v, p, n);
  return __builtin_convertvector(v, Vec);
}
[[maybe_unused]] __attribute__((noinline)) void put_first(uint8_t* p, IntVec v, int64_t n) {
  const ByteVec bytes = __builtin_convertvector(v, ByteVec);
  n == 4 ? std::memcpy(p, &bytes, 4) : std::memcpy(p, &bytes, n);
}
#endif

// The first n values, zeros behind them. Nothing behind the n-th is touched.
inline Vec get_some(const float* p, int64_t n) {
  if (n == LANES) return get(p);
#if defined(__AVX512BW__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(first(n), p));
#else
  return get_first(p, n);
#endif
}
inline Vec get_some(const uint8_t* p, int64_t n) {
  if (n == LANES) return __builtin_convertvector(reinterpret_cast<IntVec>(get_bytes(p)), Vec);
#if defined(__AVX512BW__)
  const Words wide = reinterpret_cast<Words>(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
  return __builtin_convertvector(reinterpret_cast<IntVec>(wide), Vec);
#else
  return get_first(p, n);
#endif
}
inline void put_some(float* p, Vec v, int64_t n) {
#if defined(__AVX512BW__)
  if (n < LANES) return _mm512_mask_storeu_ps(p, first(n), reinterpret_cast<__m512>(v));
  put(p, v);
#else
  n == LANES ? put(p, v) : put_first(p, v, n);
#endif
}
inline void put_some(uint8_t* p, IntVec v, int64_t n) {
#if defined(__AVX512BW__)
  if (n < LANES) return _mm512_mask_cvtepi32_storeu_epi8(p, first(n), reinterpret_cast<__m512i>(v));
  put_bytes(p, reinterpret_cast<Words>(v));
#else
  n == LANES ? put_bytes(p, reinterpret_cast<Words>(v)) : put_first(p, v, n);
#endif
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
