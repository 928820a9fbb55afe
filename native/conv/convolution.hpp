// What convolutions of channels-last images share: how weights and images lie, and which values are not zero.
#pragma once

#include "common/simd.hpp"
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Floats between rows that are used together: an odd number of cache lines, so that they spread over the cache.
inline int64_t padded_stride(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// Floor of the quotient; the divisor is positive.
inline int64_t floor_divide(int64_t n, int64_t unit) { return n >= 0 ? n / unit : -((-n + unit - 1) / unit); }

// Which of n <= 16 numbers are not zero, as bits.
inline uint32_t nonzeros(const float* x, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 valid = static_cast<__mmask16>((1u << n) - 1);
  return _mm512_mask_cmp_ps_mask(valid, _mm512_maskz_loadu_ps(valid, x), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
  uint32_t bits = 0;
#if defined(__AVX2__)
  if (n == 16) {
    const auto of_eight = [](const float* from) {
      return static_cast<uint32_t>(
          _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(from), _mm256_setzero_ps(), _CMP_NEQ_UQ)));
    };
    return of_eight(x) | of_eight(x + 8) << 8;
  }
#endif
  for (int64_t i = 0; i < n; i++) bits |= static_cast<uint32_t>(x[i] != 0.f) << i;
  return bits;
#endif
}
inline uint32_t nonzeros(const bfloat16* x, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 valid = static_cast<__mmask16>((1u << n) - 1);
  return _mm256_test_epi16_mask(_mm256_maskz_loadu_epi16(valid, x), _mm256_set1_epi16(0x7fff));
#else
  uint32_t bits = 0;
#if defined(__AVX2__)
  if (n == 16) {
    const __m256i magnitude =
        _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi16(0x7fff));
    const __m256i zero = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
    // Sixteen halves to sixteen bytes, in order.
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(zero), _mm256_extracti128_si256(zero, 1));
    return ~static_cast<uint32_t>(_mm_movemask_epi8(bytes)) & 0xffffu;
  }
#endif
  for (int64_t i = 0; i < n; i++) bits |= static_cast<uint32_t>((x[i].bits & 0x7fffu) != 0) << i;
  return bits;
#endif
}

// Whole vectors first: pixels are short.
template <class Body>
inline void in_sixteens(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
#pragma omp simd
    for (int64_t j = 0; j < 16; j++) body(i + j);
  }
  for (; i < n; i++) body(i);
}
template <class T>
inline void to_float(const T* from, int64_t n, float* to) {
  in_sixteens(n, [=](int64_t i) { to[i] = load(from, i); });
}
template <class T>
inline void from_float(const float* from, int64_t n, T* to) {
  in_sixteens(n, [=](int64_t i) { store(to, i, from[i]); });
}

// Where weight (out o, in c, row ky, column kx) lies.
inline int64_t place(const Convolution& a, int64_t o, int64_t c, int64_t ky, int64_t kx) {
  return o * a.weight_out + c * a.weight_in + ky * a.weight_row + kx * a.weight_column;
}

inline int64_t out_height(const Convolution& a) { return (a.height + 2 * a.padding - a.kernel_height) / a.stride + 1; }
inline int64_t out_width(const Convolution& a) { return (a.width + 2 * a.padding - a.kernel_width) / a.stride + 1; }

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
