// What the kernels of leaky integrators share.
#pragma once

#include "common/math.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

// Reads the constants and the state of a block.
inline void enter(const Leaky& a, int64_t i0, int64_t n, float* alpha, float* beta, float* syn, float* mem) {
  for (int64_t i = 0; i < n; i++) {
    alpha[i] = a.alpha[a.constant_stride * (i0 + i)];
    beta[i] = a.beta[a.constant_stride * (i0 + i)];
    syn[i] = a.state ? a.state[i0 + i] : 0.f;
    mem[i] = a.state ? a.state[a.size + i0 + i] : 0.f;
  }
}

template <class T>
inline void integrate(int64_t n, const T* x, const float* alpha, const float* beta, const float* syn0,
                      const float* mem0, float* syn1, float* mem1) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float s = alpha[i] * syn0[i] + load(x, i);
    syn1[i] = s;
    mem1[i] = beta[i] * mem0[i] + (1.f - beta[i]) * s;
  }
}

template <class T>
inline const T* step_of(const void* x, int64_t t, int64_t stride, int64_t i0) {
  return static_cast<const T*>(x) + t * stride + i0;
}

}  // namespace
}  // namespace spikeloom::SPIKELOOM_LEVEL
