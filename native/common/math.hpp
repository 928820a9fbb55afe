// Numbers: bfloat16 storage, surrogate derivatives, and functions that vectorise.
//
// Each kernel file is compiled once per instruction level. Nothing in these headers may be shared between levels (no
// inline functions of the standard library that a linker could merge), hence the unnamed namespaces and malloc.
#pragma once

#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

// For what runs once an element: a call that is left in such a loop keeps it from vectorising.
#define ALWAYS_INLINE __attribute__((always_inline))

namespace spikeloom::SPIKELOOM_LEVEL {
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

// While it lives, numbers below the normal ones become 0: a gradient that has decayed that far is nothing, but would
// cost a hundred cycles an operation.
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

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
